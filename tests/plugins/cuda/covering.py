"""A small set of kernel compilations that covers the ways compile-time constants and architectures meet."""

from __future__ import annotations

import heapq
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import reduce
from itertools import combinations, groupby
from operator import itemgetter, or_

from attrs import frozen

from mortice.plugins.executors.cuda.compile.nvrtc import Source

__all__ = ["covering_set"]

Meeting = tuple[str, ...]
"""Facts that meet in a compilation."""

_WEIGHTS = {"SEGMENTS", "WEIGHT", "QTYPE"}
"""Say which types, and how their tiles lie."""
_SIZES = re.compile(
    r"COLS|DIMS|\w+_HEADS|SLICES|(SLICE_)?STEPS|SPLITS|THREADS|WARPS|VOCAB_SIZE|\w+_BYTES|(RING_)?SLOTS"
)
"""Numbers with many values: each value once, rather than with everything else."""
_TILING = re.compile(r"(\w+),(\d+),\d+")


@frozen
class _Facts:
    """What a source says: types, what is to meet each other, and what is to be there once."""

    types: tuple[str, ...]
    constants: tuple[str, ...]
    sizes: tuple[str, ...]
    segments: int

    @classmethod
    def of(cls, source: Source) -> _Facts:
        types: list[str] = []
        constants: list[str] = []
        sizes: list[str] = []
        segments = 0
        for name, value in source.defines:
            if name == "RING_SLOTS":
                constants.append(f"rings={bool(value)}")
            if name not in _WEIGHTS:
                (sizes if _SIZES.fullmatch(name) else constants).append(f"{name}={value}")
                continue
            tilings = _TILING.findall(str(value))
            types += (f"type={qtype}" for qtype, _ in tilings)
            if name == "SEGMENTS":
                segments = len(tilings)
                constants.append(f"segments={segments}")
                sizes.append(f"tile rows={' '.join(rows for _, rows in tilings)}")
        return cls(tuple(dict.fromkeys(types)), tuple(constants), tuple(sizes), segments)

    def meetings(self) -> Iterator[Meeting]:
        """What meets on any architecture."""
        everything = (*self.constants, *self.types)
        yield from ((fact,) for fact in (*everything, *self.sizes))
        yield from map(tuple, map(sorted, combinations(everything, 2)))

    def meetings_with(self, arch: str, *, types: bool) -> Iterator[Meeting]:
        yield (arch,)
        yield from ((arch, fact) for fact in (*self.constants, *(self.types if types else ())))


def covering_set(
    wanted: Mapping[Source, Collection[str]], *, types_elsewhere: Collection[str] = ()
) -> dict[str, list[Source]]:
    """For each architecture the sources to compile, so that all pairs within a kernel file are there.

    Pairs of two constants, of a constant and a weight type, of two weight types, and of each of these with an
    architecture; of widths and counts each value, with nothing in particular. Greedy: next comes the compilation that
    adds most for its price, which grows with the segments of a launch.

    Args:
        wanted: what to choose from, each with the architectures that can be asked for it.
        types_elsewhere: kernel files that something else compiles for every type and architecture.

    """
    files: dict[str, list[Source]] = defaultdict(list)
    for source in sorted(wanted, key=str):
        files[source.name].append(source)
    chosen: dict[str, list[Source]] = defaultdict(list)
    for name, candidates in files.items():
        pairs = [(source, arch) for turn, source in enumerate(candidates) for arch in _turned(wanted[source], turn)]
        for source, arch in _cover(pairs, types=name not in types_elsewhere):
            chosen[arch].append(source)
    return chosen


def _turned(archs: Collection[str], turn: int) -> list[str]:
    """Another architecture first each time: of compilations that add the same, the first is taken."""
    ordered = sorted(archs)
    start = turn % len(ordered)
    return ordered[start:] + ordered[:start]


Compilation = tuple[Source, str]


def _cover(candidates: Iterable[Compilation], *, types: bool) -> Iterator[Compilation]:
    """Compilations of one kernel file that together have every meeting."""
    numbers: dict[Meeting, int] = {}

    def mask(meetings: Iterable[Meeting]) -> int:
        """A set of meetings as bits."""
        return reduce(or_, (1 << numbers.setdefault(meeting, len(numbers)) for meeting in meetings), 0)

    prices: dict[int, tuple[int, Compilation]] = {}
    for source, same in groupby(candidates, key=itemgetter(0)):
        facts = _Facts.of(source)
        price = 1 + facts.segments
        anywhere = mask(facts.meetings())
        for _, arch in same:
            meetings = anywhere | mask(facts.meetings_with(arch, types=types))
            if meetings not in prices or price < prices[meetings][0]:
                prices[meetings] = price, (source, arch)

    left = reduce(or_, prices, 0)
    # gains only shrink, so an old one bounds the new one: the first whose gain is up to date is the best
    queue = [(-float("inf"), number, meetings) for number, meetings in enumerate(prices)]
    while left:
        bound, number, meetings = heapq.heappop(queue)
        price, compilation = prices[meetings]
        gain = (meetings & left).bit_count() / price
        if gain < -bound:
            heapq.heappush(queue, (-gain, number, meetings))
            continue
        yield compilation
        left &= ~meetings
