"""From how many rows on which way of multiplying is the fastest: figures of one card, and the choice by times measured.

`run.tuning` takes the times, `run.tuned` keeps what was chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from attrs import frozen

from mortice.core.plugin.interfaces import RuntimeSettings
from mortice.plugins.executors.cuda.lowering.matmul import GEMM_FROM_ROWS, MATMUL_TILES
from mortice.plugins.executors.cuda.lowering.matmul_ring import RING_ROWS

__all__ = [
    "GEMM_CANDIDATES",
    "RING_CANDIDATES",
    "RowCrossovers",
    "Timing",
    "Way",
    "choose_crossovers",
    "gemm_thresholds",
]

Way = Literal["matmul", "ring", "gemm"]
"""``ops/matmul.cu``, or ``ops/matmul_wgmma.cu`` in its stead; ``ops/matmul_ring.cu``; weights expanded to memory and
cuBLAS."""

RING_CANDIDATES = (0, *(tile.rows for tile in MATMUL_TILES if tile.rows <= RING_ROWS))
"""What `RowCrossovers.ring_rows` may be: each tile of the other kernels that it can stand in for."""

GEMM_CANDIDATES = (33, 65, 129, 193, 257)
"""What `RowCrossovers.gemm_from_rows` may be: one more than whole passes of the other kernels."""

_BY_CHANCE = 0.02
"""Of a step's time, that another way than the built-in figures' has to save before it takes its place."""


@frozen(kw_only=True)
class RowCrossovers:
    """By how many rows of a step its products go which way. The defaults were measured on an H100.

    Attributes:
        ring_rows: up to so many, and from 2, by ``ops/matmul_ring.cu``, as far as card and shapes allow.
        gemm_from_rows: from so many on by cuBLAS, where there is one.

    """

    ring_rows: int = RING_ROWS
    gemm_from_rows: int = GEMM_FROM_ROWS


def gemm_thresholds(settings: RuntimeSettings) -> tuple[int, ...]:
    """The fewest and the most rows that products may go by cuBLAS from: memory serves all between as well."""
    return (GEMM_FROM_ROWS,) if settings.tuning == "off" else (GEMM_CANDIDATES[0], GEMM_CANDIDATES[-1])


@frozen(kw_only=True)
class Timing:
    """What the products of a step take, one way and another.

    Attributes:
        least: rows of the shortest step that this stands for.
        most: rows of the longest.
        rows: of the step that was timed.
        seconds: by way.

    """

    least: int
    most: int
    rows: int
    seconds: Mapping[Way, float]


def choose_crossovers(timings: Sequence[Timing]) -> RowCrossovers:
    """The crossovers with which the steps timed take the least, each seen as a share of its fastest way.

    The defaults stay where nothing was timed, or nothing is faster by more than chance.
    """
    default = RowCrossovers()
    rings = [timing for timing in timings if "ring" in timing.seconds]
    gemms = [timing for timing in timings if "gemm" in timing.seconds]
    return RowCrossovers(
        ring_rows=_fastest(rings, _by_rings, default.ring_rows, RING_CANDIDATES),
        gemm_from_rows=_fastest(gemms, _by_gemm, default.gemm_from_rows, GEMM_CANDIDATES),
    )


def _by_rings(timing: Timing, ring_rows: int) -> Way:
    return "ring" if timing.most <= ring_rows else "matmul"


def _by_gemm(timing: Timing, gemm_from_rows: int) -> Way:
    return "gemm" if timing.least >= gemm_from_rows else "matmul"


def _fastest(
    timings: Sequence[Timing], way: Callable[[Timing, int], Way], default: int, candidates: Sequence[int]
) -> int:
    def cost(at: int) -> float:
        return sum(timing.seconds[way(timing, at)] / min(timing.seconds.values()) for timing in timings)

    best = min(candidates, key=cost)
    changed = sum(way(timing, best) != way(timing, default) for timing in timings)
    return best if cost(default) - cost(best) > _BY_CHANCE * changed else default
