"""Blocks to planes and tiles, in NumPy, and back."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mortice.core.model.qtypes import QType
from mortice.core.plugin.interfaces import QuantizationType
from mortice.plugins.executors.cuda.lowering.layouts import tile_geometry
from tests.plugins.qtypes.blocks import NAMES, TYPES, stored


@cache
def places(name: str) -> NDArray[np.intp]:
    """For each bit of a piece's planes, the bit of the file it came from.

    Bit b of the planes over pieces whose bit i is bit k of the number i, for every k, spells the number of its origin.
    """
    type_ = TYPES[name]
    assert type_.planes is not None
    piece_bytes = type_.qtype.row_bytes(max(32, type_.qtype.block_elements))
    numbers = np.arange(8 * piece_bytes)
    digits = range(int(numbers[-1]).bit_length())
    pieces = np.packbits(
        np.stack([numbers >> digit & 1 for digit in digits]).astype(np.uint8), axis=1, bitorder="little"
    )
    planes = np.hstack(type_.planes(pieces))
    bits = np.unpackbits(planes, axis=1, bitorder="little").astype(np.intp)
    return np.asarray((bits << np.arange(len(digits))[:, None]).sum(axis=0), np.intp)


def restored(type_: QuantizationType, tiles: NDArray[np.uint8], rows: int, columns: int) -> NDArray[np.uint8]:
    """The file's rows from tiles."""
    geometry = tile_geometry(type_.qtype, rows, columns)
    assert type_.planes is not None
    widths = [plane.shape[1] for plane in type_.planes(np.zeros((1, geometry.piece_bytes), np.uint8))]
    by_tile = tiles.reshape(-1, geometry.tile_bytes)
    assert not by_tile[:, geometry.used_bytes :].any(), "padding is zeros"
    ends = np.cumsum([geometry.tile_pieces * width for width in widths])
    planes = np.split(by_tile[:, : geometry.used_bytes], ends[:-1], axis=1)
    pieces = np.hstack([plane.reshape(-1, width) for plane, width in zip(planes, widths, strict=True)])
    bits = np.unpackbits(pieces, axis=1, bitorder="little")
    raw_bits = np.empty_like(bits)
    raw_bits[:, places(type_.qtype.name)] = bits
    raw = np.packbits(raw_bits, axis=1, bitorder="little")
    grid = raw.reshape(geometry.row_groups, geometry.tiles_across, geometry.tile_rows, -1)
    return grid.transpose(0, 2, 1, 3).reshape(rows, -1)


@settings(deadline=None, max_examples=60)
@given(data=st.data(), name=st.sampled_from(NAMES), rows=st.integers(1, 24), seed=st.integers(0, 2**32 - 1))
def test_tiles_give_the_rows_back(data: st.DataObject, name: str, rows: int, seed: int) -> None:
    type_ = TYPES[name]
    piece = max(32, type_.qtype.block_elements)
    columns = piece * data.draw(st.integers(1, 12_288 // piece), label="pieces")
    raw = np.random.default_rng(seed).integers(0, 256, (rows, type_.qtype.row_bytes(columns)), np.uint8)
    assert np.array_equal(restored(type_, stored(type_, raw, columns), rows, columns), raw)


def test_many_rows_are_stored_piece_by_piece_as_at_once() -> None:
    type_ = TYPES["Q6_K"]
    raw = np.random.default_rng(1).integers(0, 256, (4096, type_.qtype.row_bytes(1024)), np.uint8)
    assert np.array_equal(restored(type_, stored(type_, raw, 1024), 4096, 1024), raw)


def test_a_header_without_planes_is_refused() -> None:
    type_ = TYPES["Q8_0"]
    with pytest.raises(ValueError, match="Q8_9: traits and planes"):
        QuantizationType(qtype=QType(900, "Q8_9", 32, 34), dequantize=type_.dequantize, traits=type_.traits)
