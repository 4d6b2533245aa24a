"""What choosing one token costs on the CPU, for a vocabulary of 151,936 tokens (Qwen's)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mortice.core.text.params import SamplingParams
from mortice.core.text.sampling import Sampler

VOCAB_SIZE = 151_936

CASES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "greedy, penalties": {"repetition_penalty": 1.1, "frequency_penalty": 0.1, "penalty_window": 512},
    "temperature only": {"temperature": 0.8},
    "top-k 40": {"temperature": 0.8, "top_k": 40},
    "top-p 0.95": {"temperature": 0.8, "top_p": 0.95},
    "min-p 0.05": {"temperature": 0.8, "min_p": 0.05},
    "all filters, penalties": {
        "temperature": 0.8,
        "top_k": 40,
        "top_p": 0.95,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
    },
}


def _logits(shape: str) -> np.ndarray[Any, np.dtype[np.float32]]:
    rng = np.random.default_rng(1)
    logits = rng.standard_normal(VOCAB_SIZE, dtype=np.float32) * np.float32(2.5)
    if shape == "peaked":  # as a trained model gives them: a few dozen tokens carry nearly all the weight
        logits[rng.integers(0, VOCAB_SIZE, 50)] += np.float32(15)
    return logits


@pytest.mark.parametrize("shape", ["peaked", "flat"])
@pytest.mark.parametrize("case", CASES)
def test_sample(benchmark: Any, case: str, shape: str) -> None:
    sampler = Sampler(SamplingParams(seed=1, **CASES[case]), VOCAB_SIZE)
    sampler.accept(range(2048))
    logits = _logits(shape)
    sampled = benchmark(sampler.sample, logits, 7)
    assert 0 <= sampled.id < VOCAB_SIZE


def test_sample_greedy_with_20_logprobs(benchmark: Any) -> None:
    sampled = benchmark(Sampler(SamplingParams(), VOCAB_SIZE, top_logprobs=20).sample, _logits("peaked"), 0)
    assert len(sampled.top) == 20
    assert sampled.top[0][0] == sampled.id


def test_accept_prompt_of_8192_tokens(benchmark: Any) -> None:
    sampler = Sampler(SamplingParams(repetition_penalty=1.1, penalty_window=1024), VOCAB_SIZE)
    prompt = np.random.default_rng(2).integers(0, VOCAB_SIZE, 8192).tolist()
    benchmark(sampler.accept, prompt)
