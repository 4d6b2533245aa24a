"""Which tokens a seeded draw may give when sums of weights are only nearly right."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mortice.core.text.params import SamplingParams
from mortice.core.text.sampling import Sampler, uniform

__all__ = ["possible_tokens"]


def possible_tokens(
    logits: NDArray[np.float32], params: SamplingParams, seen: Sequence[int], step: int, slack: float
) -> set[int]:
    """The tokens drawn where no running sum is off its target by more than a share of `slack`."""
    sampler = Sampler(params, logits.size)
    sampler.accept(seen)
    adjusted = sampler._adjust(logits)
    ranked = np.lexsort((np.arange(logits.size), -adjusted))
    if params.top_k:
        ranked = ranked[: params.top_k]
    z = (adjusted[ranked] - adjusted[ranked[0]]) / np.float32(params.temperature)
    running = np.cumsum(np.exp(z), dtype=np.float64)
    likely = int((z >= np.float32(math.log(params.min_p))).sum()) if params.min_p else ranked.size

    def rank(factor: float) -> int:
        kept = min(int(np.searchsorted(running, params.top_p * running[-1] * factor)) + 1, ranked.size)
        kept = min(likely, kept if params.top_p < 1 else ranked.size)
        return min(int(np.searchsorted(running, uniform(sampler.seed, step) * running[kept - 1] * factor)), kept - 1)

    return {int(token) for token in ranked[rank(1 - slack) : rank(1 + slack) + 1]}
