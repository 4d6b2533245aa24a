"""What validation says about tokenizer and chat template: all that would be refused later, before anything is built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mortice.core.model.findings import Finding
from mortice.core.model.template_check import template_findings
from mortice.core.model.text_check import tokenizer_findings
from mortice.core.model.types import ModelFile
from mortice.core.stages import validate_file
from mortice.core.testing.tiny_models import write_tiny_model
from mortice.core.text.template_process import TemplateLimits
from tests.support.in_memory import model_file
from tests.support.tiny import CONTRACTS
from tests.support.vocab import byte_level_metadata, smollm2_file, spm_metadata, vocab_files

REAL = [file for file in (smollm2_file(), *vocab_files()) if file is not None]


def file_with(metadata: dict[str, Any], **keys: Any) -> ModelFile:
    changed = {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
    return model_file({key: value for key, value in (metadata | changed).items() if value is not None}, {})


def only(file: ModelFile) -> Finding:
    (finding,) = tokenizer_findings(file)
    assert finding.offset == file.metadata_offsets.get(finding.subject)
    return finding


@pytest.mark.parametrize("metadata", [byte_level_metadata(), spm_metadata(["▁", "a"])], ids=["bpe", "spm"])
def test_a_good_vocabulary_has_no_findings(metadata: dict[str, Any]) -> None:
    assert tokenizer_findings(file_with(metadata)) == []


@pytest.mark.parametrize(
    ("keys", "rule", "said"),
    [
        ({"pre": "none-such"}, "tokenizer.pre", "unknown pre-tokenizer 'none-such'; known: "),
        ({"pre": None}, "tokenizer.pre", "missing"),
        ({"model": "none-such"}, "tokenizer.model", "'none-such' is not supported; have "),
        ({"model": None}, "tokenizer.model", "missing; wanted a string"),
        ({"merges": None}, "tokenizer.merges", "missing; wanted an array of strings"),
        ({"merges": ["he llo"]}, "tokenizer.merges", "entry 0 ('he' + 'llo') needs 'llo', which is no token"),
        ({"merges": ["hello"]}, "tokenizer.merges", "entry 0 is 'hello'; wanted two tokens"),
        ({"tokens": [["a"]] * 264}, "tokenizer.tokens", "array of list found; wanted an array of strings"),
        ({"tokens": ["a"] * 264}, "tokenizer.tokens", "'a' is both token 0 and token 1"),
        ({"token_type": np.full(264, 9, np.int32)}, "tokenizer.token_type", "9 for token 0; wanted 0 to 6"),
        ({"add_bos_token": True}, "tokenizer.add_bos_token", "the file names no such token"),
    ],
)
def test_a_tokenizer_that_cannot_be_built_is_an_error(keys: dict[str, Any], rule: str, said: str) -> None:
    finding = only(file_with(byte_level_metadata(), **keys))
    assert (finding.rule, finding.severity, finding.subject) == (rule, "error", f"tokenizer.ggml.{rule[10:]}")
    assert said in str(finding)


def test_a_table_that_is_too_long_is_not_shown_whole() -> None:
    finding = only(file_with(byte_level_metadata(), merges=["x" * 100_000]))
    assert len(str(finding)) < 1000


def test_lengths_are_reported_before_the_vocabulary_is_read() -> None:
    finding = only(file_with(byte_level_metadata(), token_type=np.ones(3, np.int32), pre="none-such"))
    assert (finding.rule, finding.found, finding.wanted) == (
        "tokenizer.length",
        "3 entries",
        "wanted one for each of 264 tokens",
    )


@pytest.mark.skipif(not REAL, reason="no vocabularies here")
@pytest.mark.parametrize("path", REAL, ids=lambda path: path.stem)
def test_real_vocabularies_have_no_findings(path: Path) -> None:
    rules = {item.rule.partition(".")[0] for item in validate_file(path).findings.items}
    assert not rules & {"tokenizer", "template"}


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{% if %}", "line 1: "),
        ("{{ 1 | no_such_filter }}", "no_such_filter"),
        ("x" * 3000, "3000 characters, wanted at most 2000"),
        ("{{ " + "(" * 1900 + " }}", ""),
        (7, "int; wanted a string"),
    ],
)
def test_a_template_that_does_not_compile_is_a_warning(source: object, said: str) -> None:
    file = model_file({"tokenizer.chat_template": source}, {})
    (finding,) = template_findings(file, TemplateLimits(source_chars=2000))
    assert (finding.severity, finding.subject, finding.offset) == ("warning", "tokenizer.chat_template", 24)
    assert said in str(finding)


def test_a_good_template_and_none_have_no_findings() -> None:
    assert template_findings(model_file({}, {})) == []
    good = (
        "{% generation %}{% for m in messages %}{% if not m.role %}{{ raise_exception('') }}{% break %}{% endif %}"
        "{{ m.content }}{% endfor %}{% if add_generation_prompt %}:{% endif %}{% endgeneration %}"
    )
    assert template_findings(model_file({"tokenizer.chat_template": good}, {})) == []


def test_a_file_is_validated_with_its_template_and_goes_on_without_it(tmp_path: Path) -> None:
    metadata = {"tokenizer.chat_template": "{% if %}"}
    report = validate_file(write_tiny_model(tmp_path / "m.gguf", CONTRACTS["llama"], metadata=metadata))
    assert [item.rule for item in report.findings.items] == ["template.broken"]
    assert report.ok
