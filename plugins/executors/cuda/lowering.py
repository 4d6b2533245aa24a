"""Lowers a program to kernel launches: the same lowering for one token and for many.

A launch is described by what it runs and where its arguments lie; nothing here depends on a token, a position or a
length. Those are read by the kernels from the step's rows on the device.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

from attrs import define, evolve, field

from mortice.core.errors import ExecutionError
from mortice.core.model import operators as op
from mortice.core.model.operators import Buffer, Operator, WeightRef
from mortice.core.model.weight_plan import WeightPlan
from mortice.plugins.executors.cuda.attend import LeftRuns, attend, attend_fits, left_runs
from mortice.plugins.executors.cuda.attend_rows import rows_kernel
from mortice.plugins.executors.cuda.attend_runs import attend_runs
from mortice.plugins.executors.cuda.crossovers import RowCrossovers
from mortice.plugins.executors.cuda.fusion import Group, LinearGroup, PlaceGroup, SingleGroup
from mortice.plugins.executors.cuda.launches import Addresses, LaunchSpec, Spec, StepRows, rope_key
from mortice.plugins.executors.cuda.linear import LinearLowering
from mortice.plugins.executors.cuda.matmul import (
    MatmulScratch,
    RowPath,
    attention_tile,
    row_path,
    row_paths,
)
from mortice.plugins.executors.cuda.placing import (
    LOGIT_ROWS,
    PARTIAL_ROWS,
    attention_splits,
    place_products,
    place_program,
    row_splits,
)
from mortice.plugins.executors.cuda.sources import KernelSources
from mortice.plugins.executors.cuda.workspace import Workspace

__all__ = ["Lowering"]

_ACT_KINDS = {"silu": 1, "gelu_tanh": 2, "gelu_erf": 3, "relu": 4, "relu_squared": 5}

Pointer, Int, Float = ctypes.c_uint64, ctypes.c_int32, ctypes.c_float


class _AttentionArgs(ctypes.Structure):
    _fields_ = [
        *((name, Pointer) for name in ("q", "keys", "values", "out", "partial", "arrivals")),
        ("rows", StepRows),
        ("scale", Float),
        ("softcap", Float),
        ("window", Int),
        ("splits", Int),
    ]


class _PlaceArgs(ctypes.Structure):
    _fields_ = [
        *((name, Pointer) for name in ("q", "k", "v", "q_out", "keys", "values", "q_norm", "k_norm", "frequencies")),
        ("rows", StepRows),
        *((name, Float) for name in ("q_eps", "k_eps", "magnitude")),
    ]


@define(eq=False)
class Lowering:
    """The launches of a program.

    Attributes:
        plan: the weights.
        sources: makes kernel sources.
        rows: most rows of a step.
        kv_type: element type of the cache.
        sm_count: multiprocessors of the card.
        quantize_activations: whether products may take int8 or half-precision activations.
        cublas: whether cuBLAS is there for steps of many rows.
        bulk_copies: whether the card copies to shared memory in bulk (sm_90 and later).
        crossovers: from how many rows on which way is taken.
        other_gemm_from: other numbers of rows from which on `scratch` is to serve products by cuBLAS.
        paths: the ways that the linear maps of a step go, by rising numbers of rows.
        scratch: where products of many rows lie.
        linear: the launches of groups of linear maps.

    """

    plan: WeightPlan
    sources: KernelSources
    rows: int
    kv_type: str
    sm_count: int
    quantize_activations: bool = True
    cublas: bool = False
    bulk_copies: bool = False
    crossovers: RowCrossovers = field(factory=RowCrossovers)
    other_gemm_from: Sequence[int] = ()
    groups: list[Group] = field(init=False, repr=False)
    workspace: Workspace = field(init=False, repr=False)
    paths: tuple[RowPath, ...] = field(init=False)
    scratch: MatmulScratch = field(init=False, repr=False)
    linear: LinearLowering = field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        self.groups, self.workspace = place_program(self.plan.program, self.rows)
        exact, gemm_from_rows = not self.quantize_activations, self.crossovers.gemm_from_rows
        self.paths = row_paths(self.rows, exact=exact, cublas=self.cublas, gemm_from_rows=gemm_from_rows)
        self.scratch = place_products(
            self.groups,
            self.sm_count,
            self.rows,
            exact=exact,
            cublas=self.cublas,
            gemm_from=(gemm_from_rows, *self.other_gemm_from),
        )
        self._planned = {planned.weight: planned for planned in self.plan.weights}
        self._places = {group.attention: group for group in self.groups if isinstance(group, PlaceGroup)}
        self._read_by_linears = {group.attention for group in self.groups if isinstance(group, LinearGroup)}
        self.linear = LinearLowering(
            sources=self.sources,
            planned=self._planned,
            workspace=self.workspace,
            scratch=self.scratch,
            sm_count=self.sm_count,
            quantize_activations=self.quantize_activations,
            bulk_copies=self.bulk_copies,
            ring_rows=self.crossovers.ring_rows,
        )

    _planned: dict[WeightRef, Any] = field(init=False, repr=False)
    _places: dict[Operator, PlaceGroup] = field(init=False, repr=False)
    _read_by_linears: set[op.Attention | None] = field(init=False, repr=False)

    @property
    def splits(self) -> int:
        """Parts a row's context is attended in at most."""
        return attention_splits(self.plan.program, self.sm_count)

    def path(self, rows: int) -> RowPath:
        """The way that the linear maps of a step of `rows` rows go."""
        return row_path(self.paths, rows)

    def launches(self, path: RowPath) -> tuple[list[Spec], list[Spec]]:
        """What the body and the head queue when a step goes by `path`; no head for ways only longer steps go."""
        body: list[Spec] = []
        head: list[Spec] = []
        target = body
        has_head = path in {self.path(rows) for rows in range(1, LOGIT_ROWS + 1)}
        for i, group in enumerate(self.groups):
            if isinstance(group, SingleGroup) and isinstance(group.operator, op.SelectRows):
                if not has_head:
                    break
                target = head
            if isinstance(group, LinearGroup):
                around = (self.groups[i - 1] if i else None, self.groups[i + 1] if i + 1 < len(self.groups) else None)
                before, after = (other if isinstance(other, LinearGroup) else None for other in around)
                target += self.linear.launches(group, path, before, after, self._left(group.attention, path))
            else:
                target += self._others(group, path)
        return body, head

    def _others(self, group: SingleGroup | PlaceGroup, path: RowPath) -> list[Spec]:
        place = group if isinstance(group, PlaceGroup) else self._places.get(group.operator)
        if place is not None and self._is_one_launch(place, path):
            if isinstance(group, PlaceGroup):
                return []
            left = left_runs(place.attention) if place.attention in self._read_by_linears else 0
            splits = self._runs(place.attention)
            return [attend(place, self.sources, self.kv_type, splits, self.sm_count, left, self._buffer)]
        if isinstance(group, PlaceGroup):
            specs: list[Spec] = [self._place(group)]
        elif isinstance(group.operator, op.Attention):
            specs = self._attention(group.operator, path)
        else:
            specs = [self._single(group.operator)]
        return [*specs[:-1], evolve(specs[-1], outputs=group.outputs)]

    def _is_one_launch(self, place: PlaceGroup, path: RowPath) -> bool:
        """Whether one launch does for what brings Q, K and V into place and attention: nothing but one token is new."""
        one_row = path.kind == "gemv" and path.rows == 1
        return one_row and attend_fits(place.attention, self.kv_type, bulk_copies=self.bulk_copies)

    def _runs(self, attention: op.Attention) -> int:
        """Parts the context of one row is attended in at most, where one launch does all."""
        return min(self.splits, max(1, self.sm_count // attention.num_kv_heads))

    def _left(self, attention: op.Attention | None, path: RowPath) -> LeftRuns | None:
        """What an attention leaves to those that read it."""
        place = self._places.get(attention) if attention is not None else None
        if attention is None or place is None or not self._is_one_launch(place, path):
            return None
        return LeftRuns(attention=attention, splits=self._runs(attention))

    def _buffer(self, at: Addresses, buffer: Buffer) -> int:
        return at.workspace + self.workspace.offsets[buffer]

    # everything else --------------------------------------------------------------------------------------------

    def _single(self, o: Operator) -> LaunchSpec:  # noqa: C901 (one case an operator)
        match o:
            case op.Embed():
                return self._embed(o, o.weight, o.out, "token_ids")
            case op.EmbedPositions():
                return self._embed(o, o.weight, o.out, "positions")
            case op.Norm():
                return self._norm(o)
            case op.Linear():
                raise AssertionError("linear maps are always in a group")
            case op.AddBias():
                return self._elementwise(
                    o, o.out, lambda at: (self._p(at, o.src), Pointer(at.weights[o.weight]), self._p(at, o.out))
                )
            case op.Rope():
                return self._rope(o)
            case op.KvWrite():
                return self._kv_write(o)
            case op.Add():
                return self._elementwise(o, o.out, lambda at: (self._p(at, o.a), self._p(at, o.b), self._p(at, o.out)))
            case op.Act():
                kind = Int(_ACT_KINDS[o.activation])
                return self._elementwise(o, o.out, lambda at: (self._p(at, o.src), self._p(at, o.out), kind))
            case op.GatedAct():
                kind = Int(_ACT_KINDS[o.activation])
                return self._elementwise(
                    o, o.out, lambda at: (self._p(at, o.gate), self._p(at, o.up), self._p(at, o.out), kind)
                )
            case op.Scale():
                return self._elementwise(o, o.out, lambda at: (self._p(at, o.src), self._p(at, o.out), Float(o.factor)))
            case op.PositionScale():
                return self._elementwise(
                    o,
                    o.out,
                    lambda at: (
                        self._p(at, o.src),
                        Pointer(at.rows.positions),
                        self._p(at, o.out),
                        Float(o.strength),
                        Int(o.period),
                    ),
                )
            case op.Softcap():
                return self._elementwise(o, o.out, lambda at: (self._p(at, o.src), self._p(at, o.out), Float(o.cap)))
            case op.SelectRows():
                return self._elementwise(
                    o, o.out, lambda at: (self._p(at, o.src), Pointer(at.selected), self._p(at, o.out))
                )
        raise ExecutionError(f"{o.name}: the CUDA executor has no {o.kind!r}")

    def _p(self, at: Addresses, buffer: Buffer) -> ctypes.c_uint64:
        return Pointer(self._buffer(at, buffer))

    def _elementwise(self, o: Operator, out: Buffer, args: Callable[[Addresses], tuple[Any, ...]]) -> LaunchSpec:
        return LaunchSpec(
            name=o.name,
            label=o.kind,
            source=self.sources.plain(),
            entry=f"op_{o.kind}",
            block=256,
            grid=lambda rows, _: (-(-out.width // 256), rows, 1),
            args=lambda at, _: (*args(at), Int(out.width)),
        )

    def _embed(self, o: Operator, weight: WeightRef, out: Buffer, ids: str) -> LaunchSpec:
        return LaunchSpec(
            name=o.name,
            label=o.kind,
            source=self.sources.embed(self._planned[weight]),
            entry="embed",
            block=128,
            grid=lambda rows, _: (rows, 1, 1),
            args=lambda at, _: (Pointer(at.weights[weight]), Pointer(getattr(at.rows, ids)), self._p(at, out)),
        )

    def _norm(self, o: op.Norm) -> LaunchSpec:
        width = o.src.width // o.groups
        per_row = o.weight.rows * o.weight.columns != width

        def args(at: Addresses, _: int) -> tuple[Any, ...]:
            bias = Pointer(at.weights[o.bias] if o.bias is not None else 0)
            head = (self._p(at, o.src), Pointer(at.weights[o.weight]), bias, self._p(at, o.out))
            return (*head, Float(o.eps), Int(width), Int(o.type == "layer"), Int(per_row))

        return LaunchSpec(
            name=o.name,
            label=o.kind,
            source=self.sources.plain(),
            entry="op_norm",
            block=256,
            grid=lambda rows, _: (o.groups, rows, 1),
            args=args,
        )

    def _rope(self, o: op.Rope) -> LaunchSpec:
        def args(at: Addresses, _: int) -> tuple[Any, ...]:
            table, magnitude = at.frequencies[rope_key(o)]
            pointers = (self._p(at, o.src), Pointer(table), Pointer(at.rows.positions), self._p(at, o.out))
            return (*pointers, Float(magnitude), Int(o.head_dim), Int(o.dims), Int(o.style == "halves"))

        return LaunchSpec(
            name=o.name,
            label=o.kind,
            source=self.sources.plain(),
            entry="op_rope",
            block=64,
            grid=lambda rows, _: (o.num_heads, rows, 1),
            args=args,
        )

    def _kv_write(self, o: op.KvWrite) -> LaunchSpec:
        assert o.layer is not None
        layer = o.layer
        return LaunchSpec(
            name=o.name,
            label=o.kind,
            source=self.sources.kv_write(self.kv_type),
            entry="kv_write",
            block=128,
            grid=lambda rows, _: (o.num_kv_heads, rows, 1),
            args=lambda at, _: (
                self._p(at, o.k),
                self._p(at, o.v),
                Pointer(at.keys[layer]),
                Pointer(at.values[layer]),
                at.rows,
                Int(o.head_dim),
            ),
        )

    def _place(self, group: PlaceGroup) -> LaunchSpec:
        write = group.write
        assert write.layer is not None
        layer = write.layer

        def args(at: Addresses, _: int) -> tuple[Any, ...]:
            q, k, v = group.sources
            filled = _PlaceArgs(
                q=self._buffer(at, q),
                k=self._buffer(at, k),
                v=self._buffer(at, v),
                q_out=self._buffer(at, group.outputs[0]),
                keys=at.keys[layer],
                values=at.values[layer],
                rows=at.rows,
            )
            if group.q_norm is not None and group.k_norm is not None:
                filled.q_norm, filled.q_eps = at.weights[group.q_norm.weight], group.q_norm.eps
                filled.k_norm, filled.k_eps = at.weights[group.k_norm.weight], group.k_norm.eps
            if group.q_rope is not None:
                filled.frequencies, filled.magnitude = at.frequencies[rope_key(group.q_rope)]
            return (filled,)

        return LaunchSpec(
            name="+".join(operator.name for operator in group.operators),
            label="place",
            source=self.sources.place(group, self.kv_type),
            entry="place",
            block=64,
            grid=lambda rows, _: (group.attention.num_heads + write.num_kv_heads, rows, 1),
            args=args,
        )

    def _attention(self, o: op.Attention, path: RowPath) -> list[Spec]:
        """Rows by themselves; in steps of many rows, those that follow one another together before."""
        tile = attention_tile(o.num_heads // o.num_kv_heads)
        many = path.kind == "gemm" or (path.kind == "matmul" and path.rows > PARTIAL_ROWS)
        if not many or o.head_dim % 16 or self.kv_type == "f32":
            return [self._attend_rows(o, 0)]
        return [attend_runs(o, tile, self.sources, self.kv_type, self._buffer), self._attend_rows(o, tile.rows)]

    def _attend_rows(self, o: op.Attention, run_tile: int) -> LaunchSpec:
        def splits(rows: int) -> int:
            return row_splits(o, kernel.warps, rows, self.sm_count)

        exact = not self.quantize_activations
        kernel = rows_kernel(o, self.kv_type, exact=exact)

        def args(at: Addresses, rows: int) -> tuple[Any, ...]:
            keys, values = self._caches(o, at)
            filled = _AttentionArgs(
                q=self._buffer(at, o.src),
                keys=keys,
                values=values,
                out=self._buffer(at, o.out),
                partial=at.partial,
                arrivals=at.arrivals,
                rows=at.rows,
                scale=o.scale,
                softcap=o.softcap,
                window=o.window,
                splits=splits(rows),
            )
            return (filled,)

        return LaunchSpec(
            name=o.name,
            label=o.kind,
            source=self.sources.attention(o, self.kv_type, run_tile, exact=exact),
            entry=kernel.name,
            block=32 * kernel.warps,
            grid=lambda rows, _: (splits(rows), o.num_kv_heads, rows),
            args=args,
        )

    def _caches(self, o: op.Attention, at: Addresses) -> tuple[int, int]:
        assert o.layer is not None
        return at.keys[o.layer], at.values[o.layer]
