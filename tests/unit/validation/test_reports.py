"""SARIF and JUnit: what their schemas ask for holds for every kind of result."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from mortice.core.errors import ModelFileError, PluginError, UnknownArchitectureError
from mortice.core.model.findings import Finding, Findings, Severity
from mortice.core.validation.junit import junit_xml
from mortice.core.validation.results import DataRead, ModelResult
from mortice.core.validation.rules import RULES, STEPS, describe_rule, step_of
from mortice.core.validation.sarif import sarif_log

ROOT = Path(__file__).resolve().parents[3]


def finding(rule: str, severity: Severity = "error", subject: str = "x", offset: int | None = None) -> Finding:
    return Finding(
        rule=rule, severity=severity, subject=subject, found="it's <f> \x1b\x00", wanted="w & ü", offset=offset
    )


MISSING = [finding("role.missing", subject=f"blk.{layer}.attn_q.weight") for layer in range(30)]
RESULTS = [
    ModelResult(path=Path("good.gguf"), contract="llama", data=DataRead(10, 0.5), seconds=1.0),
    ModelResult(
        path=Path("a b/bad.gguf"),
        contract="llama",
        findings=Findings(
            [*MISSING, finding("key.unread", "warning", "k", 40), finding("template.suspicious", "warning")]
        ),
    ),
    ModelResult(path=Path("notes.gguf"), contract="llama", findings=Findings([finding("tensor.ignored", "note")])),
    ModelResult(path=Path("cut.gguf"), error=ModelFileError(Path("cut.gguf"), "truncated", 99)),
    ModelResult(path=Path("/else/new.gguf"), error=UnknownArchitectureError("unknown architecture 'x'")),
    ModelResult(path=Path("p.gguf"), error=PluginError("plugin acme (acme 1.0): boo")),
]


def sarif(**options: Any) -> dict[str, Any]:
    """The run of the log, as a reader gets it, held against the parts of the SARIF 2.1.0 schema that it uses."""
    log: dict[str, Any] = json.loads(json.dumps(sarif_log(RESULTS, **options)))
    assert log["version"] == "2.1.0"
    assert log["$schema"].startswith("https://")
    assert log.keys() == {"version", "$schema", "runs"}
    run: dict[str, Any]
    (run,) = log["runs"]
    assert run.keys() <= {"tool", "results", "columnKind"}
    assert run["columnKind"] in ("utf16CodeUnits", "unicodeCodePoints")
    driver = run["tool"]["driver"]
    assert driver["name"] == "mortice"
    assert isinstance(driver["version"], str)
    ids = [rule["id"] for rule in driver["rules"]]
    assert len(ids) == len(set(ids))
    for rule in driver["rules"]:
        assert rule.keys() <= {"id", "shortDescription", "fullDescription", "help", "properties"}
        assert rule["shortDescription"]["text"]
        assert all(isinstance(tag, str) for tag in rule["properties"]["tags"])
    for result in run["results"]:
        assert result.keys() <= {"ruleId", "ruleIndex", "level", "message", "locations", "partialFingerprints"}
        assert ids[result["ruleIndex"]] == result["ruleId"]
        assert result["level"] in ("none", "note", "warning", "error")
        assert result["message"]["text"]
        (location,) = result["locations"]
        physical = location["physicalLocation"]
        assert re.fullmatch(r"[A-Za-z0-9%/._~:-]+", physical["artifactLocation"]["uri"])
        assert physical["region"]["startLine"] >= 1
        assert physical["region"].get("byteOffset", 0) >= 0
        assert all(logical["name"] for logical in location["logicalLocations"])
        assert all(isinstance(value, str) for value in result["partialFingerprints"].values())
    return run


def test_a_run_is_sarif_by_its_schema() -> None:
    run = sarif()
    assert [result["ruleId"] for result in run["results"]] == [
        "role.missing",
        "key.unread",
        "template.suspicious",
        "tensor.ignored",
        "file.refused",
        "file.architecture",
        "plugin.failed",
    ]


def test_findings_of_all_layers_are_one_result_with_the_byte_offset_of_the_first() -> None:
    missing, unread, *_ = sarif()["results"]
    assert missing["message"]["text"].startswith("blk.{0..29}.attn_q.weight: ")
    assert unread["locations"][0]["physicalLocation"]["region"] == {"startLine": 1, "byteOffset": 40}


def test_uris_are_relative_below_the_base_and_escaped(tmp_path: Path) -> None:
    uris = [result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] for result in sarif()["results"]]
    assert uris[0] == "a%20b/bad.gguf"
    assert uris[5] == "file:///else/new.gguf"
    below = ModelResult(path=tmp_path / "m.gguf", error=PluginError("boo"))
    (result,) = sarif_log([below], base=tmp_path)["runs"][0]["results"]
    assert result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] == "m.gguf"


def test_a_strict_run_makes_warnings_errors_and_leaves_notes() -> None:
    levels = {result["ruleId"]: result["level"] for result in sarif(strict=True)["results"]}
    assert (levels["key.unread"], levels["tensor.ignored"]) == ("error", "note")
    assert {result["ruleId"]: result["level"] for result in sarif()["results"]}["key.unread"] == "warning"


def test_fingerprints_tell_results_apart_and_stay() -> None:
    prints = [result["partialFingerprints"]["morticeFinding/v1"] for result in sarif()["results"]]
    assert len(prints) == len(set(prints))
    assert prints == [result["partialFingerprints"]["morticeFinding/v1"] for result in sarif()["results"]]


# JUnit -----------------------------------------------------------------------------------------------------------

_ATTRIBUTES = {
    "testsuites": {"name", "tests", "failures", "errors", "time"},
    "testsuite": {"name", "tests", "failures", "errors", "skipped", "time"},
    "testcase": {"name", "classname", "time"},
    "failure": {"type", "message"},
    "error": {"type", "message"},
    "skipped": {"message"},
    "system-out": set(),
}
_CHILDREN = {
    "testsuites": {"testsuite"},
    "testsuite": {"testcase"},
    "testcase": {"failure", "error", "skipped", "system-out"},
}


def junit(**options: Any) -> ET.Element:
    """The document, parsed and held against ``junit-10.xsd``."""
    root = ET.fromstring(junit_xml(RESULTS, **options))
    assert root.tag == "testsuites"
    for element in root.iter():
        assert element.attrib.keys() <= _ATTRIBUTES[element.tag]
        assert {child.tag for child in element} <= _CHILDREN.get(element.tag, set())
        if element.tag in ("testsuite", "testcase"):
            assert element.get("name")
            assert float(element.get("time", "")) >= 0
    for suite in root:
        assert int(suite.get("tests", "")) == len(suite)
        for count, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
            assert int(suite.get(count, "")) == sum(case.find(tag) is not None for case in suite)
    return root


def case(root: ET.Element, model: int, step: str) -> ET.Element:
    return next(case for case in root[model] if str(case.get("name")).endswith(f": {step}"))


def test_a_run_is_junit_by_its_schema_with_a_case_for_each_step() -> None:
    root = junit()
    assert [len(suite) for suite in root] == [len(STEPS)] * len(RESULTS)
    assert (root.get("failures"), root.get("errors")) == ("2", "2")


def test_a_finding_fails_the_case_of_its_step() -> None:
    failure = case(junit(), 1, "fits its contract").find("failure")
    assert failure is not None
    assert "role.missing: blk.{0..29}.attn_q.weight" in str(failure.text)
    assert failure.get("type") == "role.missing"


def test_warnings_are_output_unless_the_run_is_strict() -> None:
    relaxed, strict = (case(junit(strict=strict), 1, "chat template") for strict in (False, True))
    assert relaxed.find("failure") is None
    assert "template.suspicious" in str(relaxed.findtext("system-out"))
    assert strict.find("failure") is not None


def test_a_file_that_does_not_open_is_an_error_and_its_other_steps_are_skipped() -> None:
    root = junit()
    assert case(root, 3, "opens").find("error") is not None
    assert [step.find("skipped") is not None for step in root[3]][1:] == [True] * 4
    assert [skipped.get("message") for skipped in root[3].iter("skipped")] == ["not reached"] * 4


def test_the_data_step_is_skipped_unless_data_were_read() -> None:
    root = junit()
    assert case(root, 0, "tensor data").find("skipped") is None
    assert case(root, 0, "tensor data").get("time") == "0.500"
    assert case(root, 2, "tensor data").find("skipped") is not None


# rules -----------------------------------------------------------------------------------------------------------


def rules_in_the_code() -> set[str]:
    """Every literal id of a rule."""
    folders = (ROOT / "core" / "model", ROOT / "core" / "validation")
    text = "".join(path.read_text() for folder in folders for path in sorted(folder.glob("*.py")))
    found = set(re.findall(r"rule=\"([a-z_.]+)\"|report(?:_tensor)?\(\s*\"([a-z_]+\.[a-z_]+)\"", text))
    return {rule for pair in found for rule in pair if rule} | set(re.findall(r'"(data\.[a-z_]+)"', text))


def test_every_rule_of_the_code_is_described_in_the_code_and_in_the_docs() -> None:
    rules = rules_in_the_code()
    assert {"role.missing", "data.not_finite", "key.unread"} <= rules
    assert [rule for rule in sorted(rules) if describe_rule(rule) == "A rule of a plugin."] == []
    page = (ROOT / "docs" / "how-to" / "validate-before-deployment.md").read_text()
    assert [rule for rule in RULES if f"`{rule}`" not in page] == []


@pytest.mark.parametrize(
    ("rule", "step"),
    [
        ("file.refused", "opens"),
        ("file.architecture", "fits its contract"),
        ("acme.license", "fits its contract"),
        ("tokenizer.pre", "tokenizer"),
        ("template.fails", "chat template"),
        ("data.range", "tensor data"),
    ],
)
def test_a_rule_belongs_to_a_step(rule: str, step: str) -> None:
    assert step_of(rule) == step


def test_a_plugins_rule_is_called_that() -> None:
    assert describe_rule("acme.license") == "A rule of a plugin."
