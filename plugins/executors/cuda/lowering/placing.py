"""Where a program's buffers and the scratch of its kernels lie, and how much they take: known before any weight is."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from mortice.core.model import operators as op
from mortice.core.model.operators import Buffer
from mortice.core.model.program import Program
from mortice.plugins.executors.cuda.device.cublas import WORKSPACE_BYTES
from mortice.plugins.executors.cuda.lowering.attend_rows import LEAST_WARPS
from mortice.plugins.executors.cuda.lowering.fusion import Group, LinearGroup, PlaceGroup, fuse
from mortice.plugins.executors.cuda.lowering.matmul import (
    GEMM_FROM_ROWS,
    GEMV_PASS,
    MatmulScratch,
    joint_scratch,
    matmul_scratch,
    row_paths,
)
from mortice.plugins.executors.cuda.lowering.workspace import Workspace, place_buffers

__all__ = [
    "LOGIT_ROWS",
    "PARTIAL_ROWS",
    "SPREAD_ROWS",
    "attention_splits",
    "linear_groups",
    "matmul_bytes",
    "place_products",
    "place_program",
    "row_splits",
    "scratch_bytes",
]

LOGIT_ROWS = 32
"""Rows the head runs over at once; the logits of more are taken in several runs."""

PARTIAL_ROWS = 32
"""Rows whose attention may be split along the context, each by itself; more fill the card without."""

SPREAD_ROWS = 8
"""Rows, each of a sequence of its own, that attend with one block a multiprocessor: fastest, as measured with 2 and 8
(docs/design/prefill-performance.md). More take two, for 9 rows and 8 KV heads would leave half of the card idle."""

_MOST_SPLITS = 64

_ATTENTION_WARPS = 16
"""Of a multiprocessor, that contexts are split for: measured, see docs/design/prefill-performance.md."""

_PROGRAMS_KEPT = 4
"""Programs whose places are remembered: whether a context fits is asked for many contexts of one program."""


def place_program(program: Program, rows: int) -> tuple[list[Group], Workspace]:
    """The groups of a program, and where their buffers lie for `rows` tokens.

    What the head writes has room for `LOGIT_ROWS` only: the logits of a whole prompt would dwarf everything else. So it
    may run several times, and what it reads of the body stays until the end.
    """
    groups, workspace = _placed(program, rows)
    return list(groups), workspace


@lru_cache(maxsize=_PROGRAMS_KEPT)
def _fused(program: Program) -> tuple[Group, ...]:
    return tuple(fuse(program.operators, program.logits))


@lru_cache(maxsize=_PROGRAMS_KEPT)
def _placed(program: Program, rows: int) -> tuple[tuple[Group, ...], Workspace]:
    groups = _fused(program)
    uses: list[tuple[Sequence[Buffer], Sequence[Buffer]]] = []
    few: set[Buffer] = set()
    kept: dict[Buffer, None] = {program.logits: None}  # ordered, so that places are the same in every run
    in_head = False
    for group in groups:
        if isinstance(group, LinearGroup):
            added = (group.added,) if group.added is not None else ()
            uses.append(((group.source, *added), group.outputs))
        elif isinstance(group, PlaceGroup):
            uses.append((group.sources, group.outputs))
        else:
            in_head = in_head or isinstance(group.operator, op.SelectRows)
            uses.append((group.operator.inputs, group.operator.outputs))
        if in_head:
            kept.update((buffer, None) for buffer in uses[-1][0] if buffer not in few)
            few.update(uses[-1][1])
    padded = -(-rows // GEMV_PASS) * GEMV_PASS
    return groups, place_buffers(uses, lambda buffer: LOGIT_ROWS if buffer in few else padded, list(kept))


def linear_groups(groups: Sequence[Group], rows: int) -> list[tuple[LinearGroup, int]]:
    """The groups of linear maps, with the most rows each is given in steps of up to `rows`."""
    found = []
    for group in groups:
        if isinstance(group, LinearGroup):
            found.append((group, rows))
        elif isinstance(group.operators[0], op.SelectRows):
            rows = min(rows, LOGIT_ROWS)
    return found


def place_products(
    groups: Sequence[Group],
    sm_count: int,
    rows: int,
    *,
    exact: bool,
    cublas: bool,
    gemm_from: Sequence[int] = (GEMM_FROM_ROWS,),
) -> MatmulScratch:
    """What products of up to `rows` rows work in, from whichever of the numbers `gemm_from` on by cuBLAS."""
    linears = linear_groups(groups, rows)
    paths = (row_paths(rows, exact=exact, cublas=cublas, gemm_from_rows=each) for each in gemm_from)
    return joint_scratch([matmul_scratch(linears, each, sm_count, WORKSPACE_BYTES) for each in paths])


@lru_cache(maxsize=_PROGRAMS_KEPT)
def matmul_bytes(
    program: Program,
    sm_count: int,
    rows: int,
    *,
    exact: bool,
    cublas: bool,
    gemm_from: Sequence[int] = (GEMM_FROM_ROWS,),
) -> int:
    """Bytes of `place_products`."""
    return place_products(_fused(program), sm_count, rows, exact=exact, cublas=cublas, gemm_from=gemm_from).nbytes


def attention_splits(program: Program, sm_count: int) -> int:
    """Parts the context of one row is attended in at most."""
    return min(_MOST_SPLITS, _attention_parts(program, sm_count))


def row_splits(attention: op.Attention, warps: int, rows: int, sm_count: int) -> int:
    """Parts the context of each of so many rows is attended in, with so many warps a block."""
    if rows > PARTIAL_ROWS:
        return 1
    return max(1, min(_MOST_SPLITS, _ATTENTION_WARPS * sm_count // (warps * attention.num_kv_heads * rows)))


def _attention_parts(program: Program, sm_count: int) -> int:
    """Parts that the contexts of all rows of a step are attended in at most, of each KV head: those of split ones."""
    kv_heads = min(shape.num_kv_heads for shape in program.kv)
    return max(1, -(-_ATTENTION_WARPS * sm_count // (LEAST_WARPS * kv_heads)))


def scratch_bytes(program: Program, sm_count: int, rows: int) -> tuple[int, int]:
    """Bytes of split attention's partial sums, and of its counters."""
    attentions = [o for o in program.operators if isinstance(o, op.Attention)]
    widest = max((o.num_heads * (o.head_dim + 2) for o in attentions), default=1)
    heads = max((o.num_kv_heads for o in attentions), default=1)
    return 4 * _attention_parts(program, sm_count) * widest, 4 * rows * heads
