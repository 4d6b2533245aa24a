"""Products of few rows in one launch (``ops/matmul_ring.cu``), run on the CPU against NumPy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from attrs import define, field
from numpy.typing import NDArray

from mortice.core.model.operators import Act, Add, Buffer, GatedAct, Linear, Norm, WeightRef
from mortice.plugins.executors.cuda.lowering.fusion import LinearGroup
from mortice.plugins.executors.cuda.lowering.layouts import tile_geometry
from mortice.plugins.executors.cuda.lowering.linear_args import RingArgs
from mortice.plugins.executors.cuda.lowering.matmul_ring import ring_shape
from mortice.plugins.executors.cuda.lowering.sources import ring_defines
from tests.plugins.qtypes.blocks import NAMES, TYPES, stored
from tests.support.cuda_on_cpu import needs_cpu_compiler
from tests.support.tensor_kernels import Wide, compiled, inputs, run, tame

pytestmark = needs_cpu_compiler

SM_COUNT = 5


def ring_group(
    outputs: Sequence[int],
    columns: int,
    *,
    rms: bool = False,
    gated: bool = False,
    act: bool = False,
    added: bool = False,
) -> LinearGroup:
    """A group of linear maps, of which only what shapes depend on is true."""
    source, sums = Buffer("x", columns), [Buffer(f"out{i}", n) for i, n in enumerate(outputs)]

    def weight(name: str, *shape: int) -> WeightRef:
        return WeightRef(role=name, layer=None, tensor=name, shape=shape, row_stop=shape[0])

    norm = (
        Norm(name="norm", src=source, out=source, type="rms", eps=1e-5, weight=weight("norm", columns)) if rms else None
    )
    linears = tuple(
        Linear(name=f"map{i}", src=source, out=out, weight=weight(f"map{i}", out.width, columns))
        for i, out in enumerate(sums)
    )
    half = GatedAct(name="gated", gate=sums[0], up=sums[-1], out=Buffer("h", outputs[0]), activation="silu")
    residual = Add(name="add", a=source, b=sums[0], out=Buffer("sum", outputs[0]))
    acted = Act(name="act", src=sums[0], out=Buffer("acted", outputs[0]), activation="gelu_tanh")
    return LinearGroup(
        norm=norm,
        linears=linears,
        biases=(None,) * len(linears),
        gated=half if gated else None,
        act=acted if act else None,
        residual=residual if added else None,
    )


@define(eq=False)
class RingCase:
    """One launch of ``ops/matmul_ring.cu`` with random weights and rows of very different sizes."""

    maps: Sequence[tuple[str, int]]
    columns: int
    rows: int
    path_rows: int
    kinds: Mapping[str, bool]
    rng: np.random.Generator = field(factory=lambda: np.random.default_rng(3))

    def run(self, folder: Path) -> tuple[Wide, Wide]:
        """What is found and what is wanted, (rows, all outputs)."""
        group = ring_group([n for _, n in self.maps], self.columns, **self.kinds)
        tiles = [tile_geometry(TYPES[name].qtype, n, self.columns) for name, n in self.maps]
        shape = ring_shape(group, tiles, self.path_rows, SM_COUNT)
        assert shape is not None
        raws = [tame(name, n, self.columns, self.rng) for name, n in self.maps]
        held = [
            aligned_copy(stored(TYPES[name], raw, self.columns)) for (name, _), raw in zip(self.maps, raws, strict=True)
        ]
        x, norm = inputs(self.rng, self.rows, self.columns), inputs(self.rng, 1, self.columns)[0]
        if group.activation is not None:
            largest = np.abs(TYPES[self.maps[0][0]].dequantize(raws[0])).max()
            x /= np.abs(x).max(axis=1, keepdims=True) * largest * 4
        biases = [self.rng.standard_normal(n).astype(np.float32) for _, n in self.maps]
        residual = self.rng.standard_normal((self.rows, self.maps[0][1])).astype(np.float32)
        outs = [np.full((self.rows, n), np.nan, np.float32) for _, n in self.maps]
        products = np.full((shape.slices, self.rows, sum(n for _, n in self.maps)), np.nan, np.float32)
        args = RingArgs(x=x.ctypes.data, products=products.ctypes.data, norm_eps=1e-5, rows=self.rows)
        args.norm_weight = norm.ctypes.data
        for segment, tile, bias, out in zip(args.segments, held, biases, outs, strict=False):
            segment.weight, segment.bias, segment.out = tile.ctypes.data, bias.ctypes.data, out.ctypes.data
        if group.residual is not None:
            args.segments[0].residual = residual.ctypes.data
        segments = ",".join(
            f"Segment<{name},{tile.tile_rows},{tile.tile_columns},{n}>"
            for (name, n), tile in zip(self.maps, tiles, strict=True)
        )
        constants = ring_defines(shape, group.norm, gated=group.gated is not None, activation=group.activation)
        library = compiled(
            folder,
            "matmul_ring",
            "MatmulRingArgs",
            {**constants, "COLS": self.columns, "SEGMENTS": segments, "SLOTS": min(3, shape.slots)},
            sorted({name for name, _ in self.maps}),
        )
        run(library, args, (shape.grid(self.rows, SM_COUNT), 1, 1), shape.threads)

        n = x.astype(np.float64)
        if group.norm is not None:
            n = n / np.sqrt(np.square(n).mean(axis=1, keepdims=True) + 1e-5) * norm
        weights = [
            TYPES[name].dequantize(raw).astype(np.float64) for (name, _), raw in zip(self.maps, raws, strict=True)
        ]
        if shape.slices > 1:
            return products.astype(np.float64).sum(axis=0), n @ np.concatenate(weights).T
        sums = [n @ weight.T + bias for weight, bias in zip(weights, biases, strict=True)]
        if group.gated is not None:
            return outs[0].astype(np.float64), sums[0] / (1 + np.exp(-sums[0])) * sums[1]
        if group.act is not None:
            sums[0] = 0.5 * sums[0] * (1 + np.tanh(0.7978845608 * (sums[0] + 0.044715 * sums[0] ** 3)))
        if group.residual is not None:
            sums[0] = sums[0] + residual
        return np.concatenate(outs, axis=1).astype(np.float64), np.concatenate(sums, axis=1)


def aligned_copy(tiles: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The same bytes where a bulk copy may begin."""
    room = np.zeros(tiles.nbytes + 16, np.uint8)
    start = -room.ctypes.data % 16
    room[start : start + tiles.nbytes] = tiles.reshape(-1).view(np.uint8)
    return room[start:]


@pytest.mark.parametrize("name", [name for name in NAMES if name != "F32"])
def test_rings_of_every_type_give_results(tmp_path: Path, name: str) -> None:
    columns = 512 if TYPES[name].qtype.block_elements == 256 else 416  # not whole steps
    found, wanted = RingCase([(name, 24), (name, 5)], columns, 7, 8, {"rms": True}).run(tmp_path)
    off = np.linalg.norm(found - wanted, axis=1) / np.linalg.norm(wanted, axis=1)
    assert off.max() < 3e-3, off  # of few results, some of which nearly cancel


@pytest.mark.parametrize(
    ("maps", "columns", "rows", "path_rows", "kinds"),
    [
        ([("Q4_K", 40), ("Q6_K", 16), ("Q8_0", 24)], 1024, 19, 16, {"rms": True}),
        ([("Q4_K", 70)], 4096 + 2048, 3, 8, {"added": True}),
        ([("Q5_K", 33)], 8192, 5, 8, {}),
        ([("Q4_K", 33)], 8192, 21, 16, {}),
        ([("Q4_K", 48), ("Q6_K", 48)], 768, 11, 16, {"rms": True, "gated": True}),
        ([("Q8_0", 40), ("Q8_0", 40)], 4096, 8, 8, {"gated": True}),
        ([("Q4_K", 48)], 512, 20, 16, {"act": True}),
    ],
)
def test_rings_do_what_precedes_and_what_follows_products(
    tmp_path: Path, maps: Sequence[tuple[str, int]], columns: int, rows: int, path_rows: int, kinds: Mapping[str, bool]
) -> None:
    found, wanted = RingCase(maps, columns, rows, path_rows, kinds).run(tmp_path)
    assert np.isfinite(found).all(), "every result is written"
    off = np.linalg.norm(found - wanted, axis=1) / np.linalg.norm(wanted, axis=1)
    assert off.max() < 3e-3, off


@pytest.mark.parametrize(
    ("outputs", "columns", "early"),
    [([4096], 4096, 1), ([4096, 1024, 1024], 4096, 2), ([14336, 14336], 4096, 2), ([4096], 14336, 2), ([128], 4096, 1)],
    ids=["two slots a block", "three", "many", "several tiles long", "one"],
)
def test_a_block_does_not_ask_for_all_its_weights_before_it_reads_its_input(
    outputs: Sequence[int], columns: int, early: int
) -> None:
    tiles = [tile_geometry(TYPES["Q4_K"].qtype, n, columns) for n in outputs]
    shape = ring_shape(ring_group(outputs, columns), tiles, 8, 132)
    assert shape is not None
    assert shape.early == early
