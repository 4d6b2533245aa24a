"""How a product of one row is cut: what a block asks for fits, and leaves room for the next kernel's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from mortice.core.model.operators import WeightRef
from mortice.core.model.types import TensorView
from mortice.core.model.weight_plan import PlannedWeight
from mortice.plugins.executors.cuda.lowering.gemv import GemvShape, gemv_shape
from mortice.plugins.executors.cuda.lowering.layouts import TileLayout, tile_geometry
from tests.plugins.qtypes.blocks import NAMES, TYPES

SM_BYTES, BLOCK_BYTES = 228 << 10, 227 << 10
"""Shared memory of an H100's multiprocessor, and the most that one block may have."""
RESERVED = 1 << 10
"""What each block takes besides what it asks for."""


def never(start: int, stop: int) -> NDArray[np.uint8]:
    raise AssertionError(f"rows {start} to {stop} are not wanted here")


def planned(name: str, rows: int, columns: int) -> PlannedWeight:
    type_ = TYPES[name]
    ref = WeightRef(role="w", layer=0, tensor="w", shape=(rows, columns), row_stop=rows)
    view = TensorView(name="w", shape=ref.shape, qtype=type_.qtype, make=never, offset=0, path=Path("none"))
    return PlannedWeight.of(ref, view, TileLayout(type_), 0)


def shared_bytes(shape: GemvShape, weight: PlannedWeight, input_bytes: int) -> int:
    tile = tile_geometry(weight.tensor.qtype, weight.rows, weight.columns).tile_bytes
    return input_bytes + 128 + shape.warps * shape.slots * tile


@pytest.mark.parametrize("columns", [576, 896, 1536, 4096, 4864, 8960, 11008, 14336, 18944, 25600, 53248])
@pytest.mark.parametrize("name", NAMES)
def test_rings_fit_a_block_and_with_int8_two_blocks_fit(name: str, columns: int) -> None:
    if columns % TYPES[name].qtype.block_elements:
        pytest.skip("no whole blocks")
    weight = planned(name, 1024, columns)
    shape = gemv_shape([weight], bulk_copies=True)
    assert shape.warps >= 4
    if shape.slots:
        assert shared_bytes(shape, weight, 4 * columns) <= BLOCK_BYTES - RESERVED
        assert 2 * (shared_bytes(shape, weight, 40 * columns // 32) + RESERVED) <= SM_BYTES
        assert shape.slots >= 2


def test_without_bulk_copies_and_for_the_widest_input_there_is_no_ring() -> None:
    assert gemv_shape([planned("Q4_K", 4096, 4096)], bulk_copies=True).slots >= 2
    assert gemv_shape([planned("Q4_K", 4096, 4096)], bulk_copies=False).slots == 0
    assert gemv_shape([planned("Q6_K", 128256, 4096)], bulk_copies=True).slots >= 2
    assert gemv_shape([planned("F16", 4096, 53248)], bulk_copies=True).slots == 0


def test_blocks_with_rings_take_every_multiprocessor_once() -> None:
    ring = gemv_shape([planned("Q8_0", 960, 576)], bulk_copies=True)
    assert ring.grid(units=120, at_once=264) == ring.grid(units=5000, at_once=264) == 132
    straight = gemv_shape([planned("Q8_0", 960, 576)], bulk_copies=False)
    assert straight.grid(units=120, at_once=132) == 8
