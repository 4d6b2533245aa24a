"""Attention of a step of one token, with what brings Q, K and V into place: one launch of ``ops/attend.cu``."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

from mortice.core.model.kv_types import kv_cache_bytes
from mortice.core.model.operators import Attention, Buffer
from mortice.core.model.program import KvShape
from mortice.core.plugin.kv_pages import PAGE_TOKENS
from mortice.plugins.executors.cuda.fusion import PlaceGroup
from mortice.plugins.executors.cuda.launches import Addresses, LaunchSpec, StepRows, rope_key
from mortice.plugins.executors.cuda.sources import KernelSources

__all__ = ["attend", "attend_fits", "attend_threads"]

_MOST_PAGE_BYTES = 80 << 10
"""Of K and V, where a block has 99 KiB of shared memory."""


def attend_threads(attention: Attention, kv_type: str) -> int:
    """Threads of a block: fewer than 512 where most would idle, or where 64 registers each are too few."""
    values = attention.num_heads // attention.num_kv_heads * attention.head_dim
    return 512 if values > 256 and not attention.softcap and kv_type != "q8_0" else 256


def attend_fits(attention: Attention, kv_type: str, *, bulk_copies: bool) -> bool:
    """Whether a page of one KV head fits a block's shared memory; cards with bulk copies have room for every type."""
    page = kv_cache_bytes(KvShape(num_kv_heads=1, head_dim=attention.head_dim), kv_type, PAGE_TOKENS)
    return bulk_copies or page <= _MOST_PAGE_BYTES


class _AttendArgs(ctypes.Structure):
    """Mirror of ``AttendArgs`` in ``ops/attend.cu``."""

    _fields_ = [
        *((name, ctypes.c_uint64) for name in ("q", "k", "v", "keys", "values", "out", "partial", "arrivals")),
        *((name, ctypes.c_uint64) for name in ("q_norm", "k_norm", "frequencies")),
        ("rows", StepRows),
        *((name, ctypes.c_float) for name in ("q_eps", "k_eps", "magnitude", "scale", "softcap")),
        *((name, ctypes.c_int32) for name in ("window", "splits")),
    ]


def attend(
    place: PlaceGroup,
    sources: KernelSources,
    kv_type: str,
    splits: int,
    sm_count: int,
    buffer: Callable[[Addresses, Buffer], int],
) -> LaunchSpec:
    """The launch.

    Args:
        place: what is done, with its attention.
        sources: makes kernel sources.
        kv_type: element type of the cache.
        splits: parts the context is attended in at most.
        sm_count: multiprocessors of the card; each gets a block.
        buffer: where a buffer lies.

    """
    attention = place.attention
    assert attention.layer is not None
    layer = attention.layer
    threads = attend_threads(attention, kv_type)

    def args(at: Addresses, _: int) -> tuple[Any, ...]:
        q, k, v = place.sources
        filled = _AttendArgs(
            q=buffer(at, q),
            k=buffer(at, k),
            v=buffer(at, v),
            keys=at.keys[layer],
            values=at.values[layer],
            out=buffer(at, attention.out),
            partial=at.partial,
            arrivals=at.arrivals,
            rows=at.rows,
            scale=attention.scale,
            softcap=attention.softcap,
            window=attention.window,
            splits=splits,
        )
        if place.q_norm is not None and place.k_norm is not None:
            filled.q_norm, filled.q_eps = at.weights[place.q_norm.weight], place.q_norm.eps
            filled.k_norm, filled.k_eps = at.weights[place.k_norm.weight], place.k_norm.eps
        if place.q_rope is not None:
            filled.frequencies, filled.magnitude = at.frequencies[rope_key(place.q_rope)]
        return (filled,)

    return LaunchSpec(
        name="+".join(operator.name for operator in (*place.operators, attention)),
        label="attention",
        source=sources.attend(place, kv_type, splits, threads),
        entry="attend",
        block=threads,
        shared_symbol="shared_bytes",
        grid=lambda _rows, _at_once: (max(sm_count, attention.num_kv_heads * splits), 1, 1),
        args=args,
        outputs=attention.outputs,
    )
