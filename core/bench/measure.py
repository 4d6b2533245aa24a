"""Measures a pipeline: prefill and decode at depths, the way to the first token, and where the time goes.

Works with any executor. What only an executor can measure it may offer as methods of its runtime (`MeasuresBandwidth`,
`CountsWaiting`, `Profiles`); without them the numbers are left out.
"""

from __future__ import annotations

import os
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from typing import Literal, Protocol, cast, runtime_checkable

import numpy as np
from attrs import define, field
from numpy.typing import NDArray

from mortice.core.bench.results import BenchReport, BenchSettings, ProfileRow, SpeedRow, Startup, Subject
from mortice.core.bench.traffic import Traffic, decode_traffic
from mortice.core.counts import counted
from mortice.core.errors import ExecutionError, UnsupportedError
from mortice.core.pipeline import Pipeline
from mortice.core.plugin.events import Event, StepDone, WaysMeasured
from mortice.core.plugin.interfaces import Runtime, StepPart, TokenSequence, Tuned
from mortice.core.plugin.token_choice import ChoicePart, ChoosesTokens, TokenChoice
from mortice.core.text.params import GenerationParams, SamplingParams
from mortice.core.text.sampling import Sampler

__all__ = ["CountsWaiting", "MeasuresBandwidth", "Profiles", "bench"]

_WARM_UP_TOKENS = 8
_GREEDY = SamplingParams(temperature=0.0)
_ENDLESS = GenerationParams(stop_at_eos=False)


@runtime_checkable
class MeasuresBandwidth(Protocol):
    """A runtime that can tell how fast its device reads."""

    def measure_read_bandwidth(self) -> float:
        """Bytes a second, measured now with a buffer larger than any cache."""
        ...


@runtime_checkable
class CountsWaiting(Protocol):
    """A runtime that knows how long it waited."""

    waited_seconds: float
    """Only grows: seconds that the calling thread has waited for the device."""


@runtime_checkable
class Profiles(Protocol):
    """A runtime that can time what a step consists of."""

    def profile(self, parts: Sequence[StepPart]) -> Sequence[tuple[str, float]]:
        """Run a step like `Runtime.step`, timing each launch: (label, seconds), in order."""
        ...


def bench(open_pipeline: Callable[[], Pipeline], settings: BenchSettings, note: Callable[[str], None]) -> BenchReport:
    """Measure a model from opening it on.

    Args:
        open_pipeline: opens the model and plans it; the pipeline is closed here.
        settings: what to measure.
        note: told what is going on, one line each.

    Raises:
        ConfigError: before anything is uploaded, when the context or the KV cache is too small.
        UnsupportedError: when a profile is asked for and the executor has none.
        MorticeError: what `open_pipeline` and the executor raise.

    """
    load_average = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    started = time.perf_counter()
    with open_pipeline() as pipeline:
        plan_seconds = time.perf_counter() - started
        settings.require_room(pipeline.settings)
        pipeline.fit.require()
        pipeline.registry.observers.append(lambda event: note(str(event)) if isinstance(event, WaysMeasured) else None)
        preload_started = time.perf_counter()
        pipeline.preload()
        preload_seconds = time.perf_counter() - preload_started
        if settings.profile and not isinstance(pipeline.runtime, Profiles):
            raise UnsupportedError(f"profile: the executor {pipeline.executor.name} cannot time its operators")
        bencher = _Bencher(pipeline=pipeline, settings=settings, note=note)
        bencher.first_token()
        cold = time.perf_counter() - started
        note("start-up measured")
        startup = Startup(
            plan_seconds=plan_seconds,
            upload_seconds=pipeline.upload_seconds,
            upload_bytes=pipeline.plan.file_bytes,
            open_seconds=preload_seconds - pipeline.upload_seconds,
            prompt_tokens=settings.first_prompt,
            first_token_cold=cold,
            first_token_warm=tuple(bencher.first_token() for _ in range(settings.repeats)),
            made=any(planned.tensor.make is not None for planned in pipeline.plan.weights),
        )
        return BenchReport(
            subject=_subject(pipeline, load_average),
            settings=settings,
            startup=startup,
            read_bandwidth=bencher.measure_bandwidth(),
            rows=tuple(bencher.rows()),
            profile=tuple(bencher.profile()) if settings.profile else (),
        )


def _subject(pipeline: Pipeline, load_average: float | None) -> Subject:
    file, plan = pipeline.model.file, pipeline.plan
    return Subject(
        model=file.path.name,
        architecture=file.architecture,
        parameters=file.parameters,
        file_bytes=file.tensor_bytes,
        executor=pipeline.executor.name,
        device=pipeline.fit.device.name,
        layouts=dict(Counter(planned.layout.name for planned in plan.weights).most_common()),
        upload=pipeline.upload.name,
        kv_type=pipeline.settings.kv_type,
        context_length=pipeline.settings.context_length,
        load_average=load_average,
        cores=os.cpu_count() or 1,
        choices=pipeline.runtime.measured_choices() if isinstance(pipeline.runtime, Tuned) else {},
    )


@define(eq=False, kw_only=True)
class _Bencher:
    pipeline: Pipeline
    settings: BenchSettings
    note: Callable[[str], None]
    runtime: Runtime = field(init=False)
    read_bandwidth: float | None = field(default=None, init=False)
    _traffic: Traffic = field(init=False)
    _rng: np.random.Generator = field(init=False)
    _step_seconds: float = field(default=0.0, init=False)
    _steps: int = field(default=0, init=False)
    _counting: CountsWaiting | None = field(init=False)

    def __attrs_post_init__(self) -> None:
        pipeline = self.pipeline
        self.runtime = pipeline.runtime
        self._counting = self.runtime if isinstance(self.runtime, CountsWaiting) else None
        self._traffic = decode_traffic(pipeline.plan, pipeline.executor, pipeline.settings)
        self._rng = np.random.default_rng(self.settings.seed)
        pipeline.registry.observers.append(self._observe)

    def _observe(self, event: Event) -> None:
        if isinstance(event, StepDone):
            self._step_seconds += event.seconds
            self._steps += 1

    # what is measured -------------------------------------------------------------------------------------------

    def first_token(self) -> float:
        """Seconds from a prompt to its first token, in a sequence of its own."""
        prompt = self._tokens(self.settings.first_prompt)
        started = time.perf_counter()
        with closing(self.runtime.new_sequence()) as sequence:
            self._chooser([sequence])([prompt], 0)
            return time.perf_counter() - started

    def measure_bandwidth(self) -> float | None:
        """The device's, where its executor can tell; the rows compare with it."""
        if isinstance(self.runtime, MeasuresBandwidth):
            self.read_bandwidth = self.runtime.measure_read_bandwidth()
            self.note("read bandwidth measured")
        return self.read_bandwidth

    def rows(self) -> Iterator[SpeedRow]:
        """Every test, each warmed up first."""
        for depth in self.settings.depths:
            for count in self.settings.batch:
                with self._filled(depth, count) as sequences:
                    for tokens in filter(None, self.settings.prompt_tokens):
                        yield self._prefill(sequences, tokens, depth)
                    for tokens in filter(None, self.settings.generated_tokens):
                        yield self._decode(sequences, tokens, depth)

    def _prefill(self, sequences: Sequence[TokenSequence], tokens: int, depth: int) -> SpeedRow:
        seconds = []
        for number in range(self.settings.repeats + 1):
            prompts = [self._tokens(tokens) for _ in sequences]
            started = time.perf_counter()
            self._feed(sequences, prompts, "last")
            elapsed = time.perf_counter() - started
            _cut(sequences, depth)
            if number:  # the first one warms up
                seconds.append(elapsed)
        self.note(f"prefill of {counted(tokens, 'token')} at depth {depth} measured{_among(sequences)}")
        return SpeedRow(test="prefill", tokens=tokens, depth=depth, sequences=len(sequences), seconds=tuple(seconds))

    def _decode(self, sequences: Sequence[TokenSequence], tokens: int, depth: int) -> SpeedRow:
        self._decode_once(sequences, min(tokens, _WARM_UP_TOKENS))
        _cut(sequences, depth)
        seconds, host_seconds = [], []
        for _ in range(self.settings.repeats):
            elapsed, host = self._decode_once(sequences, tokens)
            _cut(sequences, depth)
            seconds.append(elapsed)
            if host is not None:
                host_seconds.append(host)
        self.note(f"decoding of {counted(tokens, 'token')} at depth {depth} measured{_among(sequences)}")
        return SpeedRow(
            test="decode",
            tokens=tokens,
            depth=depth,
            sequences=len(sequences),
            seconds=tuple(seconds),
            # the token that begins stands at the depth itself, so the first measured one sees one more and itself
            token_bytes=self._traffic.mean_bytes(depth + 2, tokens, len(sequences)),
            read_bandwidth=self.read_bandwidth,
            host_seconds=tuple(host_seconds) if len(host_seconds) == len(seconds) else None,
        )

    def _decode_once(self, sequences: Sequence[TokenSequence], tokens: int) -> tuple[float, float | None]:
        """Seconds for `tokens` steps, and those of them the host was busy. One step before them is not measured.

        An executor may launch a step ahead of the one it waits for. It has done so when the watch starts and when it
        stops, so the number of steps between is right.

        The host is taken to be as busy in every step as in the median one: now and then a core is taken away from it
        for longer than all of its work takes, which says nothing of that work.
        """
        choose = self._chooser(sequences)
        last = choose([self._tokens(1) for _ in sequences], 0)
        steps = self._steps
        busy = []
        now = started = time.perf_counter()
        waited = self._waited()
        for index in range(tokens):
            last = choose(last, index + 1)
            before, waited_before = now, waited
            now, waited = time.perf_counter(), self._waited()
            busy.append(now - before - (waited - waited_before))
        known = self._counting is not None or self._steps > steps
        return now - started, tokens * statistics.median(busy) if known else None

    def _waited(self) -> float:
        """Seconds spent waiting so far; where the runtime does not count them, its steps are the device's work."""
        return self._counting.waited_seconds if self._counting is not None else self._step_seconds

    def profile(self) -> Iterator[ProfileRow]:
        """A prompt and a decode step, as far as they are fed in one step, for each depth and number of sequences."""
        longest = self.pipeline.settings.step_tokens
        prompts = sorted({min(tokens, longest) for tokens in self.settings.prompt_tokens if tokens})
        steps: list[tuple[Literal["prefill", "decode"], int]] = [("prefill", tokens) for tokens in prompts]
        if any(self.settings.generated_tokens):
            steps.append(("decode", 1))
        for depth in self.settings.depths:
            for count in self.settings.batch:
                with self._filled(depth, count) as sequences:
                    for test, tokens in steps:
                        if count * tokens <= longest:
                            yield from self._profile_step(sequences, test, tokens, depth)

    def _profile_step(
        self, sequences: Sequence[TokenSequence], test: Literal["prefill", "decode"], tokens: int, depth: int
    ) -> Iterator[ProfileRow]:
        runtime = cast(Profiles, self.runtime)
        launches: Counter[str] = Counter()
        seconds: defaultdict[str, float] = defaultdict(float)
        repeats = self.settings.repeats
        for number in range(repeats + 1):
            times = runtime.profile([StepPart(sequence=one, token_ids=self._tokens(tokens)) for one in sequences])
            _cut(sequences, depth)
            if number:  # the first one warms up
                launches.update(label for label, _ in times)
                for label, elapsed in times:
                    seconds[label] += elapsed
        total = sum(seconds.values())
        for label, elapsed in sorted(seconds.items(), key=lambda item: -item[1]):
            yield ProfileRow(
                test=test,
                tokens=tokens,
                depth=depth,
                sequences=len(sequences),
                label=label,
                launches=launches[label] // repeats,
                seconds=elapsed / repeats,
                share=elapsed / total if total else 0.0,
            )

    # feeding ----------------------------------------------------------------------------------------------------

    def _tokens(self, count: int) -> list[int]:
        ids: list[int] = self._rng.integers(0, self.pipeline.program.vocab_size, count).tolist()
        return ids

    @contextmanager
    def _filled(self, depth: int, count: int) -> Iterator[list[TokenSequence]]:
        """So many sequences of random tokens."""
        with ExitStack() as stack:
            sequences = [stack.enter_context(closing(self.runtime.new_sequence())) for _ in range(count)]
            if depth:
                self._feed(sequences, [self._tokens(depth) for _ in sequences], "none")
            yield sequences

    def _feed(
        self, sequences: Sequence[TokenSequence], texts: Sequence[Sequence[int]], logits: Literal["last", "none"]
    ) -> NDArray[np.float32]:
        """Feed each sequence its tokens, with as many in a step as it takes; the logits of the last of each."""
        rows: list[NDArray[np.float32]] = []
        parts: list[StepPart] = []
        room = size = self.pipeline.settings.step_tokens
        for number, (sequence, ids) in enumerate(zip(sequences, texts, strict=True), 1):
            done = 0
            while done < len(ids):
                count = min(room, len(ids) - done)
                wanted = logits if done + count == len(ids) else "none"
                parts.append(StepPart(sequence=sequence, token_ids=ids[done : done + count], logits=wanted))
                done, room = done + count, room - count
                if not room or (number == len(sequences) and done == len(ids)):
                    rows.append(self.runtime.step(parts))
                    parts, room = [], size
        return np.concatenate(rows) if len(rows) > 1 else rows[0]

    def _chooser(self, sequences: Sequence[TokenSequence]) -> Callable[[Sequence[Sequence[int]], int], list[list[int]]]:
        """The greedy choice as `generate` and `generate_many` make it: on the device where it can.

        It is called with what to feed to each sequence, and gives what to feed next.
        """
        runtime = self.runtime
        if len(sequences) == 1:
            one = runtime.device_chooser(sequences[0], _GREEDY, _ENDLESS)
            if one is not None:
                return lambda texts, index: [[one(texts[0], index).id]]
        elif isinstance(runtime, ChoosesTokens):
            choices = [runtime.token_choice(sequence, _GREEDY, _ENDLESS) for sequence in sequences]
            if None not in choices:
                return partial(_choose_on_device, runtime, sequences, choices)
        sampler = Sampler(_GREEDY, self.pipeline.program.vocab_size)
        return lambda texts, index: [[sampler.sample(row, index).id] for row in self._feed(sequences, texts, "last")]


def _choose_on_device(
    runtime: ChoosesTokens,
    sequences: Sequence[TokenSequence],
    choices: Sequence[TokenChoice | None],
    texts: Sequence[Sequence[int]],
    index: int,
) -> list[list[int]]:
    parts = [
        ChoicePart(sequence=sequence, token_ids=ids, choice=choice, index=index)
        for sequence, ids, choice in zip(sequences, texts, choices, strict=True)
    ]
    chosen = []
    for made in runtime.choose_step(parts, ahead=True):
        if isinstance(made, ExecutionError):
            raise made
        assert made is not None, "each part has a choice"
        chosen.append([made.id])
    return chosen


def _cut(sequences: Sequence[TokenSequence], length: int) -> None:
    for sequence in sequences:
        sequence.truncate(length)


def _among(sequences: Sequence[TokenSequence]) -> str:
    return f", {len(sequences)} sequences" if len(sequences) > 1 else ""
