"""Attention of tokens of different sequences with what places Q, K and V: one launch of ``ops/attend.cu``."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

from attrs import frozen

from mortice.core.model.kv_types import kv_cache_bytes
from mortice.core.model.operators import Attention, Buffer
from mortice.core.model.program import KvShape
from mortice.core.plugin.kv_pages import PAGE_TOKENS
from mortice.plugins.executors.cuda.lowering.ahead import MOST_AHEAD, AheadArgs, AheadWeight
from mortice.plugins.executors.cuda.lowering.attend_rows import rows_kernel
from mortice.plugins.executors.cuda.lowering.fusion import PlaceGroup, name_of
from mortice.plugins.executors.cuda.lowering.launches import Addresses, LaunchSpec, StepRows, rope_key
from mortice.plugins.executors.cuda.lowering.linear_args import LeftArgs
from mortice.plugins.executors.cuda.lowering.sources import KernelSources

__all__ = ["LeftRuns", "attend", "attend_fits", "attend_tensor", "attend_threads", "left_runs"]

_MOST_PAGE_BYTES = 80 << 10
"""Of K and V, where a block has 99 KiB of shared memory."""

_MANY_RUNS_COLUMNS = 2048
"""Of a row whose reader has registers for many runs."""


def attend_tensor(attention: Attention, kv_type: str) -> bool:
    """Whether tensor cores attend, which here loses nothing: see ``ops/attend_tensor.cuh``."""
    return kv_type == "f16" and rows_kernel(attention, kv_type, exact=False).name == "attention_rows"


def attend_threads(attention: Attention, kv_type: str) -> int:
    """Threads of a block.

    On tensor cores eight warps attend, and each head is brought by a warp of its own if registers allow it. Else fewer
    than 512 where most would idle, or where 64 registers each are too few.
    """
    group = attention.num_heads // attention.num_kv_heads
    if attend_tensor(attention, kv_type):
        return 32 * max(8, group + 2) if attention.head_dim <= 128 else 256
    return 512 if group * attention.head_dim > 256 and not attention.softcap and kv_type != "q8_0" else 256


def attend_fits(attention: Attention, kv_type: str, *, bulk_copies: bool) -> bool:
    """Whether a page of one KV head fits a block's shared memory; cards with bulk copies have room for every type."""
    page = kv_cache_bytes(KvShape(num_kv_heads=1, head_dim=attention.head_dim), kv_type, PAGE_TOKENS)
    return bulk_copies or page <= _MOST_PAGE_BYTES


def left_runs(attention: Attention) -> int:
    """Runs of a context that attention leaves to who reads its result, at most; more are joined by attention.

    A thread of the reader asks for the same columns of all runs at once: of wide rows its registers hold fewer.
    """
    return 8 if attention.num_heads * attention.head_dim <= _MANY_RUNS_COLUMNS else 4


@frozen(kw_only=True)
class LeftRuns:
    """What attention leaves to the group of linear maps that reads its result; see ``ops/gemv_input.cuh``.

    Attributes:
        attention: whose result it is.
        splits: parts the context is attended in at most.

    """

    attention: Attention
    splits: int

    def args(self, at: Addresses) -> LeftArgs:
        """Where it lies."""
        return LeftArgs(
            partial=at.partial, position=at.rows.positions, window=self.attention.window, splits=self.splits
        )


class _AttendArgs(ctypes.Structure):
    """Mirror of ``AttendArgs`` in ``ops/attend.cu``."""

    _fields_ = [
        *((name, ctypes.c_uint64) for name in ("q", "k", "v", "keys", "values", "out", "partial", "arrivals")),
        *((name, ctypes.c_uint64) for name in ("q_norm", "k_norm", "frequencies")),
        ("rows", StepRows),
        *((name, ctypes.c_float) for name in ("q_eps", "k_eps", "magnitude", "scale", "softcap")),
        *((name, ctypes.c_int32) for name in ("window", "splits", "left_runs")),
        ("ahead", AheadArgs * MOST_AHEAD),
    ]


def attend(
    place: PlaceGroup,
    sources: KernelSources,
    kv_type: str,
    splits: Callable[[int], int],
    sm_count: int,
    blocks: int,
    left: int,
    ahead: Sequence[AheadWeight],
    buffer: Callable[[Addresses, Buffer], int],
) -> LaunchSpec:
    """The launch.

    Args:
        place: what is done, with its attention.
        sources: makes kernel sources.
        kv_type: element type of the cache.
        splits: parts the context of each of so many rows is attended in at most.
        sm_count: multiprocessors of the card; each gets a block.
        blocks: of a multiprocessor.
        left: runs of the context that are left to who reads the result, at most.
        ahead: what blocks without a part of the context ask the L2 cache for.
        buffer: where a buffer lies.

    """
    attention = place.attention
    assert attention.layer is not None
    layer = attention.layer
    threads = attend_threads(attention, kv_type)

    def args(at: Addresses, rows: int) -> tuple[Any, ...]:
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
            splits=splits(rows),
            left_runs=left,
            ahead=(AheadArgs * MOST_AHEAD)(*(weight.args(at) for weight in ahead)),
        )
        if place.q_norm is not None and place.k_norm is not None:
            filled.q_norm, filled.q_eps = at.weights[place.q_norm.weight], place.q_norm.eps
            filled.k_norm, filled.k_eps = at.weights[place.k_norm.weight], place.k_norm.eps
        if place.q_rope is not None:
            filled.frequencies, filled.magnitude = at.frequencies[rope_key(place.q_rope)]
        return (filled,)

    return LaunchSpec(
        name=name_of((*place.operators, attention)),
        label="attention",
        source=sources.attend(place, kv_type, threads, blocks, tensor=attend_tensor(attention, kv_type)),
        entry="attend",
        block=threads,
        shared_symbol="shared_bytes",
        grid=lambda rows, _: (max(sm_count // rows, attention.num_kv_heads * splits(rows)), rows, 1),
        args=args,
        outputs=() if left else attention.outputs,
    )
