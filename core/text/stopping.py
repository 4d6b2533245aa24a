"""Stop strings in a stream of text: found wherever pieces are cut, and never shown in part."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["StopMatcher"]


class StopMatcher:
    """Finds the first stop string in text that arrives in pieces.

    Text goes out as soon as it cannot be the start of a stop string. The stop string that ends first wins,
    and of those that end at the same character the longest. The outcome does not depend on how the text was
    cut.

    Each stop string is followed with the Knuth-Morris-Pratt automaton: work is linear in the text, however
    the stop strings repeat themselves.

    Args:
        stops: the strings, none of them empty; there may be none.

    """

    def __init__(self, stops: Sequence[str]) -> None:
        assert all(stops), "an empty stop string matches everywhere"
        self._stops = tuple(sorted(set(stops), key=len, reverse=True))
        self._failures = tuple(_failure_table(stop) for stop in self._stops)
        self._matched = [0] * len(self._stops)  # how long a prefix of each stop string the text ends with
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """Add text; return what may go out and the stop string found, or None.

        Once a stop string is found the rest of the text is dropped, and `push` must not be called again.
        """
        if not self._stops:
            return text, None
        pending = self._held + text
        for position, character in enumerate(text, start=len(self._held) + 1):
            found = self._advance(character)
            if found is not None:
                self._held = ""
                return pending[: position - len(found)], found
        safe = len(pending) - max(self._matched)
        self._held = pending[safe:]
        return pending[:safe], None

    def finish(self) -> str:
        """The text held back: no more comes, so it starts no stop string."""
        held, self._held = self._held, ""
        self._matched = [0] * len(self._stops)
        return held

    def _advance(self, character: str) -> str | None:
        found: str | None = None
        for index, stop in enumerate(self._stops):  # longest first
            matched = self._matched[index]
            while matched and stop[matched] != character:
                matched = self._failures[index][matched - 1]
            if stop[matched] == character:
                matched += 1
            self._matched[index] = matched
            if matched == len(stop):
                found = stop
                break
        return found


def _failure_table(pattern: str) -> list[int]:
    """For each prefix, the length of its longest proper suffix that is also a prefix of the pattern."""
    table = [0] * len(pattern)
    length = 0
    for index in range(1, len(pattern)):
        while length and pattern[length] != pattern[index]:
            length = table[length - 1]
        if pattern[length] == pattern[index]:
            length += 1
        table[index] = length
    return table
