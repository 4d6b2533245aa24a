"""What a lowered program consists of: launches of kernels and products by cuBLAS, and where their arguments lie."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from attrs import frozen

from mortice.core.model.operators import Buffer, Rope, WeightRef
from mortice.plugins.executors.cuda.compile.nvrtc import Source
from mortice.plugins.executors.cuda.device.cublas import Gemm
from mortice.plugins.executors.cuda.device.stream import Stream

__all__ = ["MAX_SEQUENCES", "Addresses", "GemmSpec", "LaunchSpec", "Queued", "Spec", "StepRows", "rope_key"]

MAX_SEQUENCES = 32
"""Sequences that may be open at once."""


class StepRows(ctypes.Structure):
    """Mirror of ``StepRows`` in ``ops/kv_cache.cuh``."""

    _fields_ = [(name, ctypes.c_uint64) for name in ("token_ids", "positions", "tables", "pages")]


@frozen(eq=False, kw_only=True)
class Addresses:
    """Where things lie on the device.

    Attributes:
        weights: address of each planned weight, by its reference.
        workspace: start of the workspace.
        matmul: start of what products of many rows work in.
        keys: start of each layer's K pages.
        values: start of each layer's V pages.
        rows: the step's rows.
        selected: row numbers for `SelectRows`.
        partial: scratch of split attention.
        arrivals: counters of split attention.
        frequencies: RoPE's tables by (operator's constants).

    """

    weights: Mapping[WeightRef, int]
    workspace: int
    matmul: int
    keys: Sequence[int]
    values: Sequence[int]
    rows: StepRows
    selected: int
    partial: int
    arrivals: int
    frequencies: Mapping[object, tuple[int, float]]


@frozen(eq=False, kw_only=True)
class LaunchSpec:
    """One kernel launch: source and entry, and what it needs at a number of rows.

    Attributes:
        name: the operators done, for tables and errors.
        label: what kind of work it is, to add up equal ones.
        source: what is compiled.
        entry: the kernel's name.
        block: threads.
        shared_symbol: the constant of the source that says how much dynamic shared memory it wants; none without.
        grid: blocks for (rows, blocks the card runs at once).
        args: arguments for (addresses, rows).
        outputs: the buffers that are complete when it is done.

    """

    name: str
    label: str
    source: Source
    entry: str
    block: int
    shared_symbol: str = ""
    grid: Callable[[int, int], tuple[int, int, int]]
    args: Callable[[Addresses, int], tuple[Any, ...]]
    outputs: tuple[Buffer, ...] = ()


@frozen(eq=False, kw_only=True)
class GemmSpec:
    """One product by cuBLAS.

    Attributes:
        name: the operators it is part of.
        label: what kind of work it is.
        gemm: shapes and addresses for (addresses, rows).
        outputs: the buffers that are complete when it is done: none, for what follows it writes them.

    """

    name: str
    label: str = "gemm"
    gemm: Callable[[Addresses, int], Gemm]
    outputs: tuple[Buffer, ...] = ()


Spec = LaunchSpec | GemmSpec

Queued = Callable[[Stream], None]
"""Puts one piece of work on a stream."""


def rope_key(o: Rope) -> object:
    """What a RoPE table depends on."""
    return (o.dims, o.base, o.scaling, o.factors)
