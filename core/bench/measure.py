"""Measures a pipeline: prefill and decode at depths, the way to the first token, and where the time goes.

Works with any executor. What only an executor can measure it may offer as methods of its runtime (`MeasuresBandwidth`,
`CountsWaiting`, `Profiles`); without them the numbers are left out.
"""

from __future__ import annotations

import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, Protocol, cast, runtime_checkable

import numpy as np
from attrs import define, field
from numpy.typing import NDArray

from mortice.core.bench.results import BenchReport, BenchSettings, ProfileRow, SpeedRow, Startup, Subject
from mortice.core.bench.traffic import Traffic, decode_traffic
from mortice.core.errors import UnsupportedError
from mortice.core.pipeline import Pipeline
from mortice.core.plugin.events import Event, StepDone
from mortice.core.plugin.interfaces import Runtime, StepPart, TokenSequence
from mortice.core.text.generation import ChooseToken
from mortice.core.text.params import GenerationParams, SamplingParams
from mortice.core.text.sampling import Sampled, Sampler

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
        ConfigError: before anything is uploaded, when the context is too short.
        UnsupportedError: when a profile is asked for and the executor has none.
        MorticeError: what `open_pipeline` and the executor raise.

    """
    load_average = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    started = time.perf_counter()
    with open_pipeline() as pipeline:
        plan_seconds = time.perf_counter() - started
        settings.require_context(pipeline.settings.context_length)
        pipeline.fit.require()
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

    def __attrs_post_init__(self) -> None:
        pipeline = self.pipeline
        self.runtime = pipeline.runtime
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
        sequence = self.runtime.new_sequence()
        try:
            self._chooser(sequence)(prompt, 0)
            return time.perf_counter() - started
        finally:
            sequence.close()

    def measure_bandwidth(self) -> float | None:
        """The device's, where its executor can tell; the rows compare with it."""
        if isinstance(self.runtime, MeasuresBandwidth):
            self.read_bandwidth = self.runtime.measure_read_bandwidth()
            self.note("read bandwidth measured")
        return self.read_bandwidth

    def rows(self) -> Iterator[SpeedRow]:
        """Every test, each warmed up first."""
        for depth in self.settings.depths:
            sequence = self._filled(depth)
            try:
                for tokens in filter(None, self.settings.prompt_tokens):
                    yield self._prefill(sequence, tokens, depth)
                for tokens in filter(None, self.settings.generated_tokens):
                    yield self._decode(sequence, tokens, depth)
            finally:
                sequence.close()

    def _prefill(self, sequence: TokenSequence, tokens: int, depth: int) -> SpeedRow:
        seconds = []
        for number in range(self.settings.repeats + 1):
            prompt = self._tokens(tokens)
            started = time.perf_counter()
            self._feed(sequence, prompt, "last")
            elapsed = time.perf_counter() - started
            sequence.truncate(depth)
            if number:  # the first one warms up
                seconds.append(elapsed)
        self.note(f"prefill of {tokens} tokens at depth {depth} measured")
        return SpeedRow(test="prefill", tokens=tokens, depth=depth, seconds=tuple(seconds))

    def _decode(self, sequence: TokenSequence, tokens: int, depth: int) -> SpeedRow:
        self._decode_once(sequence, min(tokens, _WARM_UP_TOKENS))
        sequence.truncate(depth)
        seconds, host_seconds = [], []
        for _ in range(self.settings.repeats):
            elapsed, host = self._decode_once(sequence, tokens)
            sequence.truncate(depth)
            seconds.append(elapsed)
            if host is not None:
                host_seconds.append(host)
        self.note(f"decoding of {tokens} tokens at depth {depth} measured")
        return SpeedRow(
            test="decode",
            tokens=tokens,
            depth=depth,
            seconds=tuple(seconds),
            # the token that begins stands at the depth itself, so the first measured one sees one more and itself
            token_bytes=self._traffic.mean_bytes(depth + 2, tokens),
            read_bandwidth=self.read_bandwidth,
            host_seconds=tuple(host_seconds) if len(host_seconds) == len(seconds) else None,
        )

    def _decode_once(self, sequence: TokenSequence, tokens: int) -> tuple[float, float | None]:
        """Seconds for `tokens` tokens, and those of them the host was busy. One token before them is not measured.

        An executor may launch a step ahead of the one it waits for. It has done so when the watch starts and when it
        stops, so the number of steps between is right.
        """
        choose = self._chooser(sequence)
        last = choose(self._tokens(1), 0).id
        waited, steps = self._waited(), self._steps
        started = time.perf_counter()
        for index in range(tokens):
            last = choose((last,), index + 1).id
        elapsed = time.perf_counter() - started
        known = isinstance(self.runtime, CountsWaiting) or self._steps > steps
        return elapsed, elapsed - (self._waited() - waited) if known else None

    def _waited(self) -> float:
        """Seconds spent waiting so far; where the runtime does not count them, its steps are the device's work."""
        return self.runtime.waited_seconds if isinstance(self.runtime, CountsWaiting) else self._step_seconds

    def profile(self) -> Iterator[ProfileRow]:
        """A prompt, as far as it is fed in one step, and a decode step, at each depth."""
        longest = self.pipeline.settings.step_tokens
        prompts = sorted({min(tokens, longest) for tokens in self.settings.prompt_tokens if tokens})
        steps: list[tuple[Literal["prefill", "decode"], int]] = [("prefill", tokens) for tokens in prompts]
        if any(self.settings.generated_tokens):
            steps.append(("decode", 1))
        for depth in self.settings.depths:
            sequence = self._filled(depth)
            try:
                for test, tokens in steps:
                    yield from self._profile_step(sequence, test, tokens, depth)
            finally:
                sequence.close()

    def _profile_step(
        self, sequence: TokenSequence, test: Literal["prefill", "decode"], tokens: int, depth: int
    ) -> Iterator[ProfileRow]:
        runtime = cast(Profiles, self.runtime)
        launches: Counter[str] = Counter()
        seconds: defaultdict[str, float] = defaultdict(float)
        repeats = self.settings.repeats
        for number in range(repeats + 1):
            times = runtime.profile([StepPart(sequence=sequence, token_ids=self._tokens(tokens))])
            sequence.truncate(depth)
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
                label=label,
                launches=launches[label] // repeats,
                seconds=elapsed / repeats,
                share=elapsed / total if total else 0.0,
            )

    # feeding ----------------------------------------------------------------------------------------------------

    def _tokens(self, count: int) -> list[int]:
        ids: list[int] = self._rng.integers(0, self.pipeline.program.vocab_size, count).tolist()
        return ids

    def _filled(self, depth: int) -> TokenSequence:
        sequence = self.runtime.new_sequence()
        try:
            if depth:
                self._feed(sequence, self._tokens(depth), "none")
        except BaseException:
            sequence.close()
            raise
        return sequence

    def _feed(
        self, sequence: TokenSequence, ids: Sequence[int], logits: Literal["last", "none"]
    ) -> NDArray[np.float32]:
        size = self.pipeline.settings.step_tokens
        for start in range(0, len(ids) - size, size):
            self.runtime.step([StepPart(sequence=sequence, token_ids=ids[start : start + size], logits="none")])
        rest = ids[(len(ids) - 1) // size * size :]
        return self.runtime.step([StepPart(sequence=sequence, token_ids=rest, logits=logits)])

    def _chooser(self, sequence: TokenSequence) -> ChooseToken:
        """The greedy choice as `Session.generate` makes it: on the device where it can."""
        on_device = self.runtime.device_chooser(sequence, _GREEDY, _ENDLESS)
        if on_device is not None:
            return on_device
        sampler = Sampler(_GREEDY, self.pipeline.program.vocab_size)

        def choose(ids: Sequence[int], index: int) -> Sampled:
            sampler.accept(ids)
            return sampler.sample(self._feed(sequence, ids, "last")[-1], index)

        return choose
