"""How large the values of a tensor can be, seen from its bytes: what is not finite, all zero or beyond float16.

Of a block only its scales are looked at, as bits: read as integers, float magnitudes keep their order, Inf and NaN
stand above all, and one maximum over a row answers all three questions. Places of scales: ggml's ``ggml-common.h``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from mortice.core.model.qtypes import QType

__all__ = ["FLOAT16_MAX", "Rows", "reads_scales", "row_magnitudes"]

FLOAT16_MAX = 65504.0
"""The largest float16. No weight of a real model comes near it; one beyond it overflows where halves are computed."""

Bytes = NDArray[np.uint8]


@frozen(eq=False)
class Rows:
    """What was found in some rows, three arrays of bool, shape (rows,).

    Attributes:
        broken: a value is NaN or infinite.
        zero: every value is zero.
        large: finite, but a value may lie beyond `FLOAT16_MAX`.

    """

    broken: NDArray[np.bool_]
    zero: NDArray[np.bool_]
    large: NDArray[np.bool_]


@frozen
class _Float:
    """A float format: its integer view, the bits without the sign, and those of infinity."""

    kind: str
    mask: int
    infinity: int
    as_number: Callable[[NDArray[Any]], NDArray[Any]]

    def largest(self, values: NDArray[Any]) -> NDArray[Any]:
        """The magnitude bits of each row's largest value."""
        largest: NDArray[Any] = np.bitwise_and(values, self.mask).max(axis=1)
        return largest


_F16 = _Float("<u2", 0x7FFF, 0x7C00, lambda bits: bits.view("<f2").astype(np.float32))
_BF16 = _Float("<u2", 0x7FFF, 0x7F80, lambda bits: (bits.astype("<u4") << np.uint32(16)).view("<f4"))
_F32 = _Float("<u4", 0x7FFFFFFF, 0x7F800000, lambda bits: bits.view("<f4"))
_F64 = _Float("<u8", 0x7FFFFFFFFFFFFFFF, 0x7FF0000000000000, lambda bits: bits.view("<f8"))
_ELEMENTS: Mapping[str, _Float] = MappingProxyType({"F32": _F32, "F16": _F16, "BF16": _BF16, "F64": _F64})


@frozen
class _Scales:
    """Where a block keeps its float16 numbers, each with the most that one is multiplied by in a value."""

    places: tuple[tuple[int, float], ...]


_SCALES: Mapping[str, _Scales] = MappingProxyType(
    {
        "Q4_0": _Scales(((0, 8),)),
        "Q4_1": _Scales(((0, 15), (2, 1))),
        "Q5_0": _Scales(((0, 16),)),
        "Q5_1": _Scales(((0, 31), (2, 1))),
        "Q8_0": _Scales(((0, 128),)),
        "Q2_K": _Scales(((80, 45), (82, 15))),
        "Q3_K": _Scales(((108, 128),)),
        "Q4_K": _Scales(((0, 945), (2, 63))),
        "Q5_K": _Scales(((0, 1953), (2, 63))),
        "Q6_K": _Scales(((208, 4096),)),
        "IQ2_XXS": _Scales(((0, 167),)),
        "IQ2_XS": _Scales(((0, 167),)),
        "IQ2_S": _Scales(((0, 167),)),
        "IQ3_XXS": _Scales(((0, 481),)),
        "IQ3_S": _Scales(((0, 465),)),
        "IQ1_S": _Scales(((0, 17),)),
        "IQ4_NL": _Scales(((0, 127),)),
        "IQ4_XS": _Scales(((0, 4064),)),
        "TQ1_0": _Scales(((52, 1),)),
        "TQ2_0": _Scales(((64, 2),)),
    }
)


def reads_scales(qtype: QType) -> bool:
    """Whether rows of the type are judged by their bytes; those of other types have to be dequantised."""
    return qtype.name in _ELEMENTS or qtype.name in _SCALES


def row_magnitudes(rows: Bytes, qtype: QType, dequantize: Callable[[Bytes], NDArray[np.float32]] | None = None) -> Rows:
    """Judge rows.

    A quantised row counts as zero when all its scales are: the quantisers of ggml write no others for a row of zeros.

    Args:
        rows: ``uint8``, shape (rows, bytes of a row), contiguous.
        qtype: how they are stored.
        dequantize: for types whose blocks are not known here.

    """
    if (element := _ELEMENTS.get(qtype.name)) is not None:
        return _judge(element, element.largest(rows.view(element.kind)), 1.0)
    if (scales := _SCALES.get(qtype.name)) is not None:
        blocks = rows.reshape(len(rows), -1, qtype.block_bytes)
        # blocks have an even number of bytes, and so has every place
        halves = blocks.view("<u2")
        parts = [_judge(_F16, _F16.largest(halves[:, :, at // 2]), most) for at, most in scales.places]
        return _together(parts)
    assert dequantize is not None, f"{qtype.name}: no scales known, and nothing to dequantise it"
    with np.errstate(all="ignore"):  # what overflows is what is looked for
        values = np.ascontiguousarray(dequantize(rows), "<f4")
    return _judge(_F32, _F32.largest(values.view("<u4")), 1.0)


def _judge(form: _Float, largest: NDArray[Any], most: float) -> Rows:
    broken = largest >= form.infinity
    numbers = form.as_number(np.where(broken, 0, largest).astype(form.kind))
    return Rows(broken=broken, zero=largest == 0, large=numbers > FLOAT16_MAX / most)


def _together(parts: list[Rows]) -> Rows:
    broken = np.logical_or.reduce([part.broken for part in parts])
    zero = np.logical_and.reduce([part.zero for part in parts])
    return Rows(broken=broken, zero=zero, large=np.logical_or.reduce([part.large for part in parts]) & ~broken)
