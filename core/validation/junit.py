"""Results as JUnit XML, the form that most CI systems show: a suite for each model, a case for each step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from xml.etree import ElementTree as ET

from mortice.core.counts import counted
from mortice.core.model.findings import Finding, join_layers
from mortice.core.validation.results import ModelResult
from mortice.core.validation.rules import STEPS, step_of

__all__ = ["junit_xml"]


def junit_xml(results: Iterable[ModelResult], *, strict: bool = False) -> str:
    """The document, with an XML declaration; the schema is that of Jenkins' xUnit plugin (``junit-10.xsd``).

    Errors fail the case of their step; warnings do where `strict`, and stand in its output where not, as notes always
    do. A step that was not reached, or not asked for, is skipped.
    """
    root = ET.Element("testsuites", name="mortice validate")
    for result in results:
        root.append(_suite(result, strict=strict))
    for count in ("tests", "failures", "errors"):
        root.set(count, str(sum(int(suite.get(count, "0")) for suite in root)))
    root.set("time", _seconds(sum(float(suite.get("time", "0")) for suite in root)))
    ET.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def _suite(result: ModelResult, *, strict: bool) -> ET.Element:
    suite = ET.Element("testsuite", name=_clean(str(result.path)))
    by_step: dict[str, list[Finding]] = {step: [] for step in STEPS}
    for finding in result.everything():
        by_step[step_of(finding.rule)].append(finding)
    for step, findings in by_step.items():
        suite.append(_case(result, step, findings, strict=strict))
    suite.set("tests", str(len(suite)))
    for count, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
        suite.set(count, str(sum(case.find(tag) is not None for case in suite)))
    suite.set("time", _seconds(result.seconds))
    return suite


def _case(result: ModelResult, step: str, findings: Sequence[Finding], *, strict: bool) -> ET.Element:
    case = ET.Element("testcase", classname="mortice.validate", name=f"{_clean(str(result.path))}: {step}")
    seconds = result.data.seconds if step == "tensor data" and result.data is not None else 0.0
    case.set("time", _seconds(seconds))
    failing = [finding for finding in findings if finding.severity == "error" or (strict and _warns(finding))]
    if failing:
        tag = "error" if step == "opens" else "failure"
        count = counted(len(failing), "finding")
        failure = ET.SubElement(case, tag, type=_clean(failing[0].rule), message=_clean(f"{count}; {failing[0]}"))
        failure.text = _lines(failing)
    elif not findings and (reason := _not_reached(result, step)):
        ET.SubElement(case, "skipped", message=reason)
    others = [finding for finding in findings if finding not in failing]
    if others:
        ET.SubElement(case, "system-out").text = _lines(others)
    return case


def _warns(finding: Finding) -> bool:
    return finding.severity == "warning"


def _not_reached(result: ModelResult, step: str) -> str:
    if result.error is not None and result.contract is None and step != "opens":
        return "not reached"
    if step == "tensor data" and result.data is None:
        return "not asked for; --deep reads tensor data"
    return ""


def _lines(findings: Iterable[Finding]) -> str:
    """One line for findings that differ in the layer only."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for finding in findings:
        key = (finding.severity, finding.rule, finding.found, finding.wanted)
        groups.setdefault(key, []).append(finding.subject)
    return "\n".join(
        _clean(f"{severity} {rule}: {', '.join(join_layers(subjects))}: {found}; {wanted}")
        for (severity, rule, found, wanted), subjects in groups.items()
    )


def _seconds(value: float) -> str:
    return f"{value:.3f}"


def _clean(text: str) -> str:
    """Text with everything escaped that XML cannot hold (control characters, lone surrogates)."""
    return "".join(
        char if char in "\t\n" or (char.isprintable() and not 0xD800 <= ord(char) < 0xE000) else _escape(char)
        for char in text
    )


def _escape(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")
