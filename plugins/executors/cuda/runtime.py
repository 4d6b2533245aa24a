"""Runs a lowered program on a card: builds it, owns its memory, feeds steps, and replays decode as one graph."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from attrs import define, field
from numpy.typing import NDArray

from mortice.core.errors import InputError
from mortice.core.model import operators as op
from mortice.core.model.operators import Buffer
from mortice.core.model.program import KvShape, Program
from mortice.core.model.residency import BoundModel
from mortice.core.model.rope import rope_frequencies
from mortice.core.plugin.events import GraphCaptured, StepDone
from mortice.core.plugin.interfaces import Emit, RuntimeSettings, StepPart, TokenSequence
from mortice.core.text.params import GenerationParams, SamplingParams
from mortice.plugins.executors.cuda.bandwidth import measure_read_bandwidth
from mortice.plugins.executors.cuda.build import compile_all
from mortice.plugins.executors.cuda.cache import KernelCache
from mortice.plugins.executors.cuda.choosing import TOP_LIMIT, Decoder, TokenChooser, choice_bytes
from mortice.plugins.executors.cuda.device import Device
from mortice.plugins.executors.cuda.kv_pool import PAGE_TOKENS, CudaSequence, PagePool
from mortice.plugins.executors.cuda.lowering import (
    LOGIT_ROWS,
    TOKEN_TILES,
    Addresses,
    LaunchSpec,
    Lowering,
    place_program,
    rope_key,
    scratch_bytes,
)
from mortice.plugins.executors.cuda.rows import Row, RowTable
from mortice.plugins.executors.cuda.stream import Event, Stream

__all__ = ["MAX_SEQUENCES", "CudaRuntime", "kv_pool_bytes", "runtime_bytes"]

MAX_SEQUENCES = 8

_KV_BYTES = {"f16": 2, "f32": 4}


def page_count(settings: RuntimeSettings) -> int:
    """Pages for one full sequence."""
    return -(-settings.context_length // PAGE_TOKENS)


def kv_pool_bytes(shapes: Sequence[KvShape], settings: RuntimeSettings, kv_type: str) -> int:
    """Bytes of the KV cache."""
    elements = sum(shape.elements for shape in shapes)
    return page_count(settings) * PAGE_TOKENS * elements * _KV_BYTES[kv_type]


def runtime_bytes(program: Program, settings: RuntimeSettings, sm_count: int) -> int:
    """Bytes a runtime allocates on the device besides weights and KV cache."""
    _, workspace = place_program(program, settings.step_tokens)
    rows = RowTable.nbytes(settings.step_tokens, MAX_SEQUENCES, page_count(settings))
    ropes = {rope_key(o): 8 * (o.dims // 2) for o in program.operators if isinstance(o, op.Rope)}
    choice = choice_bytes(program.vocab_size, settings.context_length, sm_count)
    scratch = sum(scratch_bytes(program, sm_count, settings.step_tokens))
    return workspace.nbytes + scratch + rows + sum(ropes.values()) + choice


@define(eq=False)
class CudaRuntime:
    """A program on a CUDA device."""

    model: BoundModel
    settings: RuntimeSettings
    emit: Emit
    device: Device
    lowering: Lowering
    _owned: list[Any] = field(factory=list, init=False, repr=False)
    _plans: dict[tuple[str, int], list[Any]] = field(factory=dict, init=False, repr=False)
    _graphs: dict[str, Any] = field(factory=dict, init=False, repr=False)
    epoch: int = field(default=0, init=False)
    """Counts the steps that wrote the rows anew; whoever launched ahead sees by it that they are no longer its own."""
    waited_seconds: float = field(default=0.0, init=False)
    """Time callers spent waiting for the card; only grows."""

    def __attrs_post_init__(self) -> None:
        device, lowering, program = self.device, self.lowering, self.model.plan.program
        device.make_current()
        self._specs = {tokens: lowering.launches(tokens) for tokens in TOKEN_TILES}
        choose = lowering.sources.choose(program.vocab_size, lowering.sm_count)
        sources = {spec.source for body, head in self._specs.values() for spec in (*body, *head)}
        sources.add(choose)
        self.build = compile_all(sources, device.arch, cache=KernelCache())
        self._modules = {source: device.load(self.build.kernels[source].cubin) for source in sources}
        self._functions = {
            (spec.source, spec.entry): self._modules[spec.source].function(spec.entry)
            for body, head in self._specs.values()
            for spec in (*body, *head)
        }
        self.stream = device.new_stream()
        self.chooser = self._own(
            TokenChooser(device, self.stream, self._modules[choose], program.vocab_size, self.settings.context_length)
        )
        self._rows = self._own(RowTable(device, lowering.rows, MAX_SEQUENCES, page_count(self.settings)))
        workspace = self._own(device.allocate(lowering.workspace.nbytes))
        partial, arrivals = (
            self._own(device.allocate(nbytes)) for nbytes in scratch_bytes(program, lowering.sm_count, lowering.rows)
        )
        self.stream.fill(arrivals.address, 0, arrivals.nbytes)
        self._pool = PagePool(page_count(self.settings))
        kv = self._own(device.allocate(kv_pool_bytes(program.kv, self.settings, lowering.kv_type)))
        keys, values, at = [], [], kv.address
        for shape in program.kv:
            half = self._pool.pages * PAGE_TOKENS * shape.elements // 2 * _KV_BYTES[lowering.kv_type]
            keys.append(at)
            values.append(at + half)
            at += 2 * half
        self._logits_address = workspace.address + lowering.workspace.offsets[program.logits]
        self._logits = self._own(device.allocate_host(4 * LOGIT_ROWS * program.vocab_size))
        self._addresses = Addresses(
            weights={
                planned.weight: self.model.resident.address(i) for i, planned in enumerate(self.model.plan.weights)
            },
            workspace=workspace.address,
            keys=keys,
            values=values,
            rows=self._rows.structure(),
            selected=self._rows.selected,
            partial=partial.address,
            arrivals=arrivals.address,
            frequencies=self._frequencies(),
        )
        self._slots = list(range(MAX_SEQUENCES - 1, -1, -1))
        self.stream.synchronize()

    _specs: dict[int, tuple[list[LaunchSpec], list[LaunchSpec]]] = field(init=False, repr=False)
    build: Any = field(init=False, repr=False)
    _modules: dict[Any, Any] = field(init=False, repr=False)
    _functions: dict[Any, Any] = field(init=False, repr=False)
    stream: Any = field(init=False, repr=False)
    _rows: RowTable = field(init=False, repr=False)
    _pool: PagePool = field(init=False, repr=False)
    _logits: Any = field(init=False, repr=False)
    _logits_address: int = field(init=False, repr=False)
    _addresses: Addresses = field(init=False, repr=False)
    _slots: list[int] = field(init=False, repr=False)
    chooser: TokenChooser = field(init=False, repr=False)

    def _own(self, memory: Any) -> Any:
        self._owned.append(memory)
        return memory

    def _frequencies(self) -> dict[object, tuple[int, float]]:
        """RoPE's tables, one for each distinct set of constants."""
        tables: dict[object, tuple[int, float]] = {}
        planned = {item.weight: item for item in self.model.plan.weights}
        for operator in self.model.plan.program.operators:
            if isinstance(operator, op.Rope) and rope_key(operator) not in tables:
                factors = None
                if operator.factors is not None:
                    factors = np.ascontiguousarray(planned[operator.factors].source()).view("<f4").reshape(-1)
                frequencies, magnitude = rope_frequencies(operator, factors)
                memory = self._own(self.device.allocate(frequencies.nbytes))
                self.stream.write(memory.address, frequencies)
                tables[rope_key(operator)] = memory.address, magnitude
        return tables

    # sequences --------------------------------------------------------------------------------------------------

    def new_sequence(self) -> CudaSequence:
        if not self._slots:
            raise InputError(f"{MAX_SEQUENCES} sequences are open, which is the most at once; close one")
        return CudaSequence(self._pool, self._slots.pop(), self.settings.context_length, self._slots.append)

    def step(self, parts: Sequence[StepPart]) -> NDArray[np.float32]:
        started = time.perf_counter()
        self.device.make_current()
        rows = self._check(parts)
        single = len(rows) == 1 and rows[0][3]
        self.epoch += 1
        for part in parts:
            sequence = _own_sequence(part.sequence)
            self._reserve(sequence, sequence.length + len(part.token_ids))
        out: list[NDArray[np.float32]] = []
        for start in range(0, len(rows), self.lowering.rows):
            out += self._chunk(rows[start : start + self.lowering.rows], graph=single)
        for part in parts:
            part.sequence.length += len(part.token_ids)  # type: ignore[misc]  # checked to be ours
        self.emit(StepDone(tokens=len(rows), seconds=time.perf_counter() - started))
        if not out:
            return np.empty((0, self.model.plan.program.vocab_size), np.float32)
        return out[0] if len(out) == 1 else np.concatenate(out)

    def _reserve(self, sequence: CudaSequence, length: int) -> bool:
        """Give a sequence pages for `length` tokens and enter them in the host's table; whether any are new."""
        if not sequence.reserve(length):
            return False
        self._rows.enter_pages(sequence)
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
        wanted = self._rows.send(rows, self.stream)
        if graph:
            self._decode_graph("logits").launch(self.stream)
            return [self._read_logits(1)]
        self._run("body", len(rows))
        out = []
        for start in range(0, len(wanted), LOGIT_ROWS):
            size = min(LOGIT_ROWS, len(wanted) - start)
            if start:
                self._rows.select(wanted[start : start + size], self.stream)
            self._run("head", size)
            out.append(self._read_logits(size))
        if not out:
            self.stream.synchronize()
        return out

    def _read_logits(self, rows: int) -> NDArray[np.float32]:
        vocab_size = self.model.plan.program.vocab_size
        self.stream.copy_to_host(self._logits.address, self._logits_address, 4 * rows * vocab_size)
        self.wait(self.stream)
        logits: NDArray[np.float32] = self._logits.array.view(np.float32)[: rows * vocab_size]
        return logits.reshape(rows, vocab_size).copy()

    def wait(self, work: Stream | Event) -> None:
        """Wait for work on the card, and note for how long."""
        started = time.perf_counter()
        work.synchronize()
        self.waited_seconds += time.perf_counter() - started

    # launches ---------------------------------------------------------------------------------------------------

    def _run(self, part: str, rows: int) -> None:
        for launch in self._plan(part, rows):
            launch(self.stream)

    def _plan(self, part: str, rows: int) -> list[Any]:
        plan = self._plans.get((part, rows))
        if plan is None:
            plan = self._plans[part, rows] = self._prepare(part, rows)
        return plan

    def _specs_of(self, part: str, rows: int) -> list[LaunchSpec]:
        tokens = next((size for size in TOKEN_TILES if size >= rows), TOKEN_TILES[-1])
        return self._specs[tokens][0 if part == "body" else 1]

    def _prepare(self, part: str, rows: int) -> list[Any]:
        specs = self._specs_of(part, rows)
        pdl = self.device.properties.compute_capability >= (9, 0)
        launches = []
        for spec in specs:
            function = self._functions[spec.source, spec.entry]
            shared = self._shared_bytes(spec)
            if shared > 48 << 10:
                function.set_dynamic_shared(shared)
            at_once = self.lowering.sm_count * max(1, function.blocks_per_sm(spec.block, shared))
            launches.append(
                function.prepare(
                    spec.grid(rows, at_once),
                    spec.block,
                    spec.args(self._addresses, rows),
                    dynamic_shared=shared,
                    pdl=pdl,
                )
            )
        return launches

    def _shared_bytes(self, spec: LaunchSpec) -> int:
        if not spec.shared_symbol:
            return 0
        number = np.empty(1, np.int32)
        address, _ = self._modules[spec.source].symbol(spec.shared_symbol)
        self.stream.read(number, address)
        return int(number[0])

    def profile(self, parts: Sequence[StepPart]) -> list[tuple[str, float]]:
        """Run a step launch by launch; what each was and the seconds it took. Gaps between launches are not counted."""
        self.device.make_current()
        self.epoch += 1
        rows = self._check(parts)[: self.lowering.rows]
        for part in parts:
            sequence = _own_sequence(part.sequence)
            self._reserve(sequence, sequence.length + len(part.token_ids))
        wanted = self._rows.send(rows, self.stream)[:LOGIT_ROWS]
        start, end = (self.device.new_event(timing=True) for _ in range(2))
        times = []
        for name, count in (("body", len(rows)), ("head", len(wanted))):
            for spec, launch in zip(self._specs_of(name, count), self._plan(name, count), strict=True) if count else ():
                self.stream.synchronize()
                start.record(self.stream)
                launch(self.stream)
                end.record(self.stream)
                end.synchronize()
                times.append((spec.label, end.milliseconds_since(start) / 1000))
        for part in parts:
            _own_sequence(part.sequence).length += len(part.token_ids)
        start.close()
        end.close()
        return times

    def trace(
        self, parts: Sequence[StepPart], see: Callable[[Buffer, NDArray[np.float32]], None]
    ) -> NDArray[np.float32]:
        """Run a step launch by launch, with the kernels of `step` but no graph, and show what each launch wrote."""
        self.device.make_current()
        rows = self._check(parts)
        if len(rows) > self.lowering.rows:
            raise InputError(
                f"found {len(rows)} tokens to trace, wanted at most {self.lowering.rows} (executor.step_tokens)"
            )
        self.epoch += 1
        for part in parts:
            sequence = _own_sequence(part.sequence)
            self._reserve(sequence, sequence.length + len(part.token_ids))
        wanted = self._rows.send(rows, self.stream)
        self._trace("body", len(rows), see)
        pieces: dict[Buffer, list[NDArray[np.float32]]] = {}
        for start in range(0, len(wanted), LOGIT_ROWS):
            chosen = wanted[start : start + LOGIT_ROWS]
            if start:
                self._rows.select(chosen, self.stream)
            self._trace("head", len(chosen), lambda buffer, value: pieces.setdefault(buffer, []).append(value))
        for buffer, values in pieces.items():
            see(buffer, np.concatenate(values))
        for part in parts:
            _own_sequence(part.sequence).length += len(part.token_ids)
        logits = self.model.plan.program.logits
        return np.concatenate(pieces[logits]) if pieces else np.empty((0, logits.width), np.float32)

    def _trace(self, part: str, rows: int, see: Callable[[Buffer, NDArray[np.float32]], None]) -> None:
        for spec, launch in zip(self._specs_of(part, rows), self._plan(part, rows), strict=True):
            launch(self.stream)
            for buffer in spec.outputs:  # now: a later launch may use their memory for something else
                value = np.empty((rows, buffer.width), np.float32)
                self.stream.read(value, self._addresses.workspace + self.lowering.workspace.offsets[buffer])
                see(buffer, value)

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
                rows = self._rows
                launch = self.chooser.launch(
                    logits=self._logits_address, token_ids=rows.token_ids, positions=rows.positions
                )
                plans.append([launch])
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
            self._rows.send([(sequence, token, sequence.length, True)], self.stream)
        elif grown:
            self._rows.send_pages(sequence, self.stream)
        graph.launch(self.stream)

    def close(self) -> None:
        if self._owned:
            self.device.make_current()
            self.clear_decode_graph()
            self.stream.synchronize()
            for memory in self._owned:
                memory.close()
            self._owned.clear()
            for module in self._modules.values():
                module.close()
            self.stream.close()
        self.model.resident.close()


def _own_sequence(sequence: TokenSequence) -> CudaSequence:
    if not isinstance(sequence, CudaSequence):
        raise InputError(f"a sequence of the CUDA executor is needed, not {type(sequence).__name__}")
    return sequence
