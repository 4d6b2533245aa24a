"""Text to token ids and back, for the vocabulary that a model file carries.

Agrees token for token with llama.cpp on the vocabularies it was compared with, and differs on purpose in one
thing: text can never spell a control token when `parse_special` is off, not even where merges or scores would
allow it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping

from attrs import define, field, frozen

from mortice.core.errors import InputError, TokenizerError
from mortice.core.model.types import MetadataValue, ModelFile
from mortice.core.text.encoders import BYTE_OF_CHAR, SPACE, Encoder, build_encoder
from mortice.core.text.vocabulary import TokenType, Vocabulary

__all__ = ["Tokenizer"]

_WHITESPACE = " \t\n\v\f\r"


@define(eq=False, kw_only=True)
class Tokenizer:
    """Encodes and decodes text. Safe to use from several threads.

    Attributes:
        vocabulary: tokens, types, special ids and flags as the file has them.
        origin: the file it comes from, for messages; empty when not known.
        max_tokens: text that certainly has more tokens is refused before it is encoded; None for no limit.

    """

    vocabulary: Vocabulary
    origin: str = ""
    max_tokens: int | None = None
    _encoder: Encoder = field(repr=False)
    _strips_right: frozenset[int] = frozenset()
    _matchers: dict[bool, _Matcher] = field(init=False, repr=False)
    _bound: _LengthBound | None = field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        user_defined = self._tokens_of(TokenType.USER_DEFINED)
        special = user_defined | self._tokens_of(TokenType.CONTROL) | self._tokens_of(TokenType.UNKNOWN)
        self._matchers = {False: _Matcher(user_defined), True: _Matcher(special)}
        self._bound = None if self.max_tokens is None else _LengthBound.of(self.vocabulary, strips=self._strips_right)

    @classmethod
    def from_metadata(
        cls, metadata: Mapping[str, MetadataValue], *, origin: str = "", max_tokens: int | None = None
    ) -> Tokenizer:
        """Build the tokenizer that the ``tokenizer.ggml.*`` keys of a model file describe.

        Raises:
            TokenizerError: the keys are missing, contradict each other, or name a kind that is not supported.

        """
        return cls._built(lambda: Vocabulary.from_metadata(metadata), metadata, origin, max_tokens)

    @classmethod
    def of(cls, file: ModelFile, *, max_tokens: int | None = None) -> Tokenizer:
        """The tokenizer of a model file; its vocabulary is not read again where validation has read it.

        Raises:
            TokenizerError: as `from_metadata` does.

        """
        return cls._built(lambda: Vocabulary.of(file), file.metadata, str(file.path), max_tokens)

    @classmethod
    def _built(
        cls,
        read: Callable[[], Vocabulary],
        metadata: Mapping[str, MetadataValue],
        origin: str,
        max_tokens: int | None,
    ) -> Tokenizer:
        try:
            vocabulary = read()
            encoder = build_encoder(vocabulary)
        except TokenizerError as error:
            raise TokenizerError(f"{origin}: {error}" if origin else str(error)) from error
        return cls(
            vocabulary=vocabulary,
            origin=origin,
            max_tokens=max_tokens,
            encoder=encoder,
            strips_right=_strips_right(vocabulary, metadata),
        )

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return len(self.vocabulary.tokens)

    @property
    def bos_id(self) -> int | None:
        """Token that begins a text, or None."""
        return self.vocabulary.bos_id

    @property
    def eos_id(self) -> int | None:
        """Token that ends a text, or None."""
        return self.vocabulary.eos_id

    @property
    def eot_id(self) -> int | None:
        """Token that ends a turn, or None."""
        return self.vocabulary.eot_id

    @property
    def pad_id(self) -> int | None:
        """Padding token, or None."""
        return self.vocabulary.pad_id

    @property
    def unk_id(self) -> int | None:
        """Token for text that has no other, or None."""
        return self.vocabulary.unk_id

    @property
    def stop_ids(self) -> frozenset[int]:
        """Every token that ends a generation."""
        return self.vocabulary.stop_ids

    @property
    def add_bos(self) -> bool:
        """Whether `encode` puts BOS first."""
        return self.vocabulary.add_bos

    def encode(
        self,
        text: str,
        *,
        add_special: bool = True,
        parse_special: bool = True,
        literals: Mapping[int, str] | None = None,
    ) -> list[int]:
        """Token ids of `text`.

        Args:
            text: what to encode.
            add_special: put BOS before and EOS after, where the file asks for it.
            parse_special: read the text of a control token as that token. Off, it is plain text; tokens that
                the file calls user-defined are found either way.
            literals: characters of `text` (by code point) that stand for longer text in which no control token
                is seen, whatever `parse_special` says.

        Raises:
            TokenizerError: `text` has a lone surrogate and so is not Unicode text.
            InputError: `text` is so long that it must have more than `max_tokens` tokens.

        Bytes for which a byte-level vocabulary has no token are dropped, as they were in the model's training.

        """
        try:
            data = text.encode()
        except UnicodeEncodeError as error:
            found = ord(text[error.start])
            raise TokenizerError(f"text: character {error.start} is the lone surrogate U+{found:04X}") from None
        if self._bound is not None and self.max_tokens is not None:
            self._bound.require(data if literals is None else text.translate(literals).encode(), self.max_tokens)
        ids = [self.vocabulary.bos_id] if add_special and self.vocabulary.add_bos else []
        for part in self._partition(text, self._matchers[parse_special]):
            if isinstance(part, int):
                ids.append(part)
            else:
                ids += self._encoder.encode(part if literals is None else part.translate(literals))
        if add_special and self.vocabulary.add_eos:
            ids.append(self.vocabulary.eos_id)
        return [token for token in ids if token is not None]

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """The text that `ids` stand for, joined; what is not UTF-8 becomes U+FFFD.

        A space that SentencePiece put before the text is part of its first token and stays.

        Args:
            ids: token ids.
            skip_special: leave out control tokens and the unknown token; otherwise their names are shown.

        Raises:
            TokenizerError: an id is not in the vocabulary.

        """
        return b"".join(self.token_bytes(id_, skip_special=skip_special) for id_ in ids).decode(errors="replace")

    def token_bytes(self, token_id: int, *, skip_special: bool = False) -> bytes:
        """The exact bytes a token stands for, maybe part of a character. Unused tokens stand for nothing.

        Raises:
            TokenizerError: the id is not in the vocabulary.

        """
        text = self.piece(token_id)
        kind = self.vocabulary.types[token_id]
        if kind in {TokenType.UNUSED, TokenType.UNDEFINED}:
            return b""
        if kind in {TokenType.CONTROL, TokenType.UNKNOWN}:
            return b"" if skip_special else text.encode()
        if kind == TokenType.BYTE:
            return bytes((int(text[3:5], 16),))
        if kind == TokenType.USER_DEFINED:
            return text.encode()
        pre = self.vocabulary.pre
        if pre is None or not pre.byte_level:
            return text.replace(SPACE, " ").encode()
        try:
            return bytes(BYTE_OF_CHAR[char] for char in text)
        except KeyError:  # not written in the byte alphabet: the text itself
            return text.encode()

    def piece(self, token_id: int) -> str:
        """The token's text as the file stores it (with ``Ġ`` or ``▁`` for a space).

        Raises:
            TokenizerError: the id is not in the vocabulary.

        """
        if not 0 <= token_id < self.vocab_size:
            raise TokenizerError(f"token id {token_id} is not in the vocabulary, wanted 0 to {self.vocab_size - 1}")
        return self.vocabulary.tokens[token_id]

    def control_texts(self) -> frozenset[str]:
        """The texts that `encode` reads as control tokens when `parse_special` is on."""
        hidden = self._tokens_of(TokenType.CONTROL) | self._tokens_of(TokenType.UNKNOWN)
        return frozenset(hidden)

    def _tokens_of(self, kind: TokenType) -> dict[str, int]:
        tokens = self.vocabulary.tokens
        return {tokens[i]: i for i, found in enumerate(self.vocabulary.types) if found == kind and tokens[i]}

    def _partition(self, text: str, matcher: _Matcher) -> Iterator[str | int]:
        """Cut `text` at its special tokens: plain text and token ids in turn, no empty text."""
        done = 0
        while (match := matcher.find(text, done)) is not None:
            start, end, token = match
            if start > done:
                yield text[done:start]
            yield token
            done = end
            if token in self._strips_right:
                while done < len(text) and text[done] in _WHITESPACE:
                    done += 1
        if done < len(text):
            yield text[done:]


@frozen
class _LengthBound:
    """How few tokens a text can have: no token stands for more than `longest` bytes."""

    longest: int
    vanishing: bytes
    """Bytes that may become no token at all."""

    @classmethod
    def of(cls, vocabulary: Vocabulary, *, strips: Iterable[int]) -> _LengthBound | None:
        """None where any length of text may become few tokens: by normalising, or as one unknown token."""
        byte_level = vocabulary.pre is not None and vocabulary.pre.byte_level
        byte_tokens = sum(kind == TokenType.BYTE for kind in vocabulary.types)
        if vocabulary.kind == "unigram" or (not byte_level and byte_tokens < 256):
            return None
        hidden = {TokenType.CONTROL, TokenType.UNKNOWN}
        gone = {
            byte
            for char, byte in BYTE_OF_CHAR.items()
            if byte_level and (char not in vocabulary.ids or vocabulary.types[vocabulary.ids[char]] in hidden)
        }
        if any(True for _ in strips):
            gone |= set(_WHITESPACE.encode())
        longest = 0
        for text, kind in zip(vocabulary.tokens, vocabulary.types, strict=True):
            size = len(text.encode())  # as stored a token has at least as many bytes as it stands for
            if size > longest and byte_level and kind == TokenType.NORMAL and all(map(BYTE_OF_CHAR.__contains__, text)):
                size = len(text)  # each character is a byte
            longest = max(longest, size)
        return cls(longest, bytes(sorted(gone)))

    def require(self, data: bytes, max_tokens: int) -> None:
        found = len(data.translate(None, self.vanishing)) if self.vanishing else len(data)
        if found > max_tokens * self.longest:
            raise InputError(
                f"prompt: found {found} bytes, wanted fewer than the context's {max_tokens} tokens can hold: "
                f"{max_tokens * self.longest}, at most {self.longest} bytes each"
            )


class _Matcher:
    """Finds the leftmost special token, the longest where several begin."""

    def __init__(self, tokens: Mapping[str, int]) -> None:
        self._tokens = tokens
        lengths: dict[str, set[int]] = {}
        for text in tokens:
            lengths.setdefault(text[0], set()).add(len(text))
        self._lengths = {first: sorted(found, reverse=True) for first, found in lengths.items()}
        self._first = re.compile("[" + "".join(map(re.escape, lengths)) + "]") if tokens else None

    def find(self, text: str, start: int) -> tuple[int, int, int] | None:
        if self._first is None:
            return None
        for candidate in self._first.finditer(text, start):
            at = candidate.start()
            for length in self._lengths[text[at]]:
                token = self._tokens.get(text[at : at + length])
                if token is not None:
                    return at, at + length, token
        return None


def _strips_right(vocabulary: Vocabulary, metadata: Mapping[str, MetadataValue]) -> frozenset[int]:
    """Tokens that swallow the white space after them.

    Phi-3's tokenizer does so and GGUF has no key for it; like llama.cpp, go by the model's name.
    """
    name = metadata.get("general.name")
    if not isinstance(name, str) or not re.search("phi-?3", name.lower()):
        return frozenset()
    kept = {"<unk>", "<s>", "<|endoftext|>"}
    special = {TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN}
    return frozenset(
        token for token, kind in enumerate(vocabulary.types) if kind in special and vocabulary.tokens[token] not in kept
    )
