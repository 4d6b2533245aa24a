"""A small set of kernel compilations that covers the ways compile-time constants and architectures meet."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import combinations

from mortice.plugins.executors.cuda.nvrtc import Source

__all__ = ["covering_set"]

Meeting = tuple[str, ...]
"""A kernel file and the facts that meet in it."""

_WEIGHTS = {"SEGMENTS", "WEIGHT", "QTYPE"}
"""Say which types, and how their tiles lie."""
_SIZES = {"COLS", "DIMS", "KV_HEADS", "Q_HEADS", "SLICES", "SLICE_STEPS", "SPLITS", "THREADS"}
"""Numbers with many values: each value once, rather than with everything else."""
_TILING = re.compile(r"(\w+),(\d+),\d+")


def _meetings(source: Source, arch: str) -> set[Meeting]:
    facts = [f"arch={arch}"]
    once: list[str] = []
    for name, value in source.defines:
        if name not in _WEIGHTS:
            (once if name in _SIZES else facts).append(f"{name}={value}")
            continue
        tilings = _TILING.findall(str(value))
        facts += dict.fromkeys(f"type={qtype}" for qtype, _ in tilings)
        if name == "SEGMENTS":
            facts.append(f"segments={len(tilings)}")
            once.append(f"tile rows={' '.join(rows for _, rows in tilings)}")
    pairs = {(source.name, *sorted(pair)) for pair in combinations(facts, 2)}
    return pairs | {(source.name, fact) for fact in (*facts, *once)}


def covering_set(sources: Iterable[Source], archs: Sequence[str]) -> dict[str, list[Source]]:
    """For each architecture the sources to compile, so that all pairs within a kernel file are there.

    Pairs of two constants, of a constant and a weight type, of two weight types, and of each of these with an
    architecture; of widths and counts each value, with nothing in particular. Greedy: each source in turn goes to the
    architecture where it adds most, and stays out where it adds nothing.
    """
    wanted = sorted(set(sources), key=str)
    meetings = {(source, arch): _meetings(source, arch) for source in wanted for arch in archs}
    left = set().union(*meetings.values())
    chosen: dict[str, list[Source]] = defaultdict(list)
    for least in (8, 4, 2, 1):  # the most useful first
        for source in wanted:
            while True:
                gains = {arch: len(meetings[source, arch] & left) for arch in archs}
                best = max(archs, key=lambda arch: gains[arch])
                if gains[best] < least:
                    break
                chosen[best].append(source)
                left -= meetings[source, best]
    assert not left
    return chosen
