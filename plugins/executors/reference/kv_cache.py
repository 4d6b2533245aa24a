"""The KV cache: pages of float32 that went through the type asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from attrs import define, field
from numpy.typing import NDArray

from mortice.core.errors import DoesNotFitError
from mortice.core.model.kv_types import KV_TYPES
from mortice.core.model.program import KvShape
from mortice.core.plugin.kv_pages import PAGE_TOKENS, PagedSequence

__all__ = ["KvStore", "ReferenceSequence", "through_kv_type"]

Array = NDArray[np.float32]


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
class KvStore:
    """K and V of all pages: for each layer, (num_kv_heads, pages * `PAGE_TOKENS`, head_dim) each.

    The system gives memory for pages as they are written.
    """

    shapes: Sequence[KvShape]
    pages: int
    kv_type: str
    _keys: list[Array] = field(init=False, repr=False)
    _values: list[Array] = field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        tokens = self.pages * PAGE_TOKENS
        try:
            self._keys, self._values = (
                [np.empty((shape.num_kv_heads, tokens, shape.head_dim), np.float32) for shape in self.shapes]
                for _ in range(2)
            )
        except (MemoryError, ValueError):  # more than there is, or than an array can have
            raise DoesNotFitError(f"cpu: a KV cache for {tokens} tokens could not be allocated") from None

    def copy_page(self, source: int, destination: int) -> None:
        """Copy K and V of all layers from one page to another."""
        for cache in (*self._keys, *self._values):
            cache[:, _tokens_of(destination)] = cache[:, _tokens_of(source)]

    def write(self, layer: int, sequence: PagedSequence, k: Array, v: Array) -> None:
        """Store rows (tokens, num_kv_heads * head_dim) after the tokens there are, in pages that were reserved."""
        shape, first = self.shapes[layer], sequence.length
        for cache, rows in ((self._keys[layer], k), (self._values[layer], v)):
            heads = rows.reshape(len(rows), shape.num_kv_heads, shape.head_dim).transpose(1, 0, 2)
            heads, start = through_kv_type(heads, self.kv_type), 0
            for run in _runs(sequence.pages, first, first + len(rows)):
                count = run.stop - run.start
                cache[:, run] = heads[:, start : start + count]
                start += count

    def read(self, layer: int, sequence: PagedSequence, new: int) -> tuple[Array, Array]:
        """K and V of all tokens and `new` just written ones, each (num_kv_heads, length + new, head_dim)."""
        runs = list(_runs(sequence.pages, 0, sequence.length + new))
        k, v = (
            cache[layer][:, runs[0]] if len(runs) == 1 else np.concatenate([cache[layer][:, run] for run in runs], 1)
            for cache in (self._keys, self._values)
        )
        return k, v


def _tokens_of(page: int) -> slice:
    return slice(page * PAGE_TOKENS, (page + 1) * PAGE_TOKENS)


def _runs(pages: Sequence[int], first: int, last: int) -> Iterator[slice]:
    """Where the tokens from `first` to before `last` lie; pages that follow each other are one slice."""
    while first < last:
        place, inside = divmod(first, PAGE_TOKENS)
        end = place + 1
        while end * PAGE_TOKENS < last and pages[end] == pages[end - 1] + 1:
            end += 1
        count = min(last, end * PAGE_TOKENS) - first
        start = pages[place] * PAGE_TOKENS + inside
        yield slice(start, start + count)
        first += count


@define(eq=False)
class ReferenceSequence(PagedSequence):
    """One sequence of a runtime."""
