"""Runs a lowered program on a card: builds it, owns its memory, feeds steps, and replays decode as one graph."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from typing import Any

import numpy as np
from attrs import define, field
from numpy.typing import NDArray

from mortice.core.errors import InputError
from mortice.core.model.operators import Buffer
from mortice.core.model.residency import BoundModel
from mortice.core.plugin.events import GraphCaptured, StepDone
from mortice.core.plugin.interfaces import Emit, RuntimeSettings, StepPart, TokenSequence
from mortice.core.text.params import GenerationParams, SamplingParams
from mortice.plugins.executors.cuda.bandwidth import measure_read_bandwidth
from mortice.plugins.executors.cuda.choosing import TOP_LIMIT, Decoder, TokenChooser
from mortice.plugins.executors.cuda.cublas import Blas, find_cublas
from mortice.plugins.executors.cuda.device import Device
from mortice.plugins.executors.cuda.kernels import Kernels
from mortice.plugins.executors.cuda.kv_pool import PAGE_TOKENS, CudaSequence, PagePool, page_count
from mortice.plugins.executors.cuda.launches import GemmSpec, LaunchSpec, Queued, Spec
from mortice.plugins.executors.cuda.lowering import Lowering
from mortice.plugins.executors.cuda.placing import LOGIT_ROWS
from mortice.plugins.executors.cuda.rows import MAX_SEQUENCES, Row, RowTable
from mortice.plugins.executors.cuda.runtime_memory import RuntimeMemory
from mortice.plugins.executors.cuda.stream import Event, Stream
from mortice.plugins.executors.cuda.tracing import Part, profile, trace

__all__ = ["CudaRuntime"]


@define(eq=False)
class CudaRuntime:
    """A program on a CUDA device."""

    model: BoundModel
    settings: RuntimeSettings
    emit: Emit
    device: Device
    kernels: Kernels
    _closed: bool = field(default=False, init=False, repr=False)
    _plans: dict[tuple[Part, int], list[Queued]] = field(factory=dict, init=False, repr=False)
    _graphs: dict[str, Any] = field(factory=dict, init=False, repr=False)
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
        self._modules = {
            source: undo.enter_context(closing(device.load(code.cubin)))
            for source, code in kernels.build.kernels.items()
        }
        self._functions = {
            (spec.source, spec.entry): self._modules[spec.source].function(spec.entry) for spec in kernels.launches
        }
        self.stream = undo.enter_context(closing(device.new_stream()))
        self.memory = RuntimeMemory(device, self.stream, lowering, self.model, self.settings.context_length)
        undo.callback(self.memory.close)
        self.chooser = TokenChooser(
            device, self.stream, self._modules[kernels.choose], program.vocab_size, self.settings.context_length
        )
        undo.callback(self.chooser.close)
        self._pool = PagePool(page_count(self.settings.context_length))
        self._slots = list(range(MAX_SEQUENCES - 1, -1, -1))
        self.stream.synchronize()

    _undo: ExitStack = field(init=False, repr=False)
    lowering: Lowering = field(init=False)
    _modules: dict[Any, Any] = field(init=False, repr=False)
    _functions: dict[Any, Any] = field(init=False, repr=False)
    _blas: Blas | None = field(default=None, init=False, repr=False)
    stream: Any = field(init=False, repr=False)
    memory: RuntimeMemory = field(init=False, repr=False)
    _pool: PagePool = field(init=False, repr=False)
    _slots: list[int] = field(init=False, repr=False)
    chooser: TokenChooser = field(init=False, repr=False)

    # sequences --------------------------------------------------------------------------------------------------

    @property
    def rows(self) -> RowTable:
        """What the current step says of its tokens."""
        return self.memory.rows

    def new_sequence(self) -> CudaSequence:
        if not self._slots:
            raise InputError(f"{MAX_SEQUENCES} sequences are open, which is the most at once; close one")
        return CudaSequence(self._pool, self._slots.pop(), self.settings.context_length, self._slots.append)

    def step(self, parts: Sequence[StepPart]) -> NDArray[np.float32]:
        started = time.perf_counter()
        rows = self.begin(parts)
        single = len(rows) == 1 and rows[0][3]
        out: list[NDArray[np.float32]] = []
        for start in range(0, len(rows), self.lowering.rows):
            out += self._chunk(rows[start : start + self.lowering.rows], graph=single)
        self.end(parts)
        self.emit(StepDone(tokens=len(rows), seconds=time.perf_counter() - started))
        if not out:
            return np.empty((0, self.model.plan.program.vocab_size), np.float32)
        return out[0] if len(out) == 1 else np.concatenate(out)

    def begin(self, parts: Sequence[StepPart]) -> list[Row]:
        """Check a step and give its sequences their pages; its rows."""
        self.device.make_current()
        rows = self._check(parts)
        self.epoch += 1
        for part in parts:
            sequence = _own_sequence(part.sequence)
            self._reserve(sequence, sequence.length + len(part.token_ids))
        return rows

    def end(self, parts: Sequence[StepPart]) -> None:
        """Count the tokens of a step that was queued."""
        for part in parts:
            _own_sequence(part.sequence).length += len(part.token_ids)

    def _reserve(self, sequence: CudaSequence, length: int) -> bool:
        """Give a sequence pages for `length` tokens and enter them in the host's table; whether any are new."""
        if not sequence.reserve(length):
            return False
        self.rows.enter_pages(sequence)
        return True

    def _check(self, parts: Sequence[StepPart]) -> list[Row]:
        """The rows of a step; refuses before any work."""
        vocab_size = self.model.plan.program.vocab_size
        rows: list[Row] = []
        needed = 0
        seen: set[int] = set()
        for part in parts:
            sequence = _own_sequence(part.sequence)
            if id(sequence) in seen:
                raise InputError("a sequence can stand in a step only once")
            seen.add(id(sequence))
            end = sequence.length + len(part.token_ids)
            if end > self.settings.context_length:
                raise InputError(
                    f"{sequence.length} + {len(part.token_ids)} tokens do not fit the context of "
                    f"{self.settings.context_length}"
                )
            needed += max(0, -(-end // PAGE_TOKENS) - len(sequence.pages))
            for i, token in enumerate(part.token_ids):
                if not 0 <= token < vocab_size:
                    raise InputError(f"token id {token} is outside the vocabulary of {vocab_size}")
                wanted = part.logits == "all" or (part.logits == "last" and i == len(part.token_ids) - 1)
                rows.append((sequence, int(token), sequence.length + i, wanted))
        if needed > self._pool.free:
            raise InputError(
                f"{needed} more pages of KV cache are needed, {self._pool.free} are free; close a sequence"
            )
        return rows

    def _chunk(self, rows: list[Row], *, graph: bool) -> list[NDArray[np.float32]]:
        wanted = self.rows.send(rows, self.stream)
        if graph:
            self._decode_graph("logits").launch(self.stream)
            return [self._read_logits(1)]
        self._run("body", len(rows))
        out = []
        for start in range(0, len(wanted), LOGIT_ROWS):
            size = min(LOGIT_ROWS, len(wanted) - start)
            if start:
                self.rows.select(wanted[start : start + size], self.stream)
            self._run("head", size)
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

    def launches(self, part: Part, rows: int) -> list[tuple[Spec, Queued]]:
        """What a step of that many rows queues, each launch with what it was made from."""
        return list(zip(self._specs_of(part, rows), self._plan(part, rows), strict=True))

    def read_buffer(self, buffer: Buffer, rows: int) -> NDArray[np.float32]:
        """The first rows of a buffer, as they are now."""
        value = np.empty((rows, buffer.width), np.float32)
        self.stream.read(value, self.memory.address(buffer))
        return value

    def _run(self, part: Part, rows: int) -> None:
        for launch in self._plan(part, rows):
            launch(self.stream)

    def _plan(self, part: Part, rows: int) -> list[Queued]:
        plan = self._plans.get((part, rows))
        if plan is None:
            plan = self._plans[part, rows] = self._prepare(part, rows)
        return plan

    def _specs_of(self, part: Part, rows: int) -> list[Spec]:
        return self.kernels.specs[self.lowering.path(rows)][0 if part == "body" else 1]

    def _prepare(self, part: Part, rows: int) -> list[Queued]:
        specs = self._specs_of(part, rows)
        pdl = self.device.properties.compute_capability >= (9, 0)
        launches: list[Queued] = []
        for spec in specs:
            if isinstance(spec, GemmSpec):
                launches.append(self._opened_blas().prepare(spec.gemm(self.memory.addresses, rows)))
                continue
            function = self._functions[spec.source, spec.entry]
            shared = self._shared_bytes(spec)
            if shared > 48 << 10:
                function.set_dynamic_shared(shared)
            at_once = self.lowering.sm_count * max(1, function.blocks_per_sm(spec.block, shared))
            launches.append(
                function.prepare(
                    spec.grid(rows, at_once),
                    spec.block,
                    spec.args(self.memory.addresses, rows),
                    dynamic_shared=shared,
                    pdl=pdl,
                )
            )
        return launches

    def _opened_blas(self) -> Blas:
        """cuBLAS, brought up when the first step needs it."""
        if self._blas is None:
            library = find_cublas()
            assert library is not None, "the lowering has products by cuBLAS only where there is one"
            self._blas = Blas(library, self.stream, self.memory.addresses.matmul + self.lowering.scratch.blas)
        return self._blas

    def _shared_bytes(self, spec: LaunchSpec) -> int:
        if not spec.shared_symbol:
            return 0
        number = np.empty(1, np.int32)
        address, _ = self._modules[spec.source].symbol(spec.shared_symbol)
        self.stream.read(number, address)
        return int(number[0])

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

    def _decode_graph(self, ending: str) -> Any:
        """The graph of one decode step, captured once: positions, lengths and pages are read from the device."""
        captured = self._graphs.get(ending)
        if captured is None:
            started = time.perf_counter()
            plans = [self._prepare("body", 1), self._prepare("head", 1)]
            if ending == "choose":
                rows = self.rows
                choice = self.chooser.launch(
                    logits=self.memory.address(self.model.plan.program.logits),
                    token_ids=rows.token_ids,
                    positions=rows.positions,
                )
                plans.append([choice])
            with self.stream.capture() as graph:
                for plan in plans:
                    for launch in plan:
                        launch(self.stream)
            # the launches keep their arguments alive for as long as the graph
            captured = self._graphs[ending] = (graph.instantiate(), plans)
            self.emit(GraphCaptured(nodes=graph.node_count, seconds=time.perf_counter() - started))
        return captured[0]

    def clear_decode_graph(self) -> None:
        """Forget captured graphs; the next decode step captures again."""
        if self._graphs:
            self.device.make_current()
            self.stream.synchronize()
            for graph, _ in self._graphs.values():
                graph.close()
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
        own = _own_sequence(sequence)
        return Decoder(self, own, sampling.seeded(), generation.logprobs, fed if fed is not None else ())

    def decode(self, sequence: CudaSequence, token: int | None) -> None:
        """Queue a step of one token that ends with choosing the next: a given one, or None for the one chosen last."""
        graph = self._decode_graph("choose")
        grown = self._reserve(sequence, sequence.length + 1)
        if token is not None:
            self.epoch += 1
            self.rows.send([(sequence, token, sequence.length, True)], self.stream)
        elif grown:
            self.rows.send_pages(sequence, self.stream)
        graph.launch(self.stream)

    def code_hashes(self) -> dict[str, str]:
        """See `Identified`: of the machine code, so that another compiler or card shows, too."""
        return self.kernels.build.hashes()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self.device.make_current()
            self.clear_decode_graph()
            self.stream.synchronize()
            if self._blas is not None:
                self._blas.close()
            self._undo.close()
        self.model.resident.close()


def _own_sequence(sequence: TokenSequence) -> CudaSequence:
    if not isinstance(sequence, CudaSequence):
        raise InputError(f"a sequence of the CUDA executor is needed, not {type(sequence).__name__}")
    return sequence
