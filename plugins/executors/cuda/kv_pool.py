"""Pages of the KV cache: which are free, and which belong to a sequence."""

from __future__ import annotations

from collections.abc import Sequence

from attrs import define, field

from mortice.core.errors import DoesNotFitError, InputError
from mortice.core.model.kv_types import kv_cache_bytes
from mortice.core.model.program import KvShape

__all__ = ["PAGE_TOKENS", "CudaSequence", "PagePool", "kv_pool_bytes", "page_bytes", "page_count"]

PAGE_TOKENS = 64
"""As ``kPageTokens`` in ``ops/kv_cache.cuh``."""


def page_count(context_length: int) -> int:
    """Pages of one full sequence."""
    return -(-context_length // PAGE_TOKENS)


def page_bytes(shape: KvShape, kv_type: str) -> int:
    """Bytes of a page of K, or of V, of one layer."""
    return kv_cache_bytes(shape, kv_type, PAGE_TOKENS) // 2


def kv_pool_bytes(shapes: Sequence[KvShape], context_length: int, kv_type: str) -> int:
    """Bytes of the KV cache of all layers, for one full sequence."""
    tokens = page_count(context_length) * PAGE_TOKENS
    return sum(kv_cache_bytes(shape, kv_type, tokens) for shape in shapes)


@define(eq=False)
class PagePool:
    """Numbers of the pages of all layers; a page holds `PAGE_TOKENS` tokens."""

    pages: int
    _free: list[int] = field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        self._free = list(range(self.pages - 1, -1, -1))

    def take(self) -> int:
        """A free page."""
        if not self._free:
            raise DoesNotFitError(f"all {self.pages} pages of the KV cache are in use; close a sequence")
        return self._free.pop()

    def give_back(self, page: int) -> None:
        """Take a page back."""
        self._free.append(page)

    @property
    def free(self) -> int:
        """Pages nobody has."""
        return len(self._free)


@define(eq=False)
class CudaSequence:
    """One sequence: its length and its pages, in order. `slot` is its row in the table of pages."""

    pool: PagePool
    slot: int
    context_length: int
    _release: object
    length: int = field(default=0, init=False)
    pages: list[int] = field(factory=list, init=False)

    def reserve(self, length: int) -> bool:
        """Take pages for `length` tokens; whether any were taken."""
        if length > self.context_length:
            raise InputError(f"{length} tokens do not fit the context of {self.context_length}")
        before = len(self.pages)
        while len(self.pages) * PAGE_TOKENS < length:
            self.pages.append(self.pool.take())
        return len(self.pages) > before

    def truncate(self, length: int) -> None:
        if not 0 <= length <= self.length:
            raise InputError(f"cannot truncate a sequence of {self.length} tokens to {length}")
        self.length = length
        while (len(self.pages) - 1) * PAGE_TOKENS >= length and self.pages:
            self.pool.give_back(self.pages.pop())

    def close(self) -> None:
        self.length = 0
        while self.pages:
            self.pool.give_back(self.pages.pop())
        release, self._release = self._release, None
        if callable(release):
            release(self.slot)
