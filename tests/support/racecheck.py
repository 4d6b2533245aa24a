"""A pytest plugin for compute-sanitizer's racecheck: all lanes arrive at barriers (``ops/matmul_ring_parts.cuh``)."""

from __future__ import annotations

from mortice.core.model.operators import Norm
from mortice.plugins.executors.cuda.lowering import sources
from mortice.plugins.executors.cuda.lowering.matmul_ring import RingShape

_defines = sources.ring_defines


def _defines_for_racecheck(
    shape: RingShape, norm: Norm | None, *, gated: bool, activation: str | None
) -> dict[str, str | int]:
    return _defines(shape, norm, gated=gated, activation=activation) | {"ARRIVING_LANES": 32}


def pytest_configure() -> None:
    """Compile the kernels so in this process."""
    sources.ring_defines = _defines_for_racecheck
