"""Runs a lowered program on a card: builds it, owns its memory, feeds steps, and replays decode as one graph."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from typing import Any, Literal

import numpy as np
from attrs import define, field
from numpy.typing import NDArray

from mortice.core.errors import ExecutionError, InputError
from mortice.core.model.operators import Buffer
from mortice.core.model.residency import BoundModel
from mortice.core.plugin.events import StepDone
from mortice.core.plugin.interfaces import Emit, RuntimeSettings, StepPart, TokenSequence
from mortice.core.plugin.kv_pages import PagedRuntime, PagePool, page_count
from mortice.core.plugin.token_choice import ChoicePart
from mortice.core.text.params import GenerationParams, SamplingParams
from mortice.core.text.sampling import Sampled
from mortice.plugins.executors.cuda.device.device import Device
from mortice.plugins.executors.cuda.device.module import Launch
from mortice.plugins.executors.cuda.device.stream import Event, GraphExec, Stream
from mortice.plugins.executors.cuda.lowering.choice_args import TOP_LIMIT
from mortice.plugins.executors.cuda.lowering.launches import MAX_SEQUENCES, Addresses, Queued, Spec
from mortice.plugins.executors.cuda.lowering.lowering import Lowering
from mortice.plugins.executors.cuda.lowering.matmul import RowPath
from mortice.plugins.executors.cuda.lowering.placing import LOGIT_ROWS
from mortice.plugins.executors.cuda.run.bandwidth import measure_read_bandwidth
from mortice.plugins.executors.cuda.run.choosing import TokenChooser, check_bias
from mortice.plugins.executors.cuda.run.decoder import Decoder
from mortice.plugins.executors.cuda.run.graphs import StepGraphs
from mortice.plugins.executors.cuda.run.kernels import Kernels
from mortice.plugins.executors.cuda.run.kv_pool import CudaSequence
from mortice.plugins.executors.cuda.run.loaded import LoadedKernels
from mortice.plugins.executors.cuda.run.rows import Row, RowTable, one_row_each
from mortice.plugins.executors.cuda.run.runtime_memory import RuntimeMemory
from mortice.plugins.executors.cuda.run.step_choices import CudaChoice, StepChoices
from mortice.plugins.executors.cuda.run.tracing import Part, profile, trace
from mortice.plugins.executors.cuda.run.tuning import choices_of

__all__ = ["CudaRuntime"]


@define(eq=False)
class CudaRuntime(PagedRuntime[CudaSequence]):
    """A program on a CUDA device."""

    model: BoundModel
    settings: RuntimeSettings
    emit: Emit
    device: Device
    kernels: Kernels
    _closed: bool = field(default=False, init=False, repr=False)
    _plans: dict[tuple[Part, int, RowPath], list[Queued]] = field(factory=dict, init=False, repr=False)
    _choices: dict[int, list[Launch]] = field(factory=dict, init=False, repr=False)
    epoch: int = field(default=0, init=False)
    """Counts the steps that wrote the rows anew; whoever launched ahead sees by it that they are no longer its own."""
    waited_seconds: float = field(default=0.0, init=False)
    """Time callers spent waiting for the card; only grows."""

    def __attrs_post_init__(self) -> None:
        with ExitStack() as undo:  # what fails half-way gives back what it took
            self._open(undo)
            self._undo = undo.pop_all()

    def _open(self, undo: ExitStack) -> None:
        device, kernels, program = self.device, self.kernels, self.model.plan.program
        self.lowering = lowering = kernels.lowering
        device.make_current()
        self.stream = undo.enter_context(closing(device.new_stream()))
        self.memory = memory = RuntimeMemory(device, self.stream, lowering, self.model, self.settings)
        undo.callback(memory.close)
        blas_workspace = memory.addresses.matmul + lowering.scratch.blas
        self._loaded = LoadedKernels(device, self.stream, kernels.build.kernels, blas_workspace)
        undo.callback(self._loaded.close)
        choose = self._loaded.modules[kernels.choose]
        self.chooser = TokenChooser(device, self.stream, choose, program.vocab_size, self.settings.context_length)
        undo.callback(self.chooser.close)
        self.pool = PagePool(page_count(self.settings.cache_tokens), self.settings.prefix_cache)
        self._slots = list(range(MAX_SEQUENCES - 1, -1, -1))
        self._graphs = StepGraphs(self.stream, self.emit)
        self._choosing = StepChoices(self)
        self.stream.synchronize()

    _undo: ExitStack = field(init=False, repr=False)
    lowering: Lowering = field(init=False)
    _loaded: LoadedKernels = field(init=False, repr=False)
    stream: Any = field(init=False, repr=False)
    memory: RuntimeMemory = field(init=False, repr=False)
    pool: PagePool = field(init=False, repr=False)
    _slots: list[int] = field(init=False, repr=False)
    chooser: TokenChooser = field(init=False, repr=False)
    _graphs: StepGraphs = field(init=False, repr=False)
    _choosing: StepChoices = field(init=False, repr=False)

    # sequences --------------------------------------------------------------------------------------------------

    @property
    def rows(self) -> RowTable:
        """What the current step says of its tokens."""
        return self.memory.rows

    def new_sequence(self) -> CudaSequence:
        if not self._slots:
            raise InputError(f"{MAX_SEQUENCES} sequences are open, which is the most at once; close one")
        slot, context_length = self._slots.pop(), self.settings.context_length
        return CudaSequence(self.pool, context_length, self.memory.copy_page, slot, self._slots.append)

    def own(self, sequence: TokenSequence) -> CudaSequence:
        if not isinstance(sequence, CudaSequence) or sequence.pool is not self.pool:
            raise InputError("the sequence is not one of this runtime's")
        return sequence

    def step(self, parts: Sequence[StepPart]) -> NDArray[np.float32]:
        started = time.perf_counter()
        rows = self.begin(parts)
        decodes = len(rows) == len(parts) <= self.graph_rows and all(row[3] for row in rows)
        out: list[NDArray[np.float32]] = []
        for start in range(0, len(rows), self.lowering.rows):
            out += self._chunk(rows[start : start + self.lowering.rows], graph=decodes)
        self.end(parts)
        self.emit(StepDone(tokens=len(rows), seconds=time.perf_counter() - started))
        if not out:
            return np.empty((0, self.model.plan.program.vocab_size), np.float32)
        return out[0] if len(out) == 1 else np.concatenate(out)

    def begin(self, parts: Sequence[StepPart]) -> list[Row]:
        """Check a step and give its sequences their pages; its rows."""
        self.device.make_current()
        rows = self._check(parts)
        self.wait(self.stream)  # a copy queued before may still read what is written from here on
        self.epoch += 1
        for part in parts:
            sequence = self.own(part.sequence)
            self.reserve(sequence, sequence.length + len(part.token_ids))
        return rows

    def end(self, parts: Sequence[StepPart]) -> None:
        """Count the tokens of a step that was queued."""
        for part in parts:
            self.own(part.sequence).advance(part.token_ids)

    def reserve(self, sequence: CudaSequence, length: int) -> bool:
        """Give a sequence pages for `length` tokens and enter them in the host's table; whether any are new."""
        if not sequence.reserve(length):
            return False
        self.rows.enter_pages(sequence)
        return True

    def _check(self, parts: Sequence[StepPart]) -> list[Row]:
        """The rows of a step; refuses before any work."""
        vocab_size = self.model.plan.program.vocab_size
        rows: list[Row] = []
        grown: list[tuple[CudaSequence, int]] = []
        seen: set[int] = set()
        for part in parts:
            sequence = self.own(part.sequence)
            if id(sequence) in seen:
                raise InputError("a sequence can stand in a step only once")
            seen.add(id(sequence))
            end = sequence.length + len(part.token_ids)
            if end > self.settings.context_length:
                raise InputError(
                    f"{sequence.length} + {len(part.token_ids)} tokens do not fit the context of "
                    f"{self.settings.context_length}"
                )
            grown.append((sequence, end))
            for i, token in enumerate(part.token_ids):
                if not 0 <= token < vocab_size:
                    raise InputError(f"token id {token} is outside the vocabulary of {vocab_size}")
                wanted = part.logits == "all" or (part.logits == "last" and i == len(part.token_ids) - 1)
                rows.append((sequence, int(token), sequence.length + i, wanted))
        self.require_pages(grown)
        return rows

    def _chunk(self, rows: list[Row], *, graph: bool) -> list[NDArray[np.float32]]:
        wanted = self.rows.send(rows, self.stream)
        if graph:
            self.graph(len(rows), "logits").launch(self.stream)
            return [self._read_logits(len(rows))]
        self.run_part("body", len(rows), alone=one_row_each(rows))
        out = []
        for start in range(0, len(wanted), LOGIT_ROWS):
            size = min(LOGIT_ROWS, len(wanted) - start)
            if start:
                self.rows.select(wanted[start : start + size], self.stream)
            self.run_part("head", size)
            out.append(self._read_logits(size))
        if not out:
            self.stream.synchronize()
        return out

    def _read_logits(self, rows: int) -> NDArray[np.float32]:
        vocab_size = self.model.plan.program.vocab_size
        logits_at = self.memory.address(self.model.plan.program.logits)
        self.stream.copy_to_host(self.memory.logits.address, logits_at, 4 * rows * vocab_size)
        self.wait(self.stream)
        logits: NDArray[np.float32] = self.memory.logits.array.view(np.float32)[: rows * vocab_size]
        return logits.reshape(rows, vocab_size).copy()

    def wait(self, work: Stream | Event) -> None:
        """Wait for work on the card, and note for how long."""
        started = time.perf_counter()
        work.synchronize()
        self.waited_seconds += time.perf_counter() - started

    # launches ---------------------------------------------------------------------------------------------------

    def launches(self, part: Part, rows: int, *, alone: bool = False) -> list[tuple[Spec, Queued]]:
        """What a step of that many rows queues, each launch with what it was made from; see `run_part`."""
        path = self.lowering.path(rows, alone=alone)
        return list(zip(self._specs_of(part, path), self._plan(part, rows, alone=alone), strict=True))

    def read_buffer(self, buffer: Buffer, rows: int) -> NDArray[np.float32]:
        """The first rows of a buffer, as they are now."""
        value = np.empty((rows, buffer.width), np.float32)
        self.stream.read(value, self.memory.address(buffer))
        return value

    def run_part(self, part: Part, rows: int, *, alone: bool = False) -> None:
        """Queue the launches of a part of a step; `alone` where each row is the only one of its sequence."""
        for launch in self._plan(part, rows, alone=alone):
            launch(self.stream)

    def _plan(self, part: Part, rows: int, *, alone: bool = False) -> list[Queued]:
        path = self.lowering.path(rows, alone=alone)
        plan = self._plans.get((part, rows, path))
        if plan is None:
            plan = self._plans[part, rows, path] = self.queue(self._specs_of(part, path), rows, self.memory.addresses)
        return plan

    def _specs_of(self, part: Part, path: RowPath) -> list[Spec]:
        return self.kernels.specs[path][0 if part == "body" else 1]

    def queue(self, specs: Sequence[Spec], rows: int, addresses: Addresses) -> list[Queued]:
        """Launches of a step of that many rows, ready to run."""
        return self._loaded.queue(specs, rows, addresses)

    def profile(self, parts: Sequence[StepPart]) -> list[tuple[str, float]]:
        """See `tracing.profile`."""
        return profile(self, parts)

    def trace(
        self, parts: Sequence[StepPart], see: Callable[[Buffer, NDArray[np.float32]], None]
    ) -> NDArray[np.float32]:
        """See `tracing.trace`."""
        return trace(self, parts, see)

    def measure_read_bandwidth(self) -> float:
        """Bytes per second this card reads at best."""
        self.device.make_current()
        return measure_read_bandwidth(self.device, self.stream)

    def graph(self, rows: int, ending: Literal["logits", "choose"]) -> GraphExec:
        """A step of so many rows, each with its logits; nothing of positions, lengths, pages or sequences is in it."""

        def launches() -> list[Queued]:
            plans = [*self._plan("body", rows, alone=True), *self._plan("head", rows)]
            return plans if ending == "logits" else [*plans, *self.choices(rows)]

        return self._graphs.get((rows, ending), launches)

    @property
    def graph_rows(self) -> int:
        """Rows of a step that may be one graph, at most."""
        return min(LOGIT_ROWS, self.lowering.rows)

    def clear_decode_graph(self) -> None:
        """Forget captured graphs; the next decode steps capture again."""
        self.device.make_current()
        self._graphs.clear()

    # choosing tokens --------------------------------------------------------------------------------------------

    def device_chooser(
        self,
        sequence: TokenSequence,
        sampling: SamplingParams,
        generation: GenerationParams,
        fed: Sequence[int] | None = None,
    ) -> Decoder | None:
        """A chooser that works on the device, or None where the host has to sample.

        `fed` is the caller's list of the sequence's tokens, kept up to date; penalties need it.
        """
        if generation.logprobs > min(TOP_LIMIT, self.chooser.vocab_size) or (sampling.penalises and fed is None):
            return None
        return Decoder(self, self.own(sequence), sampling.seeded(), generation.logprobs, fed if fed is not None else ())

    def token_choice(
        self, sequence: TokenSequence, sampling: SamplingParams, generation: GenerationParams
    ) -> CudaChoice | None:
        """See `ChoosesTokens`."""
        if generation.logprobs > min(TOP_LIMIT, self.chooser.vocab_size):
            return None
        check_bias(sampling, self.chooser.vocab_size)
        return CudaChoice(self.own(sequence), sampling.seeded(), generation.logprobs)

    def choose_step(self, parts: Sequence[ChoicePart], *, ahead: bool) -> list[Sampled | ExecutionError | None]:
        """See `ChoosesTokens`."""
        started = time.perf_counter()
        self.device.make_current()
        chosen = self._choosing.run(parts, ahead=ahead)
        self.emit(StepDone(tokens=sum(len(part.token_ids) for part in parts), seconds=time.perf_counter() - started))
        return chosen

    def choices(self, rows: int) -> list[Launch]:
        """What a step of so many rows with logits ends with where tokens are chosen."""
        launches = self._choices.get(rows)
        if launches is None:
            logits, table = self.memory.address(self.model.plan.program.logits), self.rows
            launches = self._choices[rows] = self.chooser.launches(
                rows, logits=logits, token_ids=table.token_ids, positions=table.positions
            )
        return launches

    def decode(self, sequence: CudaSequence, token: int | None) -> None:
        """Queue a step of one token that ends with choosing the next: a given one, or None for the one chosen last."""
        graph = self.graph(1, "choose")
        if token is not None:
            self.wait(self.stream)  # see `begin`
        grown = self.reserve(sequence, sequence.length + 1)
        if token is not None:
            self.epoch += 1
            self.rows.send([(sequence, token, sequence.length, True)], self.stream)
        elif grown:
            self.rows.send_pages(sequence, self.stream)
        graph.launch(self.stream)

    def measured_choices(self) -> dict[str, str]:
        """See `Tuned`."""
        return choices_of(self.lowering)

    def code_hashes(self) -> dict[str, str]:
        """See `Identified`: of the machine code, so that another compiler or card shows, too."""
        return self.kernels.build.hashes()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self.device.make_current()
            self.clear_decode_graph()
            self.stream.synchronize()
            self._undo.close()
        self.model.resident.close()
