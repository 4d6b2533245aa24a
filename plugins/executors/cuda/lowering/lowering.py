"""Lowers a program to kernel launches: the same lowering for one token and for many.

A launch is described by what it runs and where its arguments lie; nothing here depends on a token, a position or a
length. Those are read by the kernels from the step's rows on the device.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from typing import Any

from attrs import define, evolve, field

from mortice.core.model import operators as op
from mortice.core.model.operators import Buffer, Operator, WeightRef
from mortice.core.model.weight_plan import WeightPlan
from mortice.plugins.executors.cuda.compile.nvrtc import Source
from mortice.plugins.executors.cuda.lowering.alike import Likeness
from mortice.plugins.executors.cuda.lowering.attend import LeftRuns, attend, attend_fits, attend_tensor, left_runs
from mortice.plugins.executors.cuda.lowering.attend_rows import rows_kernel
from mortice.plugins.executors.cuda.lowering.attend_runs import attend_runs
from mortice.plugins.executors.cuda.lowering.crossovers import RowCrossovers
from mortice.plugins.executors.cuda.lowering.fusion import Group, LinearGroup, PlaceGroup, SingleGroup, name_of
from mortice.plugins.executors.cuda.lowering.launches import Addresses, LaunchSpec, Spec, StepRows, rope_key
from mortice.plugins.executors.cuda.lowering.linear import LinearLowering
from mortice.plugins.executors.cuda.lowering.matmul import (
    MatmulScratch,
    RowPath,
    attention_tile,
    row_path,
    row_paths,
)
from mortice.plugins.executors.cuda.lowering.placing import (
    LOGIT_ROWS,
    PARTIAL_ROWS,
    SPREAD_ROWS,
    attention_splits,
    place_products,
    place_program,
    row_splits,
)
from mortice.plugins.executors.cuda.lowering.singles import SingleLowering
from mortice.plugins.executors.cuda.lowering.sources import KernelSources
from mortice.plugins.executors.cuda.lowering.workspace import Workspace

__all__ = ["Lowering"]

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
        wgmma: whether it has products of warpgroups (sm_90 alone).
        crossovers: from how many rows on which way is taken.
        other_gemm_from: other numbers of rows from which on `scratch` is to serve products by cuBLAS.
        paths: the ways that the linear maps of a step go, by rising numbers of rows.
        scratch: where products of many rows lie.
        linear: the launches of groups of linear maps.
        likeness: compares groups.

    """

    plan: WeightPlan
    sources: KernelSources
    rows: int
    kv_type: str
    sm_count: int
    quantize_activations: bool = True
    cublas: bool = False
    bulk_copies: bool = False
    wgmma: bool = False
    crossovers: RowCrossovers = field(factory=RowCrossovers)
    other_gemm_from: Sequence[int] = ()
    groups: list[Group] = field(init=False, repr=False)
    workspace: Workspace = field(init=False, repr=False)
    paths: tuple[RowPath, ...] = field(init=False)
    scratch: MatmulScratch = field(init=False, repr=False)
    linear: LinearLowering = field(init=False, repr=False)
    likeness: Likeness = field(init=False, repr=False)

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
        heads = (i for i, group in enumerate(self.groups) if isinstance(group.operators[0], op.SelectRows))
        self._head = next(heads, len(self.groups))
        self._planned = {planned.weight: planned for planned in self.plan.weights}
        self._places = {group.attention: group for group in self.groups if isinstance(group, PlaceGroup)}
        self._read_by_linears = {group.attention for group in self.groups if isinstance(group, LinearGroup)}
        self._singles = SingleLowering(
            sources=self.sources, planned=self._planned, kv_type=self.kv_type, buffer=self._buffer
        )
        self.linear = LinearLowering(
            sources=self.sources,
            planned=self._planned,
            workspace=self.workspace,
            scratch=self.scratch,
            sm_count=self.sm_count,
            quantize_activations=self.quantize_activations,
            bulk_copies=self.bulk_copies,
            wgmma=self.wgmma,
            ring_rows=self.crossovers.ring_rows,
        )
        self.likeness = Likeness(lambda weight: self._planned[weight].tensor.qtype.name)
        self._each_kind = list(self.likeness.first_of_each(map(self._neighbourhood, range(len(self.groups)))))
        self.paths += tuple(evolve(path, alone=True) for path in self.paths if self._has_alone(path))

    _linears: dict[tuple[int, RowPath], list[Spec]] = field(factory=dict, init=False, repr=False)
    _head: int = field(init=False, repr=False)
    """The first group of the head."""
    _each_kind: Sequence[int] = field(init=False, repr=False)
    """Of groups that are lowered alike the first."""
    _planned: dict[WeightRef, Any] = field(init=False, repr=False)
    _places: dict[Operator, PlaceGroup] = field(init=False, repr=False)
    _singles: SingleLowering = field(init=False, repr=False)
    _read_by_linears: set[op.Attention | None] = field(init=False, repr=False)

    @property
    def splits(self) -> int:
        """Parts a row's context is attended in at most."""
        return attention_splits(self.plan.program, self.sm_count)

    def path(self, rows: int, *, alone: bool = False) -> RowPath:
        """The way that a step of `rows` rows goes; `alone` where each is the only one of its sequence."""
        return row_path(self.paths, rows, alone=alone)

    def launches(self, path: RowPath) -> tuple[list[Spec], list[Spec]]:
        """What the body and the head queue when a step goes by `path`; no head for ways only longer steps go."""
        groups = range(self._end(path))
        return self._specs(groups[: self._head], path), self._specs(groups[self._head :], path)

    def kernel_sources(self, path: RowPath) -> set[Source]:
        """The sources of `launches`, which need not be made for it: layers are alike."""
        each_kind = [i for i in self._each_kind if i < self._end(path)]
        return {spec.source for spec in self._specs(each_kind, path) if isinstance(spec, LaunchSpec)}

    def _end(self, path: RowPath) -> int:
        """Past the last group of a step that goes by `path`."""
        return len(self.groups) if path.least <= LOGIT_ROWS else self._head

    def _specs(self, groups: Iterable[int], path: RowPath) -> list[Spec]:
        return [spec for i in groups for spec in self._lowered(i, path)]

    def _lowered(self, i: int, path: RowPath) -> list[Spec]:
        """The launches of a group; it is lowered with what `_neighbourhood` has, and nothing else."""
        before, group, after, next_but_one, _ = self._neighbourhood(i)
        if not isinstance(group, LinearGroup):
            return self._others(group, path, next_but_one)
        maps = evolve(path, alone=False) if path.alone else path
        if (i, maps) not in self._linears:  # ways that differ in attention alone have them in common
            before, after = (other if isinstance(other, LinearGroup) else None for other in (before, after))
            left = self._left(group.attention, maps)
            self._linears[i, maps] = self.linear.launches(group, maps, before, after, left)
        return self._linears[i, maps]

    def _neighbourhood(self, i: int) -> tuple[Group | None, Group, Group | None, Group | None, PlaceGroup | None]:
        """The group before, the group, the two after it, and what its attention may be one launch with."""
        group = self.groups[i]
        before, after, next_but_one = (
            self.groups[at] if 0 <= at < len(self.groups) else None for at in (i - 1, i + 1, i + 2)
        )
        attention = group.operator if isinstance(group, SingleGroup) else group.attention
        place = self._places.get(attention) if isinstance(attention, op.Attention) else None
        return before, group, after, next_but_one, place

    def _others(self, group: SingleGroup | PlaceGroup, path: RowPath, next_but_one: Group | None) -> list[Spec]:
        place = group if isinstance(group, PlaceGroup) else self._places.get(group.operator)
        if place is not None and self._is_one_launch(place, path):
            if isinstance(group, PlaceGroup):
                return []
            return [self._attend(place, path, next_but_one)]
        if isinstance(group, PlaceGroup):
            specs: list[Spec] = [self._place(group)]
        elif isinstance(group.operator, op.Attention):
            specs = self._attention(group.operator, path)
        else:
            specs = [self._singles.launch(group.operator)]
        return [*specs[:-1], evolve(specs[-1], outputs=group.outputs)]

    def _is_one_launch(self, place: PlaceGroup, path: RowPath) -> bool:
        """Whether one launch brings Q, K and V into place and attends: no sequence has two new tokens."""
        if path.alone:
            return self._attends_alone(place)
        one_row = path.kind == "gemv" and path.rows == 1
        return one_row and attend_fits(place.attention, self.kv_type, bulk_copies=self.bulk_copies)

    def _has_alone(self, path: RowPath) -> bool:
        """Whether rows that are each the only one of its sequence attend in another way than others.

        Only where all products are by rings, which want all shared memory, too: the others live on the L1 cache.
        """
        linears = (group for group in map(self.groups.__getitem__, self._each_kind) if isinstance(group, LinearGroup))
        by_rings = path.kind == "matmul" and all(self.linear.is_by_ring(group, path) for group in linears)
        return by_rings and any(self._attends_alone(place) for place in self._places.values())

    def _attends_alone(self, place: PlaceGroup) -> bool:
        return self.bulk_copies and attend_tensor(place.attention, self.kv_type)

    def _attend(self, place: PlaceGroup, path: RowPath, next_but_one: Group | None) -> LaunchSpec:
        attention = place.attention
        left = left_runs(attention) if not path.alone and attention in self._read_by_linears else 0

        def splits(rows: int) -> int:
            return self._runs(attention, rows)

        # of several rows few blocks have nothing to do but to ask
        ahead = self.linear.ahead(next_but_one) if not path.alone and isinstance(next_but_one, LinearGroup) else ()
        blocks = self._blocks(attention, path.rows)
        return attend(place, self.sources, self.kv_type, splits, self.sm_count, blocks, left, ahead, self._buffer)

    def _runs(self, attention: op.Attention, rows: int) -> int:
        """Parts the context of each of so many rows is attended in at most, where one launch does all."""
        blocks = self.sm_count * (1 if rows == 1 else self._blocks(attention, rows))
        return max(1, min(self.splits, blocks // (attention.num_kv_heads * rows)))

    def _blocks(self, attention: op.Attention, rows: int) -> int:
        """Blocks that a multiprocessor has room for: of one row, one and one of the products before or after."""
        return 1 if 1 < rows <= SPREAD_ROWS and attention.num_kv_heads * SPREAD_ROWS <= self.sm_count else 2

    def _left(self, attention: op.Attention | None, path: RowPath) -> LeftRuns | None:
        """What an attention leaves to those that read it."""
        place = self._places.get(attention) if attention is not None else None
        if attention is None or place is None or not self._is_one_launch(place, path):
            return None
        return LeftRuns(attention=attention, splits=self._runs(attention, 1))

    def _buffer(self, at: Addresses, buffer: Buffer) -> int:
        return at.workspace + self.workspace.offsets[buffer]

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
            name=name_of(group.operators),
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
