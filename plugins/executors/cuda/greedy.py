"""Greedy decoding without the host in the way: each step ends by choosing its token and begins the next with it.

One step is always launched ahead of the one waited for, so the card never waits; when text ends, one step was too many,
and what it wrote lies beyond the sequence's length.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, Protocol

from attrs import define, field

from mortice.core.plugin.interfaces import StepPart
from mortice.core.text.sampling import Sampled
from mortice.plugins.executors.cuda.kv_pool import CudaSequence

__all__ = ["BLOCKS", "RING", "Chosen", "GreedyArgs", "GreedyDecoder", "GreedySteps", "Running"]

RING = 16
BLOCKS = 128

_Pointer, _Int = ctypes.c_uint64, ctypes.c_int32


class Chosen(ctypes.Structure):
    """Mirror of ``Chosen`` in ``ops/greedy.cu``."""

    _fields_ = [("id", _Int), ("logprob", ctypes.c_float)]


class GreedyArgs(ctypes.Structure):
    """Mirror of ``GreedyArgs`` in ``ops/greedy.cu``."""

    _fields_ = [
        ("logits", _Pointer),
        ("vocab_size", _Int),
        *((name, _Pointer) for name in ("partial", "arrivals", "token_ids", "positions", "steps", "chosen")),
        ("ring", _Int),
    ]


Running = tuple[Any, int]
"""A step under way: the event it ends with, and its place in the ring of results."""


class GreedySteps(Protocol):
    """What the runtime does for a decoder."""

    epoch: int
    """Changes when the rows on the device are written anew."""

    def step(self, parts: Sequence[StepPart]) -> Any:
        """Run the program."""
        ...

    def begin_greedy(self, sequence: CudaSequence, token: int) -> Running:
        """Feed a token and choose the next one."""
        ...

    def continue_greedy(self, sequence: CudaSequence) -> Running:
        """Feed the token just chosen, wherever it is, and choose the next one."""
        ...

    def take(self, running: Running) -> tuple[int, float]:
        """Wait for a step; the token chosen and its log-probability."""
        ...


@define(eq=False)
class GreedyDecoder:
    """Chooses the best token of a sequence, again and again; see `mortice.core.text.generation.ChooseToken`."""

    runtime: GreedySteps
    sequence: CudaSequence
    _last: int | None = field(default=None, init=False)
    _epoch: int = field(default=-1, init=False)
    _ahead: Running | None = field(default=None, init=False)

    def __call__(self, ids: Sequence[int], index: int) -> Sampled:
        del index  # nothing is random here
        runtime, sequence = self.runtime, self.sequence
        if self._ahead is not None and self._epoch == runtime.epoch and len(ids) == 1 and ids[0] == self._last:
            running, self._ahead = self._ahead, None
        else:
            self._ahead = None
            if len(ids) > 1:
                runtime.step([StepPart(sequence=sequence, token_ids=ids[:-1], logits="none")])
            running = runtime.begin_greedy(sequence, int(ids[-1]))
            self._epoch = runtime.epoch
        sequence.length += 1
        if sequence.length < sequence.context_length:
            self._ahead = runtime.continue_greedy(sequence)
        token, logprob = runtime.take(running)
        self._last = token
        return Sampled(id=token, logprob=logprob, top=())
