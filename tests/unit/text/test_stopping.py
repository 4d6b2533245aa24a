"""Stop strings in streamed text."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mortice.core.text.stopping import StopMatcher


def reference(text: str, stops: Sequence[str]) -> tuple[str, str | None]:
    """The first stop string to end, the longest of those ending there, and the text before it."""
    found = [(text.index(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    if not found:
        return text, None
    end, _, stop = min(found)
    return text[: end - len(stop)], stop


def stream(pieces: Sequence[str], stops: Sequence[str]) -> tuple[str, str | None]:
    matcher, out = StopMatcher(stops), ""
    for piece in pieces:
        text, stop = matcher.push(piece)
        out += text
        if stop is not None:
            return out, stop
    return out + matcher.finish(), None


few_letters = st.text("abc", max_size=40)


@given(few_letters, st.lists(st.text("abc", min_size=1, max_size=6), max_size=4), st.data())
@example("aaab", ["aab"], None)
@example("aabaaabaaac", ["aabaaac"], None)
@example("xaby", ["xaby", "ab"], None)
def test_any_cut_of_the_text_finds_the_same_stop(text: str, stops: list[str], data: st.DataObject | None) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8))) if data else range(1, len(text))
    bounds = [0, *cuts, len(text)]
    pieces = [text[start:end] for start, end in pairwise(bounds)]
    assert stream(pieces, stops) == reference(text, stops)


@given(few_letters, st.lists(st.text("abc", min_size=1, max_size=6), max_size=4))
def test_no_more_is_held_back_than_could_start_a_stop(text: str, stops: list[str]) -> None:
    if any(stop in text for stop in stops):
        return
    out, _ = StopMatcher(stops).push(text)
    longest = max((length for stop in stops for length in range(len(stop)) if text.endswith(stop[:length])), default=0)
    assert out == text[: len(text) - longest]


def test_text_that_may_start_a_stop_is_held_until_it_is_decided() -> None:
    matcher = StopMatcher(["###"])
    assert matcher.push("answer #") == ("answer ", None)
    assert matcher.push("#") == ("", None)
    assert matcher.push(" no") == ("## no", None)
    assert matcher.push("#") == ("", None)
    assert matcher.push("##tail") == ("", "###")


def test_text_still_held_comes_out_at_the_end() -> None:
    matcher = StopMatcher(["\nUser:"])
    assert matcher.push("bye\nUse") == ("bye", None)
    assert matcher.finish() == "\nUse"
    assert matcher.finish() == ""


def test_of_two_stops_that_end_together_the_longer_one_is_cut_off() -> None:
    assert StopMatcher(["b", "ab"]).push("xxab") == ("xx", "ab")


def test_without_stop_strings_everything_passes_at_once() -> None:
    matcher = StopMatcher([])
    assert matcher.push("text") == ("text", None)
    assert matcher.finish() == ""


def test_an_empty_stop_string_is_a_fault_of_the_caller() -> None:
    with pytest.raises(AssertionError, match="empty stop string"):
        StopMatcher([""])
