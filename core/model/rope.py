"""RoPE frequencies, in one place for all executors."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from mortice.core.errors import InputError
from mortice.core.model.operators import Rope, RopeScaling

__all__ = ["rope_frequencies", "yarn_magnitude"]


def rope_frequencies(rope: Rope, factors: NDArray[np.float32] | None) -> tuple[NDArray[np.float64], float]:
    """Angle per position for each pair, and the factor on sine and cosine.

    ``base ** (-2 p / dims)`` (Su et al. 2021), divided by `factors` where the model brings them, then stretched as the
    scaling says. All of it is independent of the position, so one table serves every token.

    Args:
        rope: the operator.
        factors: the values of `Rope.factors_for`, shape (dims / 2,), or None.

    Returns:
        Frequencies, float64, shape (dims / 2,), and the magnitude (1 where no scaling has one).

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
        return stretched, rope.scaling.attn_factor
    kept = _yarn_kept_share(rope, rope.scaling, pairs)
    magnitude = rope.scaling.attn_factor * yarn_magnitude(rope.scaling.factor, rope.scaling.log_multiplier)
    return stretched * (1.0 - kept) + frequencies * kept, magnitude


def yarn_magnitude(factor: float, log_multiplier: float = 0.0) -> float:
    """``1 + 0.1 ln(factor)`` (Peng et al. 2023, section 3.4), divided by the same with ``log_multiplier * ln(factor)``.

    The divisor is DeepSeek's ``mscale_all_dim``, which llama.cpp reads as ``rope.scaling.yarn_log_multiplier``.
    """
    stretch = 0.1 * math.log(max(1.0, factor))
    return (1.0 + stretch) / (1.0 + log_multiplier * stretch)


def _checked(rope: Rope, factors: NDArray[np.float32]) -> NDArray[np.float64]:
    for number in np.flatnonzero(~(np.isfinite(factors) & (factors > 0))):
        tensors = " or ".join(weight.tensor for weight in rope.weights) or "RoPE factors"
        raise InputError(f"{tensors}: factor {number} is {factors[number]}, wanted a positive number")
    return factors.astype(np.float64)


def _yarn_kept_share(rope: Rope, scaling: RopeScaling, pairs: NDArray[np.float64]) -> NDArray[np.float64]:
    """YaRN's ramp (Peng et al. 2023, section 3.2): 1 where a pair keeps its frequency, 0 where it is interpolated."""

    def pair_with_rotations(rotations: float) -> float:
        wavelengths = scaling.original_context / (rotations * 2.0 * math.pi)
        return rope.dims * math.log(wavelengths) / (2.0 * math.log(rope.base))

    low = max(0, math.floor(pair_with_rotations(scaling.beta_fast)))
    high = min(rope.dims - 1, math.ceil(pair_with_rotations(scaling.beta_slow)))
    return 1.0 - np.clip((pairs - low) / max(0.001, high - low), 0.0, 1.0)
