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

HALVES: Mapping[str, tuple[float, float]] = {"f16": (1e-5, 2e-6), "q8_0": (2e-4, 4e-5)}
"""The same where tensor cores attend, which multiply halves.

Q, the weights of the values, and what a cache of q8_0 holds, rounded to halves in the reference, moved the worst of 50
positions of these models by up to 1.9e-6 (f16) and 6.2e-5 (q8_0), the median one by 5e-7 and 1.2e-5.
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


@pytest.mark.parametrize("kv", HALVES)
@pytest.mark.parametrize("name", MODELS)
def test_tensor_cores_attend_as_exactly_as_halves_allow(tmp_path: Path, name: str, kv: str) -> None:
    family, sizes = MODELS[name]
    path = write_tiny_model(tmp_path / "model.gguf", CONTRACTS[family], qtypes="F32", sizes=sizes)
    kinds: dict[str, Any] = {"kv": kv, "activations": "int8"}  # which weights in F32 are not multiplied with
    with load(path, "reference", kv=kv) as reference, load(path, "cuda", **kinds) as cuda:
        ids = prompt(reference, 170)
        wanted = reference.logits(ids)
        worst, median = HALVES[kv]
        for at_once in (170, 34, 5):  # runs of rows together, a few rows and some by themselves, rows by themselves
            with cuda.session() as session:
                found = np.concatenate(
                    [session.feed(ids[start : start + at_once], logits="all") for start in range(0, 170, at_once)]
                )
            errors = [error(*pair) for pair in zip(found[120:], wanted[120:], strict=True)]
            assert max(errors) < worst, (at_once, errors.index(max(errors)))
            assert np.median(errors) < median, at_once


@pytest.mark.parametrize("heads", [32, 4])
@pytest.mark.parametrize("kv", SAME)
def test_a_long_context_is_attended_by_few_blocks_or_by_many(tmp_path: Path, kv: str, heads: int) -> None:
    # of 32 heads, a block attends to more pages than it holds; of 4, more blocks to one than the next launch joins
    sizes = {"head_dim": 64, "num_heads": heads, "num_kv_heads": heads, "context_length": 4096}
    path = write_tiny_model(tmp_path / "model.gguf", CONTRACTS["qwen3"], qtypes="Q8_0", sizes=sizes)
    with load(path, "reference", kv=kv, context=2304) as reference, load(path, "cuda", kv=kv, context=2304) as cuda:
        ids = prompt(reference, 2205)
        with reference.session() as ours, cuda.session() as theirs:
            parts = ids[:2200], *([token] for token in ids[2200:])
            found, wanted = ([session.feed(part)[0] for part in parts] for session in (theirs, ours))
        assert max(map(error, found, wanted)) < SAME[kv][0]


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
