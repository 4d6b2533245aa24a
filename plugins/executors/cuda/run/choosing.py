"""Choosing tokens on the card: what is kept there for each sequence, and the kernel, ``ops/choose.cu``.

Each decode step ends by choosing its tokens and begins the next step with them. `decoder` uses it for one sequence,
`step_choices` for several.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
from attrs import define, field

from mortice.core.errors import ConfigError, ExecutionError
from mortice.core.text.params import SamplingParams
from mortice.core.text.sampling import Sampled
from mortice.plugins.executors.cuda.device.device import Device
from mortice.plugins.executors.cuda.device.module import Int, Launch, Module, Pointer
from mortice.plugins.executors.cuda.device.stream import Event, Stream
from mortice.plugins.executors.cuda.lowering.choice_args import (
    RING,
    THREADS,
    ChoiceRow,
    ChooseArgs,
    Chosen,
    choice_blocks,
    choice_params,
    choice_parts,
    choice_rows_at_once,
    history_length,
)
from mortice.plugins.executors.cuda.lowering.launches import MAX_SEQUENCES

__all__ = ["TokenChooser", "check_bias"]

_PROBLEMS = {
    1: "the logits hold NaN, wanted numbers",
    2: "the logits hold plus infinity, wanted numbers",
    4: "the logits hold nothing but minus infinity, wanted numbers",
    8: "logit_bias and penalties leave no best token with a finite logit",
}
"""The bits of ``Problem`` in ``ops/choose.cu``, the gravest first; worded as `mortice.core.text.sampling` does."""


def check_bias(sampling: SamplingParams, vocab_size: int) -> None:
    """Refuse a bias of a token that does not exist, as `mortice.core.text.sampling.Sampler` does.

    Raises:
        ConfigError: naming it.

    """
    beyond = [token for token in sampling.logit_bias if token >= vocab_size]
    if beyond:
        raise ConfigError(f"logit_bias: found token id {min(beyond)}, wanted one below {vocab_size}")


@define(eq=False)
class TokenChooser:
    """The kernel, and what it keeps on the card for each slot of sequences: parameters, bias, counts of tokens.

    Attributes:
        device: where.
        stream: what all of it is queued on.
        module: the compiled ``ops/choose.cu``.
        vocab_size: length of a row of logits.
        context_length: of the longest sequence.
        owners: who wrote what is kept for a slot last, by slot.

    """

    device: Device
    stream: Stream
    module: Module
    vocab_size: int
    context_length: int
    owners: list[object] = field(factory=lambda: [None] * MAX_SEQUENCES, init=False, repr=False)
    _memory: Any = field(init=False, repr=False)
    _at: dict[str, int] = field(factory=dict, init=False, repr=False)
    _results: Any = field(init=False, repr=False)
    _chosen: list[list[Chosen]] = field(init=False, repr=False)
    _events: list[Event] = field(init=False, repr=False)
    _launches: int = field(default=0, init=False, repr=False)
    _count: Launch = field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        sm_count = self.device.properties.sm_count
        parts = choice_parts(self.vocab_size, self.context_length, sm_count)
        self._memory = self.device.allocate(sum(parts.values()))
        self.stream.fill(self._memory.address, 0, self._memory.nbytes)
        at = self._memory.address
        for name, nbytes in parts.items():
            self._at[name] = at
            at += nbytes
        size = ctypes.sizeof(Chosen)
        self._results = self.device.allocate_host(size * MAX_SEQUENCES * RING)
        starts = range(self._results.address, self._results.address + self._results.nbytes, size)
        chosen = [Chosen.from_address(start) for start in starts]
        self._chosen = [chosen[start : start + MAX_SEQUENCES] for start in range(0, len(chosen), MAX_SEQUENCES)]
        self._events = [self.device.new_event() for _ in range(RING)]
        self._count = self.module.function("count_tokens").prepare(
            choice_blocks(sm_count, 1), THREADS, (Pointer(0), Pointer(0), Int(0), Int(0))
        )

    def launches(self, rows: int, *, logits: int, token_ids: int, positions: int) -> list[Launch]:
        """The end of a step with `rows` rows of logits: reads them, writes the rows of the step after.

        What queued these rows last has to be over when the launch before these begins.
        """
        sm_count = self.device.properties.sm_count
        function = self.module.function("choose")
        pdl = self.device.properties.compute_capability >= (9, 0)
        launches = []
        for first in range(0, rows, choice_rows_at_once(sm_count)):
            count = min(choice_rows_at_once(sm_count), rows - first)
            args = ChooseArgs(
                logits=logits,
                token_ids=token_ids,
                positions=positions,
                chosen=self._results.device_address,
                first=first,
                history_length=history_length(self.context_length),
                **self._at,
            )
            launches.append(
                function.prepare(
                    (choice_blocks(sm_count, count), count, 1), THREADS, (args,), pdl=pdl, carveout=100 if pdl else None
                )
            )
        return launches

    def begin(
        self,
        owner: object,
        slot: int,
        sampling: SamplingParams,
        *,
        step: int,
        top: int,
        position: int,
        seen: Sequence[int] = (),
    ) -> None:
        """Queue writing what is kept for a slot.

        Args:
            owner: who uses it until somebody else begins.
            slot: which.
            sampling: how to choose, its seed settled.
            step: tokens generated before.
            top: alternatives to report.
            position: of the token that the next step feeds.
            seen: all tokens of the sequence, that one included; only looked at where penalties are on.

        """
        self.owners[slot] = owner
        params = choice_params(sampling, self.vocab_size, step=step, top=top, position=position)
        self.stream.write(self._of("params", slot, ctypes.sizeof(params)), np.frombuffer(bytes(params), np.uint8))
        if sampling.logit_bias:
            bias = np.zeros(self.vocab_size, np.float32)
            bias[list(sampling.logit_bias)] = list(sampling.logit_bias.values())
            self.stream.write(self._of("bias", slot, bias.nbytes), bias)
        if sampling.penalises:
            history = self._of("history", slot, 4 * history_length(self.context_length))
            counts = self._of("counts", slot, 4 * self.vocab_size)
            self.stream.write(history, np.array(seen, np.int32))
            self.stream.fill(counts, 0, 4 * self.vocab_size)
            window = sampling.penalty_window or len(seen)
            counted = (history, counts, max(0, len(seen) - window), len(seen))
            for arg, value in zip(self._count.args, counted, strict=True):
                arg.value = value
            self._count(self.stream)

    def _of(self, name: str, slot: int, nbytes: int) -> int:
        return self._at[name] + slot * nbytes

    def place(self, slots: Sequence[int]) -> None:
        """Queue saying which slot each row of the steps to come belongs to."""
        rows = np.array([(slot, self._launches % 2**32) for slot in slots], np.dtype(ChoiceRow))
        self.stream.write(self._at["rows"], rows)

    def queued(self) -> int:
        """Note that a step was queued; returns what `take` wants."""
        place = self._launches % RING
        self._launches += 1
        self._events[place].record(self.stream)
        return place

    def event(self, place: int) -> Event:
        """What a queued step ends with."""
        return self._events[place]

    def take(self, place: int, row: int = 0, *, step: int, top: int) -> Sampled:
        """The result of a row of a step that has ended.

        Raises:
            ExecutionError: as `mortice.core.text.sampling.Sampler.sample`.

        """
        chosen = self._chosen[place][row]
        if chosen.problem:
            gravest = next(text for bit, text in _PROBLEMS.items() if chosen.problem & bit)
            raise ExecutionError(f"step {step}: {gravest}")
        alternatives = tuple((item.id, item.logprob) for item in chosen.top[:top]) if top else ()
        return Sampled(id=chosen.id, logprob=chosen.logprob, top=alternatives)

    def close(self) -> None:
        """Give all memory back; the stream has to be idle."""
        for event in self._events:
            event.close()
        self._results.close()
        self._memory.close()
