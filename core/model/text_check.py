"""What a file says about its vocabulary, checked without building a tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mortice.core.counts import counted
from mortice.core.errors import TokenizerError
from mortice.core.model.findings import Finding, Severity
from mortice.core.model.types import ModelFile
from mortice.core.text.encoders import check_encodable
from mortice.core.text.vocabulary import Vocabulary

__all__ = ["tokenizer_findings"]

_TOKENS = "tokenizer.ggml.tokens"
_FOUND_CHARS = 300
"""Texts from the file stand in messages; a hostile one has megabytes."""


def tokenizer_findings(file: ModelFile) -> list[Finding]:
    """Whether a tokenizer can be built: sizes and ids first, and where these are right all else, up to one fault."""
    tokens = file.metadata.get(_TOKENS)
    if tokens is None:
        return [
            _finding(file, "tokenizer.missing", _TOKENS, "missing", "only token ids can be used, no text", "warning")
        ]
    if not isinstance(tokens, Sequence) or isinstance(tokens, str):
        return [_finding(file, "tokenizer.type", _TOKENS, type(tokens).__name__, "wanted an array of strings")]
    found = list(_sizes_and_ids(file, len(tokens)))
    if found:
        return found
    try:
        check_encodable(Vocabulary.of(file))
    except TokenizerError as error:
        subject, _, text = str(error).partition(": ")
        return [_finding(file, f"tokenizer.{subject.rpartition('.')[2]}", subject, *_parts(text))]
    return []


def _sizes_and_ids(file: ModelFile, count: int) -> Iterator[Finding]:
    for name in ("token_type", "scores"):
        key = f"tokenizer.ggml.{name}"
        values = file.metadata.get(key)
        if values is not None and (not hasattr(values, "__len__") or len(values) != count):
            found = counted(len(values), "entry", "entries") if hasattr(values, "__len__") else type(values).__name__
            yield _finding(file, "tokenizer.length", key, found, f"wanted one for each of {counted(count, 'token')}")
    for name in ("bos", "eos", "eot", "eom", "unknown", "padding"):
        key = f"tokenizer.ggml.{name}_token_id"
        value = file.metadata.get(key)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < count):
            yield _finding(file, "tokenizer.id", key, repr(value), f"wanted a token id below {count}")


def _parts(text: str) -> tuple[str, str]:
    """An error's text as what was found and what was wanted."""
    for mark, lead in ((", wanted ", "wanted "), ("; ", "")):
        found, _, wanted = text.partition(mark)
        if wanted:
            return found[:_FOUND_CHARS], lead + wanted
    return text[:_FOUND_CHARS], "no tokenizer can be built from it"


def _finding(
    file: ModelFile, rule: str, subject: str, found: str, wanted: str, severity: Severity = "error"
) -> Finding:
    offset = file.metadata_offsets.get(subject)
    return Finding(rule=rule, severity=severity, subject=subject, found=found, wanted=wanted, offset=offset)
