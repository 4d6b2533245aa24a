"""The KV cache in every type it is kept in: the CUDA executor against the reference with a cache of the same type."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mortice.core.errors import UnsupportedError
from mortice.core.testing.tiny_models import write_tiny_model
from tests.gpu.test_executor import error, load, prompt
from tests.support.cuda import needs_gpu
from tests.support.tiny import CONTRACTS

pytestmark = [pytest.mark.gpu, needs_gpu]

SAME: Mapping[str, tuple[float, float]] = {"f32": (1e-9, 1e-9), "f16": (1e-6, 1e-7), "q8_0": (1e-4, 1e-6)}
"""Normalised mean squared error of logits: of the worst position, and of the median one.

A difference in the last bit decides how a value halfway between two steps is rounded, and a step of q8_0 is large.
Noise of 2e-7 on the reference's K and V moved the worst of 50 positions by up to 1.3e-5 (q8_0) and 2.3e-7 (f16), and
left most as they were.
"""

MODELS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "place and attention": ("qwen3", {"head_dim": 64, "num_heads": 6, "num_kv_heads": 2}),
    "heads of 96": ("llama", {"hidden_size": 384, "num_heads": 4, "num_kv_heads": 1}),
    "no RoPE, written by itself": ("granite", {"hidden_size": 256, "num_heads": 4, "rotated": False}),
    "a window": ("mistral", {"hidden_size": 256, "num_heads": 4, "window": 70}),
}


@pytest.fixture(params=MODELS)
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    family, sizes = MODELS[request.param]
    return write_tiny_model(tmp_path / "model.gguf", CONTRACTS[family], qtypes="Q8_0", sizes=sizes)


@pytest.mark.parametrize("kv", SAME)
def test_prefill_and_decode_equal_the_reference(path: Path, kv: str) -> None:
    with load(path, "reference", kv=kv) as reference, load(path, "cuda", kv=kv) as cuda:
        ids = prompt(reference, 170)  # pages of 64, the third begun
        wanted = reference.logits(ids)
        worst, median = SAME[kv]
        assert error(cuda.logits(ids), wanted) < worst
        with cuda.session() as session:
            session.feed(ids[:120])
            errors = [error(session.feed([ids[position]])[0], wanted[position]) for position in range(120, 170)]
        assert max(errors) < worst, errors.index(max(errors))
        assert np.median(errors) < median


def test_q8_0_is_close_to_float32_and_not_the_same(path: Path) -> None:
    with load(path, "cuda") as exact, load(path, "cuda", kv="q8_0") as rounded:
        ids = prompt(exact, 170)
        assert SAME["f32"][0] < error(rounded.logits(ids), exact.logits(ids)) < 2e-3


def test_q8_0_takes_34_bytes_where_f32_takes_128(path: Path) -> None:
    with load(path, "cuda") as exact, load(path, "cuda", kv="q8_0") as rounded:
        assert rounded.fit.kv_bytes * 128 == exact.fit.kv_bytes * 34


def test_heads_that_are_not_whole_blocks_are_refused(tmp_path: Path) -> None:
    sizes = {"hidden_size": 160, "num_heads": 2, "num_kv_heads": 2}
    path = write_tiny_model(tmp_path / "model.gguf", CONTRACTS["llama"], qtypes="Q8_0", sizes=sizes)
    with pytest.raises(UnsupportedError, match=r"executor.kv = 'q8_0': found head_dim 80, wanted a multiple of 32"):
        load(path, "cuda", kv="q8_0")
