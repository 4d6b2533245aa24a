"""Which weights blocks of attention ask for ahead: a part of gate and up that rings do not ask for yet, and no more."""

from __future__ import annotations

import pytest

from mortice.core.model.operators import WeightRef
from mortice.plugins.executors.cuda.lowering.ahead import AheadWeight, weights_ahead
from mortice.plugins.executors.cuda.lowering.layouts import tile_geometry
from tests.plugins.qtypes.blocks import TYPES

SM_COUNT = 132
PIECE = 2048


def of_shape(qtype: str, rows: int, columns: int, count: int = 2) -> tuple[AheadWeight, ...]:
    tile = tile_geometry(TYPES[qtype].qtype, rows, columns)
    refs = [
        WeightRef(role=str(i), layer=0, tensor=f"weight {i}", shape=(rows, columns), row_stop=rows)
        for i in range(count)
    ]
    return weights_ahead(refs, [tile] * count, SM_COUNT)


@pytest.mark.parametrize("qtype", ["Q4_K", "Q8_0", "Q5_0", "F16"])
@pytest.mark.parametrize(("rows", "columns"), [(14336, 4096), (8960, 1536), (4864, 1024), (4300, 1024)])
def test_what_is_asked_for_lies_in_the_weight_behind_what_rings_ask_for(qtype: str, rows: int, columns: int) -> None:
    nbytes = tile_geometry(TYPES[qtype].qtype, rows, columns).nbytes
    asked = of_shape(qtype, rows, columns)
    assert [weight.weight.tensor for weight in asked] == ["weight 0", "weight 1"]
    for weight in asked:
        assert weight.start % 16 == 0
        assert 0 < weight.pieces * PIECE <= 2 << 20
        assert 0 < weight.late_pieces <= weight.pieces
        assert weight.start + weight.pieces * PIECE <= nbytes
        rows_of_warp = 2 if nbytes // rows >= 2048 else 1
        assert abs(weight.start - rows_of_warp * 16 * SM_COUNT * nbytes // rows) < 128


def test_nothing_is_asked_for_of_weights_that_rings_hold() -> None:
    assert of_shape("Q8_0", 1536, 576) == ()


def test_long_rows_leave_the_rings_two_rows_of_a_warp_and_short_ones_leave_one() -> None:
    long, short = of_shape("Q4_K", 14336, 4096)[0], of_shape("Q4_K", 8960, 1536)[0]
    assert abs(long.start - 2 * 16 * SM_COUNT * 2304) < 128
    assert abs(short.start - 16 * SM_COUNT * 864) < 128


def test_nothing_is_asked_for_of_three_weights() -> None:
    assert of_shape("Q4_K", 14336, 4096, count=3) == ()
