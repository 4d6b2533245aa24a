from __future__ import annotations

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from mortice.core.model.qtypes import GGML_TYPES
from mortice.core.testing.blocks import encode
from tests.support.tiny import QTYPES


@pytest.mark.parametrize("columns", [256, 2048])
@pytest.mark.parametrize("name", sorted(QTYPES))
def test_values_are_bit_for_bit_those_of_gguf(name: str, columns: int) -> None:
    rng = np.random.default_rng(1)
    qtype = QTYPES[name].qtype
    rows = encode(rng.standard_normal((700, columns), np.float32), qtype, rng)
    theirs = np.asarray(dequantize(rows, GGMLQuantizationType(qtype.id)), np.float32)
    ours = QTYPES[name].dequantize(rows)
    assert ours.shape == (700, columns)
    np.testing.assert_array_equal(ours.view(np.uint32), theirs.view(np.uint32))


def test_rows_need_not_be_contiguous_or_many() -> None:
    rng = np.random.default_rng(1)
    qtype = QTYPES["Q4_1"].qtype
    rows = encode(rng.standard_normal((10, 64), np.float32), qtype, rng)
    whole = QTYPES["Q4_1"].dequantize(rows)
    np.testing.assert_array_equal(QTYPES["Q4_1"].dequantize(rows[1::3]), whole[1::3])
    assert QTYPES["Q4_1"].dequantize(rows[:0]).shape == (0, 64)


def test_types_that_hold_activations_or_integers_are_no_weight_types() -> None:
    left_out = {qtype.name for qtype in GGML_TYPES.values()} - QTYPES.keys()
    assert left_out == {"Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64", "NVFP4"}
