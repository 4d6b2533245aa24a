"""Attention of runs of rows of a sequence, one launch of ``ops/attention_prefill.cu``; it leaves out all other rows."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

from mortice.core.model import operators as op
from mortice.core.model.operators import Buffer
from mortice.plugins.executors.cuda.lowering.launches import Addresses, LaunchSpec, StepRows
from mortice.plugins.executors.cuda.lowering.matmul import AttentionTile
from mortice.plugins.executors.cuda.lowering.sources import KernelSources

__all__ = ["RunsArgs", "attend_runs"]


class RunsArgs(ctypes.Structure):
    """Mirror of ``AttentionArgs`` in ``ops/attention_prefill.cu``."""

    _fields_ = [
        *((name, ctypes.c_uint64) for name in ("q", "keys", "values", "out")),
        ("rows", StepRows),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("window", ctypes.c_int32),
        ("count", ctypes.c_int32),
    ]


def attend_runs(
    attention: op.Attention,
    tile: AttentionTile,
    sources: KernelSources,
    kv_type: str,
    buffer: Callable[[Addresses, Buffer], int],
) -> LaunchSpec:
    """The launch.

    Args:
        attention: what is done.
        tile: what a block takes.
        sources: makes kernel sources.
        kv_type: element type of the cache.
        buffer: where a buffer lies.

    """
    assert attention.layer is not None
    layer = attention.layer

    def args(at: Addresses, rows: int) -> tuple[Any, ...]:
        filled = RunsArgs(
            q=buffer(at, attention.src),
            keys=at.keys[layer],
            values=at.values[layer],
            out=buffer(at, attention.out),
            rows=at.rows,
            scale=attention.scale,
            softcap=attention.softcap,
            window=attention.window,
            count=rows,
        )
        return (filled,)

    return LaunchSpec(
        name=attention.name,
        label="attention of runs",
        source=sources.attention_prefill(attention, kv_type, tile),
        entry="attention_prefill",
        block=tile.threads,
        shared_symbol="shared_bytes",
        grid=lambda rows, _: (-(-rows // tile.rows), attention.num_heads // tile.heads, 1),
        args=args,
    )
