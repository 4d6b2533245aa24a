"""Random weights of every type with a device layout, and what their traits should make of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mortice.core.plugin.interfaces import QuantizationType
from mortice.plugins.executors.cuda.flatten import flatten
from mortice.plugins.executors.cuda.layouts import TileGeometry, TileLayout, tile_geometry
from mortice.plugins.qtypes import mortice_qtypes

OPS = Path(__file__).parents[3] / "plugins" / "executors" / "cuda" / "ops"
PROBE = Path(__file__).parent / "probe.cuh"

TYPES = {type_.qtype.name: type_ for type_ in mortice_qtypes() if type_.traits is not None}
NAMES = sorted(TYPES)

# Byte offsets of the half-precision numbers of a block; all other bytes may hold anything.
_HALVES = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
}


def shapes(name: str) -> list[tuple[int, int]]:
    """Rows and columns that give tiles of several rows, several tiles a row, and an odd row count."""
    many = 4864 if TYPES[name].qtype.block_elements == 256 else 8704
    small = 256 if TYPES[name].qtype.block_elements == 256 else 96
    return [(16, many), (12, small), (5, 512)]


def random_rows(type_: QuantizationType, rows: int, columns: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Rows as in a file; every bit is random but for floats, which are finite, some of them denormal."""
    qtype = type_.qtype
    if qtype.name not in _HALVES:
        values = rng.standard_normal((rows, columns)).astype(np.float32)
        values *= 10.0 ** rng.integers(-6, 4, values.shape).astype(np.float32)
        if qtype.name == "F16":
            return values.astype("<f2").view(np.uint8)
        if qtype.name == "BF16":
            return (values.view("<u4") >> 16).astype("<u2").view(np.uint8)
        return values.view(np.uint8)
    blocks = rng.integers(0, 256, (rows * columns // qtype.block_elements, qtype.block_bytes), np.uint8)
    for at in _HALVES[qtype.name]:
        halves = blocks[:, at : at + 2].copy().view("<u2")
        halves[(halves & 0x7C00) == 0x7C00] ^= 0x4000  # neither infinite nor no number
        blocks[:, at : at + 2] = halves.view(np.uint8)
    return blocks.reshape(rows, qtype.row_bytes(columns))


def stored(type_: QuantizationType, raw: NDArray[np.uint8], columns: int) -> NDArray[np.uint8]:
    """The tiles of rows, as NumPy writes them over poisoned bytes; 16-byte aligned."""
    layout = TileLayout(type_)
    tiles = aligned(layout.nbytes(type_.qtype, len(raw), columns))
    layout.store(raw, columns, tiles)
    return tiles


def aligned(nbytes: int) -> NDArray[np.uint8]:
    """Poisoned bytes that start at a multiple of 16."""
    space = np.full(nbytes + 16, 0xA5, np.uint8)
    start = -space.ctypes.data % 16
    return space[start : start + nbytes]


def geometry_of(type_: QuantizationType, rows: int, columns: int) -> TileGeometry:
    return tile_geometry(type_.qtype, rows, columns)


def defines(type_: QuantizationType, rows: int, columns: int) -> dict[str, str | int]:
    """What the kernels want to know at compile time."""
    geometry = tile_geometry(type_.qtype, rows, columns)
    name = type_.qtype.name
    return {
        "WEIGHT": f"Tile<{name},{geometry.tile_rows},{geometry.tile_columns}>",
        "QTYPE": name,
        "COLS": columns,
        "OUT": "float",
        "MEMORY": "GlobalStream",
    }


def kernel_text(type_: QuantizationType, *files: Path) -> str:
    """One source of several kernel files for a type."""
    assert type_.traits is not None
    return flatten(files[-1], [OPS], before=[type_.traits, *files[:-1]])


def activations(columns: int, rng: np.random.Generator) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Integers of a row and a scale for each 32."""
    q = rng.integers(-127, 128, columns).astype(np.int8)
    return q, rng.uniform(0.001, 0.1, columns // 32).astype(np.float32)


def check_values(type_: QuantizationType, raw: NDArray[np.uint8], values: NDArray[np.float32]) -> None:
    """`dequantise4` gives the reference's floats, at most one unit in the last place off."""
    expected = type_.dequantize(raw)
    assert np.isfinite(expected).all()
    np.testing.assert_array_max_ulp(values, expected, maxulp=1)


def check_products(
    type_: QuantizationType,
    raw: NDArray[np.uint8],
    q: NDArray[np.int8],
    scales: NDArray[np.float32],
    products: NDArray[np.float32],
) -> None:
    """`dot` gives the product of each chunk with the activations, as float64 does, but for rounding."""
    weights = type_.dequantize(raw).astype(np.float64).reshape(len(raw), -1, 32)
    terms = weights * (q.reshape(-1, 32) * scales[:, None].astype(np.float64))
    expected, size = terms.sum(axis=-1), np.abs(terms).sum(axis=-1)
    off = np.abs(products - expected)
    assert (off <= 1e-5 * size).all(), f"chunk {np.argmax(off - 1e-5 * size)}: off by {off.max()}"
