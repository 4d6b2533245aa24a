"""Text out of a stream of tokens."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mortice.core.errors import TokenizerError
from mortice.core.text.detokenizer import IncrementalDetokenizer
from mortice.core.text.tokenizer import Tokenizer
from tests.support.vocab import byte_level_metadata, spm_metadata

BYTE_LEVEL = Tokenizer.from_metadata(byte_level_metadata())
SPM = Tokenizer.from_metadata(spm_metadata(["▁a", "▁", "a", "é"]))


def push_all(tokenizer: Tokenizer, ids: list[int], *, skip_special: bool = False) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special=skip_special)
    return [*(detokenizer.push(id_) for id_ in ids), detokenizer.finish()]


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, SPM], ids=["byte-level", "sentencepiece"])
@given(data=st.data(), skip_special=st.booleans())
def test_the_parts_joined_are_what_decode_gives(tokenizer: Tokenizer, data: st.DataObject, skip_special: bool) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1)))
    assert "".join(push_all(tokenizer, ids, skip_special=skip_special)) == tokenizer.decode(
        ids, skip_special=skip_special
    )


@given(st.text())
def test_no_character_is_ever_split(text: str) -> None:
    parts = push_all(BYTE_LEVEL, BYTE_LEVEL.encode(text, parse_special=False))
    assert "".join(parts) == text
    assert all(part == "" or part in text for part in parts)


def test_a_character_appears_with_its_last_byte() -> None:
    ids = BYTE_LEVEL.encode("🦙")
    assert push_all(BYTE_LEVEL, ids) == ["", "", "", "🦙", ""]


def test_bytes_that_cannot_become_a_character_are_replaced_at_once() -> None:
    lead, letter = BYTE_LEVEL.encode("é")[0], BYTE_LEVEL.encode("h")[0]
    assert push_all(BYTE_LEVEL, [lead, letter]) == ["", "\ufffdh", ""]


def test_an_unfinished_character_is_replaced_at_the_end() -> None:
    assert push_all(BYTE_LEVEL, BYTE_LEVEL.encode("🦙")[:3]) == ["", "", "", "\ufffd"]


def test_a_detokenizer_begins_afresh_after_finish() -> None:
    detokenizer = IncrementalDetokenizer(BYTE_LEVEL)
    detokenizer.push(BYTE_LEVEL.encode("🦙")[0])
    detokenizer.finish()
    assert detokenizer.push(BYTE_LEVEL.encode("h")[0]) == "h"


def test_an_id_outside_the_vocabulary_is_refused_by_push() -> None:
    with pytest.raises(TokenizerError, match="token id 100000 is not in the vocabulary"):
        IncrementalDetokenizer(BYTE_LEVEL).push(100000)
