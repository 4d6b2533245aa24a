"""The shape of tiles: what fits, how much is added."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mortice.core.errors import UnsupportedError
from mortice.plugins.executors.cuda.lowering.layouts import tile_geometry
from tests.plugins.qtypes.blocks import NAMES, TYPES

WIDTHS = (576, 896, 1024, 1536, 2048, 2560, 3072, 3584, 4096, 4864, 8960, 9728, 11008, 12288, 14336, 18944)


@pytest.mark.parametrize("name", NAMES)
def test_tiles_add_at_most_three_percent_to_any_common_width(name: str) -> None:
    qtype = TYPES[name].qtype
    for width in WIDTHS:
        if width % qtype.block_elements == 0:
            geometry = tile_geometry(qtype, 1024, width)
            assert geometry.nbytes <= 1.03 * qtype.nbytes((1024, width)), width


@pytest.mark.parametrize("name", NAMES)
def test_most_lanes_are_busy_at_any_common_width(name: str) -> None:
    qtype = TYPES[name].qtype
    for width in WIDTHS:
        if width % qtype.block_elements == 0:
            assert tile_geometry(qtype, 1024, width).busy_lanes >= 0.8, width


@pytest.mark.parametrize("name", NAMES)
def test_a_vector_and_an_odd_number_of_rows_have_tiles_of_one_row(name: str) -> None:
    assert tile_geometry(TYPES[name].qtype, 1, 2048).tile_rows == 1
    assert tile_geometry(TYPES[name].qtype, 151_669, 2048).tile_rows == 1


@given(
    name=st.sampled_from(NAMES),
    rows=st.integers(1, 40_000),
    pieces=st.integers(1, 1000),
)
def test_tiles_cover_any_weight_exactly(name: str, rows: int, pieces: int) -> None:
    qtype = TYPES[name].qtype
    columns = pieces * max(32, qtype.block_elements)
    geometry = tile_geometry(qtype, rows, columns)
    assert geometry.row_groups * geometry.tile_rows == rows
    assert geometry.tiles_across * geometry.tile_columns == columns
    assert qtype.row_bytes(geometry.tile_columns) <= 9216, "two rows of tiles fit a warp's ring"
    assert geometry.tile_columns % geometry.piece_elements == 0
    assert 32 % geometry.tile_rows == 0
    assert geometry.tile_bytes % 16 == 0
    assert geometry.tile_bytes - geometry.used_bytes < 16
    tiles = geometry.row_groups * geometry.tiles_across
    assert tiles * geometry.used_bytes == qtype.nbytes((rows, columns))


def test_a_row_that_is_not_whole_chunks_is_refused_with_both_numbers() -> None:
    with pytest.raises(UnsupportedError, match=r"F32 weight of 4 x 80: .* whole 32 elements"):
        tile_geometry(TYPES["F32"].qtype, 4, 80)
    with pytest.raises(UnsupportedError, match=r"Q4_K weight of 4 x 896: .* whole 256 elements"):
        tile_geometry(TYPES["Q4_K"].qtype, 4, 896)
