"""When a step of several sequences uses what was launched ahead, and what it writes to the card anew."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from attrs import define, field

from mortice.core.errors import ExecutionError, InputError
from mortice.core.plugin.interfaces import StepPart, TokenSequence
from mortice.core.plugin.kv_pages import PAGE_TOKENS, PagedRuntime, PagePool
from mortice.core.plugin.token_choice import ChoicePart
from mortice.core.text.params import SamplingParams
from mortice.core.text.sampling import Sampled
from mortice.plugins.executors.cuda.lowering.choice_args import RING
from mortice.plugins.executors.cuda.run.kv_pool import CudaSequence
from mortice.plugins.executors.cuda.run.rows import Row
from mortice.plugins.executors.cuda.run.step_choices import CudaChoice, StepChoices

PLAIN = SamplingParams(seed=3)
PENALTIES = SamplingParams(repetition_penalty=1.5, seed=4)

NAN = 999
"""A token after which nothing can be chosen."""


def after(tokens: Sequence[int], step: int, sampling: SamplingParams) -> int:
    """The token this card chooses after others."""
    return (7 * sum(place * token for place, token in enumerate(tokens, 1)) + 13 * step + int(sampling.seed or 0)) % 900


@define(eq=False)
class Kept:
    """What the card keeps of a slot."""

    sampling: SamplingParams
    step: int
    position: int
    seen: list[int]


@define(eq=False)
class Card(PagedRuntime[CudaSequence]):
    """A card, its runtime and its chooser in one. K and V of a token are the token."""

    pool: PagePool = field(factory=lambda: PagePool(40, prefix_cache=False))
    epoch: int = 0
    most_rows: int = 8
    begun: list[CudaSequence] = field(factory=list)
    launched: list[str] = field(factory=list)
    owners: list[object] = field(factory=lambda: [None] * 16)
    stream: Any = None
    _slots: list[int] = field(factory=lambda: list(range(15, -1, -1)))
    _kv: dict[tuple[int, int], int] = field(factory=dict)
    _kept: dict[int, Kept] = field(factory=dict)
    _tables: dict[int, list[int]] = field(factory=dict)
    _rows: list[list[int]] = field(factory=list)
    """Slot, token and position of each row on the card."""
    _selected: list[int] = field(factory=list)
    _placed: list[int] = field(factory=list)
    _results: defaultdict[int, dict[int, int]] = field(factory=lambda: defaultdict(dict))
    _events: int = 0

    rows = property(lambda self: self)
    lowering = property(lambda self: SimpleNamespace(rows=self.most_rows))
    graph_rows = property(lambda self: min(6, self.most_rows))

    @property
    def chooser(self) -> Any:
        members = {name: getattr(self, name) for name in ("owners", "place", "queued", "event", "take")}
        return SimpleNamespace(**members, begin=self.begin_choice)

    # sequences and steps

    def new_sequence(self) -> CudaSequence:
        return CudaSequence(self.pool, 300, self._copy_page, self._slots.pop(), self._slots.append)

    def _copy_page(self, source: int, destination: int) -> None:
        for place in range(PAGE_TOKENS):
            self._kv[destination, place] = self._kv.get((source, place), -1)

    def own(self, sequence: TokenSequence) -> CudaSequence:
        assert isinstance(sequence, CudaSequence)
        return sequence

    def begin(self, parts: Sequence[StepPart]) -> list[Row]:
        rows: list[Row] = []
        for part in parts:
            sequence = self.own(part.sequence)
            if max(part.token_ids) > NAN:
                raise InputError("outside the vocabulary")
            last = len(part.token_ids) - 1
            rows += [
                (sequence, token, sequence.length + i, part.logits == "last" and i == last)
                for i, token in enumerate(part.token_ids)
            ]
        self.require_pages([(self.own(part.sequence), part.sequence.length + len(part.token_ids)) for part in parts])
        self.epoch += 1
        for part in parts:
            self.reserve(self.own(part.sequence), part.sequence.length + len(part.token_ids))
        return rows

    def end(self, parts: Sequence[StepPart]) -> None:
        for part in parts:
            self.own(part.sequence).advance(part.token_ids)

    def reserve(self, sequence: CudaSequence, length: int) -> bool:
        return sequence.reserve(length)

    def wait(self, work: int) -> None:
        assert work < self._events

    # what is on the card

    def send(self, rows: list[Row], _: Any) -> list[int]:
        self._rows = [[sequence.slot, token, position] for sequence, token, position, _ in rows]
        self._tables.update({sequence.slot: list(sequence.pages) for sequence, _, _, _ in rows})
        self._selected = [row for row, (_, _, _, wanted) in enumerate(rows) if wanted]
        return self._selected

    def send_pages(self, sequence: CudaSequence, _: Any) -> None:
        self._tables[sequence.slot] = list(sequence.pages)

    def place(self, slots: Sequence[int]) -> None:
        self._placed = list(slots)

    def begin_choice(self, owner: object, slot: int, sampling: SamplingParams, **kept: Any) -> None:
        del kept["top"]
        self.owners[slot] = owner
        self._kept[slot] = Kept(sampling, kept["step"], kept["position"], list(kept["seen"]))
        self.launched.append("begin")

    def run_part(self, part: str, rows: int, *, alone: bool = False) -> None:
        if part == "body":
            assert alone == (len({slot for slot, _, _ in self._rows}) == rows)
            self.launched.append(f"body {rows}")
            self._write_kv()

    def _write_kv(self) -> None:
        for slot, token, position in self._rows:
            self._kv[self._tables[slot][position // PAGE_TOKENS], position % PAGE_TOKENS] = token

    def graph(self, rows: int, _: str) -> Any:
        assert rows == len(self._rows) <= self.graph_rows

        def launch(_: Any) -> None:
            self.launched.append(f"graph {rows}")
            self._write_kv()
            self._selected = list(range(rows))
            self._choose(rows)

        return SimpleNamespace(launch=launch)

    def choices(self, rows: int) -> list[Callable[[Any], None]]:
        return [lambda _: self._choose(rows)]

    def _choose(self, rows: int) -> None:
        assert rows == len(self._selected) == len(self._placed)
        found = []
        for row, slot in zip(self._selected, self._placed, strict=True):
            owner, _, position = self._rows[row]
            kept = self._kept[slot]
            assert (owner, position) == (slot, kept.position), "the card is ready for this token"
            pages = self._tables[slot]
            tokens = [self._kv[pages[i // PAGE_TOKENS], i % PAGE_TOKENS] for i in range(position + 1)]
            assert not kept.sampling.penalises or kept.seen == tokens
            token = NAN if tokens[-1] == NAN else after(tokens, kept.step, kept.sampling)
            found.append((slot, token, position + 1))
            kept.step, kept.position = kept.step + 1, position + 1
            kept.seen.append(token)
        for row, item in enumerate(found):
            self._results[self._events % RING][row] = item[1]
            self._rows[row] = list(item)

    def queued(self) -> int:
        self._events += 1
        return (self._events - 1) % RING

    def event(self, place: int) -> int:
        return place

    def take(self, place: int, row: int, *, step: int, top: int) -> Sampled:
        if self._results[place][row] == NAN:
            raise ExecutionError(f"step {step}: the logits hold NaN")
        return Sampled(id=self._results[place][row], logprob=0.0)


@pytest.fixture
def card() -> Card:
    return Card()


@pytest.fixture
def steps(card: Card) -> StepChoices:
    return StepChoices(cast(Any, card))


def part(choice: CudaChoice, tokens: Sequence[int], index: int) -> ChoicePart:
    return ChoicePart(sequence=choice.sequence, token_ids=tokens, choice=choice, index=index)


def choices(card: Card, count: int, sampling: SamplingParams = PLAIN) -> list[CudaChoice]:
    return [CudaChoice(card.new_sequence(), sampling, 0) for _ in range(count)]


def ids(found: Sequence[Sampled | ExecutionError | None]) -> list[int]:
    return [one.id for one in found if isinstance(one, Sampled)]


def test_a_step_of_single_tokens_is_one_graph_and_the_next_is_launched_before_it_ends(
    card: Card, steps: StepChoices
) -> None:
    ours = choices(card, 3)
    last = ids(steps.run([part(choice, [5], 0) for choice in ours], ahead=True))
    assert card.launched == ["begin"] * 3 + ["graph 3", "graph 3"]
    assert last == [after([5], 0, PLAIN)] * 3
    del card.launched[:]
    steps.run([part(choice, [token], 1) for choice, token in zip(ours, last, strict=True)], ahead=True)
    assert card.launched == ["graph 3"]
    assert [choice.sequence.length for choice in ours] == [2, 2, 2]


def test_nothing_is_launched_ahead_of_a_last_step(card: Card, steps: StepChoices) -> None:
    ours = choices(card, 2)
    steps.run([part(choice, [5], 0) for choice in ours], ahead=False)
    assert card.launched[2:] == ["graph 2"]


def test_those_left_when_one_leaves_are_not_run_again(card: Card, steps: StepChoices) -> None:
    ours = choices(card, 3)
    last = ids(steps.run([part(choice, [5], 0) for choice in ours], ahead=True))
    ours[1].sequence.close()
    del card.launched[:]
    found = ids(steps.run([part(ours[0], [last[0]], 1), part(ours[2], [last[2]], 1)], ahead=True))
    assert card.launched == []
    assert found == [after([5, last[0]], 1, PLAIN)] * 2
    steps.run([part(choice, [found[0]], 2) for choice in (ours[0], ours[2])], ahead=True)
    assert card.launched == ["graph 2", "graph 2"], "what the card keeps is still good"


def test_a_prompt_that_comes_runs_by_itself_where_the_others_are_ahead(card: Card, steps: StepChoices) -> None:
    ours = choices(card, 3)
    last = ids(steps.run([part(choice, [5], 0) for choice in ours[:2]], ahead=True))
    del card.launched[:]
    parts = [part(choice, [token], 1) for choice, token in zip(ours, last, strict=False)]
    steps.run([*parts, part(ours[2], [1, 2, 3], 0)], ahead=True)
    assert card.launched == ["begin", "body 3"]


def test_a_refused_part_leaves_what_is_ahead(card: Card, steps: StepChoices) -> None:
    ours = choices(card, 3)
    last = ids(steps.run([part(choice, [5], 0) for choice in ours[:2]], ahead=True))
    parts = [part(choice, [token], 1) for choice, token in zip(ours, last, strict=False)]
    del card.launched[:]
    with pytest.raises(InputError, match="vocabulary"):
        steps.run([*parts, part(ours[2], [1000], 0)], ahead=True)
    with pytest.raises(InputError, match="only once"):
        steps.run([*parts, parts[0]], ahead=True)
    with pytest.raises(InputError, match="not one of this sequence's"):
        steps.run([ChoicePart(sequence=ours[0].sequence, token_ids=[1], choice=ours[1])], ahead=True)
    assert [choice.sequence.length for choice in ours] == [1, 1, 0]
    assert len(ids(steps.run(parts, ahead=False))) == 2
    assert card.launched == []


def test_a_row_that_cannot_be_sampled_is_an_error_of_its_own(card: Card, steps: StepChoices) -> None:
    ours = choices(card, 2)
    bad, good = steps.run([part(ours[0], [NAN], 0), part(ours[1], [5], 0)], ahead=False)
    assert str(bad) == "step 0: the logits hold NaN"
    assert isinstance(good, Sampled)


def test_nothing_is_launched_ahead_beyond_the_context_or_the_pages(card: Card, steps: StepChoices) -> None:
    (ours,) = choices(card, 1)
    steps.run([part(ours, list(range(299)), 0)], ahead=False)
    del card.launched[:]
    steps.run([part(ours, [4], 1)], ahead=True)
    assert card.launched == ["begin", "graph 1"]
    ours.sequence.close()
    one, other = choices(card, 2)
    steps.run([part(choice, [1] * (PAGE_TOKENS - 1), 0) for choice in (one, other)], ahead=False)
    while card.pool.free > 1:
        card.pool.take()
    del card.launched[:]
    steps.run([part(choice, [1], 1) for choice in (one, other)], ahead=True)
    assert card.launched == ["begin", "begin", "graph 2"]


def test_what_somebody_else_wrote_for_the_sequence_is_written_again(card: Card, steps: StepChoices) -> None:
    (ours,) = choices(card, 1)
    last = ids(steps.run([part(ours, [5], 0)], ahead=False))
    card.begin_choice("another", ours.sequence.slot, PENALTIES, step=7, top=0, position=1, seen=[5, 6])
    assert ids(steps.run([part(ours, last, 1)], ahead=False)) == [after([5, *last], 1, PLAIN)]


def test_what_was_launched_ahead_on_a_page_that_was_given_back_is_run_again(card: Card, steps: StepChoices) -> None:
    (ours,) = choices(card, 1)
    prompt = [1] * (PAGE_TOKENS - 1)
    tokens = [*prompt, *ids(steps.run([part(ours, prompt, 0)], ahead=False))]
    tokens += ids(steps.run([part(ours, tokens[-1:], 1)], ahead=True))
    ours.sequence.truncate(PAGE_TOKENS)
    card.pool.take()
    tokens += ids(steps.run([part(ours, tokens[-1:], 2)], ahead=True))
    steps.run([part(ours, tokens[-1:], 3)], ahead=False)
    assert tokens[-1] == after(tokens[:-1], 2, PLAIN)
    assert len(ours.sequence.pages) == 2


@pytest.mark.parametrize("seed", range(12))
def test_whatever_happens_between_steps_each_sequence_gets_its_own_tokens(card: Card, seed: int) -> None:
    steps, rng = StepChoices(cast(Any, card)), np.random.default_rng(seed)
    alive: list[tuple[CudaChoice, list[int], int]] = []  # with all tokens, and how many of them are the prompt's
    for _ in range(150):
        if len(alive) < 7 and rng.random() < 0.2:
            prompt = rng.integers(0, 900, rng.integers(1, 90)).tolist()
            alive.append((CudaChoice(card.new_sequence(), (PLAIN, PENALTIES)[len(alive) % 2], 0), prompt, len(prompt)))
        if alive and rng.random() < 0.08:
            alive.pop(rng.integers(len(alive)))[0].sequence.close()
        for choice, tokens, prompt_length in alive:
            length = choice.sequence.length
            if length > prompt_length and rng.random() < 0.03:
                choice.sequence.truncate(int(rng.integers(prompt_length, length + 1)))
                del tokens[choice.sequence.length + 1 :]
                if rng.random() < 0.5:
                    tokens[choice.sequence.length :] = [int(rng.integers(900))]
        if rng.random() < 0.05:
            card.epoch += 1  # somebody else used the rows
            card._rows = []
        present = [item for item in alive if rng.random() < 0.9]
        parts = []
        for choice, tokens, prompt_length in present:
            length = choice.sequence.length
            count = len(tokens) - length if rng.random() < 0.7 else int(rng.integers(1, len(tokens) - length + 1))
            last = length + count == len(tokens)
            parts.append(
                ChoicePart(
                    sequence=choice.sequence,
                    token_ids=tokens[length : length + count],
                    choice=choice if last else None,
                    index=len(tokens) - prompt_length,
                )
            )
        found = steps.run(parts, ahead=bool(rng.random() < 0.8))
        for (choice, tokens, _), one, made in zip(present, parts, found, strict=True):
            assert choice.sequence.tokens == tokens[: choice.sequence.length]
            if one.choice is None:
                assert made is None
            else:
                assert isinstance(made, Sampled)
                assert made.id == after(tokens, one.index, choice.sampling)
                tokens.append(made.id)
        for item in [item for item in alive if len(item[1]) > 290]:
            alive.remove(item)
            item[0].sequence.close()
