"""GGML's own quantisation types; the NumPy reference is the `gguf` package's, which ggml's authors keep."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from mortice.core.model.qtypes import GGML_TYPES, QType
from mortice.core.plugin.hookspecs import hookimpl
from mortice.core.plugin.interfaces import QuantizationType

# Types that hold weights. Q8_1 and Q8_K hold activations inside ggml, the integer types and F64 hold no weights.
_WEIGHT_TYPES = (
    *("F32", "F16", "BF16"),
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    *("IQ4_NL", "IQ4_XS", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"),
    *("TQ1_0", "TQ2_0", "MXFP4"),
)


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

        return np.asarray(dequantize(rows, GGMLQuantizationType(self.qtype.id)), dtype=np.float32)


@hookimpl
def mortice_qtypes() -> Iterable[QuantizationType]:
    """Every GGML type that holds weights."""
    by_name = {qtype.name: qtype for qtype in GGML_TYPES.values()}
    return [
        QuantizationType(qtype=by_name[name], dequantize=_Dequantize(by_name[name])) for name in _WEIGHT_TYPES
    ]
