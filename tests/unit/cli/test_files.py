"""``mortice validate``, ``inspect``, ``tokenize`` and ``fit``: all that looks at a file and runs nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

import mortice as package
from mortice.core.cli.findings import finding_rows
from mortice.core.cli.render import size_text
from mortice.core.model.findings import Finding
from mortice.core.model.types import ModelFile
from mortice.core.plugin.registry import make_registry
from mortice.core.testing.gguf_files import TensorData, write_gguf
from mortice.core.testing.tiny_models import write_tiny_model
from tests.support.models import smollm2_path
from tests.unit.cli.conftest import Mortice


def rewritten(
    source: Path, target: Path, *, drop: Sequence[str] = (), metadata: Mapping[str, Any] | None = None
) -> Path:
    """A copy of a model without the tensors in `drop` and with other metadata."""
    with make_registry().open_model(source) as file:
        keys = {**file.metadata, **(metadata or {})}
        tensors = [
            TensorData(name=tensor.name, shape=tensor.shape, qtype=tensor.qtype, data=tensor.data.copy())
            for tensor in file.tensors.values()
            if tensor.name not in drop
        ]
    return write_gguf(target, str(keys["general.architecture"]), keys, tensors)


@pytest.fixture
def without_norms(tiny: Path, tmp_path: Path) -> Path:
    """A model that lacks a norm in both layers."""
    return rewritten(tiny, tmp_path / "no-norms.gguf", drop=[f"blk.{i}.ffn_norm.weight" for i in range(2)])


@pytest.fixture
def unknown(tiny: Path, tmp_path: Path) -> Path:
    """A model of an architecture nobody knows."""
    return rewritten(tiny, tmp_path / "unknown.gguf", metadata={"general.architecture": "lama"})


# validate


def test_a_valid_file_is_said_to_be(mortice: Mortice, tiny: Path) -> None:
    ran = mortice("validate", tiny)
    assert ran.code == 0
    assert ran.out.startswith(f"{tiny}: valid against contract llama, no findings\n")


def test_findings_of_all_layers_stand_in_one_line(mortice: Mortice, without_norms: Path) -> None:
    ran = mortice("validate", without_norms)
    assert ran.code == 2
    lines = [line for line in ran.out.splitlines() if "role.missing" in line]
    assert len(lines) == 1
    assert "blk.{0..1}.ffn_norm.weight" in lines[0]


def test_json_has_every_finding(mortice: Mortice, without_norms: Path) -> None:
    ran = mortice("validate", without_norms, "--json")
    (found,) = ran.json
    assert ran.code == 2
    assert [finding["subject"] for finding in found["findings"] if finding["rule"] == "role.missing"] == [
        "blk.0.ffn_norm.weight",
        "blk.1.ffn_norm.weight",
    ]
    assert found["findings"] == [finding.as_dict() for finding in package.validate(without_norms).findings.items]


def test_validation_goes_on_after_a_broken_file(mortice: Mortice, tiny: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(tiny.read_bytes()[:1000])
    ran = mortice("validate", broken, tmp_path / "none.gguf", tiny, "--json")
    assert ran.code == 2
    assert [found["ok"] for found in ran.json] == [False, False, True]
    assert "no such file" in ran.json[1]["error"]["message"]
    assert "valid against contract llama" in mortice("validate", broken, tiny).out


def test_a_contract_of_ones_own_serves_an_unknown_architecture(mortice: Mortice, unknown: Path, tmp_path: Path) -> None:
    refused = mortice("validate", unknown)
    assert refused.code == 2
    assert "nearest are llama" in refused.out
    contract = Path(__file__).parents[3] / "arch_contracts" / "llama.toml"
    own = tmp_path / "lama.toml"
    own.write_text(contract.read_text())
    found = mortice("validate", unknown, "--contract", own, "--json").json[0]
    assert found["contract"] == "llama"


def test_a_run_of_an_invalid_file_summarises_its_findings(mortice: Mortice, without_norms: Path) -> None:
    ran = mortice("run", "-m", without_norms, "-p", "a")
    assert ran.code == 2
    assert "blk.{0..1}.ffn_norm.weight" in ran.err
    assert ran.err.splitlines()[-1] == f"mortice: error: {without_norms}: 2 errors against contract llama"


def test_gaps_between_layers_are_shown() -> None:
    findings = [
        Finding(rule="r", severity="error", subject=f"blk.{i}.x.weight", found="f", wanted="w") for i in (0, 1, 2, 5, 7)
    ]
    assert [row[2] for row in finding_rows(findings)] == ["blk.{0..2,5,7}.x.weight"]


def test_findings_that_differ_in_more_than_the_layer_stay_apart() -> None:
    findings = [
        Finding(rule="r", severity="error", subject="blk.0.x.weight", found="shape (1)", wanted="w", offset=8),
        Finding(rule="r", severity="error", subject="blk.1.x.weight", found="shape (2)", wanted="w", plugin="acme"),
    ]
    rows = finding_rows(findings)
    assert [row[2] for row in rows] == ["blk.0.x.weight (byte 8)", "blk.1.x.weight"]
    assert rows[1][4] == "w [plugin acme]"


# inspect


def test_inspect_shows_metadata_tensors_types_and_program(mortice: Mortice, tiny: Path) -> None:
    out = mortice("inspect", tiny).out
    for part in ("general.architecture", "blk.1.attn_q.weight", "bits per weight", "operators:", "contract llama"):
        assert part in out


def test_inspect_as_json_adds_up(mortice: Mortice, tiny: Path) -> None:
    found = mortice("inspect", tiny, "--json").json
    assert sum(tensor["bytes"] for tensor in found["tensors"]) == found["tensor_bytes"]
    assert sum(row["elements"] for row in found["types"]) == found["parameters"]
    assert found["bits_per_weight"] == pytest.approx(8 * found["tensor_bytes"] / found["parameters"])
    assert found["program"]["operators"]["attention"] == 2
    tokens = found["metadata"]["tokenizer.ggml.tokens"]
    assert (len(tokens["first"]), tokens["array"]) == (4, found["program"]["vocab_size"])
    assert (found["loader"], found["contract_plugin"]) == ("loaders-gguf", "archs")


def test_inspect_works_where_no_contract_does(mortice: Mortice, unknown: Path, without_norms: Path) -> None:
    ran = mortice("inspect", unknown)
    assert ran.code == 0
    assert "blk.1.attn_q.weight" in ran.out
    assert "unknown architecture 'lama'" in ran.out
    found = mortice("inspect", without_norms, "--json").json
    assert (found["valid"], found["program"]) == (False, None)


def test_control_characters_of_a_file_do_not_reach_the_terminal(mortice: Mortice, tiny: Path, tmp_path: Path) -> None:
    hostile = rewritten(tiny, tmp_path / "h.gguf", metadata={"general.name": "a\x1b]0;pwned\x07\nb"})
    out = mortice("inspect", hostile).out
    assert "\x1b" not in out
    assert r"a\x1b]0;pwned\x07\nb" in out


# tokenize


def test_tokenize_gives_the_ids_of_the_python_api(mortice: Mortice) -> None:
    path = smollm2_path()
    text = "<|im_start|>Grüße,\n  world 123"
    found = mortice("tokenize", path, text, "--json").json
    with package.prepare(package.RunConfig(model=package.RunConfig().model.__class__(path=path))) as pipe:
        assert found["ids"] == pipe.encode(text)
    assert found["count"] == len(found["ids"]) == len(found["pieces"])
    assert mortice("tokenize", path, "-", "--json", stdin=text.encode()).json == found


def test_a_text_to_tokenize_that_is_no_utf_8_is_named_by_byte(mortice: Mortice, tiny: Path) -> None:
    ran = mortice("tokenize", tiny, "ü\udcff")
    assert (ran.code, ran.err) == (2, "mortice: error: text: not UTF-8 at byte 2\n")


def test_standard_input_is_tokenized_exactly_as_it_is(mortice: Mortice, tiny: Path) -> None:
    ids = mortice("tokenize", tiny, "-", "--json", stdin=b"a\n").json["ids"]
    assert ids == mortice("tokenize", tiny, "a\n", "--json").json["ids"]
    assert ids != mortice("tokenize", tiny, "a", "--json").json["ids"]


def test_control_tokens_can_be_read_as_plain_text(mortice: Mortice) -> None:
    path = smollm2_path()
    assert mortice("tokenize", path, "<|im_start|>", "--json").json["count"] == 1
    assert mortice("tokenize", path, "<|im_start|>", "--no-special", "--json").json["count"] > 1


def test_text_that_looks_like_a_flag_stands_behind_two_dashes(mortice: Mortice, tiny: Path) -> None:
    assert mortice("tokenize", tiny, "--json", "--", "--json").json["count"] > 0


# fit


@pytest.fixture
def tiny_heads_of_32(tmp_path: Path) -> Path:
    """A llama whose heads can be kept in blocks of 32."""
    contract = make_registry().contracts["llama"].value
    return write_tiny_model(tmp_path / "heads.gguf", contract, sizes={"hidden_size": 128})


def test_fit_says_what_is_needed_and_the_largest_context(mortice: Mortice, tiny: Path) -> None:
    ran = mortice("fit", tiny, "--context", 128)
    assert ran.code == 0
    assert "KV cache, 128 tokens" in ran.out
    assert "largest context that fits: 512 of the model's 512 tokens" in ran.out


def test_fit_says_that_no_kv_cache_fits_the_context_where_a_shorter_one_would(mortice: Mortice, tiny: Path) -> None:
    least = mortice("fit", tiny, "--context", 64, "--json").json
    mib = -(-least["total_bytes"] >> 20)
    ran = mortice("fit", tiny, "--context", 512, "--memory-mib", max(mib, 1))
    assert ran.code == 2
    assert "largest KV cache that fits: none for a context of 512 tokens" in ran.out


def test_fit_says_that_the_reference_stores_every_kv_type_as_float32(mortice: Mortice, tiny_heads_of_32: Path) -> None:
    sizes = {}
    for kv in ("auto", "f32", "f16", "q8_0"):
        asked = ("fit", tiny_heads_of_32, "--executor", "reference", "--context", 128, "--kv", kv)
        sizes[kv] = mortice(*asked, "--json").json["kv_bytes"]
        lines = [line for line in mortice(*asked).out.splitlines() if line.startswith("KV cache in ")]
        share = {"f16": 1 / 2, "q8_0": 34 / 128}.get(kv)
        assert len(lines) == (share is not None)
        if share is not None:
            stored = size_text(int(sizes["f32"] * share))
            why = "executor reference rounds to it and stores wider values"
            assert lines == [f"KV cache in {kv}: {why}; stored in {kv} it is {stored}"]
    assert len(set(sizes.values())) == 1


def test_fit_counts_the_tokens_of_all_sequences(mortice: Mortice, tiny: Path) -> None:
    one, many = (mortice("fit", tiny, "--context", 128, "--kv-tokens", count, "--json").json for count in (0, 4096))
    assert (one["kv_tokens"], many["kv_tokens"]) == (128, 4096)
    assert many["kv_bytes"] == 32 * one["kv_bytes"]
    asked = ("--context", 128, "--memory-mib", 64)
    largest = mortice("fit", tiny, *asked, "--json").json["largest_kv_tokens"]
    codes = [mortice("fit", tiny, *asked, "--kv-tokens", count).code for count in (largest, 2 * largest)]
    assert codes == [0, 2]
    text = f"largest KV cache that fits: {largest} tokens of all sequences together"
    assert text in mortice("fit", tiny, *asked).out


def test_fit_as_json_adds_up(mortice: Mortice, tiny: Path) -> None:
    found = mortice("fit", tiny, "--context", 128, "--json").json
    assert found["total_bytes"] == found["weight_bytes"] + found["kv_bytes"] + found["workspace_bytes"]
    assert found["fits"] is True
    assert found["context_length"] == 128


def test_what_does_not_fit_has_a_report_and_exit_code_2(mortice: Mortice, tiny: Path) -> None:
    asked = ("fit", tiny, "--executor", "reference", "--memory-mib", 1)
    ran = mortice(*asked, "--json")
    assert (ran.code, ran.json["fits"]) == (2, False)
    told = re.search(r"^does not fit: limits\.memory_mib would have to be (\d+)", mortice(*asked).out, re.MULTILINE)
    assert told is not None
    assert mortice("fit", tiny, "--executor", "reference", "--memory-mib", told[1]).code == 0


def test_the_largest_context_is_that_of_the_smallest_layouts(mortice: Mortice) -> None:
    """Half the memory that the expanded weights take still holds a context over weights as they are in the file."""
    found = mortice("fit", smollm2_path(), "--context", 8192, "--memory-mib", 300, "--json").json
    assert found["fits"] is False
    assert 0 < found["largest_context"] < 8192
    again = mortice("fit", smollm2_path(), "--context", found["largest_context"], "--memory-mib", 300)
    assert again.code == 0


def test_fit_allocates_nothing(mortice: Mortice, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    executor = type(make_registry().executors["reference"].value)

    def refuse(self: object, nbytes: int) -> None:
        raise AssertionError("allocated")

    monkeypatch.setattr(executor, "allocate", refuse)
    assert mortice("fit", tiny).code == 0
    assert mortice("run", "-m", tiny, "-p", "a", "-q").code == 1, "the trap works"


def test_a_context_beyond_the_models_is_refused(mortice: Mortice, tiny: Path) -> None:
    ran = mortice("fit", tiny, "--context", 513, "--json")
    assert ran.code == 2
    assert "the model was made for at most 512" in ran.json["error"]["message"]


def test_files_are_closed_after_every_command(
    mortice: Mortice, tiny: Path, without_norms: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[Path] = []
    close = ModelFile.close

    def remember(self: ModelFile) -> None:
        closed.append(self.path)
        close(self)

    monkeypatch.setattr(ModelFile, "close", remember)
    for command in (
        ["validate", tiny],
        ["inspect", tiny],
        ["fit", tiny],
        ["tokenize", tiny, "a"],
        ["fit", without_norms],
    ):
        closed.clear()
        mortice(*command)
        assert closed, command


def test_an_error_is_json_where_json_is_wanted(mortice: Mortice, tmp_path: Path) -> None:
    ran = mortice("inspect", tmp_path / "none.gguf", "--json")
    assert ran.code == 2
    error = json.loads(ran.out)["error"]
    assert (error["type"], error["exit_code"]) == ("ModelFileError", 2)
    assert ran.err == f"mortice: error: {error['message']}\n"
