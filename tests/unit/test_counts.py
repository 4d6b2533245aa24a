"""Numbers of things in messages."""

from __future__ import annotations

from mortice.core.counts import counted


def test_one_thing_has_no_plural() -> None:
    assert [counted(count, "token") for count in (0, 1, 2)] == ["0 tokens", "1 token", "2 tokens"]
    assert [counted(count, "entry", "entries") for count in (1, 2)] == ["1 entry", "2 entries"]
    assert [counted(count, "byte is", "bytes are") for count in (1, 0)] == ["1 byte is", "0 bytes are"]
