"""Choosing the tokens of one sequence on the card.

One step is always launched ahead of the one waited for, so the card never waits for the host; when text ends, one step
was too many, and what it wrote lies beyond the sequence's length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from attrs import define, field

from mortice.core.plugin.interfaces import StepPart
from mortice.core.text.params import SamplingParams
from mortice.core.text.sampling import Sampled
from mortice.plugins.executors.cuda.device.stream import Event
from mortice.plugins.executors.cuda.run.choosing import TokenChooser, check_bias
from mortice.plugins.executors.cuda.run.kv_pool import CudaSequence

__all__ = ["DecodeSteps", "Decoder"]


class DecodeSteps(Protocol):
    """What the runtime does for a decoder."""

    epoch: int
    """Changes when the rows on the device are written anew."""

    @property
    def chooser(self) -> TokenChooser: ...

    def step(self, parts: Sequence[StepPart]) -> Any:
        """Run the program."""
        ...

    def decode(self, sequence: CudaSequence, token: int | None) -> None:
        """Queue a step of one token that ends with choosing the next: a given one, or the one chosen last."""
        ...

    def wait(self, work: Event) -> None:
        """Wait for work on the card."""
        ...


@define(eq=False)
class Decoder:
    """Chooses the tokens of one sequence; see `mortice.core.text.generation.ChooseToken`.

    What the card holds of a decoder (rows, parameters, counts) is lost when anything else runs: the epoch tells, and
    then all of it is written again.

    Attributes:
        runtime: runs the steps.
        sequence: the sequence.
        sampling: how to choose, its seed settled.
        top: alternatives to report.
        fed: the tokens of the sequence before those of a call, kept up to date by the caller.

    """

    runtime: DecodeSteps
    sequence: CudaSequence
    sampling: SamplingParams
    top: int
    fed: Sequence[int]
    _last: int | None = field(default=None, init=False)
    _epoch: int = field(default=-1, init=False)
    _ahead: tuple[int, int, int] | None = field(default=None, init=False)
    """A step under way: its place in the ring, the position of the token it feeds, and its number."""

    def __attrs_post_init__(self) -> None:
        check_bias(self.sampling, self.runtime.chooser.vocab_size)

    def __call__(self, ids: Sequence[int], index: int) -> Sampled:
        runtime, sequence = self.runtime, self.sequence
        runtime.chooser.device.make_current()
        ahead, self._ahead = self._ahead, None
        current = self._epoch == runtime.epoch and len(ids) == 1 and ids[0] == self._last
        if ahead is not None and current and ahead[1:] == (sequence.length, index):
            place = ahead[0]
        else:
            place = self._begin(ids, index)
        sequence.advance((int(ids[-1]),))
        if sequence.has_room:  # a step ahead must not fail where the text might end before it
            runtime.decode(sequence, None)
            self._ahead = runtime.chooser.queued(), sequence.length, index + 1
        runtime.wait(runtime.chooser.event(place))
        sampled = runtime.chooser.take(place, step=index, top=self.top)
        self._last = sampled.id
        return sampled

    def _begin(self, ids: Sequence[int], index: int) -> int:
        """Feed tokens that are not on the card yet."""
        runtime = self.runtime
        seen = [*self.fed, *ids] if self.sampling.penalises else ()
        if len(ids) > 1:
            runtime.step([StepPart(sequence=self.sequence, token_ids=ids[:-1], logits="none")])
        slot, position = self.sequence.slot, self.sequence.length
        runtime.chooser.begin(self, slot, self.sampling, step=index, top=self.top, position=position, seen=seen)
        runtime.chooser.place([slot])
        runtime.decode(self.sequence, int(ids[-1]))
        self._epoch = runtime.epoch
        return runtime.chooser.queued()
