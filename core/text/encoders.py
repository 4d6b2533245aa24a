"""From a checked vocabulary to the compiled tokenizer (the `tokenizers` package) that encodes plain text."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from attrs import frozen

from mortice.core.errors import TokenizerError
from mortice.core.text.vocabulary import PREFIX, TokenType, Vocabulary

if TYPE_CHECKING:
    import tokenizers
    from tokenizers.pre_tokenizers import PreTokenizer

__all__ = ["BYTE_OF_CHAR", "SPACE", "Encoder", "build_encoder", "check_encodable"]

SPACE = "▁"
"""SentencePiece's visible space, U+2581."""


# Every way to cut every token in two is looked at: this bounds the time (the 256,000 tokens of Gemma have 2 million).
_MAX_SPM_CHARS = 8_000_000


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 stands for itself, the other bytes for U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    chars = [chr(byte) for byte in printable] + [chr(0x100 + i) for i in range(len(others))]
    return dict(zip(chars, printable + others, strict=True))


BYTE_OF_CHAR: Mapping[str, int] = _byte_alphabet()
"""The byte that each character of a byte-level token stands for."""


@frozen(eq=False, kw_only=True)
class Encoder:
    """Encodes text in which nothing is special.

    Attributes:
        compiled: the Rust tokenizer; ids at or above the vocabulary's size are symbols that are not tokens.
        prepare: puts text into the form the tokens are written in.
        expansions: what each of those symbols becomes, in the order of their ids.
        vocab_size: number of tokens.

    """

    compiled: tokenizers.Tokenizer
    prepare: Callable[[str], str]
    expansions: tuple[tuple[int, ...], ...]
    vocab_size: int

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`."""
        ids: list[int] = self.compiled.encode(self.prepare(text), add_special_tokens=False).ids
        if self.expansions and ids and max(ids) >= self.vocab_size:
            return [token for id_ in ids for token in self._expand(id_)]
        return ids

    def _expand(self, id_: int) -> tuple[int, ...]:
        return (id_,) if id_ < self.vocab_size else self.expansions[id_ - self.vocab_size]


def build_encoder(vocabulary: Vocabulary) -> Encoder:
    """The encoder for `vocabulary`.

    Raises:
        TokenizerError: a merge refers to a token that is not there, or the normalisation table is broken.

    """
    return _BUILDERS[vocabulary.kind](vocabulary)


def check_encodable(vocabulary: Vocabulary) -> None:
    """Find what `build_encoder` would refuse, in less time than it takes to build.

    Raises:
        TokenizerError: as `build_encoder` does.

    """
    if vocabulary.kind == "bpe":
        fault = _merge_fault(vocabulary.merges, _symbols(vocabulary)[0])
        if fault is not None:
            raise TokenizerError(fault)
    elif vocabulary.kind == "spm":
        _check_spm_size(vocabulary)
    else:
        _unknown_id(vocabulary)
        _normaliser(vocabulary)


def _symbols(vocabulary: Vocabulary) -> tuple[dict[str, int], list[str], dict[str, Any]]:
    """What the merges of a BPE vocabulary may join, the bytes among it that are no tokens, and the fallback."""
    pre = vocabulary.pre
    assert pre is not None, "a BPE vocabulary knows its pre-tokenizer"
    ids = _matchable(vocabulary)
    # A byte that has no token still keeps its neighbours from merging; it is dropped afterwards.
    missing = [char for char in BYTE_OF_CHAR if char not in ids] if pre.byte_level else []
    ids.update((char, len(vocabulary.tokens) + i) for i, char in enumerate(missing))
    return ids, missing, {} if pre.byte_level else _fallback(vocabulary, ids)


def _matchable(vocabulary: Vocabulary) -> dict[str, int]:
    """Tokens that plain text may become. Never control tokens: text must not be able to spell one."""
    types = np.array(vocabulary.types, np.int8)
    ids = dict(vocabulary.ids)
    for token in np.flatnonzero((types == TokenType.CONTROL) | (types == TokenType.UNKNOWN)).tolist():
        ids.pop(vocabulary.tokens[token], None)
    return ids


def _bpe(vocabulary: Vocabulary) -> Encoder:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    pre = vocabulary.pre
    assert pre is not None, "a BPE vocabulary knows its pre-tokenizer"
    ids, missing, options = _symbols(vocabulary)
    try:
        model = models.BPE(ids, _pairs(vocabulary.merges), ignore_merges=pre.ignore_merges, **options)
    except Exception as error:
        raise TokenizerError(_merge_fault(vocabulary.merges, ids) or f"{PREFIX}merges: {error}") from error
    compiled = Tokenizer(model)
    steps: list[PreTokenizer] = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.patterns]
    if pre.byte_level:
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    compiled.pre_tokenizer = pre_tokenizers.Sequence(steps)
    return Encoder(
        compiled=compiled,
        prepare=str if pre.byte_level else _show_spaces,
        expansions=((),) * len(missing),
        vocab_size=len(vocabulary.tokens),
    )


def _pairs(merges: Iterable[str]) -> list[tuple[str, str]]:
    # Parted by the first space after the first character: a token may itself begin with a space.
    return [(merge[:at], merge[at + 1 :]) for merge in dict.fromkeys(merges) for at in (merge.find(" ", 1),)]


def _merge_fault(merges: Iterable[str], ids: Mapping[str, int]) -> str | None:
    for i, merge in enumerate(merges):  # some hundred thousand
        left, _, right = merge.partition(" ")
        if not (left and right and left in ids and right in ids and left + right in ids):
            fault = _fault_of(merge, ids)
            if fault is not None:
                return f"{PREFIX}merges: entry {i} {fault}"
    return None


def _fault_of(merge: str, ids: Mapping[str, int]) -> str | None:
    rest, space, right = merge[1:].partition(" ")  # parted as in `_pairs`
    left = merge[:1] + rest
    if not space or not right:
        return f"is {merge!r}, wanted two tokens with a space between"
    missing = next((text for text in (left, right, left + right) if text not in ids), None)
    return None if missing is None else f"({left!r} + {right!r}) needs {missing!r}, which is no token of plain text"


def _show_spaces(text: str) -> str:
    return text.replace(" ", SPACE)


def _spm(vocabulary: Vocabulary) -> Encoder:
    """SentencePiece BPE: of all neighbours that together are a token, join those with the best score first.

    Every way to cut a token in two becomes a merge, ranked by the token's score; that makes it ordinary BPE. Between
    different tokens of equal score the lower id goes first, where SentencePiece would take what stands leftmost.
    """
    from tokenizers import Tokenizer, models

    _check_spm_size(vocabulary)
    size = len(vocabulary.tokens)
    ids = {text: token for text, token in _matchable(vocabulary).items() if vocabulary.types[token] != TokenType.BYTE}
    # Characters that only occur inside longer tokens take part in merges; left over, they become bytes.
    alphabet = {char for text in ids for char in text}
    loose = sorted(alphabet - ids.keys())
    ids.update((char, size + i) for i, char in enumerate(loose))
    bytes_ = _byte_tokens(vocabulary)
    unknown = () if vocabulary.unk_id is None else (vocabulary.unk_id,)
    expansions = tuple(
        tuple(bytes_[byte] for byte in char.encode()) if len(bytes_) == 256 else unknown for char in loose
    )
    merges = _merges_by_score(vocabulary, ids)
    model = models.BPE(ids, merges, **_fallback(vocabulary, ids))
    prefix = SPACE if vocabulary.add_space_prefix else ""
    return Encoder(
        compiled=Tokenizer(model),
        prepare=lambda text: prefix + _show_spaces(text),
        expansions=expansions,
        vocab_size=size,
    )


def _check_spm_size(vocabulary: Vocabulary) -> None:
    total = sum(map(len, vocabulary.tokens))
    if total > _MAX_SPM_CHARS:
        raise TokenizerError(f"{PREFIX}tokens: {total} characters in all, wanted at most {_MAX_SPM_CHARS}")


def _fallback(vocabulary: Vocabulary, ids: dict[str, int]) -> dict[str, Any]:
    """What a character without a token becomes: its bytes or else the unknown token. Both are added to `ids`."""
    bytes_ = _byte_tokens(vocabulary)
    ids.update((f"<0x{byte:02X}>", token) for byte, token in bytes_.items())
    options: dict[str, Any] = {"byte_fallback": len(bytes_) == 256, "fuse_unk": True}
    if vocabulary.unk_id is not None:
        options["unk_token"] = vocabulary.tokens[vocabulary.unk_id]
        ids[options["unk_token"]] = vocabulary.unk_id
    return options


def _byte_tokens(vocabulary: Vocabulary) -> dict[int, int]:
    return {
        int(vocabulary.tokens[token][3:5], 16): token
        for token, kind in enumerate(vocabulary.types)
        if kind == TokenType.BYTE
    }


def _merges_by_score(vocabulary: Vocabulary, ids: Mapping[str, int]) -> list[tuple[str, str]]:
    scores = vocabulary.scores.tolist()
    size = len(scores)
    ranked = sorted((-scores[token], token, text) for text, token in ids.items() if token < size and len(text) > 1)
    return [
        (text[:cut], text[cut:])
        for _, _, text in ranked
        for cut in range(1, len(text))
        if text[:cut] in ids and text[cut:] in ids
    ]


def _unigram(vocabulary: Vocabulary) -> Encoder:
    """SentencePiece unigram: the cut with the highest sum of scores (Viterbi)."""
    from tokenizers import Tokenizer, models

    unk_id, normalise = _unknown_id(vocabulary), _normaliser(vocabulary)
    kinds = {TokenType.NORMAL, TokenType.USER_DEFINED, TokenType.UNUSED}
    # A token that text must not spell keeps its place in the list, as the empty text, which matches nothing.
    entries = [
        (text if kind in kinds else "", 0.0 if kind != TokenType.NORMAL else score)
        for text, kind, score in zip(vocabulary.tokens, vocabulary.types, vocabulary.scores.tolist(), strict=True)
    ]
    compiled = Tokenizer(models.Unigram(entries, unk_id, False))
    prefix = SPACE if vocabulary.add_space_prefix else ""

    def prepare(text: str) -> str:
        text = normalise(text)
        if vocabulary.remove_extra_whitespaces:
            return "".join(SPACE + word for word in text.split(" ") if word)
        return (prefix if re.search("[^ ]", text) else "") + _show_spaces(text)

    return Encoder(compiled=compiled, prepare=prepare, expansions=(), vocab_size=len(vocabulary.tokens))


def _unknown_id(vocabulary: Vocabulary) -> int:
    if vocabulary.unk_id is None:
        raise TokenizerError(f"{PREFIX}unknown_token_id: missing, wanted the token for text that has no other")
    return vocabulary.unk_id


def _normaliser(vocabulary: Vocabulary) -> Callable[[str], str]:
    if not vocabulary.charsmap:
        return str
    from tokenizers import normalizers

    try:
        normalise: Callable[[str], str] = normalizers.Precompiled(vocabulary.charsmap).normalize_str
    except Exception as error:
        raise TokenizerError(f"{PREFIX}precompiled_charsmap: {error}") from error
    return normalise


_BUILDERS: Mapping[str, Callable[[Vocabulary], Encoder]] = {"bpe": _bpe, "spm": _spm, "unigram": _unigram}
