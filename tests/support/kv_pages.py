"""A paged runtime that keeps tokens in place of K and V, so that what a page holds can be looked at."""

from __future__ import annotations

from attrs import define, field

from mortice.core.plugin.interfaces import TokenSequence
from mortice.core.plugin.kv_pages import PAGE_TOKENS, PagedRuntime, PagedSequence, PagePool

__all__ = ["Pages", "fed", "is_whole", "pages"]

T = PAGE_TOKENS


@define(eq=False)
class Pages(PagedRuntime[PagedSequence]):
    """A runtime that keeps tokens themselves, each with all that came before it, in place of K and V."""

    pool: PagePool
    context_length: int = 1 << 20
    slots: dict[tuple[int, int], tuple[int, ...]] = field(factory=dict)
    """(page, place in it) -> the tokens up to there, which is what K and V depend on."""
    copies: int = 0

    def new_sequence(self) -> PagedSequence:
        return PagedSequence(self.pool, self.context_length, self.copy_page)

    def own(self, sequence: TokenSequence) -> PagedSequence:
        assert isinstance(sequence, PagedSequence)
        return sequence

    def copy_page(self, source: int, destination: int) -> None:
        self.copies += 1
        for place in range(T):
            if (source, place) in self.slots:
                self.slots[destination, place] = self.slots[source, place]

    def feed(self, *parts: tuple[PagedSequence, list[int]]) -> None:
        """A step: refused as a whole, or done as a whole."""
        self.require_pages([(sequence, sequence.length + len(ids)) for sequence, ids in parts])
        for sequence, ids in parts:
            sequence.reserve(sequence.length + len(ids))
        for sequence, ids in parts:
            tokens = (*sequence.tokens, *ids)
            for position in range(sequence.length, len(tokens)):
                page = sequence.pages[position // T]
                assert self.pool.owners(page) == 1, "nobody writes to a shared page"
                self.slots[page, position % T] = tokens[: position + 1]
        for sequence, ids in parts:
            sequence.advance(ids)

    def content(self, sequence: PagedSequence) -> list[tuple[int, ...]]:
        return [self.slots[sequence.pages[i // T], i % T] for i in range(sequence.length)]


def pages(count: int, **options: bool) -> Pages:
    return Pages(PagePool(count, **options))


def fed(runtime: Pages, ids: list[int]) -> PagedSequence:
    sequence = runtime.new_sequence()
    runtime.feed((sequence, ids))
    return sequence


def is_whole(runtime: Pages, sequence: PagedSequence, ids: list[int]) -> None:
    assert sequence.tokens == ids
    assert runtime.content(sequence) == [tuple(ids[: i + 1]) for i in range(len(ids))]
