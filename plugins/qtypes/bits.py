"""The planes of a tile in NumPy: what ``ops/unpack.cuh``, ``k_scales.cuh`` and ``iq4_codes.cuh`` say in CUDA.

Every function takes a row of bytes for each block and gives one, ``uint8``. Inside, blocks lie along the
last axis, where NumPy's loops are fast. A *chunk* is 32 neighbouring elements, a *group* four.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Bytes",
    "Planes",
    "bit_plane",
    "columns",
    "iq4_codes",
    "nibble_plane",
    "pair_plane",
    "scales_and_minimums",
    "six_bit_pairs",
    "spread_bits",
]

Bytes = NDArray[np.uint8]
"""Shape (blocks, bytes of a block or of a plane's part of it)."""

Planes = Callable[[Bytes], tuple[Bytes, ...]]
"""Blocks as in the file to the planes of a tile, in order; together they have the same bytes a block."""

_NIBBLES = np.uint64(0x0F0F0F0F0F0F0F0F)


def columns(*ranges: tuple[int, int]) -> Planes:
    """Planes that are byte ranges of the block as they are."""

    def planes(blocks: Bytes) -> tuple[Bytes, ...]:
        return tuple(blocks[:, start:stop] for start, stop in ranges)

    return planes


def nibble_plane(low: Bytes, order: tuple[int, ...] = ()) -> Bytes:
    """The 4-bit plane of blocks whose nibbles lie as in the K types.

    In the file, element l of two chunks is the low and the high nibble of byte l of 32; in the plane, byte i of a
    chunk's 16 has element i in the low nibble and element i + 16 in the high one.

    Args:
        low: shape (blocks, 16 n), two chunks every 32 bytes.
        order: the chunk that each nibble of the file is, as chunk numbers by (32 bytes, nibble); in order by default.

    """
    words = _words(low, np.uint64).reshape(low.shape[1] // 32, 2, 2, len(low))
    first, second = words[:, 0], words[:, 1]
    plane = np.empty((len(words) * 2, 2, len(low)), np.uint64)
    places = np.arange(2 * len(words)) if not order else np.array(order)
    plane[places[0::2]] = (first & _NIBBLES) | ((second & _NIBBLES) << np.uint64(4))
    plane[places[1::2]] = ((first >> np.uint64(4)) & _NIBBLES) | (second & ~_NIBBLES)
    return _bytes(plane)


def pair_plane(pairs: Bytes) -> Bytes:
    """The 2-bit plane of blocks of 256 elements.

    In the file, element l of chunk c is bits 2 (c % 4) of byte l of 32, at 32 (c // 4); in the plane, group g of a
    chunk is bits 2 (g % 4) of the four bytes of word g // 4.
    """
    words = _words(pairs, np.uint32).reshape(2, 1, 2, 4, len(pairs))
    shifts = np.arange(0, 8, 2, dtype=np.uint32).reshape(1, 4, 1, 1)
    plane = np.zeros((2, 4, 2, len(pairs)), np.uint32)
    for group in range(4):
        plane |= ((words[:, :, :, group] >> shifts) & np.uint32(0x03030303)) << np.uint32(2 * group)
    return _bytes(plane)


def bit_plane(bits: Bytes) -> Bytes:
    """The 1-bit plane of blocks of 256 elements.

    In the file, element l of chunk c is bit c of byte l of 32; in the plane, group g of a chunk is bit g of the four
    bytes of its word.
    """
    words = _words(bits, np.uint32)
    shifts = np.arange(8, dtype=np.uint32)[:, None]
    plane = np.zeros((8, len(bits)), np.uint32)
    for group in range(8):
        plane |= ((words[group] >> shifts) & np.uint32(0x01010101)) << np.uint32(group)
    return _bytes(plane)


def spread_bits(bits: Bytes) -> Bytes:
    """The 1-bit plane of blocks of 32 elements whose bits lie in order, as in Q5_0: shape (blocks, 4) both ways."""
    words = _words(bits, np.uint32)
    plane = np.zeros_like(words)
    for group in range(8):
        four = (words >> np.uint32(4 * group)) & np.uint32(15)
        plane |= ((four * np.uint32(0x00204081)) & np.uint32(0x01010101)) << np.uint32(group)
    return _bytes(plane)


def six_bit_pairs(first: Bytes, second: Bytes) -> Bytes:
    """Two 6-bit numbers for each of eight chunks, shapes (blocks, 8), as 12 bytes a block: see ``k_scales.cuh``."""
    words = np.zeros((3, len(first)), np.uint32)
    for chunk, (a, b) in enumerate(zip(first.T.astype(np.uint32), second.T.astype(np.uint32), strict=True)):
        half = 16 * (chunk % 2)
        words[chunk // 2 % 2] |= ((a & 15) | ((b & 15) << 8)) << (half + 4 * (chunk // 4))
        words[2] |= ((a >> 4) | ((b >> 4) << 8)) << (half + 2 * (chunk // 2))
    return _bytes(words)


def scales_and_minimums(scales: Bytes) -> Bytes:
    """The 12 bytes of scales and minimums of a Q4_K or Q5_K block, as six-bit pairs."""
    scale, minimum, high = scales[:, 0:4], scales[:, 4:8], scales[:, 8:12]
    return six_bit_pairs(
        np.hstack([scale & 63, (high & 15) | ((scale >> 6) << 4)]),
        np.hstack([minimum & 63, (high >> 4) | ((minimum >> 6) << 4)]),
    )


def iq4_codes(codes: Bytes) -> Bytes:
    """The plane of 4-bit codes in element order, bits 2 and 3 of each exchanged, from nibbles as in Q4_0.

    Shape (blocks, 16 n) both ways; see ``iq4_codes.cuh``.
    """
    words = _words(codes, np.uint32).reshape(-1, 4, len(codes))
    plane = np.empty_like(words)
    for half, shift in enumerate((0, 4)):
        four = (words >> np.uint32(shift)) & np.uint32(0x0F0F0F0F)
        four |= four >> np.uint32(4)
        four &= np.uint32(0x00FF00FF)
        four |= four >> np.uint32(8)  # the codes of four bytes in the low 16 bits
        plane[:, 2 * half : 2 * half + 2] = (four[:, 0::2] & np.uint32(0xFFFF)) | (four[:, 1::2] << np.uint32(16))
    first, second = plane & np.uint32(0x44444444), plane & np.uint32(0x88888888)
    return _bytes((plane & np.uint32(0x33333333)) | (first << np.uint32(1)) | (second >> np.uint32(1)))


def _words(rows: Bytes, kind: type[np.uint32 | np.uint64]) -> NDArray[Any]:
    """Words of bytes by (place in the row, row)."""
    return np.ascontiguousarray(np.ascontiguousarray(rows).view(np.dtype(kind).newbyteorder("<")).T)


def _bytes(words: NDArray[Any]) -> Bytes:
    """Bytes by (row, place) of words whose last axis is the row."""
    flat = words.reshape(-1, words.shape[-1])
    return np.ascontiguousarray(flat.T).view(np.uint8)
