"""The vocabulary a model file carries, checked: tokens, their types and scores, special ids and flags.

Keys are GGUF's ``tokenizer.ggml.*``. Defaults that a file may leave out are those of llama.cpp
(src/llama-vocab.cpp), except that no token id is ever assumed: an id that is not in the file does not exist.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from enum import IntEnum
from typing import Any

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from mortice.core.counts import counted
from mortice.core.errors import TokenizerError
from mortice.core.model.types import MetadataValue, ModelFile
from mortice.core.text.pretokenizers import PreTokenizer, pre_tokenizer

__all__ = ["MAX_TOKEN_CHARS", "PREFIX", "TokenType", "Vocabulary"]

PREFIX = "tokenizer.ggml."

MAX_TOKEN_CHARS = 1 << 12
"""Longest token accepted; the longest of real vocabularies, runs of one character, have some hundreds."""

# Texts that end a turn or a text in the model families that exist; llama.cpp keeps the same list.
_END_OF_TURN = (
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<turn|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "<｜end▁of▁sentence｜>",
    "<end_of_utterance>",
)
_END_OF_TEXT = frozenset(_END_OF_TURN) | {
    "<|eom_id|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "</s>",
    "[EOS]",
    "<eos>",
    "<|tool_response>",
    "[e~[",
}
_MODELS = {"gpt2": "bpe", "gemma4": "bpe", "llama": "spm", "t5": "unigram"}


class TokenType(IntEnum):
    """Values of ``tokenizer.ggml.token_type``."""

    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@frozen(eq=False, kw_only=True)
class Vocabulary:
    """What a file says about its tokens, consistent with itself.

    Attributes:
        kind: ``bpe`` (merges from the file), ``spm`` (merges by score) or ``unigram``.
        tokens: text of every token, by id, as stored.
        types: a `TokenType` value for every token.
        scores: float32 for every token; zeros where the file has none.
        merges: pairs joined by a space, best first; empty unless `kind` is ``bpe``.
        pre: how text is cut into words; None unless `kind` is ``bpe``.
        ids: id of every non-empty token text.
        bos_id: first token of a text, None when the file names none; so for the other ids.
        eos_id: last token of a text.
        eot_id: last token of a turn.
        pad_id: padding.
        unk_id: what stands for text that cannot be written.
        stop_ids: every token that ends a generation.
        add_bos: whether `bos_id` goes before a text.
        add_eos: whether `eos_id` goes after it.
        add_space_prefix: whether a space is put before a text.
        remove_extra_whitespaces: whether runs of spaces are made one (``unigram`` only).
        charsmap: SentencePiece's compiled normalisation, empty when there is none (``unigram`` only).

    """

    kind: str
    tokens: list[str]
    types: list[int]
    scores: NDArray[np.float32]
    merges: Sequence[str]
    pre: PreTokenizer | None
    ids: Mapping[str, int]
    bos_id: int | None
    eos_id: int | None
    eot_id: int | None
    pad_id: int | None
    unk_id: int | None
    stop_ids: frozenset[int]
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    remove_extra_whitespaces: bool
    charsmap: bytes

    @classmethod
    def of(cls, file: ModelFile) -> Vocabulary:
        """The vocabulary of a file, read and checked once: validation and the tokenizer share it.

        Raises:
            TokenizerError: as `from_metadata` does.

        """
        found = file.memo.get("vocabulary")
        if not isinstance(found, cls):
            found = file.memo["vocabulary"] = cls.from_metadata(file.metadata)
        return found

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, MetadataValue]) -> Vocabulary:
        """Read and check the ``tokenizer.ggml.*`` keys.

        Raises:
            TokenizerError: a key is missing, has the wrong type or contradicts another; the message names it.

        """
        reader = _Reader(metadata)
        kind = _kind(reader)
        tokens = reader.strings("tokens")
        if not tokens:
            raise TokenizerError(f"{PREFIX}tokens: empty, wanted at least one token")
        ids = _index(tokens)
        types = _token_types(reader, tokens)
        bos_id, eos_id, unk_id = _text_ends(reader, kind, len(tokens), ids, types)
        eot_id = reader.token_id("eot_token_id", len(tokens))
        if eot_id is None:
            eot_id = next((ids[text] for text in _END_OF_TURN if _is_special(text, ids, types)), None)
        given = (eos_id, eot_id, reader.token_id("eom_token_id", len(tokens)))
        stop_ids = _stop_ids(given, ids, types)
        for token in stop_ids:
            if types[token] == TokenType.USER_DEFINED:
                types[token] = TokenType.CONTROL  # else a user's text could end the turn
        pre = _pre_tokenizer(reader) if kind == "bpe" else None
        return cls(
            kind=kind,
            tokens=tokens,
            types=types,
            scores=_scores(reader, kind, len(tokens)),
            merges=reader.strings("merges") if kind == "bpe" else (),
            pre=pre,
            ids=ids,
            bos_id=bos_id,
            eos_id=eos_id,
            eot_id=eot_id,
            pad_id=reader.token_id("padding_token_id", len(tokens)),
            unk_id=unk_id,
            stop_ids=stop_ids,
            add_bos=_flag(reader, "add_bos_token", kind == "spm" or (pre is not None and pre.add_bos), bos_id),
            add_eos=_flag(reader, "add_eos_token", kind == "unigram", eos_id),
            add_space_prefix=reader.boolean("add_space_prefix", default=kind == "spm"),
            remove_extra_whitespaces=reader.boolean("remove_extra_whitespaces", default=False),
            charsmap=reader.raw_bytes("precompiled_charsmap") if kind == "unigram" else b"",
        )


@frozen
class _Reader:
    """Typed access to the keys under `PREFIX`."""

    metadata: Mapping[str, MetadataValue]

    def string(self, name: str, default: str | None = None) -> str:
        value = self.metadata.get(PREFIX + name, default)
        if value is None:
            raise TokenizerError(f"{PREFIX}{name}: missing, wanted a string")
        if not isinstance(value, str):
            raise TokenizerError(f"{PREFIX}{name}: {type(value).__name__} found, wanted a string")
        return value

    def strings(self, name: str) -> list[str]:
        value = self.metadata.get(PREFIX + name)
        if value is None:
            raise TokenizerError(f"{PREFIX}{name}: missing, wanted an array of strings")
        if isinstance(value, str | np.ndarray) or not isinstance(value, Sequence):
            raise TokenizerError(f"{PREFIX}{name}: {type(value).__name__} found, wanted an array of strings")
        try:
            texts = list(value)
        except UnicodeDecodeError as error:
            raise TokenizerError(f"{PREFIX}{name}: text that is not UTF-8 ({error.reason})") from None
        others = set(map(type, texts)) - {str}
        if others:
            raise TokenizerError(f"{PREFIX}{name}: array of {others.pop().__name__} found, wanted an array of strings")
        return texts

    def numbers(self, name: str, kinds: str, wanted: int) -> NDArray[Any] | None:
        value = self.metadata.get(PREFIX + name)
        if value is None:
            return None
        if not isinstance(value, np.ndarray) or value.dtype.kind not in kinds or value.ndim != 1:
            found = value.dtype if isinstance(value, np.ndarray) else type(value).__name__
            raise TokenizerError(f"{PREFIX}{name}: {found} found, wanted an array of numbers")
        if len(value) != wanted:
            raise TokenizerError(f"{PREFIX}{name}: {counted(len(value), 'entry', 'entries')} for {wanted} tokens")
        return value

    def boolean(self, name: str, *, default: bool) -> bool:
        value = self.metadata.get(PREFIX + name, default)
        if not isinstance(value, bool | np.bool_):
            raise TokenizerError(f"{PREFIX}{name}: {value!r} found, wanted true or false")
        return bool(value)

    def token_id(self, name: str, vocab_size: int) -> int | None:
        value = self.metadata.get(PREFIX + name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise TokenizerError(f"{PREFIX}{name}: {type(value).__name__} found, wanted a token id")
        if not 0 <= value < vocab_size:
            raise TokenizerError(f"{PREFIX}{name}: {value} is not a token id, wanted 0 to {vocab_size - 1}")
        return int(value)

    def raw_bytes(self, name: str) -> bytes:
        value = self.metadata.get(PREFIX + name)
        if value is None:
            return b""
        if not isinstance(value, np.ndarray) or value.dtype.itemsize != 1:
            raise TokenizerError(f"{PREFIX}{name}: {type(value).__name__} found, wanted an array of bytes")
        return value.tobytes()


def _kind(reader: _Reader) -> str:
    model = reader.string("model")
    if model not in _MODELS:
        raise TokenizerError(f"{PREFIX}model: {model!r} is not supported; have {', '.join(sorted(_MODELS))}")
    return _MODELS[model]


def _pre_tokenizer(reader: _Reader) -> PreTokenizer:
    # A model called gemma4 has no other way to be cut than its own, and its files leave the key out.
    name = "gemma4" if reader.string("model") == "gemma4" else reader.string("pre", default="")
    if not name:
        raise TokenizerError(
            f"{PREFIX}pre: missing, and with the wrong pre-tokenizer a model only gets worse; "
            "set it in a copy of the file with gguf_new_metadata.py --pre-tokenizer NAME"
        )
    return pre_tokenizer(name)


def _index(tokens: Sequence[str]) -> dict[str, int]:
    longest = max(map(len, tokens))
    if longest > MAX_TOKEN_CHARS:
        token = next(token for token, text in enumerate(tokens) if len(text) == longest)
        raise TokenizerError(
            f"{PREFIX}tokens: token {token} has {longest} characters, wanted at most {MAX_TOKEN_CHARS}"
        )
    ids = dict(zip(tokens, range(len(tokens)), strict=True))
    ids.pop("", None)
    if len(ids) + tokens.count("") != len(tokens):
        first: dict[str, int] = {}
        for token, text in enumerate(tokens):
            if text and first.setdefault(text, token) != token:
                raise TokenizerError(f"{PREFIX}tokens: {text!r} is both token {first[text]} and token {token}")
    return ids


def _token_types(reader: _Reader, tokens: Sequence[str]) -> list[int]:
    types = reader.numbers("token_type", "iu", len(tokens))
    if types is None:
        return [int(TokenType.NORMAL)] * len(tokens)
    wrong = np.flatnonzero((types < 0) | (types > max(TokenType)))
    if wrong.size:
        found = types[wrong[0]]
        raise TokenizerError(f"{PREFIX}token_type: {found} for token {wrong[0]}, wanted 0 to {max(TokenType):d}")
    for token in np.flatnonzero(types == TokenType.BYTE).tolist():
        if not _is_byte(tokens[token]):
            raise TokenizerError(f"{PREFIX}tokens: byte token {token} is {tokens[token]!r}, wanted <0x00> to <0xFF>")
    result: list[int] = types.tolist()
    return result


def _is_byte(text: str) -> bool:
    return len(text) == 6 and text[:3] == "<0x" and text[5] == ">" and set(text[3:5]) <= set("0123456789ABCDEFabcdef")


def _scores(reader: _Reader, kind: str, vocab_size: int) -> NDArray[np.float32]:
    scores = reader.numbers("scores", "fiu", vocab_size)
    if scores is None:
        if kind != "bpe":
            raise TokenizerError(f"{PREFIX}scores: missing, wanted one for each of {vocab_size} tokens")
        return np.zeros(vocab_size, np.float32)
    bad = np.flatnonzero(~np.isfinite(scores))
    if bad.size:
        raise TokenizerError(f"{PREFIX}scores: {scores[bad[0]]} for token {bad[0]}, wanted a finite number")
    return scores.astype(np.float32)


def _text_ends(
    reader: _Reader, kind: str, vocab_size: int, ids: Mapping[str, int], types: Sequence[int]
) -> tuple[int | None, int | None, int | None]:
    """BOS, EOS and unknown: from their keys or, for SentencePiece, under the names that it gives them."""
    found = []
    for name, text in (("bos_token_id", "<s>"), ("eos_token_id", "</s>"), ("unknown_token_id", "<unk>")):
        token = reader.token_id(name, vocab_size)
        named = ids.get(text)
        if token is None and kind != "bpe" and named is not None:
            token = named if types[named] in {TokenType.CONTROL, TokenType.UNKNOWN} else None
        found.append(token)
    return found[0], found[1], found[2]


def _is_special(text: str, ids: Mapping[str, int], types: Sequence[int]) -> bool:
    return text in ids and types[ids[text]] in {TokenType.CONTROL, TokenType.USER_DEFINED}


def _stop_ids(given: Iterable[int | None], ids: Mapping[str, int], types: Sequence[int]) -> frozenset[int]:
    texts = {text for text in _END_OF_TEXT if _is_special(text, ids, types)}
    # In the harmony and solar formats <|end|> closes a message, not the answer.
    if texts & {"<|return|>", "<|flush|>"} and texts & {"<|call|>", "<|calls|>"}:
        texts.discard("<|end|>")
        given = [token for token in given if token != ids.get("<|end|>")]
    if "<|tool_response>" in texts:  # gemma 4, where </s> is a tag of HTML like any other
        texts.discard("</s>")
    return frozenset(ids[text] for text in texts) | {token for token in given if token is not None}


def _flag(reader: _Reader, name: str, default: bool, needed: int | None) -> bool:
    """A flag that adds a token; the token must exist when the file asks for it."""
    value = reader.boolean(name, default=default)
    if value and needed is None:
        if PREFIX + name in reader.metadata:
            raise TokenizerError(f"{PREFIX}{name}: true, but the file names no such token")
        return False
    return value
