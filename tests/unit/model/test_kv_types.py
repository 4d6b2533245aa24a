"""Types of the KV cache."""

from __future__ import annotations

import numpy as np
import pytest

from mortice.core.config import ExecutorConfig
from mortice.core.model.kv_types import KV_TYPES, kv_cache_bytes, kv_type_reasons
from mortice.core.model.program import KvShape
from mortice.plugins.executors.reference.kv_cache import through_kv_type

LLAMA = KvShape(num_kv_heads=8, head_dim=128)
ODD = KvShape(num_kv_heads=2, head_dim=80)


def test_the_config_offers_these_types() -> None:
    for kv_type in ("auto", *KV_TYPES):
        assert ExecutorConfig(kv=kv_type).kv == kv_type  # type: ignore[arg-type]  # that it is one is the test


@pytest.mark.parametrize(("kv_type", "a_token"), [("f32", 8192), ("f16", 4096), ("q8_0", 2176)])
def test_bytes_of_a_token(kv_type: str, a_token: int) -> None:
    assert kv_cache_bytes(LLAMA, kv_type, 10) == 10 * a_token


def test_heads_that_are_not_whole_blocks_are_refused_for_q8_0_alone() -> None:
    assert kv_type_reasons([LLAMA, ODD, ODD], "q8_0", "cuda") == [
        "executor.kv = 'q8_0': found head_dim 80, wanted a multiple of 32"
    ]
    assert not kv_type_reasons([LLAMA, ODD], "f16", "cuda")
    assert not kv_type_reasons([LLAMA], "q8_0", "cuda")


def test_an_unknown_type_is_refused() -> None:
    (reason,) = kv_type_reasons([LLAMA], "f8", "cuda")
    assert reason == "executor.kv = 'f8': the cuda executor keeps auto, f32, f16, q8_0"


def test_q8_0_is_off_by_half_a_127th_of_the_largest_of_32() -> None:
    values = np.random.default_rng(0).normal(size=(3, 5, 64)).astype(np.float32)
    found = through_kv_type(values, "q8_0")
    blocks, errors = values.reshape(-1, 32), np.abs(found - values).reshape(-1, 32)
    bound = np.abs(blocks).max(1) * (0.5 / 127 + 2**-11)  # rounding the integer, and the scale to half precision
    assert (errors.max(1) <= bound).all()
    assert (errors.max(1) > bound / 4).all()
    np.testing.assert_array_equal(through_kv_type(np.zeros((1, 32), np.float32), "q8_0"), 0)


@pytest.mark.parametrize(("kv_type", "error"), [("f32", 0.0), ("f16", 2**-11)])
def test_float_types_round_each_element(kv_type: str, error: float) -> None:
    values = np.random.default_rng(0).uniform(0.5, 2, 1000).astype(np.float32)
    off = np.abs(through_kv_type(values, kv_type) - values) / values
    assert off.max() <= error
    assert off.max() >= error / 2
