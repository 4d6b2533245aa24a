"""Interprets a program operator by operator."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from attrs import define, field, frozen
from numpy.typing import NDArray

from mortice.core.errors import ExecutionError, InputError
from mortice.core.model import operators as op
from mortice.core.model.residency import BoundModel
from mortice.core.model.rope import rope_frequencies
from mortice.core.model.weight_plan import PlannedWeight
from mortice.core.plugin.events import StepDone
from mortice.core.plugin.interfaces import Emit, RuntimeSettings, StepPart, TokenSequence
from mortice.core.plugin.kv_pages import PagedRuntime, PagePool, page_count
from mortice.core.text.params import GenerationParams, SamplingParams
from mortice.plugins.executors.reference import ops
from mortice.plugins.executors.reference.bandwidth import read_bandwidth
from mortice.plugins.executors.reference.kv_cache import KvStore, ReferenceSequence
from mortice.plugins.executors.reference.layouts import FileLayout, expand

__all__ = ["ReferenceRuntime", "kv_type_of"]

Array = NDArray[np.float32]


@frozen(eq=False)
class _Weight:
    """A bound weight: float32 as a whole, or rows expanded from the file on demand."""

    planned: PlannedWeight
    expanded: Array | None

    def rows(self, index: Any) -> Array:
        """float32, shape (rows of `index`, columns)."""
        if self.expanded is not None:
            return cast(Array, self.expanded[index])
        layout = cast(FileLayout, self.planned.layout)
        return expand(layout.type, self.planned.source()[index], self.planned.columns)

    def vector(self) -> Array:
        """All elements in one dimension, for weights that are vectors."""
        return self.rows(slice(None)).reshape(-1)

    def apply(self, x: Array) -> Array:
        """``x @ weight.T``."""
        if self.expanded is not None:
            return ops.linear(x, self.expanded)
        out = np.empty((len(x), self.planned.rows), np.float32)
        piece = cast(FileLayout, self.planned.layout).piece(self.planned.columns)
        for start in range(0, self.planned.rows, piece):
            out[:, start : start + piece] = ops.linear(x, self.rows(slice(start, start + piece)))
        return out


@define(eq=False)
class _Step:
    """What the operators of one step share."""

    token_ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    selected: NDArray[np.int64]
    parts: list[tuple[ReferenceSequence, int, int]]
    """(sequence, first row, one past the last row) of each part."""
    store: KvStore
    turns: dict[object, tuple[Array, Array]] = field(factory=dict)
    """RoPE's cosines and sines by the operator's constants: the same for every layer that shares them."""


Run = Callable[[_Step, list[Array]], tuple[Array, ...]]
Observe = Callable[["_Bound", tuple[Array, ...], float], None]
"""Told of an operator that ran, its outputs, and the seconds it took."""


@frozen(eq=False)
class _Bound:
    """An operator ready to run; `ends` are the values no later one needs."""

    name: str
    label: str
    run: Run
    inputs: list[int]
    outputs: list[int]
    ends: list[int]
    buffers: tuple[op.Buffer, ...]
    """What the outputs are in the program."""


@define(eq=False)
class ReferenceRuntime(PagedRuntime[ReferenceSequence]):
    """A program on the CPU, in float32."""

    model: BoundModel
    settings: RuntimeSettings
    emit: Emit
    pool: PagePool = field(init=False, repr=False)
    _store: KvStore = field(init=False, repr=False)
    _plan: list[_Bound] = field(init=False, repr=False)
    _logits: int = field(init=False)
    _closed: bool = field(default=False, init=False)

    def __attrs_post_init__(self) -> None:
        program = self.model.plan.program
        weights = _bind_weights(self.model)
        last_uses = program.last_uses()
        numbers: dict[op.Buffer, int] = {}
        self._plan = []
        for place, bound in enumerate(self.model.operators):
            operator = bound.operator
            outputs = [numbers.setdefault(buffer, len(numbers)) for buffer in operator.outputs]
            inputs = [numbers[buffer] for buffer in operator.inputs]
            ends = [
                numbers[buffer]
                for buffer in (*operator.inputs, *operator.outputs)
                if last_uses[buffer] == place and buffer != program.logits
            ]
            run = _lower(operator, [weights[index] for index in bound.weights], self.settings.context_length)
            label = operator.kind
            if isinstance(operator, op.Linear):
                label += f" {self.model.plan.weights[bound.weights[0]].tensor.qtype.name}"
            self._plan.append(_Bound(operator.name, label, run, inputs, outputs, ends, operator.outputs))
        self._logits = numbers[program.logits]
        self.pool = PagePool(page_count(self.settings.cache_tokens), self.settings.prefix_cache)
        self._store = KvStore(program.kv, self.pool.pages, kv_type_of(self.settings))

    def new_sequence(self) -> ReferenceSequence:
        return ReferenceSequence(self.pool, self.settings.context_length, self._store.copy_page)

    def step(self, parts: Sequence[StepPart]) -> Array:
        return self._observed_step(self._prepare(parts), None)

    def profile(self, parts: Sequence[StepPart]) -> list[tuple[str, float]]:
        """Run a step; the kind of each operator, its weight's type after it, and the seconds it took."""
        times: list[tuple[str, float]] = []
        self._observed_step(self._prepare(parts), lambda bound, _, seconds: times.append((bound.label, seconds)))
        return times

    def trace(self, parts: Sequence[StepPart], see: Callable[[op.Buffer, Array], None]) -> Array:
        """Run a step and show the output of every operator."""
        step = self._prepare(parts)
        if len(step.token_ids) > self.settings.step_tokens:
            raise InputError(
                f"found {len(step.token_ids)} tokens to trace, wanted at most {self.settings.step_tokens} "
                "(executor.step_tokens)"
            )

        def observe(bound: _Bound, outputs: tuple[Array, ...], _: float) -> None:
            for buffer, value in zip(bound.buffers, outputs, strict=True):
                see(buffer, value)

        return self._observed_step(step, observe)

    def measure_read_bandwidth(self) -> float:
        """Bytes a second that all cores together read from memory, measured now."""
        return read_bandwidth()

    def _observed_step(self, step: _Step, observe: Observe | None) -> Array:
        started = time.perf_counter()
        # what overflows shows in the logits, and is reported there
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            logits = self._run(step, observe)
        if not np.isfinite(logits).all():
            raise ExecutionError("the logits hold NaN or infinity: the weights are broken, or float32 overflowed")
        for sequence, first, last in step.parts:
            sequence.advance(step.token_ids[first:last].tolist())
        self.emit(StepDone(tokens=len(step.token_ids), seconds=time.perf_counter() - started))
        return logits

    def _run(self, step: _Step, observe: Observe | None) -> Array:
        values: dict[int, Array] = {}
        for bound in self._plan:
            started = time.perf_counter()
            try:
                results = bound.run(step, [values[number] for number in bound.inputs])
            except (FloatingPointError, ValueError, MemoryError) as error:
                raise ExecutionError(f"{bound.name}: {error}") from error
            if observe is not None:
                observe(bound, results, time.perf_counter() - started)
            values.update(zip(bound.outputs, results, strict=True))
            for number in bound.ends:
                values.pop(number, None)
        return values[self._logits]

    def device_chooser(
        self,
        sequence: TokenSequence,
        sampling: SamplingParams,
        generation: GenerationParams,
        fed: Sequence[int] | None = None,
    ) -> None:
        """None: the host is the device, so it samples."""

    def _prepare(self, parts: Sequence[StepPart]) -> _Step:
        """Check everything before any work, so that a refused step leaves all sequences as they were."""
        if self._closed:
            raise InputError("the runtime is closed")
        if not parts:
            raise InputError("a step has at least one part")
        placed: list[tuple[ReferenceSequence, int, int]] = []
        token_ids, positions, selected = [], [], []
        row = 0
        for part in parts:
            sequence = self.own(part.sequence)
            count = len(part.token_ids)
            if any(sequence is other for other, _, _ in placed):
                raise InputError("a sequence can stand in a step only once")
            if sequence.length + count > sequence.context_length:
                raise InputError(
                    f"{sequence.length} + {count} tokens do not fit the context of {sequence.context_length}"
                )
            token_ids.append(_checked_ids(part.token_ids, self.model.plan.program.vocab_size))
            positions.append(np.arange(sequence.length, sequence.length + count))
            first = {"all": row, "last": row + count - 1, "none": row + count}[part.logits]
            selected.append(np.arange(first, row + count))
            placed.append((sequence, row, row + count))
            row += count
        grown = [(sequence, sequence.length + last - first) for sequence, first, last in placed]
        self.require_pages(grown)
        for sequence, length in grown:
            sequence.reserve(length)
        ids, places, rows = (np.concatenate(each) for each in (token_ids, positions, selected))
        return _Step(ids, places, rows, placed, self._store)

    def own(self, sequence: TokenSequence) -> ReferenceSequence:
        if not isinstance(sequence, ReferenceSequence) or sequence.pool is not self.pool:
            raise InputError("the sequence is not one of this runtime's")
        return sequence

    def code_hashes(self) -> dict[str, str]:
        """See `Identified`: of this package's source, for nothing is compiled."""
        folder = Path(__file__).parent
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.py"))}

    def close(self) -> None:
        self._closed = True
        self._plan = []  # lets go of the weights, which are views of the arena
        self.model.resident.close()


def kv_type_of(settings: RuntimeSettings) -> str:
    """The type of the KV cache; float32 where nothing else is asked for."""
    return "f32" if settings.kv_type == "auto" else settings.kv_type


def _checked_ids(token_ids: Sequence[int], vocab_size: int) -> NDArray[np.int64]:
    ids = np.asarray(token_ids)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise InputError(f"token ids are whole numbers, found {token_ids!r:.80}")
    wrong = ids[(ids < 0) | (ids >= vocab_size)]
    if len(wrong):
        raise InputError(f"token id {wrong[0]} is outside the vocabulary of {vocab_size}")
    return ids.astype(np.int64)


def _bind_weights(model: BoundModel) -> list[_Weight]:
    view = model.resident.arena.host_view()
    assert view is not None, "the reference executor's arena is host memory"
    weights = []
    for planned in model.plan.weights:
        expanded = None
        if planned.layout.name == "f32":
            data = view[planned.offset : planned.offset + planned.nbytes]
            expanded = data.view(np.float32).reshape(planned.rows, planned.columns)
        weights.append(_Weight(planned, expanded))
    return weights


def _lower(operator: op.Operator, weights: list[_Weight], context: int) -> Run:  # noqa: C901 (one case an operator)
    """The function that runs an operator, its constants and weights bound."""
    match operator:
        case op.Embed():
            return lambda step, _: (weights[0].rows(step.token_ids),)
        case op.EmbedPositions():
            return lambda step, _: (weights[0].rows(step.positions),)
        case op.Norm(type=kind, eps=eps, groups=groups):
            scale = weights[0].vector()
            bias = weights[1].vector() if len(weights) > 1 else None
            return lambda _, x: (ops.normalize(x[0], kind, eps, groups, scale, bias),)
        case op.Linear():
            return lambda _, x: (weights[0].apply(x[0]),)
        case op.AddBias():
            offset = weights[0].vector()
            return lambda _, x: (x[0] + offset,)
        case op.Rope():
            return _rope(operator, weights, context)
        case op.KvWrite():
            return _kv_write(operator)
        case op.Attention():
            return _attention(operator)
        case op.Add():
            return lambda _, x: (x[0] + x[1],)
        case op.Act(activation=activation):
            return lambda _, x: (ops.activate(x[0], activation),)
        case op.GatedAct(activation=activation):
            return lambda _, x: (ops.activate(x[0], activation) * x[1],)
        case op.Scale(factor=factor):
            return lambda _, x: (x[0] * np.float32(factor),)
        case op.PositionScale(strength=strength, period=period):
            return lambda step, x: (x[0] * ops.position_scale(step.positions, strength, period)[:, None],)
        case op.Softcap(cap=cap):
            return lambda _, x: (ops.softcap(x[0], cap),)
        case op.SelectRows():
            return lambda step, x: (x[0][step.selected],)
    raise ExecutionError(f"{operator.name}: the reference executor has no {operator.kind!r}")


def _rope(rope: op.Rope, weights: list[_Weight], context: int) -> Run:
    chosen = rope.factors_for(context)
    factors = None if chosen is None else weights[rope.weights.index(chosen)].vector()
    frequencies, magnitude = rope_frequencies(rope, factors)
    key = (rope.dims, rope.base, rope.scaling, rope.factors)

    def run(step: _Step, x: list[Array]) -> tuple[Array, ...]:
        turns = step.turns.get(key)
        if turns is None:
            # angles in float64: a position of 100,000 leaves float32 only three digits after the point
            angles = step.positions[:, None] * frequencies
            cos, sin = (np.cos(angles) * magnitude).astype(np.float32), (np.sin(angles) * magnitude).astype(np.float32)
            turns = step.turns[key] = cos, sin
        return (ops.rotate(x[0], *turns, rope.head_dim, rope.style),)

    return run


def _kv_write(write: op.KvWrite) -> Run:
    assert write.layer is not None
    layer = write.layer

    def run(step: _Step, x: list[Array]) -> tuple[Array, ...]:
        for sequence, first, last in step.parts:
            step.store.write(layer, sequence, x[0][first:last], x[1][first:last])
        return ()

    return run


def _attention(attention: op.Attention) -> Run:
    assert attention.layer is not None
    layer = attention.layer

    def run(step: _Step, x: list[Array]) -> tuple[Array, ...]:
        outs = []
        for sequence, first, last in step.parts:
            keys, values = step.store.read(layer, sequence, last - first)
            q = x[0][first:last].reshape(last - first, attention.num_heads, attention.head_dim)
            outs.append(
                ops.attend(
                    q,
                    keys,
                    values,
                    start=sequence.length,
                    scale=attention.scale,
                    cap=attention.softcap,
                    window=attention.window,
                )
            )
        return (outs[0] if len(outs) == 1 else np.concatenate(outs),)

    return run
