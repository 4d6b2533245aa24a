"""The KV cache of one sequence, grown as it fills: float32 that went through the type asked for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from attrs import define, field
from numpy.typing import NDArray

from mortice.core.errors import InputError
from mortice.core.model.kv_types import KV_TYPES
from mortice.core.model.program import KvShape

__all__ = ["ReferenceSequence", "through_kv_type"]

Array = NDArray[np.float32]

_FIRST_CAPACITY = 256


def through_kv_type(values: Array, kv_type: str) -> Array:
    """`values`, whose last axis is a head, as they come back from a cache of this type (float32, same shape).

    ``q8_0`` is GGML's: blocks of 32 with a half-precision scale, 1/127 of the block's largest magnitude.
    """
    if kv_type == "f32":
        return values
    if kv_type == "f16":
        return values.astype(np.float16).astype(np.float32)
    blocks = values.reshape(*values.shape[:-1], -1, KV_TYPES["q8_0"].block_elements)
    scales = np.abs(blocks).max(-1, keepdims=True) / np.float32(127)
    integers = np.rint(blocks / np.where(scales > 0, scales, np.float32(1)))
    rounded: Array = integers * scales.astype(np.float16).astype(np.float32)
    return rounded.reshape(values.shape)


@define(eq=False)
class ReferenceSequence:
    """K and V of every layer, each (num_kv_heads, capacity, head_dim), and how many tokens they hold."""

    shapes: Sequence[KvShape]
    context_length: int
    kv_type: str = "f32"
    length: int = field(default=0, init=False)
    _keys: list[Array] = field(init=False, repr=False)
    _values: list[Array] = field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        self._keys, self._values = ([self._empty(shape, 0) for shape in self.shapes] for _ in range(2))

    @staticmethod
    def _empty(shape: KvShape, capacity: int) -> Array:
        return np.empty((shape.num_kv_heads, capacity, shape.head_dim), np.float32)

    def _reserve(self, layer: int, tokens: int) -> None:
        capacity = self._keys[layer].shape[1]
        if tokens <= capacity:
            return
        capacity = min(self.context_length, max(tokens, 2 * capacity, _FIRST_CAPACITY))
        for cache in (self._keys, self._values):
            grown = self._empty(self.shapes[layer], capacity)
            grown[:, : self.length] = cache[layer][:, : self.length]
            cache[layer] = grown

    def write(self, layer: int, k: Array, v: Array) -> None:
        """Store rows (tokens, num_kv_heads * head_dim) after the tokens there are; `advance` makes them count."""
        shape, end = self.shapes[layer], self.length + len(k)
        self._reserve(layer, end)
        for cache, rows in ((self._keys, k), (self._values, v)):
            heads = rows.reshape(len(rows), shape.num_kv_heads, shape.head_dim).transpose(1, 0, 2)
            cache[layer][:, self.length : end] = through_kv_type(heads, self.kv_type)

    def read(self, layer: int, new: int) -> tuple[Array, Array]:
        """K and V of all tokens and `new` just written ones, each (num_kv_heads, length + new, head_dim)."""
        end = self.length + new
        return self._keys[layer][:, :end], self._values[layer][:, :end]

    def advance(self, tokens: int) -> None:
        """Count `tokens` written tokens as part of the sequence."""
        self.length += tokens

    def truncate(self, length: int) -> None:
        if not 0 <= length <= self.length:
            raise InputError(f"cannot truncate a sequence of {self.length} tokens to {length}")
        self.length = length

    def close(self) -> None:
        self.length = 0
        self._keys, self._values = ([self._empty(shape, 0) for shape in self.shapes] for _ in range(2))
