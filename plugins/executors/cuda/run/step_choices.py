"""Choosing the tokens of several sequences on the card, one step ahead where that is wanted.

A step of single tokens leaves the next step's tokens on the card, so that step can be launched before the host knows
them. What it gives is kept until it is asked for. A sequence that is not fed its token after all, or is closed, has
lost nothing, since the step wrote beyond its length.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal, Protocol

from attrs import define, field

from mortice.core.errors import ExecutionError, InputError
from mortice.core.plugin.interfaces import StepPart
from mortice.core.plugin.kv_pages import PAGE_TOKENS
from mortice.core.plugin.token_choice import ChoicePart
from mortice.core.text.params import SamplingParams
from mortice.core.text.sampling import Sampled
from mortice.plugins.executors.cuda.device.module import Launch
from mortice.plugins.executors.cuda.device.stream import Event, GraphExec, Stream
from mortice.plugins.executors.cuda.lowering.lowering import Lowering
from mortice.plugins.executors.cuda.run.choosing import TokenChooser
from mortice.plugins.executors.cuda.run.kv_pool import CudaSequence
from mortice.plugins.executors.cuda.run.rows import Row, RowTable, one_row_each
from mortice.plugins.executors.cuda.run.tracing import Part

__all__ = ["ChoiceSteps", "CudaChoice", "StepChoices"]


_Fed = tuple[int, int, int, int]
"""The epoch of a step, the position of a token, the page it is in, and how many were chosen before the one after it."""


@define(eq=False)
class CudaChoice:
    """How the tokens of a sequence are chosen, what the card is ready for, and what was launched ahead.

    Attributes:
        sequence: whose tokens.
        sampling: how, its seed settled.
        top: alternatives to report.
        last: the token chosen last that the host knows.
        ready: what the card keeps is for the token at this position, after so many were chosen; None for nothing.
        ahead: what a step that was launched before anybody asked for it feeds; None for no such step.
        result: where its result will be: the place in the ring, and the row.

    """

    sequence: CudaSequence
    sampling: SamplingParams
    top: int
    last: int | None = field(default=None, init=False)
    ready: tuple[int, int] | None = field(default=None, init=False)
    ahead: _Fed | None = field(default=None, init=False)
    result: tuple[int, int] = field(default=(0, 0), init=False)


class ChoiceSteps(Protocol):
    """What the runtime does for this module."""

    epoch: int
    """Changes when the rows on the device are written anew."""

    lowering: Lowering
    stream: Stream
    chooser: TokenChooser

    @property
    def rows(self) -> RowTable:
        """What the current step says of its tokens."""
        ...

    def begin(self, parts: Sequence[StepPart]) -> list[Row]:
        """Check a step and give its sequences their pages; its rows."""
        ...

    def end(self, parts: Sequence[StepPart]) -> None:
        """Count the tokens of a step that was queued."""
        ...

    def reserve(self, sequence: CudaSequence, length: int) -> bool:
        """Give a sequence pages; whether any are new."""
        ...

    def graph(self, rows: int, ending: Literal["choose"]) -> GraphExec:
        """A whole step of so many rows."""
        ...

    @property
    def graph_rows(self) -> int:
        """Rows of a graph at most."""
        ...

    def run_part(self, part: Part, rows: int, *, alone: bool = False) -> None:
        """Queue the launches for every row, or those for the rows whose logits are wanted."""
        ...

    def choices(self, rows: int) -> list[Launch]:
        """What chooses the tokens of so many rows of logits."""
        ...

    def require_pages(self, grown: Sequence[tuple[CudaSequence, int]]) -> None:
        """Refuse where there are not enough pages."""
        ...

    def wait(self, work: Event) -> None:
        """Wait for work on the card."""
        ...


@define(eq=False)
class StepChoices:
    """Runs the steps."""

    runtime: ChoiceSteps
    _on_card: tuple[int, list[CudaChoice]] = field(factory=lambda: (-1, []), init=False)
    """The epoch in which the next step's rows were left on the card, and whose they are."""

    def run(self, parts: Sequence[ChoicePart], *, ahead: bool) -> list[Sampled | ExecutionError | None]:
        """See `mortice.core.plugin.token_choice.ChoosesTokens.choose_step`."""
        choices = [_own_choice(part) for part in parts]
        if len({id(part.sequence) for part in parts}) < len(parts):
            raise InputError("a sequence can stand in a step only once")
        found = [self._row_ahead(part, choice) for part, choice in zip(parts, choices, strict=True)]
        fresh = [place for place, row in enumerate(found) if row is None]
        queued = self._queue([parts[place] for place in fresh], [choices[place] for place in fresh]) if fresh else []
        for part, choice, row in zip(parts, choices, found, strict=True):
            if choice is not None and row is not None:
                choice.sequence.advance(part.token_ids)
        for place, row in zip(fresh, queued, strict=True):
            found[place] = row
        if ahead:
            self._go_on(parts, choices)
        self._wait({row[0] for row in found if row is not None})
        return [
            None if choice is None or row is None else self._take(choice, row, part.index)
            for part, choice, row in zip(parts, choices, found, strict=True)
        ]

    def _row_ahead(self, part: ChoicePart, choice: CudaChoice | None) -> tuple[int, int] | None:
        """Where the step that was launched ahead has what a part asks for."""
        if choice is None or len(part.token_ids) > 1 or part.token_ids[0] != choice.last:
            return None
        return choice.result if choice.ahead == _fed(self.runtime.epoch, choice.sequence, part.index) else None

    def _queue(self, parts: Sequence[ChoicePart], choices: Sequence[CudaChoice | None]) -> list[tuple[int, int] | None]:
        """Run what was not launched yet; where the result of each part will be."""
        runtime = self.runtime
        step_parts = [_step_part(part) for part in parts]
        rows = runtime.begin(step_parts)
        for part, choice in zip(parts, choices, strict=True):
            if choice is not None:
                self._make_ready(part, choice)
        chosen = [choice for choice in choices if choice is not None]
        decodes = len(chosen) == len(rows) <= runtime.graph_rows
        places = iter(self._queue_rows(rows, graph=decodes))
        runtime.end(step_parts)
        self._on_card = (runtime.epoch, chosen) if decodes else (-1, [])
        return [None if choice is None else next(places) for choice in choices]

    def _queue_rows(self, rows: list[Row], *, graph: bool) -> list[tuple[int, int]]:
        """Queue the rows of a step; of each one that is wanted, the place in the ring and the row there."""
        runtime = self.runtime
        found: list[tuple[int, int]] = []
        for start in range(0, len(rows), runtime.lowering.rows):
            chunk = rows[start : start + runtime.lowering.rows]
            wanted = runtime.rows.send(chunk, runtime.stream)
            if wanted:
                runtime.chooser.place([chunk[row][0].slot for row in wanted])
            if graph:
                runtime.graph(len(chunk), "choose").launch(runtime.stream)
            else:
                runtime.run_part("body", len(chunk), alone=one_row_each(chunk))
            if wanted and not graph:
                runtime.run_part("head", len(wanted))
                for launch in runtime.choices(len(wanted)):
                    launch(runtime.stream)
            if wanted:
                place = runtime.chooser.queued()
                found += [(place, row) for row in range(len(wanted))]
        return found

    def _make_ready(self, part: ChoicePart, choice: CudaChoice) -> None:
        """Bring to the card what it does not keep of a choice."""
        chooser, sequence = self.runtime.chooser, choice.sequence
        position = sequence.length + len(part.token_ids) - 1
        known = chooser.owners[sequence.slot] is choice and choice.ready == (position, part.index)
        if not known or part.token_ids[-1] != choice.last:
            seen = [*sequence.tokens, *part.token_ids] if choice.sampling.penalises else ()
            chooser.begin(
                choice, sequence.slot, choice.sampling, step=part.index, top=choice.top, position=position, seen=seen
            )
        choice.ready = position + 1, part.index + 1

    def _go_on(self, parts: Sequence[ChoicePart], choices: Sequence[CudaChoice | None]) -> None:
        """Launch the step after, where the rows on the card are its own and it cannot fail."""
        runtime, (epoch, on_card) = self.runtime, self._on_card
        if epoch != runtime.epoch or on_card != choices:
            return
        grown = [choice.sequence for choice in on_card if _wants_room(choice.sequence)]
        if not _have_room(runtime, grown):
            return
        for sequence in grown:
            if runtime.reserve(sequence, sequence.length + 1):
                runtime.rows.send_pages(sequence, runtime.stream)
        runtime.graph(len(on_card), "choose").launch(runtime.stream)
        place = runtime.chooser.queued()
        for row, (part, choice) in enumerate(zip(parts, on_card, strict=True)):
            choice.ahead = fed = _fed(epoch, choice.sequence, part.index + 1)
            choice.result = place, row
            choice.ready = fed[1] + 1, part.index + 2

    def _wait(self, places: Collection[int]) -> None:
        for place in places:
            self.runtime.wait(self.runtime.chooser.event(place))

    def _take(self, choice: CudaChoice, row: tuple[int, int], index: int) -> Sampled | ExecutionError:
        try:
            sampled = self.runtime.chooser.take(*row, step=index, top=choice.top)
        except ExecutionError as error:
            choice.last = None
            return error
        choice.last = sampled.id
        return sampled


def _fed(epoch: int, sequence: CudaSequence, index: int) -> _Fed:
    """What a step of one more token feeds; a page below 0 where there is none for it."""
    length, pages = sequence.length, sequence.pages
    place = length // PAGE_TOKENS
    return epoch, length, pages[place] if place < len(pages) else -1, index


def _wants_room(sequence: CudaSequence) -> bool:
    """Whether a sequence that was fed lacks a page of its own for one more token, or the context for it."""
    length = sequence.length
    place, begun = divmod(length, PAGE_TOKENS)
    return not begun or length >= sequence.context_length or sequence.pool.owners(sequence.pages[place]) > 1


def _have_room(runtime: ChoiceSteps, grown: Sequence[CudaSequence]) -> bool:
    if any(sequence.length >= sequence.context_length for sequence in grown):
        return False
    try:
        runtime.require_pages([(sequence, sequence.length + 1) for sequence in grown])
    except InputError:
        return False
    return True


def _own_choice(part: ChoicePart) -> CudaChoice | None:
    choice = part.choice
    if choice is not None and (not isinstance(choice, CudaChoice) or choice.sequence is not part.sequence):
        raise InputError("the choice is not one of this sequence's")
    return choice


def _step_part(part: ChoicePart) -> StepPart:
    wanted = part.choice is not None
    return StepPart(sequence=part.sequence, token_ids=part.token_ids, logits="last" if wanted else "none")
