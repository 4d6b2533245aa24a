"""Text out of a stream of token ids, never half a character."""

from __future__ import annotations

import codecs

from mortice.core.text.tokenizer import Tokenizer

__all__ = ["IncrementalDetokenizer"]

_Decoder = codecs.getincrementaldecoder("utf-8")


class IncrementalDetokenizer:
    """Turns token ids into text one at a time.

    What `push` and `finish` return, joined, is what `Tokenizer.decode` returns for all the ids. Bytes that can
    no longer become a character are given out at once, as U+FFFD.

    Args:
        tokenizer: whose ids they are.
        skip_special: leave out control tokens and the unknown token; otherwise their names are shown.

    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = False) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._decoder = _Decoder("replace")

    def push(self, token_id: int) -> str:
        """The text that is complete with this token, possibly empty.

        Raises:
            TokenizerError: the id is not in the vocabulary.

        """
        return self._decoder.decode(self._tokenizer.token_bytes(token_id, skip_special=self._skip_special))

    def finish(self) -> str:
        """What is left: U+FFFD for an unfinished character, else nothing. The next `push` starts afresh."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest
