"""Lowers groups of linear maps, in each of the ways that `mortice.plugins.executors.cuda.lowering.matmul` describes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from attrs import field, frozen

from mortice.core.model.operators import Buffer, WeightRef
from mortice.core.model.weight_plan import PlannedWeight
from mortice.plugins.executors.cuda.lowering.ahead import AheadWeight, weights_ahead
from mortice.plugins.executors.cuda.lowering.attend import LeftRuns, left_runs
from mortice.plugins.executors.cuda.lowering.fusion import LinearGroup, name_of
from mortice.plugins.executors.cuda.lowering.gemm import expand, product
from mortice.plugins.executors.cuda.lowering.gemv import gemv_shape
from mortice.plugins.executors.cuda.lowering.launches import Addresses, LaunchSpec, Spec
from mortice.plugins.executors.cuda.lowering.layouts import TileGeometry, tile_geometry
from mortice.plugins.executors.cuda.lowering.linear_args import FinishArgs, GemvArgs, InputArgs, MatmulArgs, RingArgs
from mortice.plugins.executors.cuda.lowering.matmul import (
    GEMV_PASS,
    STEP,
    MatmulScratch,
    MatmulTile,
    Piece,
    RowPath,
    Slices,
    pieces_of,
    slices_of,
    units_of,
)
from mortice.plugins.executors.cuda.lowering.matmul_input import JOIN_COLUMNS, InputCut, LeftProducts, input_cut
from mortice.plugins.executors.cuda.lowering.matmul_ring import RING_ROWS, RingShape, ring_shape
from mortice.plugins.executors.cuda.lowering.sources import KernelSources
from mortice.plugins.executors.cuda.lowering.workspace import Workspace

__all__ = ["LinearLowering"]

_NEEDS_FLOAT32 = frozenset({"F32"})
"""Types whose products half precision would change by more than the weights' own rounding."""

_ONE_SLICE = Slices(count=1, steps=0)
"""Of products by cuBLAS."""


@frozen(eq=False, kw_only=True)
class LinearLowering:
    """The launches of groups of linear maps.

    Attributes:
        sources: makes kernel sources.
        planned: the weights.
        workspace: where buffers lie.
        scratch: where products of many rows lie.
        sm_count: multiprocessors of the card.
        quantize_activations: whether products with quantised weights take int8 activations, or half precision.
        bulk_copies: whether the card copies to shared memory in bulk (sm_90 and later).
        wgmma: whether the card has products of warpgroups (sm_90 alone); ``ops/matmul_wgmma.cu`` then stands in for
            ``ops/matmul.cu``.
        ring_rows: rows of a pass of ``ops/matmul.cu`` that ``ops/matmul_ring.cu`` stands in for, at most.

    """

    sources: KernelSources
    planned: Mapping[WeightRef, PlannedWeight] = field(repr=False)
    workspace: Workspace = field(repr=False)
    scratch: MatmulScratch
    sm_count: int
    quantize_activations: bool
    bulk_copies: bool = False
    wgmma: bool = False
    ring_rows: int = RING_ROWS
    _rings: dict[tuple[int, RowPath], tuple[LinearGroup, RingShape | None]] = field(
        factory=dict, init=False, repr=False
    )
    """Shapes by their group, which is kept so that no other takes its place; a group is asked for by its neighbours."""

    def launches(
        self,
        group: LinearGroup,
        path: RowPath,
        before: LinearGroup | None = None,
        after: LinearGroup | None = None,
        left: LeftRuns | None = None,
    ) -> list[Spec]:
        """What a group queues when a step goes by `path`.

        Where the only input of the group `after` is this one's result, its first launch finishes the products of this
        one, whose last launch is then missing; so it is here for the group `before`. What attention has `left` is
        joined by the only launch of a step of one row.
        """
        kind, ring = self._kind(group, path), self._ring_shape(group, path)
        joined = before if before is not None and self._is_joined(before, group, path) else None
        leaves = after is not None and self._is_joined(group, after, path)
        if kind == "gemv":
            return [self._gemv(group, 1 if path.rows == 1 else GEMV_PASS, left)]
        if ring is not None:
            return self._ring(group, ring, leaves=leaves)
        if kind == "matmul":
            return self._matmul(group, path, joined, leaves=leaves)
        return self._gemm(group, path, joined, leaves=leaves)

    def ahead(self, group: LinearGroup) -> tuple[AheadWeight, ...]:
        """What attention two launches before asks for: nothing where weights go straight to registers."""
        weights = [linear.weight for linear in group.linears]
        return weights_ahead(weights, self._tiles(group), self.sm_count) if self.bulk_copies else ()

    def is_by_ring(self, group: LinearGroup, path: RowPath) -> bool:
        """Whether ``ops/matmul_ring.cu`` multiplies."""
        return self._ring_shape(group, path) is not None

    def _kind(self, group: LinearGroup, path: RowPath) -> str:
        types = {weight.tensor.qtype.name for weight in self._weights(group)}
        return "gemv" if types & _NEEDS_FLOAT32 else path.kind

    def _weights(self, group: LinearGroup) -> list[PlannedWeight]:
        return [self.planned[linear.weight] for linear in group.linears]

    def _tiles(self, group: LinearGroup) -> list[TileGeometry]:
        return [tile_geometry(w.tensor.qtype, w.rows, w.columns) for w in self._weights(group)]

    def _ring_shape(self, group: LinearGroup, path: RowPath) -> RingShape | None:
        key = id(group), path
        if key not in self._rings:
            by_ring = self.bulk_copies and path.rows <= self.ring_rows and self._kind(group, path) == "matmul"
            shape = ring_shape(group, self._tiles(group), path.rows, self.sm_count) if by_ring else None
            self._rings[key] = group, shape
        return self._rings[key][1]

    def _is_joined(self, first: LinearGroup, second: LinearGroup, path: RowPath) -> bool:
        """Whether the products of `first` are finished by the launch that prepares the input of `second`."""
        ways = self._kind(first, path), self._kind(second, path)
        if "gemv" in ways or first.outputs != (second.source,):
            return False
        ring = self._ring_shape(first, path)
        if self._ring_shape(second, path) is not None or (ring is not None and ring.slices == 1):
            return False
        cut = self._cut(second, path.tile(wgmma=self.wgmma) if path.kind == "matmul" else None)
        if STEP * cut.steps > JOIN_COLUMNS or (cut.factor_later and self._left(first, path).lacks_factor):
            return False  # squares would be overwritten while others read them
        if first.gated is not None and cut.parts == 1:
            return False  # twice the products for a block a row: slower than two launches, as measured
        return path.kind == "matmul" or len(list(pieces_of(first))) == 1

    def _buffer(self, at: Addresses, buffer: Buffer) -> int:
        return at.workspace + self.workspace.offsets[buffer]

    # one row, or float32 ----------------------------------------------------------------------------------------

    def _gemv(self, group: LinearGroup, tokens: int, left: LeftRuns | None) -> LaunchSpec:
        weights = self._weights(group)
        shape = gemv_shape(weights, bulk_copies=self.bulk_copies and tokens == 1)
        source = self.sources.gemv(
            weights,
            columns=weights[0].columns,
            tokens=tokens,
            shape=shape,
            norm=group.norm,
            gated=group.gated is not None,
            activation=group.activation,
            quantize_activations=self.quantize_activations,
            left=left.attention if left is not None else None,
            left_runs=left_runs(left.attention) if left is not None else 0,
        )
        row_groups = [tile.row_groups for tile in self._tiles(group)]
        units = min(row_groups) if group.gated else sum(row_groups)
        return LaunchSpec(
            name=name_of(group.operators),
            label=f"linear {_types(weights)}",
            source=source,
            entry="gemv",
            block=shape.threads,
            shared_symbol="shared_bytes",
            grid=lambda rows, at_once: (shape.grid(units, at_once), -(-rows // tokens), 1),
            args=lambda at, _: (self._gemv_args(group, at, left),),
            outputs=group.outputs,
        )

    def _gemv_args(self, group: LinearGroup, at: Addresses, left: LeftRuns | None) -> GemvArgs:
        args = GemvArgs(x=self._buffer(at, group.source))
        if left is not None:
            args.left = left.args(at)
        if group.norm is not None:
            args.norm_weight = at.weights[group.norm.weight]
            args.norm_bias = at.weights[group.norm.bias] if group.norm.bias is not None else 0
            args.norm_eps = group.norm.eps
        self._fill_segments(args.segments, group, at)
        return args

    def _fill_segments(self, segments: Any, group: LinearGroup, at: Addresses) -> None:
        outputs = group.outputs if len(group.outputs) == len(group.linears) else group.outputs * len(group.linears)
        for segment, linear, bias, out in zip(segments, group.linears, group.biases, outputs, strict=False):
            segment.weight = at.weights[linear.weight]
            segment.bias = at.weights[bias.weight] if bias is not None else 0
            segment.residual = self._buffer(at, group.added) if group.added is not None else 0
            segment.out = self._buffer(at, out)

    # tensor cores, all in one launch ----------------------------------------------------------------------------

    def _ring(self, group: LinearGroup, shape: RingShape, *, leaves: bool) -> list[Spec]:
        weights = self._weights(group)

        def args(at: Addresses, rows: int) -> tuple[Any, ...]:
            filled = RingArgs(x=self._buffer(at, group.source), products=at.matmul + self.scratch.products, rows=rows)
            if group.norm is not None:
                filled.norm_weight, filled.norm_eps = at.weights[group.norm.weight], group.norm.eps
            self._fill_segments(filled.segments, group, at)
            return (filled,)

        whole = shape.slices == 1
        products = LaunchSpec(
            name=name_of(group.operators),
            label=f"matmul {_types(weights)}",
            source=self.sources.matmul_ring(
                weights, shape, norm=group.norm, gated=group.gated is not None, activation=group.activation
            ),
            entry="matmul_ring",
            block=shape.threads,
            shared_symbol="shared_bytes",
            grid=lambda rows, _: (shape.grid(rows, self.sm_count), 1, 1),
            args=args,
            outputs=group.outputs if whole else (),
        )
        if whole or leaves:
            return [products]
        return [products, self._finish(LeftProducts(group=group, slices=shape.slices), _whole(group), ends=True)]

    # tensor cores -----------------------------------------------------------------------------------------------

    def _input(self, group: LinearGroup, tile: MatmulTile | None, joined: LeftProducts | None) -> LaunchSpec:
        """The group's input as halves: laid out for a kernel, or without a `tile` rows in order."""
        pass_rows = tile.rows if tile is not None else 1
        columns, cut = group.source.width, self._cut(group, tile)

        def args(at: Addresses, rows: int) -> tuple[Any, ...]:
            filled = InputArgs(
                x=self._buffer(at, group.source),
                out=at.matmul + self.scratch.inputs,
                scales=at.matmul + self.scratch.scales,
                squares=at.matmul + self.scratch.squares,
                rows=rows,
            )
            if group.norm is not None:
                filled.norm_weight = at.weights[group.norm.weight]
                filled.norm_bias = at.weights[group.norm.bias] if group.norm.bias is not None else 0
                filled.norm_eps = group.norm.eps
            if joined is not None:
                filled.products = self._finish_args(joined, _whole(joined.group), at, rows)
            return (filled,)

        return LaunchSpec(
            name=name_of(group.operators),
            label="matmul input" if joined is None else "matmul finish, input",
            source=self.sources.matmul_input(columns, group.norm, tile, cut, joined),
            entry="matmul_input",
            block=cut.threads,
            grid=lambda rows, _: (-(-rows // pass_rows) * pass_rows, cut.parts, 1),
            args=args,
            outputs=joined.group.outputs if joined is not None else (),
        )

    def _slices(self, group: LinearGroup, tile: MatmulTile) -> Slices:
        outputs = [linear.weight.rows for linear in group.linears]
        return slices_of(group.source.width, units_of(outputs, tile), tile, self.sm_count)

    def _cut(self, group: LinearGroup, tile: MatmulTile | None) -> InputCut:
        slices = self._slices(group, tile) if tile is not None else _ONE_SLICE
        return input_cut(group.source.width, group.norm, tile, slices)

    def _left(self, group: LinearGroup, path: RowPath) -> LeftProducts:
        """What a group's products leave, whichever kernel makes them."""
        ring = self._ring_shape(group, path)
        if ring is not None:
            return LeftProducts(group=group, slices=ring.slices)
        if path.kind == "gemm":
            return LeftProducts(group=group, slices=1, scaled=True)
        cut = self._cut(group, path.tile(wgmma=self.wgmma))
        return LeftProducts(group=group, slices=cut.scales, lacks_factor=cut.factor_later)

    def _matmul(self, group: LinearGroup, path: RowPath, joined: LinearGroup | None, *, leaves: bool) -> list[Spec]:
        weights, tile = self._weights(group), path.tile(wgmma=self.wgmma)
        units = units_of([weight.rows for weight in weights], tile)
        slices = self._slices(group, tile)

        def args(at: Addresses, rows: int) -> tuple[Any, ...]:
            filled = MatmulArgs(
                x=at.matmul + self.scratch.inputs,
                scales=at.matmul + self.scratch.scales,
                products=at.matmul + self.scratch.products,
                rows=rows,
            )
            for i, linear in enumerate(group.linears):
                filled.weights[i] = at.weights[linear.weight]
            return (filled,)

        matmul = LaunchSpec(
            name=name_of(group.operators),
            label=f"matmul {_types(weights)}",
            source=self.sources.matmul(weights, group.source.width, tile, slices),
            entry="matmul_wgmma" if tile.by_warpgroups else "matmul",
            block=tile.threads,
            shared_symbol="shared_bytes",
            grid=lambda rows, at_once: (
                slices.count * max(1, min(at_once // slices.count, units)),
                -(-rows // tile.rows),
                1,
            ),
            args=args,
        )
        first = self._input(group, tile, self._left(joined, path) if joined else None)
        last = [] if leaves else [self._finish(self._left(group, path), _whole(group), ends=True)]
        return [first, matmul, *last]

    def _gemm(self, group: LinearGroup, path: RowPath, joined: LinearGroup | None, *, leaves: bool) -> list[Spec]:
        columns = group.source.width
        specs: list[Spec] = [self._input(group, None, self._left(joined, path) if joined else None)]
        lots = list(pieces_of(group))
        for lot in lots:
            place = 0
            for piece in lot:
                offset = self.scratch.weights + 2 * place * columns
                specs.append(expand(group, piece, self.planned, self.sources, offset))
                place += piece.rows
            specs.append(product(group, place, self.scratch))
            if not leaves:
                specs.append(self._finish(self._left(group, path), lot, ends=lot is lots[-1]))
        return specs

    def _finish(self, left: LeftProducts, lot: Sequence[Piece], *, ends: bool) -> LaunchSpec:
        """What follows the products of a lot of outputs; `ends` where it is the last of the group."""
        group = left.group
        width = sum(piece.rows for piece in lot)
        results = lot[0].rows if group.gated is not None else width
        vector = 4 if all(group.linears[p.linear].weight.rows % 4 == p.rows % 4 == 0 for p in lot) else 1
        return LaunchSpec(
            name=name_of(group.operators),
            label="matmul finish",
            source=self.sources.matmul_finish(left, vector),
            entry="matmul_finish",
            block=256,
            grid=lambda rows, _: (-(-results // (256 * vector)), rows, 1),
            args=lambda at, rows: (self._finish_args(left, lot, at, rows),),
            outputs=group.outputs if ends else (),
        )

    def _finish_args(self, left: LeftProducts, lot: Sequence[Piece], at: Addresses, rows: int) -> FinishArgs:
        group = left.group
        filled = FinishArgs(
            products=at.matmul + self.scratch.products,
            scales=at.matmul + self.scratch.scales if left.scaled else 0,
            squares=at.matmul + self.scratch.squares if left.lacks_factor else 0,
            norm_eps=group.norm.eps if group.norm is not None else 0.0,
            rows=rows,
            width=sum(piece.rows for piece in lot),
        )
        outputs = group.outputs if len(group.outputs) == len(group.linears) else group.outputs * len(group.linears)
        for part, piece in zip(filled.parts, lot, strict=False):
            bias, skipped = group.biases[piece.linear], 4 * piece.start
            part.columns, part.stride = piece.rows, group.linears[piece.linear].weight.rows
            part.out = self._buffer(at, outputs[piece.linear]) + skipped
            if bias is not None:
                part.bias = at.weights[bias.weight] + skipped
            if group.added is not None:
                part.residual = self._buffer(at, group.added) + skipped
        return filled


def _whole(group: LinearGroup) -> tuple[Piece, ...]:
    return tuple(Piece(linear=i, start=0, stop=linear.weight.rows) for i, linear in enumerate(group.linears))


def _types(weights: Sequence[PlannedWeight]) -> str:
    return "+".join(dict.fromkeys(weight.tensor.qtype.name for weight in weights))
