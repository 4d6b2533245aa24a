"""Pages of a KV cache: who has them, what they hold, and the page table of each sequence.

A page is a number; where K and V of its `PAGE_TOKENS` tokens lie is the executor's matter. Its owners are counted, so
that sequences share it (paged attention: Kwon et al. 2023). What a full page holds is known by its tokens and by the
page before it, so that a prompt that begins like an earlier one takes over its pages instead of computing them (prefix
caching). Nobody writes to a page that another sequence has, too: it is copied first (copy on write).
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Generic, Protocol, TypeVar, runtime_checkable

from attrs import define, field

from mortice.core.counts import counted
from mortice.core.errors import DoesNotFitError, InputError
from mortice.core.plugin.interfaces import TokenSequence

__all__ = ["PAGE_TOKENS", "PagePool", "PagedRuntime", "PagedSequence", "SharesCache", "page_count"]

PAGE_TOKENS = 64
"""Tokens of a page."""

_Key = tuple[int, tuple[int, ...]]
"""The content of the page before, and the tokens of this one: what K and V of a page depend on, compared as a whole."""

_START = 0
"""The content before the first page."""


def page_count(tokens: int) -> int:
    """Pages that hold so many tokens of one sequence."""
    return -(-tokens // PAGE_TOKENS)


@runtime_checkable
class SharesCache(Protocol):
    """A runtime whose sequences share K and V of equal beginnings; optional, sessions and many prompts make use of it.

    The cache is given out in pages. What sequences share is stored once, and no sequence can see what another one does
    with it. `PagedRuntime` has all of it but K and V themselves.
    """

    @property
    def page_tokens(self) -> int:
        """Tokens of a page; all pages are of one size."""
        ...

    @property
    def free_pages(self) -> int:
        """Pages that no sequence has; those that are kept for prompts to come are among them."""
        ...

    def fork(self, sequence: TokenSequence) -> TokenSequence:
        """A new sequence that begins with all tokens of another; from here on each goes its own way.

        Raises:
            InputError: where `new_sequence` raises it.

        """
        ...

    def cached_prefix(self, token_ids: Sequence[int]) -> int:
        """How many tokens of a prompt `adopt_prefix` would find now."""
        ...

    def adopt_prefix(self, sequence: TokenSequence, token_ids: Sequence[int]) -> int:
        """Let an empty sequence begin with tokens that were computed before.

        Found are whole pages of sequences that are open, or were until their room was needed. Tokens are compared, not
        only their hashes, and the last token of a prompt is never found: whoever asks wants its logits.

        Args:
            sequence: it has no tokens yet.
            token_ids: the whole prompt.

        Returns:
            How many of the tokens the sequence has now; 0 where nothing is known, or ``settings.prefix_cache`` is off.

        Raises:
            InputError: for a sequence that has tokens.

        """
        ...


@define(eq=False)
class PagePool:
    """Which pages are free, how many sequences have each, and what the full ones hold. Any thread may call it.

    A full page that nobody has any more stays known until its room is needed; those that were given back longest ago go
    first.

    Attributes:
        pages: how many there are.
        prefix_cache: whether contents are known at all; if not, nothing is ever found.

    """

    pages: int
    prefix_cache: bool = True
    _unused: dict[int, None] = field(init=False, repr=False)
    """Pages with no owner and no known content, the next one to be taken last."""
    _idle: dict[int, None] = field(factory=dict, init=False, repr=False)
    """Pages with no owner whose content is known, the longest unused one first."""
    _owners: list[int] = field(init=False, repr=False)
    _known: dict[_Key, int] = field(factory=dict, init=False, repr=False)
    _contents: dict[int, tuple[int, _Key]] = field(factory=dict, init=False, repr=False)
    """Of each page that is in `_known`: the number of its content, never used twice, and the key."""
    _last_content: int = field(default=_START, init=False, repr=False)
    _lock: threading.RLock = field(factory=threading.RLock, init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        self._unused = dict.fromkeys(range(self.pages - 1, -1, -1))
        self._owners = [0] * self.pages

    @property
    def free(self) -> int:
        """Pages nobody has, those with a known content included."""
        return len(self._unused) + len(self._idle)

    def owners(self, page: int) -> int:
        """How many sequences have a page."""
        return self._owners[page]

    def take(self, after: int | None = None) -> int:
        """A page that nobody had, for one owner; the one that follows `after` if that is to be had.

        Raises:
            DoesNotFitError: when there is none.

        """
        with self._lock:
            if after is not None and after + 1 in self._unused:
                page = after + 1
                del self._unused[page]
            elif self._unused:
                page, _ = self._unused.popitem()
            elif self._idle:
                page = next(iter(self._idle))
                del self._idle[page]
                self._forget(page)
            else:
                full = f"the KV cache of {counted(self.pages, 'page')} is full"
                raise DoesNotFitError(f"{full}; close a sequence or raise executor.kv_tokens")
            self._owners[page] = 1
            return page

    def share(self, pages: Iterable[int]) -> None:
        """Count one more owner of each page."""
        with self._lock:
            for page in pages:
                self._idle.pop(page, None)
                self._owners[page] += 1

    def give_back(self, page: int) -> None:
        """Count one owner less."""
        with self._lock:
            self._owners[page] -= 1
            if not self._owners[page]:
                (self._idle if page in self._contents else self._unused)[page] = None

    def publish(self, page: int, before: int, tokens: Sequence[int]) -> int:
        """Make known what a full page holds, unless another page is known to hold the same; the content's number.

        Args:
            page: the page, which will not be written again unless `withdraw` says so.
            before: the number of the content of the page before it, 0 for none.
            tokens: its `PAGE_TOKENS` tokens.

        """
        if not self.prefix_cache:
            return _START
        with self._lock:
            key = before, tuple(tokens)
            same = self._known.get(key)
            if same is None:
                self._last_content += 1
                self._known[key] = same = page
                self._contents[page] = self._last_content, key
            return self._contents[same][0]

    def withdraw(self, page: int) -> None:
        """Forget what a page holds, because its only owner is about to write to it."""
        with self._lock:
            assert self._owners[page] == 1, "nobody writes to a page that another has"
            self._forget(page)

    def _forget(self, page: int) -> None:
        content = self._contents.pop(page, None)
        if content is not None:
            del self._known[content[1]]

    def find(self, token_ids: Sequence[int]) -> list[tuple[int, int]]:
        """The pages known to hold the beginning of a prompt, and the number of each one's content.

        At least the prompt's last token is left out, for somebody wants its logits.
        """
        found: list[tuple[int, int]] = []
        with self._lock:
            for end in range(PAGE_TOKENS, len(token_ids), PAGE_TOKENS):
                before = found[-1][1] if found else _START
                page = self._known.get((before, tuple(token_ids[end - PAGE_TOKENS : end])))
                if page is None:
                    break
                found.append((page, self._contents[page][0]))
        return found

    def adopt(self, token_ids: Sequence[int]) -> list[tuple[int, int]]:
        """`find`, with one more owner of each page."""
        with self._lock:
            found = self.find(token_ids)
            self.share(page for page, _ in found)
            return found


@define(eq=False)
class PagedSequence:
    """One sequence: its tokens, and its page table. What writes K and V calls `reserve` before and `advance` after.

    Attributes:
        pool: where its pages come from.
        context_length: tokens it may hold.
        copy_page: copies K and V of all layers from a page to another; done, or queued, before what comes next.
        tokens: those it holds.
        pages: its pages in order; there may be more of them than `tokens` need.

    """

    pool: PagePool
    context_length: int
    copy_page: Callable[[int, int], None] = field(repr=False)
    tokens: list[int] = field(factory=list, init=False, repr=False)
    pages: list[int] = field(factory=list, init=False)
    _contents: list[int] = field(factory=list, init=False, repr=False)
    """Numbers of the contents of its full pages."""
    _changed: bool = field(default=False, init=False, repr=False)

    @property
    def length(self) -> int:
        """Tokens it holds."""
        return len(self.tokens)

    @property
    def has_room(self) -> bool:
        """Whether one more token can be fed."""
        place = self.length // PAGE_TOKENS
        own = place < len(self.pages) and self.pool.owners(self.pages[place]) == 1
        return self.length < self.context_length and (own or self.pool.free > 0)

    def reserve(self, length: int) -> bool:
        """Take pages of its own for the tokens from its end to `length`; whether the page table is another since last.

        Raises:
            InputError: for more than the context.
            DoesNotFitError: when there are not enough pages; what was taken stays.

        """
        if length > self.context_length:
            raise InputError(f"{length} tokens do not fit the context of {self.context_length}")
        if length > self.length and self.length % PAGE_TOKENS:
            self._own(self.length // PAGE_TOKENS)
        while len(self.pages) * PAGE_TOKENS < length:
            self.pages.append(self.pool.take(after=self.pages[-1] if self.pages else None))
            self._changed = True
        changed, self._changed = self._changed, False
        return changed

    def _own(self, place: int) -> None:
        """Make a page that is begun safe to be written on."""
        page = self.pages[place]
        if self.pool.owners(page) == 1:
            self.pool.withdraw(page)
            return
        own = self.pool.take()
        self.copy_page(page, own)
        self.pages[place] = own
        self._changed = True
        self.pool.give_back(page)

    def advance(self, token_ids: Iterable[int]) -> None:
        """Count tokens whose K and V are in its pages, or will be before what comes next."""
        self.tokens += token_ids
        for place in range(len(self._contents), len(self.tokens) // PAGE_TOKENS):
            tokens = self.tokens[place * PAGE_TOKENS : (place + 1) * PAGE_TOKENS]
            before = self._contents[-1] if self._contents else _START
            self._contents.append(self.pool.publish(self.pages[place], before, tokens))

    def truncate(self, length: int) -> None:
        if not 0 <= length <= self.length:
            raise InputError(f"cannot truncate a sequence of {counted(self.length, 'token')} to {length}")
        del self.tokens[length:], self._contents[length // PAGE_TOKENS :]
        while len(self.pages) > page_count(length):
            self.pool.give_back(self.pages.pop())  # the last first, so that a page is forgotten before those before it

    def adopt(self, token_ids: Sequence[int]) -> int:
        """Begin with the pages known to hold the beginning of a prompt; the tokens they hold.

        Raises:
            InputError: for a sequence that has tokens.

        """
        if self.tokens:
            raise InputError(
                f"a sequence of {counted(self.length, 'token')} cannot take over a prefix, only an empty one can"
            )
        self.truncate(0)
        found = self.pool.adopt(token_ids)
        self.pages += (page for page, _ in found)
        self._contents += (content for _, content in found)
        self._changed = True
        self.tokens += token_ids[: len(found) * PAGE_TOKENS]
        return self.length

    def fork_to(self, other: PagedSequence) -> None:
        """Give an empty sequence the same tokens and the same pages."""
        assert not other.pages, "it is new"
        pages = self.pages[: page_count(self.length)]
        self.pool.share(pages)
        other.pages += pages
        other.tokens += self.tokens
        other._contents += self._contents
        other._changed = True

    def close(self) -> None:
        """Give all pages back; calling twice is fine."""
        self.truncate(0)


S = TypeVar("S", bound=PagedSequence)


class PagedRuntime(ABC, Generic[S]):
    """What `SharesCache` wants, for a runtime whose sequences are of one pool."""

    pool: PagePool

    @abstractmethod
    def new_sequence(self) -> S:
        """An empty sequence."""

    @abstractmethod
    def own(self, sequence: TokenSequence) -> S:
        """The same, which has to be one of this runtime's.

        Raises:
            InputError: when it is not.

        """

    @property
    def page_tokens(self) -> int:
        return PAGE_TOKENS

    @property
    def free_pages(self) -> int:
        return self.pool.free

    def cached_prefix(self, token_ids: Sequence[int]) -> int:
        return len(self.pool.find(token_ids)) * PAGE_TOKENS

    def adopt_prefix(self, sequence: TokenSequence, token_ids: Sequence[int]) -> int:
        return self.own(sequence).adopt(token_ids)

    def fork(self, sequence: TokenSequence) -> S:
        parent, child = self.own(sequence), self.new_sequence()
        parent.fork_to(child)
        return child

    def require_pages(self, grown: Sequence[tuple[S, int]]) -> None:
        """Refuse a step for which there are not enough pages.

        Args:
            grown: each sequence of the step, and the tokens it is to hold after it.

        Raises:
            InputError: naming how many pages are needed and free.

        """
        needed = sum(max(0, page_count(length) - len(sequence.pages)) for sequence, length in grown)
        # of a page that several have, whoever writes takes a copy; the last one left with it needs none
        written = Counter(
            sequence.pages[sequence.length // PAGE_TOKENS] for sequence, _ in grown if sequence.length % PAGE_TOKENS
        )
        needed += sum(min(count, self.pool.owners(page) - 1) for page, count in written.items())
        if needed > self.pool.free:
            more = counted(needed, "more page of KV cache is", "more pages of KV cache are")
            raise InputError(
                f"{more} needed, {counted(self.pool.free, 'is free', 'are free')}; "
                "close a sequence or raise executor.kv_tokens"
            )
