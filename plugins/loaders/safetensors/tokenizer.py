"""``tokenizer.json`` as the ``tokenizer.ggml.*`` keys a GGUF file of the same model would have.

Read are byte-level BPE (Llama 3, Qwen, SmolLM) and SentencePiece BPE with byte fallback (Llama 2). Which pre-tokenizer
a file asks for is told by its expressions, not by its name: they have to be those of one that
`mortice.core.text.pretokenizers` has. A normaliser to NFC is left out, as llama.cpp leaves it out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from attrs import define, field

from mortice.core.model.types import MetadataValue
from mortice.core.text.pretokenizers import PRE_TOKENIZERS
from mortice.core.text.vocabulary import PREFIX, TokenType
from mortice.plugins.loaders.safetensors.config import MAX_VOCABULARY
from mortice.plugins.loaders.safetensors.files import Json, quoted

__all__ = ["TokenizerJson", "read_tokenizer"]

_SPACE = "▁"
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
# Hugging Face's way to write what the expressions here write with both cases of each letter.
_ANY_CASE = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_BOTH_CASES = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_PARTS = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers"}
_GPT2 = PRE_TOKENIZERS["gpt-2"].patterns


@define(eq=False)
class TokenizerJson:
    """What ``tokenizer.json`` says.

    Attributes:
        keys: ``tokenizer.ggml.*``, without special ids.
        ids: id of every token's text.
        first: the text of the token that the post-processor puts before a text; empty for none.
        last: the one it puts after it.

    """

    keys: Mapping[str, MetadataValue] = field(repr=False)
    ids: Mapping[str, int] = field(repr=False)
    first: str = ""
    last: str = ""


def read_tokenizer(source: Json, vocab_size: int) -> TokenizerJson:
    """Translate a ``tokenizer.json``.

    Args:
        source: the file.
        vocab_size: rows of the embedding; ids up to it that have no token become unused ones, as in a GGUF file.

    Raises:
        ModelFileError: for a kind of tokenizer that is not read, or a file that contradicts itself.

    """
    model = source.object("model")
    if model is None or model.values.get("type", "BPE") != "BPE":
        kind = None if model is None else model.values.get("type")
        raise source.error("model.type", f"found {quoted(kind)}", "'BPE', the one that is read")
    ids = _vocabulary(model)
    added = _added(source, ids)
    merges = _merges(model)
    tokens, types = _tokens(model, ids, added, vocab_size)
    first, last = _post_processor(source)
    steps = list(_steps(source.values.get("pre_tokenizer"), "pre_tokenizer"))
    byte_level = any(step.get("type") == "ByteLevel" for step in steps)
    keys: dict[str, MetadataValue] = {
        PREFIX + "tokens": tokens,
        PREFIX + "token_type": np.array(types, np.int32),
    }
    if byte_level:
        _refuse_normalizers(source, {"NFC"})
        ignore_merges = model.boolean("ignore_merges", default=False)
        keys |= {
            PREFIX + "model": "gpt2",
            PREFIX + "pre": _pre_tokenizer(source, steps, ignore_merges=ignore_merges),
            PREFIX + "merges": merges,
        }
    else:
        if not model.boolean("byte_fallback", default=False):
            raise source.error("pre_tokenizer", f"found {_shown(steps)}", "ByteLevel, or a model with byte_fallback")
        keys |= {
            PREFIX + "model": "llama",
            PREFIX + "scores": _scores(tokens, merges),
            PREFIX + "add_space_prefix": _space_prefix(source, steps),
        }
    return TokenizerJson(keys, ids, first, last)


def _vocabulary(model: Json) -> dict[str, int]:
    vocab = model.object("vocab")
    if vocab is None:
        raise model.error("vocab", "missing or empty", "an object from text to id")
    ids = dict(vocab.values)
    if set(map(type, ids.values())) != {int}:
        text = next(text for text, token in ids.items() if type(token) is not int)
        raise model.error("vocab", f"found {quoted(ids[text])} for {quoted(text)}", "a token id")
    return ids


def _added(source: Json, ids: dict[str, int]) -> Mapping[str, TokenType]:
    """Added tokens with their types; their ids are put into `ids`."""
    added: dict[str, TokenType] = {}
    for place, token in enumerate(source.sequence("added_tokens", ())):
        if not isinstance(token, dict):
            raise source.error(f"added_tokens[{place}]", f"found {quoted(token)}", "an object")
        entry = Json(source.path, token, f"added_tokens[{place}].")
        text, token_id = entry.string("content"), entry.integer("id")
        if ids.setdefault(text, token_id) != token_id:
            raise entry.error("id", f"found {token_id}", f"{ids[text]}, which the vocabulary has for {quoted(text)}")
        special = entry.boolean("special", default=False) or _looks_special(text)
        added[text] = TokenType.CONTROL if special else TokenType.USER_DEFINED
    return added


def _looks_special(text: str) -> bool:
    """Whether llama.cpp's converter takes an added token for a control token, whatever the file says."""
    return (
        text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
        or (text.startswith("<|") and text.endswith("|>"))
        or (text.startswith("<｜") and text.endswith("｜>"))
        or (text.startswith("<unused") and text.endswith(">"))
    )


def _merges(model: Json) -> list[str]:
    """The merges as texts with a space between, whether they are written so or as pairs."""
    merges = model.sequence("merges")
    kinds = set(map(type, merges))
    if kinds <= {str}:
        return list(merges)
    if kinds == {list} and set(map(len, merges)) == {2} and {type(text) for pair in merges for text in pair} == {str}:
        joined = list(map(" ".join, merges))
        if "\n".join(joined).count(" ") == len(joined):
            return joined
    for place, pair in enumerate(merges):  # which of them is wrong
        is_pair = isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)
        if not isinstance(pair, str) and not (is_pair and " " not in pair[0] + pair[1]):
            raise model.error(f"merges[{place}]", f"found {quoted(pair)}", "two texts without a space")
    raise model.error("merges", "found texts and pairs", "one of the two")


def _tokens(
    model: Json, ids: Mapping[str, int], added: Mapping[str, TokenType], vocab_size: int
) -> tuple[list[str], list[int]]:
    """Text and type of every id; one that has no token is called ``[PAD7]``, as llama.cpp's converter does."""
    highest = max(ids.values())
    if not 0 <= min(ids.values()) <= highest < MAX_VOCABULARY:
        raise model.error("vocab", f"found token ids {min(ids.values())} to {highest}", f"0 to {MAX_VOCABULARY - 1}")
    size = max(highest + 1, vocab_size)
    tokens: list[str] = [""] * size
    for text, token in ids.items():
        if tokens[token]:
            found = f"found {quoted(tokens[token])} and {quoted(text)} for token {token}"
            raise model.error("vocab", found, "one text for each id")
        tokens[token] = text
    types = [int(TokenType.NORMAL if text else TokenType.UNUSED) for text in tokens]
    tokens = [text or f"[PAD{token}]" for token, text in enumerate(tokens)]
    for text, kind in added.items():
        types[ids[text]] = int(kind)
        if kind == TokenType.USER_DEFINED:
            tokens[ids[text]] = text.replace(_SPACE, " ")
    for text in ids:
        if text.startswith("<0x") and _BYTE.fullmatch(text):
            types[ids[text]] = int(TokenType.BYTE)
    return tokens, types


def _scores(tokens: Sequence[str], merges: Sequence[str]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """SentencePiece's scores: minus the rank of the first merge that makes a token; below all of these without one."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault(merge.replace(" ", "", 1), rank)
    return np.array([-float(ranks.get(text, len(merges))) for text in tokens], np.float32)


def _steps(value: Any, key: str) -> Iterator[Mapping[str, Any]]:
    """The parts of a normaliser or pre-tokenizer, sequences opened; there are no sequences in sequences."""
    if not isinstance(value, dict):
        return
    inner = value.get(_PARTS[key])
    if value.get("type") == "Sequence" and isinstance(inner, list):
        yield from (step for step in inner if isinstance(step, dict))
    else:
        yield value


def _shown(steps: Sequence[Mapping[str, Any]]) -> str:
    return " + ".join(str(step.get("type"))[:40] for step in steps) or "none"


def _pre_tokenizer(source: Json, steps: Sequence[Mapping[str, Any]], *, ignore_merges: bool) -> str:
    """The name under which GGUF files have these steps."""
    patterns: list[str] = []
    for step in steps:
        kind = step.get("type")
        if kind == "Split" and isinstance(step.get("pattern"), dict) and not step.get("invert"):
            patterns.append(str(step["pattern"].get("Regex", "")).replace(_ANY_CASE, _BOTH_CASES))
        elif kind == "Digits":
            patterns.append(r"\p{N}" if step.get("individual_digits") else r"\p{N}+")
        elif kind == "ByteLevel" and not step.get("add_prefix_space", True):
            patterns += _GPT2 if step.get("use_regex", True) else ()
        else:
            raise source.error("pre_tokenizer", f"found {quoted(dict(step))}", "Split, Digits and ByteLevel")
    wanted = tuple(patterns)
    for name, known in PRE_TOKENIZERS.items():
        if known.byte_level and known.patterns == wanted and known.ignore_merges == ignore_merges:
            return name
    found = f"found expressions {quoted(wanted)} {'with' if ignore_merges else 'without'} ignore_merges"
    raise source.error("pre_tokenizer", found, f"those of one of {', '.join(PRE_TOKENIZERS)}")


def _refuse_normalizers(source: Json, allowed: set[str]) -> list[Mapping[str, Any]]:
    steps = list(_steps(source.values.get("normalizer"), "normalizer"))
    for step in steps:
        if step.get("type") not in allowed:
            raise source.error("normalizer", f"found {quoted(step.get('type'))}", " or ".join(sorted(allowed)))
    return steps


def _space_prefix(source: Json, steps: Sequence[Mapping[str, Any]]) -> bool:
    """Whether SentencePiece's space goes before a text: said by a normaliser in older files, by Metaspace in newer."""
    normalizers = _refuse_normalizers(source, {"Prepend", "Replace"})
    for step in steps:
        if step.get("type") != "Metaspace" or step.get("replacement") != _SPACE:
            raise source.error("pre_tokenizer", f"found {quoted(dict(step))}", f"Metaspace with {_SPACE!r}, or none")
        return step.get("prepend_scheme", "always") != "never" and bool(step.get("add_prefix_space", True))
    return any(step.get("type") == "Prepend" for step in normalizers)


def _post_processor(source: Json) -> tuple[str, str]:
    """The special tokens that go before and after a text, by their text."""
    first = last = ""
    value = source.values.get("post_processor")
    parts = value.get("processors", [value]) if isinstance(value, dict) else []
    for part in parts if isinstance(parts, list) else []:
        if isinstance(part, dict) and part.get("type") == "TemplateProcessing":
            single = part.get("single")
            if not isinstance(single, list) or not all(isinstance(piece, dict) for piece in single) or not single:
                raise source.error("post_processor.single", f"found {quoted(single)}", "an array of objects")
            first, last = (_special_id(single[end]) for end in (0, -1))
    return first, last


def _special_id(piece: Mapping[str, Any]) -> str:
    special = piece.get("SpecialToken")
    text = special.get("id") if isinstance(special, dict) else ""
    return text if isinstance(text, str) else ""
