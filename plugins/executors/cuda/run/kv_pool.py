"""The KV cache on the card: its bytes, and a sequence with its row in the table of pages."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from attrs import define, field

from mortice.core.model.kv_types import kv_cache_bytes
from mortice.core.model.program import KvShape
from mortice.core.plugin.kv_pages import PAGE_TOKENS, PagedSequence, page_count

__all__ = ["CudaSequence", "kv_pool_bytes", "page_bytes"]


def page_bytes(shape: KvShape, kv_type: str) -> int:
    """Bytes of a page of K, or of V, of one layer; a page is as large as ``kPageTokens`` in ``ops/kv_cache.cuh``."""
    return kv_cache_bytes(shape, kv_type, PAGE_TOKENS) // 2


def kv_pool_bytes(shapes: Sequence[KvShape], tokens: int, kv_type: str) -> int:
    """Bytes of the KV cache of all layers, for so many tokens."""
    return sum(2 * page_count(tokens) * page_bytes(shape, kv_type) for shape in shapes)


@define(eq=False)
class CudaSequence(PagedSequence):
    """One sequence. `slot` is its row in the table of pages, which `close` gives to `release`."""

    slot: int
    release: Callable[[int], None] | None = field(repr=False)

    def close(self) -> None:
        super().close()
        release, self.release = self.release, None
        if release is not None:
            release(self.slot)
