"""Pages of the KV cache: random forks, writes, cuts and drops against sequences that keep their own lists."""

from __future__ import annotations

from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from mortice.core.errors import InputError
from mortice.core.plugin.kv_pages import PAGE_TOKENS, PagedSequence
from tests.support.kv_pages import is_whole, pages

T = PAGE_TOKENS
_MOST = 24


class Machine(RuleBasedStateMachine):
    """Sequences of one pool against lists of tokens of their own."""

    sequences = Bundle("sequences")

    def __init__(self) -> None:
        super().__init__()
        self.runtime = pages(_MOST)
        self.open: list[tuple[PagedSequence, list[int]]] = []

    def model(self, sequence: PagedSequence) -> list[int]:
        return next(tokens for found, tokens in self.open if found is sequence)

    @rule(target=sequences)
    def new(self) -> PagedSequence:
        sequence = self.runtime.new_sequence()
        self.open.append((sequence, []))
        return sequence

    @rule(target=sequences, token=st.integers(0, 1), pages=st.integers(0, 3), rest=st.integers(1, T))
    def new_with_a_prompt(self, token: int, pages: int, rest: int) -> PagedSequence:
        """What is known of it is taken over, the rest computed, where there is room."""
        prompt = [token] * (pages * T + rest)
        sequence = self.runtime.new_sequence()
        known = self.runtime.cached_prefix(prompt)
        assert self.runtime.adopt_prefix(sequence, prompt) == known < len(prompt)
        self.open.append((sequence, prompt[:known]))
        self.append(sequence, prompt[known:])
        return sequence

    @rule(sequence=sequences, token=st.integers(0, 2), count=st.integers(1, 2 * T))
    def feed(self, sequence: PagedSequence, token: int, count: int) -> None:
        self.append(sequence, [token] * count)

    @rule(one=sequences, other=sequences, count=st.integers(1, T))
    def feed_two_in_one_step(self, one: PagedSequence, other: PagedSequence, count: int) -> None:
        if one is not other:
            self.step((one, [0] * count), (other, [1]))

    def append(self, sequence: PagedSequence, ids: list[int]) -> None:
        self.step((sequence, ids))

    def step(self, *parts: tuple[PagedSequence, list[int]]) -> None:
        before = [(list(sequence.tokens), list(sequence.pages)) for sequence, _ in parts]
        try:
            self.runtime.feed(*parts)
        except InputError:
            assert [(sequence.tokens, sequence.pages) for sequence, _ in parts] == before
            return
        for sequence, ids in parts:
            self.model(sequence).extend(ids)

    @rule(target=sequences, sequence=sequences)
    def fork(self, sequence: PagedSequence) -> PagedSequence:
        free = self.runtime.free_pages
        child = self.runtime.fork(sequence)
        assert self.runtime.free_pages == free
        self.open.append((child, list(self.model(sequence))))
        return child

    @rule(sequence=sequences, share=st.floats(0, 1))
    def truncate(self, sequence: PagedSequence, share: float) -> None:
        tokens = self.model(sequence)
        length = int(share * len(tokens))
        sequence.truncate(length)
        del tokens[length:]

    @rule(sequence=sequences, back=st.integers(1, 2 * T), token=st.integers(0, 2), count=st.integers(1, 2 * T))
    def go_back_and_on(self, sequence: PagedSequence, back: int, token: int, count: int) -> None:
        """Other tokens in the place of the last ones."""
        tokens = self.model(sequence)
        sequence.truncate(max(0, len(tokens) - back))
        del tokens[sequence.length :]
        self.append(sequence, [token] * count)

    @rule(sequence=sequences)
    def launch_ahead(self, sequence: PagedSequence) -> None:
        """A page for a token that may never come."""
        if sequence.has_room:
            sequence.reserve(sequence.length + 1)

    @rule(sequence=consumes(sequences))
    def close(self, sequence: PagedSequence) -> None:
        self.open = [item for item in self.open if item[0] is not sequence]
        sequence.close()
        assert sequence.length == 0
        assert not sequence.pages

    @invariant()
    def every_sequence_has_what_it_was_fed(self) -> None:
        for sequence, tokens in self.open:
            is_whole(self.runtime, sequence, tokens)

    @invariant()
    def owners_are_counted(self) -> None:
        pool = self.runtime.pool
        held = Counter(page for sequence, _ in self.open for page in sequence.pages)
        assert all(len(set(sequence.pages)) == len(sequence.pages) for sequence, _ in self.open)
        assert [pool.owners(page) for page in range(_MOST)] == [held[page] for page in range(_MOST)]
        assert pool.free == _MOST - len(held)

    @invariant()
    def a_page_is_in_one_place(self) -> None:
        pool = self.runtime.pool
        held = {page for sequence, _ in self.open for page in sequence.pages}
        unused, idle = set(pool._unused), set(pool._idle)
        assert len(held) + len(unused) + len(idle) == _MOST
        assert held | unused | idle == set(range(_MOST))
        assert idle <= set(pool._contents)
        assert not unused & set(pool._contents)

    @invariant()
    def what_is_known_is_there(self) -> None:
        """Each known page holds the tokens it is known by, after those of the page before."""
        pool = self.runtime.pool
        assert {page: key for page, (_, key) in pool._contents.items()} == {p: key for key, p in pool._known.items()}
        pages_by_content = {content: page for page, (content, _) in pool._contents.items()}
        assert len(pages_by_content) == len(pool._contents)
        for page, (_, (before, tokens)) in pool._contents.items():
            whole = self.runtime.slots[page, T - 1]
            assert whole[-T:] == tokens
            if before in pages_by_content:
                assert whole[:-T] == self.runtime.slots[pages_by_content[before], T - 1]


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
