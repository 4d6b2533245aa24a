"""Products of many rows: a lot of outputs' weights expanded to halves, and cuBLAS."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

from mortice.core.model.operators import WeightRef
from mortice.core.model.weight_plan import PlannedWeight
from mortice.plugins.executors.cuda.device.cublas import Gemm
from mortice.plugins.executors.cuda.lowering.fusion import LinearGroup, name_of
from mortice.plugins.executors.cuda.lowering.launches import GemmSpec, LaunchSpec
from mortice.plugins.executors.cuda.lowering.layouts import tile_geometry
from mortice.plugins.executors.cuda.lowering.matmul import MatmulScratch, Piece
from mortice.plugins.executors.cuda.lowering.sources import KernelSources

__all__ = ["expand", "product"]

Pointer, Int = ctypes.c_uint64, ctypes.c_int32


def expand(
    group: LinearGroup,
    piece: Piece,
    planned: Mapping[WeightRef, PlannedWeight],
    sources: KernelSources,
    offset: int,
) -> LaunchSpec:
    """Rows of a weight as halves, `offset` bytes into the memory that products work in; see ``ops/dequantise.cu``."""
    weight = planned[group.linears[piece.linear].weight]
    geometry = tile_geometry(weight.tensor.qtype, weight.rows, weight.columns)
    skipped = piece.start // geometry.tile_rows * geometry.tiles_across * geometry.tile_bytes
    chunks = piece.rows * weight.columns // 32
    return LaunchSpec(
        name=name_of(group.operators),
        label=f"dequantise {weight.tensor.qtype.name}",
        source=sources.dequantise(weight),
        entry="dequantise",
        block=256,
        grid=lambda _, at_once: (min(at_once, -(-chunks // 256)), 1, 1),
        args=lambda at, _: (
            Pointer(at.weights[group.linears[piece.linear].weight] + skipped),
            Pointer(at.matmul + offset),
            Int(piece.rows // geometry.tile_rows),
        ),
    )


def product(group: LinearGroup, outputs: int, scratch: MatmulScratch) -> GemmSpec:
    """The input of a group times so many rows of weights that were expanded."""
    return GemmSpec(
        name=name_of(group.operators),
        gemm=lambda at, rows: Gemm(
            rows=rows,
            outputs=outputs,
            columns=group.source.width,
            x=at.matmul + scratch.inputs,
            weight=at.matmul + scratch.weights,
            out=at.matmul + scratch.products,
        ),
    )
