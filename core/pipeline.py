"""The whole flow, from a config to tokens. Read `prepare` first: it is the only place that sees every stage.

config -> registry -> file -> validated model -> program -> weight plan + fit -> resident weights -> bound model
       -> runtime -> text
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from attrs import define, evolve, field, fields_dict
from numpy.typing import NDArray

from mortice.arch_contracts.structuring import unknown_key
from mortice.core.batch import Request, Result, finished_results, stream_many
from mortice.core.config import RunConfig
from mortice.core.errors import ConfigError, DeviceError, InputError, UnsupportedError
from mortice.core.model.program import Program, build_program
from mortice.core.model.residency import ResidentWeights, bind
from mortice.core.model.types import ModelFile
from mortice.core.model.validation import ValidatedModel
from mortice.core.model.weight_plan import FitReport, WeightPlan, plan_weights
from mortice.core.plugin.interfaces import Executor, Prepares, Runtime, RuntimeSettings, UploadStrategy
from mortice.core.plugin.registry import Registry
from mortice.core.session import Session, token_ids_of
from mortice.core.stages import (
    Support,
    choose_executor,
    choose_upload,
    open_file,
    plan_and_fit,
    quantize_opened,
    registry_for,
    runtime_settings,
    supports,
    validate_opened,
    wake_executor,
)
from mortice.core.text.generation import Piece
from mortice.core.text.params import GenerationParams, SamplingParams

if TYPE_CHECKING:  # the tokenizer library is imported when text is first needed
    from mortice.core.text.tokenizer import Tokenizer

__all__ = ["Pipeline", "Prompt", "load", "prepare", "prepare_opened"]

Prompt = str | Sequence[int] | Mapping[str, Any]
"""Text, token ids, or a mapping of ``prompt`` (one of the two) and options of its own."""


def prepare(config: RunConfig, registry: Registry | None = None, *, require_fit: bool = True) -> Pipeline:
    """Everything up to the point where the device is touched: open, validate, build, plan, see whether it fits.

    Args:
        config: what to run, and how.
        registry: the plugins; by default those the config asks for.
        require_fit: refuse what does not fit now. Otherwise ``fit`` tells, and `Pipeline.preload` refuses.

    Raises:
        InputError: for whatever is wrong with config, file, contract or the memory needed.
        PluginError: when a plugin fails.
        DeviceError: when the executor asked for has no device it can use.

    """
    if not isinstance(config, RunConfig):
        raise InputError(f"config: found {config!r:.40}, wanted a RunConfig; mortice.load takes a file")
    registry = registry or registry_for(config, wake=True)
    wake_executor(registry, config.executor.name)
    return prepare_opened(config, registry, open_file(registry, config.model.path), require_fit=require_fit)


def prepare_opened(config: RunConfig, registry: Registry, file: ModelFile, *, require_fit: bool = True) -> Pipeline:
    """`prepare` for a model that is open, or was made in memory; `file` is closed with the pipeline, or on an error."""
    try:
        file = quantize_opened(registry, file, config.model.quantize)
        model = validate_opened(registry, file, config.model.contract).model()
        program = build_program(model)
        _check_parameters(config, program)
        executor, device, why = choose_executor(registry, config.executor.name)
        settings = runtime_settings(config, program)
        supports(executor, program, settings).require(f"executor {executor.name} cannot run {file.path}")
        plan, fit = plan_and_fit(registry, model, program, executor, device, settings, config)
        if require_fit:
            fit.require()
        upload = choose_upload(registry, executor, device, config.upload.strategy)
    except BaseException:
        file.close()
        raise
    return Pipeline(
        config=config,
        registry=registry,
        model=model,
        program=program,
        executor=executor,
        executor_reason=why,
        settings=settings,
        plan=plan,
        fit=fit,
        upload=upload,
    )


def _check_parameters(config: RunConfig, program: Program) -> None:
    """What only the vocabulary's size can tell to be wrong; said before anything is uploaded."""
    size = program.vocab_size
    beyond = [token for token in config.sampling.logit_bias if token >= size]
    if beyond:
        raise ConfigError(f"sampling.logit_bias: found token id {min(beyond)}, wanted one below {size}")
    if config.generation.logprobs > size:
        found = config.generation.logprobs
        raise ConfigError(f"generation.logprobs: found {found}, wanted 0 to {size}, the vocabulary's size")


def load(model: str | Path | RunConfig, *, executor: str | None = None, context: int | None = None) -> Pipeline:
    """A pipeline with its weights resident.

    Args:
        model: a model file, or a config.
        executor: overrides the config's; ``auto``, ``reference``, ``cuda`` or a plugin's.
        context: tokens a sequence may hold; overrides the config's.

    Raises:
        InputError: as `prepare` does.
        PluginError: as `prepare` does.
        DeviceError: as `prepare` does.

    """
    if isinstance(model, RunConfig):
        config = model
    elif isinstance(model, str | PathLike):
        config = evolve(RunConfig(), model=evolve(RunConfig().model, path=Path(model)))
    else:
        raise InputError(f"model: found {model!r:.40}, wanted a file, a folder or a RunConfig")
    if executor is not None:
        config = evolve(config, executor=evolve(config.executor, name=executor))
    if context is not None:
        config = evolve(config, executor=evolve(config.executor, context=context))
    pipeline = prepare(config)
    try:
        pipeline.preload()
    except BaseException:
        pipeline.close()
        raise
    return pipeline


@define(eq=False, kw_only=True)
class Pipeline:
    """A planned model and, after `preload`, a resident one. Close it, or use it as a context manager.

    Every method may be called from any thread; steps of one pipeline run one at a time.
    """

    config: RunConfig
    registry: Registry = field(repr=False)
    model: ValidatedModel
    program: Program
    executor: Executor
    executor_reason: str
    settings: RuntimeSettings
    plan: WeightPlan = field(repr=False)
    fit: FitReport
    upload: UploadStrategy
    upload_seconds: float = field(default=0.0, init=False)
    """What the upload alone took: no allocation before it, no kernels after it."""
    _resident: ResidentWeights | None = field(default=None, init=False, repr=False)
    _runtime: Runtime | None = field(default=None, init=False, repr=False)
    _tokenizer: Any = field(default=None, init=False, repr=False)
    _closed: bool = field(default=False, init=False, repr=False)
    lock: threading.RLock = field(factory=threading.RLock, init=False, repr=False)

    def preload(self) -> int:
        """Make all weights resident and open the runtime.

        Returns:
            Bytes written to the device; 0 when everything was resident already, and then nothing has moved.

        Raises:
            InputError: when the pipeline is closed.

        """
        with self.lock:
            if self._closed:
                raise InputError("the pipeline is closed; load the model again")
            if self._resident is None:
                self.fit.require()
                if isinstance(self.executor, Prepares):
                    with self.registry.naming(self.executor, "prepare"):
                        self.executor.prepare(self.plan, self.settings)
                self._resident = ResidentWeights(plan=self.plan, arena=self.executor.allocate(self.plan.arena_bytes))
            moved = 0
            if not self._resident.complete:
                started = time.perf_counter()
                try:
                    with self.registry.naming(self.upload, "upload"):
                        moved = self.upload.upload(self._resident, self.registry.emitter(self.upload))
                except BaseException:
                    self._resident.close()
                    self._resident = None
                    raise
                self.upload_seconds = time.perf_counter() - started
            if self._runtime is None:
                with self.registry.naming(self.executor, "open"):
                    self._runtime = self.executor.open(
                        bind(self._resident), self.settings, self.registry.emitter(self.executor)
                    )
            return moved

    @property
    def runtime(self) -> Runtime:
        """The runtime, opened on first use; refused when the pipeline is closed."""
        with self.lock:
            if self._runtime is None:
                self.preload()
            assert self._runtime is not None
            return self._runtime

    @property
    def tokenizer(self) -> Tokenizer:
        """The file's own tokenizer, built on first use; it refuses text that cannot fit the context."""
        with self.lock:
            if self._tokenizer is None:
                from mortice.core.text.tokenizer import Tokenizer

                self._tokenizer = Tokenizer.of(self.model.file, max_tokens=self.settings.context_length)
            tokenizer: Tokenizer = self._tokenizer
            return tokenizer

    def supports(self, executor: str | None = None) -> Support:
        """Whether an executor, this pipeline's by default, can run the model; the reasons when it cannot."""
        chosen = self.executor if executor is None else self.registry.executor(executor)
        try:
            support = supports(chosen, self.program, self.settings)
            plan_weights(self.model, self.program, self.registry.kernels(chosen, chosen.device()))
        except (UnsupportedError, DeviceError) as error:
            return Support(tuple(str(error).splitlines()))
        return support

    def logits(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """Logits after each of `token_ids`, a sequence of its own: float32, shape (tokens, vocab_size)."""
        with self.session() as session:
            return session.feed(token_ids, logits="all")

    def generate(self, prompt: str | Sequence[int], **options: Any) -> Iterator[Piece]:
        """Generate text after `prompt`, one piece a token.

        Args:
            prompt: text, tokenized with the model's special tokens, or token ids as they are.
            options: any key of the config's ``sampling`` and ``generation`` tables (temperature, seed, max_tokens …).

        """
        sampling, generation = self.parameters(options)
        session = self.session()
        try:
            pieces = session.generate(self.encode(prompt), sampling, generation)
        except BaseException:
            session.close()
            raise
        return _closing(session, pieces)

    def generate_many(self, prompts: Sequence[Prompt], **options: Any) -> Iterator[tuple[int, Piece]]:
        """Generate text after many prompts at once; a prompt's number and its next piece, as they are made.

        Closing the iterator frees all sequences.

        Args:
            prompts: each as for `generate`, or a mapping of ``prompt`` and its own options.
            options: for all prompts, as for `generate`; a prompt's own come before them.

        Raises:
            InputError: before any work, naming the prompt: one that is refused.
            ExecutionError: when all others are finished: naming each prompt that failed, and why.

        """
        return stream_many(self, self._requests(prompts, options))

    def complete_many(self, prompts: Sequence[Prompt], **options: Any) -> list[Result]:
        """`generate_many` as a list, in the order of the prompts; the error of one that failed is in its result."""
        results = finished_results(self, self._requests(prompts, options))
        return sorted(results, key=lambda result: result.index)

    def request(self, prompt: str | Sequence[int], options: Mapping[str, Any]) -> Request:
        """A prompt with its options, checked: what `mortice.core.batch` takes many of."""
        sampling, generation = self.parameters(dict(options))
        request = Request(prompt_ids=self.encode(prompt), sampling=sampling, generation=generation)
        request.check(self)
        return request

    def _requests(self, prompts: Sequence[Prompt], options: dict[str, Any]) -> list[Request]:
        # a string would be taken for a prompt in each character, a mapping for one in each key
        if isinstance(prompts, str | bytes | Mapping) or not isinstance(prompts, Iterable):
            raise InputError(f"prompts: found {prompts!r:.40}, wanted a list of them")
        requests = []
        for index, given in enumerate(prompts):
            own = dict(given) if isinstance(given, Mapping) else {"prompt": given}
            try:
                requests.append(self.request(own.pop("prompt", ()), {**options, **own}))
            except InputError as error:
                raise InputError(f"prompt {index}: {error}") from error
        return requests

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """Token ids of a prompt."""
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        return token_ids_of(prompt, "text or token ids")

    def parameters(self, options: dict[str, Any]) -> tuple[SamplingParams, GenerationParams]:
        """The config's parameters with `options` laid over them."""
        sampling, generation = fields_dict(SamplingParams), fields_dict(GenerationParams)
        for name in options:
            if name not in sampling and name not in generation:
                raise ConfigError(f"generate: {unknown_key(name, [*sampling, *generation])}")
        return (
            evolve(self.config.sampling, **{name: value for name, value in options.items() if name in sampling}),
            evolve(
                self.config.generation,
                **{name: value for name, value in options.items() if name in generation},
            ),
        )

    def session(self) -> Session:
        """An empty sequence to feed and generate with; close it when done."""
        return Session(self, self.runtime.new_sequence())

    def close(self) -> None:
        """Free device memory and let go of the file, for good; calling twice is fine.

        What was found out stays to be read (`model`, `plan`, `fit` …); whatever needs weights is refused from now on.
        """
        with self.lock:
            self._closed = True
            if self._runtime is not None:
                self._runtime.close()
            elif self._resident is not None:
                self._resident.close()
            self._runtime = self._resident = None
            self.plan = self.plan.without_bytes()
            self.model.file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _closing(session: Session, pieces: Iterator[Piece]) -> Iterator[Piece]:
    with session:
        yield from pieces
