"""RoPE frequencies, in one place for all executors."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from mortice.core.errors import InputError
from mortice.core.model.operators import Rope, RopeScaling

__all__ = ["rope_frequencies"]


def rope_frequencies(rope: Rope, factors: NDArray[np.float32] | None) -> tuple[NDArray[np.float64], float]:
    """Angle per position for each pair, and the factor on sine and cosine.

    ``base ** (-2 p / dims)`` (Su et al. 2021), divided by `factors` where the model brings them, then stretched as the
    scaling says. All of it is independent of the position, so one table serves every token.

    Args:
        rope: the operator.
        factors: shape (dims / 2,), or None.

    Returns:
        Frequencies, float64, shape (dims / 2,), and the magnitude (1 but for YaRN).

    Raises:
        InputError: for a factor that is no positive number.

    """
    pairs = np.arange(rope.dims // 2, dtype=np.float64)
    frequencies = rope.base ** (-2.0 * pairs / rope.dims)
    if factors is not None:
        frequencies = frequencies / _checked(rope, factors)
    if rope.scaling is None:
        return frequencies, 1.0
    stretched = frequencies / rope.scaling.factor
    if rope.scaling.type == "linear":
        return stretched, 1.0
    kept = _yarn_kept_share(rope, rope.scaling, pairs)
    magnitude = rope.scaling.attn_factor * (1.0 + 0.1 * math.log(max(1.0, rope.scaling.factor)))
    return stretched * (1.0 - kept) + frequencies * kept, magnitude


def _checked(rope: Rope, factors: NDArray[np.float32]) -> NDArray[np.float64]:
    for number in np.flatnonzero(~(np.isfinite(factors) & (factors > 0))):
        tensor = rope.factors.tensor if rope.factors is not None else "RoPE factors"
        raise InputError(f"{tensor}: factor {number} is {factors[number]}, wanted a positive number")
    return factors.astype(np.float64)


def _yarn_kept_share(rope: Rope, scaling: RopeScaling, pairs: NDArray[np.float64]) -> NDArray[np.float64]:
    """YaRN's ramp (Peng et al. 2023, section 3.2): 1 where a pair keeps its frequency, 0 where it is interpolated."""

    def pair_with_rotations(rotations: float) -> float:
        wavelengths = scaling.original_context / (rotations * 2.0 * math.pi)
        return rope.dims * math.log(wavelengths) / (2.0 * math.log(rope.base))

    low = max(0, math.floor(pair_with_rotations(scaling.beta_fast)))
    high = min(rope.dims - 1, math.ceil(pair_with_rotations(scaling.beta_slow)))
    return 1.0 - np.clip((pairs - low) / max(0.001, high - low), 0.0, 1.0)
