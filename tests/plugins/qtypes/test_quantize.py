"""Quantising is bit for bit what ggml's reference gives, whatever the values."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests.support.tiny import QTYPES

TYPES = sorted(name for name, type_ in QTYPES.items() if type_.quantize is not None)


def test_q4_0_and_q8_0_can_be_quantised_to() -> None:
    assert TYPES == ["Q4_0", "Q8_0"]


def oracle(values: np.ndarray, name: str) -> np.ndarray:
    with np.errstate(all="ignore"):
        return np.asarray(quantize(values, GGMLQuantizationType[name]))


@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-20, 1e-3, 1.0, 1e4])
@pytest.mark.parametrize("name", TYPES)
def test_blocks_are_those_of_the_gguf_package_at_every_scale(name: str, scale: float) -> None:
    values = (np.random.default_rng(5).standard_normal((37, 576)) * scale).astype(np.float32)
    values[3] = 0
    made = QTYPES[name].quantize
    assert made is not None
    assert np.array_equal(made(values), oracle(values, name))


@settings(max_examples=200, deadline=None)
@given(hnp.arrays(np.float32, (2, 32), elements=st.floats(-1000, 1000, width=32)), st.sampled_from(TYPES))
def test_blocks_are_those_of_the_gguf_package_for_any_values(values: np.ndarray, name: str) -> None:
    made = QTYPES[name].quantize
    assert made is not None
    assert np.array_equal(made(values), oracle(values, name))


@pytest.mark.parametrize("name", TYPES)
def test_ties_are_rounded_away_from_zero_as_in_ggml(name: str) -> None:
    values = np.arange(-16, 16, dtype=np.float32)[None] * np.float32(0.5)
    values[0, 0] = 127 if name == "Q8_0" else -8  # a scale of 1
    made = QTYPES[name].quantize
    assert made is not None
    assert np.array_equal(made(values), oracle(values, name))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e9])
@pytest.mark.parametrize("name", TYPES)
def test_what_no_scale_can_hold_is_refused(name: str, bad: float) -> None:
    values = np.ones((2, 64), np.float32)
    values[1, 40] = bad
    made = QTYPES[name].quantize
    assert made is not None
    with pytest.raises(FloatingPointError, match="not finite or above 524032"):
        made(values)
