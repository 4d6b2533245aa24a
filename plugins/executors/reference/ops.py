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

__all__ = ["activate", "attend", "linear", "normalize", "rotate", "softcap"]

Array = NDArray[np.float32]

_SCORE_ELEMENTS = 1 << 22  # the most attention scores held at once: 16 MiB


def linear(x: Array, weight: Array) -> Array:
    """``x @ weight.T``; x (tokens, columns), weight (rows, columns)."""
    if len(x) == 1:  # a matrix-vector product reads the weight once, at the speed of memory
        return (weight @ x[0])[None]
    return x @ weight.T


def normalize(x: Array, kind: NormType, eps: float, groups: int, weight: Array, bias: Array | None) -> Array:
    """RMSNorm or LayerNorm over each of `groups` parts of a row; weight (part,) or (row,)."""
    parts = x.reshape(len(x), groups, -1)
    if kind == "layer":
        parts = parts - parts.mean(axis=-1, keepdims=True)
    mean_square = np.einsum("tgi,tgi->tg", parts, parts)[..., None] / np.float32(parts.shape[-1])
    parts = parts / np.sqrt(mean_square + np.float32(eps))
    per_part = weight.size == parts.shape[-1]
    out = parts * weight if per_part else parts * weight.reshape(groups, -1)
    if bias is not None:
        out = out + (bias if bias.size == parts.shape[-1] else bias.reshape(groups, -1))
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
    num_kv_heads, length, _ = keys.shape
    group = num_heads // num_kv_heads
    out = np.empty((tokens, num_heads, head_dim), np.float32)
    block = max(1, _SCORE_ELEMENTS // (num_heads * length))
    for begin in range(0, tokens, block):
        end = min(tokens, begin + block)
        rows = end - begin
        # query heads of a group share K: (kv head, group x token, head_dim)
        grouped = q[begin:end].reshape(rows, num_kv_heads, group, head_dim).transpose(1, 2, 0, 3)
        scores = (grouped.reshape(num_kv_heads, group * rows, head_dim) @ keys.transpose(0, 2, 1)) * np.float32(scale)
        if cap:
            scores = softcap(scores, cap)
        scores = scores.reshape(num_kv_heads, group, rows, length)
        if rows > 1 or window:
            position = np.arange(start + begin, start + end)[:, None]
            seen = np.arange(length)[None]
            hidden = seen > position
            if window:
                hidden |= seen <= position - window
            scores[:, :, hidden] = -np.inf
        scores -= scores.max(axis=-1, keepdims=True)
        np.exp(scores, out=scores)
        scores /= scores.sum(axis=-1, keepdims=True)
        mixed = scores.reshape(num_kv_heads, group * rows, length) @ values
        out[begin:end] = (
            mixed.reshape(num_kv_heads, group, rows, head_dim).transpose(2, 0, 1, 3).reshape(rows, num_heads, head_dim)
        )
    return out.reshape(tokens, -1)


def softcap(x: Array, cap: float) -> Array:
    """``cap * tanh(x / cap)``."""
    return np.float32(cap) * np.tanh(x / np.float32(cap))


def activate(x: Array, activation: Activation) -> Array:
    """The activation functions by name.

    silu: ``x * sigmoid(x)``; gelu_tanh and gelu_erf: Hendrycks and Gimpel 2016; relu_squared: So et al. 2021.
    """
    match activation:
        case "silu":
            # exp of a large positive number overflows to infinity, and x / infinity is the right 0
            with np.errstate(over="ignore"):
                return x / (np.float32(1) + np.exp(-x))
        case "gelu_tanh":
            inner = np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x * x * x)
            return np.float32(0.5) * x * (np.float32(1) + np.tanh(inner))
        case "gelu_erf":
            return (0.5 * x * (1.0 + _erf(x / math.sqrt(2)))).astype(np.float32)
        case "relu":
            return np.maximum(x, np.float32(0))
        case "relu_squared":
            return np.square(np.maximum(x, np.float32(0)))


def _erf(x: Array) -> NDArray[np.float64]:
    """The error function to 1e-12; NumPy has none, so it is interpolated from `math.erf` once."""
    return np.asarray(_erf_series()(np.clip(x.astype(np.float64), -6.0, 6.0)))


@functools.cache
def _erf_series() -> Chebyshev:
    return Chebyshev.interpolate(np.vectorize(math.erf), 120, domain=[-6.0, 6.0])
