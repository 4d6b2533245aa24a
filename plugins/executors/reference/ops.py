"""The operators in NumPy, float32: plain functions on arrays, the oracle for every other executor.

Rows are tokens. Formulae and their sources are with the operators in `mortice.core.model.operators`.
"""

from __future__ import annotations

import functools
import math

import numpy as np
from numpy.polynomial import Chebyshev
from numpy.typing import NDArray

from mortice.core.model.operators import Activation, NormType

__all__ = ["SCORE_ELEMENTS", "activate", "attend", "linear", "normalize", "position_scale", "rotate", "softcap"]

Array = NDArray[np.float32]

SCORE_ELEMENTS = 1 << 22
"""The most attention scores held at once: 16 MiB."""


def linear(x: Array, weight: Array) -> Array:
    """``x @ weight.T``; x (tokens, columns), weight (rows, columns)."""
    if len(x) == 1:  # a matrix-vector product reads the weight once, at the speed of memory
        row: Array = (weight @ x[0])[None]
        return row
    out: Array = x @ weight.T
    return out


def normalize(x: Array, kind: NormType, eps: float, groups: int, weight: Array, bias: Array | None) -> Array:
    """RMSNorm or LayerNorm over each of `groups` parts of a row; weight and bias (part,) or (row,)."""
    part = x.shape[1] // groups
    parts = x.reshape(len(x), groups, part)
    if kind == "layer":
        parts = parts - parts.mean(axis=-1, keepdims=True)
    mean_square = np.einsum("tgi,tgi->tg", parts, parts)[..., None] / np.float32(part)
    out: Array = parts / np.sqrt(mean_square + np.float32(eps))
    # one row for all parts, or one for each
    out *= weight.reshape(-1, part)
    if bias is not None:
        out += bias.reshape(-1, part)
    return out.reshape(x.shape)


def rotate(x: Array, cos: Array, sin: Array, head_dim: int, style: str) -> Array:
    """RoPE; x (tokens, heads * head_dim), cos and sin (tokens, dims / 2)."""
    pairs = cos.shape[1]
    out = x.reshape(len(x), -1, head_dim).copy()
    turned = out[..., : 2 * pairs]
    first, second = (
        (turned[..., 0::2], turned[..., 1::2]) if style == "adjacent" else (turned[..., :pairs], turned[..., pairs:])
    )
    cos, sin = cos[:, None], sin[:, None]
    rotated_first, rotated_second = first * cos - second * sin, first * sin + second * cos
    first[...], second[...] = rotated_first, rotated_second
    return out.reshape(x.shape)


def attend(q: Array, keys: Array, values: Array, *, start: int, scale: float, cap: float, window: int) -> Array:
    """Causal attention of one sequence's new tokens over its cache.

    Args:
        q: (tokens, num_heads, head_dim).
        keys: (num_kv_heads, length, head_dim), the new tokens included.
        values: like `keys`.
        start: position of the first new token.
        scale: factor on the scores.
        cap: soft cap on the scores, 0 for none.
        window: tokens seen, the token itself included; 0 for all.

    Returns:
        (tokens, num_heads * head_dim).

    """
    tokens, num_heads, head_dim = q.shape
    num_kv_heads = len(keys)
    group = num_heads // num_kv_heads
    out = np.empty((tokens, num_heads, head_dim), np.float32)
    block = max(1, SCORE_ELEMENTS // (num_heads * (start + tokens)))
    for begin in range(0, tokens, block):
        end = min(tokens, begin + block)
        rows = end - begin
        # what no token of the block sees is left out: the future of the last, the past of the first
        low, high = max(0, start + begin + 1 - window) if window else 0, start + end
        # query heads of a group share K: (kv head, group x token, head_dim)
        grouped = q[begin:end].reshape(rows, num_kv_heads, group, head_dim).transpose(1, 2, 0, 3)
        scores = grouped.reshape(num_kv_heads, group * rows, head_dim) @ keys[:, low:high].transpose(0, 2, 1)
        scores *= np.float32(scale)
        if cap:
            scores = softcap(scores, cap)
        scores = scores.reshape(num_kv_heads, group, rows, high - low)
        if rows > 1:
            position = np.arange(start + begin, high)[:, None]
            seen = np.arange(low, high)[None]
            hidden = seen > position
            if window:
                hidden |= seen <= position - window
            np.copyto(scores, np.float32(-np.inf), where=hidden)
        scores -= scores.max(axis=-1, keepdims=True)
        np.exp(scores, out=scores)
        scores /= scores.sum(axis=-1, keepdims=True)
        mixed = scores.reshape(num_kv_heads, group * rows, high - low) @ values[:, low:high]
        del scores  # before the next block makes its own
        mixed = mixed.reshape(num_kv_heads, group, rows, head_dim).transpose(2, 0, 1, 3)
        out[begin:end] = mixed.reshape(rows, num_heads, head_dim)
    return out.reshape(tokens, num_heads * head_dim)


def position_scale(positions: NDArray[np.int64], strength: float, period: int) -> Array:
    """The factor of a `PositionScale` at each position, float32 of their shape."""
    return (1.0 + strength * np.log1p(positions // period)).astype(np.float32)


def softcap(x: Array, cap: float) -> Array:
    """``cap * tanh(x / cap)``."""
    out: Array = x / np.float32(cap)
    np.tanh(out, out=out)
    out *= np.float32(cap)
    return out


def activate(x: Array, activation: Activation) -> Array:
    """The activation functions by name.

    silu: ``x * sigmoid(x)``; gelu_tanh and gelu_erf: Hendrycks and Gimpel 2016; relu_squared: So et al. 2021.
    """
    out: Array
    match activation:
        case "silu":
            # exp of a large positive number overflows to infinity, and x / infinity is the right 0
            with np.errstate(over="ignore"):
                out = np.exp(-x)
            out += np.float32(1)
            return np.divide(x, out, out=out)
        case "gelu_tanh":
            # 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))); an overflowing cube ends as the right tanh of 1
            with np.errstate(over="ignore"):
                out = x * x * x
                out *= np.float32(0.044715)
                out += x
            out *= np.float32(math.sqrt(2 / math.pi))
            np.tanh(out, out=out)
            out += np.float32(1)
            out *= np.float32(0.5)
            out *= x
            return out
        case "gelu_erf":
            wide = x.astype(np.float64)
            wide *= 0.5 * (1.0 + _erf(wide / math.sqrt(2)))
            return wide.astype(np.float32)
        case "relu":
            return np.maximum(x, np.float32(0))
        case "relu_squared":
            out = np.maximum(x, np.float32(0))
            return np.square(out, out=out)


def _erf(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """The error function to 1e-12; NumPy has none, so it is interpolated from `math.erf` once."""
    series = _erf_series()(np.clip(x, -6.0, 6.0))
    # beyond 6 it is 1 to the last digit, and the series' own error would be multiplied by a large x
    return np.where(np.abs(x) < 6.0, series, np.sign(x))


@functools.cache
def _erf_series() -> Chebyshev:
    return Chebyshev.interpolate(np.vectorize(math.erf), 120, domain=[-6.0, 6.0])
