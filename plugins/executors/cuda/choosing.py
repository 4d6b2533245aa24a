"""Choosing tokens on the card: each decode step ends by choosing its token and begins the next step with it.

One step is always launched ahead of the one waited for, so the card never waits for the host; when text ends, one step
was too many, and what it wrote lies beyond the sequence's length. The kernel is ``ops/choose.cu``.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from attrs import define, field

from mortice.core.errors import ConfigError, ExecutionError
from mortice.core.plugin.interfaces import StepPart
from mortice.core.text.params import SamplingParams
from mortice.core.text.sampling import Sampled
from mortice.plugins.executors.cuda.device import Device
from mortice.plugins.executors.cuda.kv_pool import PAGE_TOKENS, CudaSequence
from mortice.plugins.executors.cuda.module import Int, Launch, Module, Pointer
from mortice.plugins.executors.cuda.stream import Event, Stream

__all__ = [
    "RING",
    "TOP_LIMIT",
    "ChoiceParams",
    "ChooseArgs",
    "Chosen",
    "Decoder",
    "TokenChooser",
    "choice_blocks",
    "choice_bytes",
    "choice_defines",
    "choice_params",
]

THREADS = 512
TOP_LIMIT = 64
"""Alternatives a step can report; where more are wanted the host samples."""

_BLOCKS = 64
RING = 16
_BINS = 2048

_PROBLEMS = {
    1: "the logits hold NaN, wanted numbers",
    2: "the logits hold plus infinity, wanted numbers",
    4: "the logits hold nothing but minus infinity, wanted numbers",
    8: "logit_bias and penalties leave no best token with a finite logit",
}
"""The bits of ``Problem`` in ``ops/choose.cu``, the gravest first; worded as `mortice.core.text.sampling` does."""


class ChoiceParams(ctypes.Structure):
    """Mirror of ``ChoiceParams``."""

    _fields_ = [
        ("seed", ctypes.c_uint64),
        ("step", ctypes.c_uint64),
        ("top_p", ctypes.c_double),
        *((name, ctypes.c_float) for name in ("temperature", "log_min_p", "repetition", "presence", "frequency")),
        *((name, Int) for name in ("top_k", "window", "top", "penalises", "biased")),
        ("launches", ctypes.c_uint32),
        ("unused", ctypes.c_uint32),
    ]


class _Alternative(ctypes.Structure):
    _fields_ = [("id", Int), ("logprob", ctypes.c_float)]


class Chosen(ctypes.Structure):
    """Mirror of ``Chosen``."""

    _fields_ = [
        ("id", Int),
        ("logprob", ctypes.c_float),
        ("problem", Int),
        ("unused", Int),
        ("top", _Alternative * TOP_LIMIT),
    ]


class ChooseArgs(ctypes.Structure):
    """Mirror of ``ChooseArgs``."""

    _fields_ = [
        (name, Pointer)
        for name in ("logits", "params", "bias", "counts", "history", "scratch", "token_ids", "positions", "chosen")
    ]


def choice_blocks(sm_count: int) -> int:
    """Blocks of the kernel. They wait for each other, so that each has to find a multiprocessor."""
    return min(_BLOCKS, sm_count)


def _scratch_bytes(vocab_size: int, blocks: int, threads: int = THREADS) -> int:
    exchange = 8 * (_BINS + 1) + 4 * (_BINS + 2) + 16 * threads
    return -(-(3 * exchange + 28 * blocks + 8 + 4 * vocab_size) // 8) * 8


def choice_bytes(vocab_size: int, context_length: int, sm_count: int) -> int:
    """Bytes a `TokenChooser` allocates on the device."""
    return sum(_parts(vocab_size, context_length, choice_blocks(sm_count)).values())


def _parts(vocab_size: int, context_length: int, blocks: int) -> dict[str, int]:
    return {
        "params": ctypes.sizeof(ChoiceParams),
        "scratch": _scratch_bytes(vocab_size, blocks),
        "bias": 4 * vocab_size,
        "counts": 4 * vocab_size,
        "history": 4 * (context_length + 1),  # the token chosen at the context's end is noted too
    }


def choice_defines(vocab_size: int, blocks: int, threads: int = THREADS) -> dict[str, str | int]:
    """Constants of the kernel; it refuses to compile where its structures are not those of this module."""
    return {
        "VOCAB_SIZE": vocab_size,
        "BLOCKS": blocks,
        "THREADS": threads,
        "RING": RING,
        "TOP_LIMIT": TOP_LIMIT,
        "PARAMS_BYTES": ctypes.sizeof(ChoiceParams),
        "CHOSEN_BYTES": ctypes.sizeof(Chosen),
        "SCRATCH_BYTES": _scratch_bytes(vocab_size, blocks, threads),
        "ARGS_BYTES": ctypes.sizeof(ChooseArgs),
    }


def choice_params(sampling: SamplingParams, vocab_size: int, *, step: int, top: int) -> ChoiceParams:
    """What the kernel reads; the seed is settled, and the place in the ring is 0."""
    return ChoiceParams(
        seed=sampling.seed,
        step=step,
        top_p=sampling.top_p,
        temperature=sampling.temperature,
        log_min_p=math.log(sampling.min_p) if sampling.min_p > 0 else -math.inf,
        repetition=sampling.repetition_penalty,
        presence=sampling.presence_penalty,
        frequency=sampling.frequency_penalty,
        top_k=min(sampling.top_k, vocab_size),
        window=sampling.penalty_window,
        top=top,
        penalises=sampling.penalises,
        biased=bool(sampling.logit_bias),
    )


@define(eq=False)
class TokenChooser:
    """The kernel and what it keeps on the card: parameters, bias, counts of tokens. One sequence uses it at a time.

    Attributes:
        device: where.
        stream: what all of it is queued on.
        module: the compiled ``ops/choose.cu``.
        vocab_size: length of a row of logits.
        context_length: of the longest sequence.

    """

    device: Device
    stream: Stream
    module: Module
    vocab_size: int
    context_length: int
    _memory: Any = field(init=False, repr=False)
    _at: dict[str, int] = field(factory=dict, init=False, repr=False)
    _results: Any = field(init=False, repr=False)
    _chosen: list[Chosen] = field(init=False, repr=False)
    _events: list[Event] = field(init=False, repr=False)
    _launches: int = field(default=0, init=False, repr=False)
    _count: Launch = field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        parts = _parts(self.vocab_size, self.context_length, choice_blocks(self.device.properties.sm_count))
        self._memory = self.device.allocate(sum(parts.values()))
        self.stream.fill(self._memory.address, 0, self._memory.nbytes)
        at = self._memory.address
        for name, nbytes in parts.items():
            self._at[name] = at
            at += nbytes
        self._results = self.device.allocate_host(ctypes.sizeof(Chosen) * RING)
        self._chosen = [Chosen.from_address(self._results.address + ctypes.sizeof(Chosen) * i) for i in range(RING)]
        self._events = [self.device.new_event() for _ in range(RING)]
        self._count = self.module.function("count_tokens").prepare(
            choice_blocks(self.device.properties.sm_count),
            THREADS,
            (Pointer(self._at["history"]), Pointer(self._at["counts"]), Int(0), Int(0)),
        )

    def launch(self, *, logits: int, token_ids: int, positions: int) -> Launch:
        """The end of a decode step: reads a row of logits, writes the row of the step after."""
        args = ChooseArgs(
            logits=logits,
            token_ids=token_ids,
            positions=positions,
            chosen=self._results.device_address,
            **self._at,
        )
        pdl = self.device.properties.compute_capability >= (9, 0)
        blocks = choice_blocks(self.device.properties.sm_count)
        return self.module.function("choose").prepare(blocks, THREADS, (args,), pdl=pdl)

    def begin(self, sampling: SamplingParams, *, step: int, top: int, seen: Sequence[int]) -> None:
        """Queue new parameters.

        Args:
            sampling: how to choose, its seed settled.
            step: tokens generated before.
            top: alternatives to report.
            seen: all tokens of the sequence, the one to be fed included; only looked at where penalties are on.

        """
        params = choice_params(sampling, self.vocab_size, step=step, top=top)
        params.launches = self._launches % 2**32
        self.stream.write(self._at["params"], np.frombuffer(bytes(params), dtype=np.uint8))
        if sampling.logit_bias:
            bias = np.zeros(self.vocab_size, np.float32)
            bias[list(sampling.logit_bias)] = list(sampling.logit_bias.values())
            self.stream.write(self._at["bias"], bias)
        if sampling.penalises:
            self.stream.write(self._at["history"], np.array(seen, np.int32))
            self.stream.fill(self._at["counts"], 0, 4 * self.vocab_size)
            window = sampling.penalty_window or len(seen)
            self._count.args[2].value, self._count.args[3].value = max(0, len(seen) - window), len(seen)
            self._count(self.stream)

    def queued(self) -> int:
        """Note that a step was queued; returns what `take` wants."""
        place = self._launches % RING
        self._launches += 1
        self._events[place].record(self.stream)
        return place

    def event(self, place: int) -> Event:
        """What a queued step ends with."""
        return self._events[place]

    def take(self, place: int, *, step: int, top: int) -> Sampled:
        """The result of a step that has ended.

        Raises:
            ExecutionError: as `mortice.core.text.sampling.Sampler.sample`.

        """
        chosen = self._chosen[place]
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
        beyond = [token for token in self.sampling.logit_bias if token >= self.runtime.chooser.vocab_size]
        if beyond:
            wanted = self.runtime.chooser.vocab_size
            raise ConfigError(f"logit_bias: found token id {min(beyond)}, wanted one below {wanted}")

    def __call__(self, ids: Sequence[int], index: int) -> Sampled:
        runtime, sequence = self.runtime, self.sequence
        runtime.chooser.device.make_current()
        ahead, self._ahead = self._ahead, None
        current = self._epoch == runtime.epoch and len(ids) == 1 and ids[0] == self._last
        if ahead is not None and current and ahead[1:] == (sequence.length, index):
            place = ahead[0]
        else:
            place = self._begin(ids, index)
        sequence.length += 1
        if _has_room(sequence):
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
        runtime.chooser.begin(self.sampling, step=index, top=self.top, seen=seen)
        runtime.decode(self.sequence, int(ids[-1]))
        self._epoch = runtime.epoch
        return runtime.chooser.queued()


def _has_room(sequence: CudaSequence) -> bool:
    """Whether one more token can be fed; a step ahead must not fail where the text might end before it."""
    has_page = len(sequence.pages) * PAGE_TOKENS > sequence.length or sequence.pool.free > 0
    return sequence.length < sequence.context_length and has_page
