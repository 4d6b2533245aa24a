"""GGML's own quantisation types; the NumPy reference is the `gguf` package's, which ggml's authors keep."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from mortice.core.model.qtypes import GGML_TYPES, QType
from mortice.core.plugin.hookspecs import hookimpl
from mortice.core.plugin.interfaces import QuantizationType
from mortice.plugins.qtypes.bits import Planes, columns
from mortice.plugins.qtypes.iq4_nl import reference as iq4_nl_reference
from mortice.plugins.qtypes.iq4_xs import reference as iq4_xs_reference
from mortice.plugins.qtypes.q2_k import reference as q2_k_reference
from mortice.plugins.qtypes.q3_k import reference as q3_k_reference
from mortice.plugins.qtypes.q4_k import reference as q4_k_reference
from mortice.plugins.qtypes.q5_0 import reference as q5_0_reference
from mortice.plugins.qtypes.q5_1 import reference as q5_1_reference
from mortice.plugins.qtypes.q5_k import reference as q5_k_reference
from mortice.plugins.qtypes.q6_k import reference as q6_k_reference

# Types that hold weights. Q8_1 and Q8_K hold activations inside ggml, the integer types and F64 hold no weights.
_WEIGHT_TYPES = (
    *("F32", "F16", "BF16"),
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    *("IQ4_NL", "IQ4_XS", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"),
    *("TQ1_0", "TQ2_0", "MXFP4"),
)

# Types with a CUDA traits header in the folder of their name, and the planes it reads.
_PLANES: Mapping[str, Planes] = {
    "F32": columns(*((start, start + 16) for start in range(0, 128, 16))),
    "F16": columns(*((start, start + 16) for start in range(0, 64, 16))),
    "BF16": columns(*((start, start + 16) for start in range(0, 64, 16))),
    "Q4_0": columns((2, 18), (0, 2)),
    "Q4_1": columns((4, 20), (0, 4)),
    "Q5_0": q5_0_reference.planes,
    "Q5_1": q5_1_reference.planes,
    "Q8_0": columns((2, 18), (18, 34), (0, 2)),
    "Q2_K": q2_k_reference.planes,
    "Q3_K": q3_k_reference.planes,
    "Q4_K": q4_k_reference.planes,
    "Q5_K": q5_k_reference.planes,
    "Q6_K": q6_k_reference.planes,
    "IQ4_NL": iq4_nl_reference.planes,
    "IQ4_XS": iq4_xs_reference.planes,
}

_QUANTIZED_AT_LOAD = ("Q8_0", "Q4_0")
"""Types that `gguf` quantises to as ggml's reference does, with no more to choose than the type."""

_LARGEST = 8 * 65504
"""Largest magnitude that these types hold, given by Q4_0's scale in float16; far above any weight."""

_PIECE = 1 << 17
"""Elements dequantised at a time: 512 KiB of float32, so that the intermediates stay in the cache of a core."""


@frozen
class _Dequantize:
    """Rows of bytes to rows of float32; `gguf` is imported on first use, since a plugin's import stays light."""

    qtype: QType

    def __call__(self, rows: NDArray[np.uint8]) -> NDArray[np.float32]:
        if self.qtype.name == "F32":
            return rows.view("<f4").astype(np.float32, copy=False)
        if self.qtype.name == "F16":
            return rows.view("<f2").astype(np.float32)
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        # gguf works on 16 rows at a time, mostly overhead when rows are short. Blocks know nothing of rows, so it is
        # given one long row at a time: the same values, 1.2 to 3 times as fast.
        ggml_type = GGMLQuantizationType(self.qtype.id)
        blocks = rows.reshape(-1, self.qtype.block_bytes)
        values = np.empty((len(blocks), self.qtype.block_elements), np.float32)
        piece = _PIECE // self.qtype.block_elements
        for start in range(0, len(blocks), piece):
            part = blocks[start : start + piece]
            values[start : start + len(part)] = dequantize(part.reshape(1, -1), ggml_type).reshape(len(part), -1)
        columns = rows.shape[1] // self.qtype.block_bytes * self.qtype.block_elements
        return values.reshape(len(rows), columns)


@frozen
class _Quantize:
    """Rows of float32 to rows of bytes, bit for bit what ggml's own reference gives (``quantize_row_*_ref``)."""

    qtype: QType

    def __call__(self, values: NDArray[np.float32]) -> NDArray[np.uint8]:
        from gguf import GGMLQuantizationType
        from gguf.quants import quantize

        ggml_type = GGMLQuantizationType(self.qtype.id)
        blocks = values.reshape(-1, self.qtype.block_elements)
        data = np.empty((len(blocks), self.qtype.block_bytes), np.uint8)
        piece = _PIECE // self.qtype.block_elements
        with np.errstate(over="ignore", invalid="ignore"):  # in blocks so small that their scale is 0 in float16
            for start in range(0, len(blocks), piece):
                part = blocks[start : start + piece]
                if not np.abs(part).max() <= _LARGEST:  # so written, it is true of NaN
                    raise FloatingPointError(f"found a value that is not finite or above {_LARGEST}")
                data[start : start + len(part)] = quantize(part.reshape(1, -1), ggml_type).reshape(len(part), -1)
        return data.reshape(len(values), self.qtype.row_bytes(values.shape[1]))


@hookimpl
def mortice_qtypes() -> Iterable[QuantizationType]:
    """Every GGML type that holds weights."""
    by_name = {qtype.name: qtype for qtype in GGML_TYPES.values()}
    return [
        QuantizationType(
            qtype=by_name[name],
            dequantize=_Dequantize(by_name[name]),
            traits=Path(__file__).parent / name.lower() / "traits.cuh" if name in _PLANES else None,
            planes=_PLANES.get(name),
            quantize=_Quantize(by_name[name]) if name in _QUANTIZED_AT_LOAD else None,
        )
        for name in _WEIGHT_TYPES
    ]
