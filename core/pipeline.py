"""The whole flow, from a config to tokens. Read `prepare` first: it is the only place that sees every stage.

config -> registry -> file -> validated model -> program -> weight plan + fit -> resident weights -> bound model
       -> runtime -> text
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from attrs import define, evolve, field, fields_dict, frozen
from numpy.typing import NDArray

from mortice.arch_contracts.schema import Contract, ContractFormatError, parse_contract
from mortice.arch_contracts.structuring import unknown_key
from mortice.core.config import RunConfig
from mortice.core.errors import ConfigError, ContractError, DeviceError, InputError, UnsupportedError
from mortice.core.model.program import Program, build_program
from mortice.core.model.residency import ResidentWeights, bind
from mortice.core.model.types import DeviceInfo, ModelFile
from mortice.core.model.validation import ValidatedModel, ValidationReport, validate
from mortice.core.model.weight_plan import FitReport, WeightPlan, fit_report, plan_weights
from mortice.core.plugin.events import ModelOpened, ModelValidated, WeightsPlanned
from mortice.core.plugin.interfaces import (
    Executor,
    Runtime,
    RuntimeSettings,
    StepPart,
    TokenSequence,
    UploadStrategy,
)
from mortice.core.plugin.manager import PluginPolicy
from mortice.core.plugin.registry import Registry, make_registry
from mortice.core.text.generation import Piece, stream_pieces
from mortice.core.text.params import GenerationParams, SamplingParams
from mortice.core.text.sampling import Sampled, Sampler

if TYPE_CHECKING:  # the tokenizer library is imported when text is first needed
    from mortice.core.text.tokenizer import Tokenizer

__all__ = ["Pipeline", "Session", "Support", "load", "prepare", "prepare_opened", "validate_file"]

_DEFAULT_CONTEXT = 4096


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
    registry = registry or registry_for(config)
    return prepare_opened(config, registry, open_file(registry, config.model.path), require_fit=require_fit)


def prepare_opened(config: RunConfig, registry: Registry, file: ModelFile, *, require_fit: bool = True) -> Pipeline:
    """`prepare` for a model that is open, or was made in memory; `file` is closed with the pipeline, or on an error."""
    try:
        model = validate_opened(registry, file, config.model.contract).model()
        program = build_program(model)
        executor, device, why = choose_executor(registry, config.executor.name)
        settings = runtime_settings(config, program)
        support = supports(executor, program, settings)
        if not support:
            raise UnsupportedError(f"executor {executor.name} cannot run {file.path}: " + "; ".join(support.reasons))
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
    config = (
        model
        if isinstance(model, RunConfig)
        else evolve(RunConfig(), model=evolve(RunConfig().model, path=Path(model)))
    )
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


def validate_file(
    path: str | Path, *, contract: str | Path | None = None, registry: Registry | None = None
) -> ValidationReport:
    """Hold a file against its contract, or the one given, and report everything found. No tensor is read."""
    registry = registry or make_registry()
    with open_file(registry, Path(path)) as file:
        return validate_opened(registry, file, None if contract is None else Path(contract))


# the stages, one by one ------------------------------------------------------------------------------------------


def registry_for(config: RunConfig) -> Registry:
    """The plugins of a run."""
    plugins = config.plugins
    policy = PluginPolicy(allow=plugins.allow, block=plugins.block, strict=plugins.strict)
    return make_registry(policy, prefer=plugins.prefer)


def open_file(registry: Registry, path: Path | None) -> ModelFile:
    """Open the model and tell observers."""
    if path is None:
        raise ConfigError("model.path: no model given; pass --model FILE or set it in the config")
    started = time.perf_counter()
    file = registry.open_model(path)
    seconds = time.perf_counter() - started
    registry.emit(ModelOpened(path=file.path, loader=file.loader, tensors=len(file.tensors), seconds=seconds))
    return file


def validate_opened(registry: Registry, file: ModelFile, contract_path: Path | None) -> ValidationReport:
    """Hold an opened file against its contract, plugins' findings included."""
    contract = read_contract(contract_path) if contract_path is not None else registry.contract_for(file)
    report = validate(file, contract, registry.findings(file, contract))
    registry.emit(
        ModelValidated(
            path=file.path,
            contract=contract.name,
            errors=len(report.findings.errors),
            warnings=len(report.findings.warnings),
        )
    )
    return report


def read_contract(path: Path) -> Contract:
    """A contract from a TOML file; ContractError lists every mistake in it."""
    try:
        return parse_contract(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ContractError(f"{path}: cannot be read: {error}") from None
    except ContractFormatError as error:
        raise ContractError(str(error)) from None


def choose_executor(registry: Registry, name: str) -> tuple[Executor, DeviceInfo, str]:
    """The executor, its device, and why it was chosen."""
    if name != "auto":
        executor = registry.executor(name)
        return executor, executor.device(), "asked for"
    if "cuda" in registry.executors:
        executor = registry.executor("cuda")
        try:
            return executor, executor.device(), "auto: a usable GPU is there"
        except DeviceError as error:
            why = f"auto: no usable GPU ({error})"
    else:
        why = "auto: no CUDA executor is registered"
    executor = registry.executor("reference")
    return executor, executor.device(), why


def choose_upload(registry: Registry, executor: Executor, device: DeviceInfo, name: str) -> UploadStrategy:
    """The upload strategy, which has to serve the executor's kind of device."""
    strategy = registry.upload(executor.default_upload() if name == "auto" else name)
    if strategy.device_kind != device.kind:
        raise ConfigError(
            f"upload.strategy: {strategy.name!r} fills {strategy.device_kind} memory, "
            f"executor {executor.name} needs {device.kind}"
        )
    return strategy


def runtime_settings(config: RunConfig, program: Program) -> RuntimeSettings:
    """The runtime's settings; a context beyond the model's own is refused."""
    context = config.executor.context or min(program.context_length, _DEFAULT_CONTEXT)
    if context > program.context_length:
        raise ConfigError(f"executor.context: found {context}, the model was made for at most {program.context_length}")
    return RuntimeSettings(
        context_length=context,
        kv_type=config.executor.kv,
        activations=config.executor.activations,
        step_tokens=config.executor.step_tokens,
    )


@frozen
class Support:
    """Whether an executor can run a program; true when it can, with the reasons when it cannot."""

    reasons: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return not self.reasons


def supports(executor: Executor, program: Program, settings: RuntimeSettings) -> Support:
    """What the executor says to the program; weight types are the plan's matter."""
    return Support(tuple(executor.unsupported(program, settings)))


def plan_and_fit(
    registry: Registry,
    model: ValidatedModel,
    program: Program,
    executor: Executor,
    device: DeviceInfo,
    settings: RuntimeSettings,
    config: RunConfig,
) -> tuple[WeightPlan, FitReport]:
    """The plan with the layouts asked for; ``auto`` takes the smaller ones where the fastest do not fit."""
    kernels = registry.kernels(executor, device)
    limit = config.limits.memory_mib << 20 or None

    def attempt(layout: str) -> tuple[WeightPlan, FitReport]:
        plan = plan_weights(model, program, kernels, prefer=layout)
        fit = fit_report(
            plan,
            device,
            settings.context_length,
            kv_bytes=lambda context: executor.kv_bytes(program, evolve(settings, context_length=context)),
            workspace_bytes=lambda context: executor.workspace_bytes(program, evolve(settings, context_length=context)),
            available_bytes=limit,
        )
        return plan, fit

    layout = config.kernels.layout
    if layout not in ("auto", "compact"):
        names = sorted({kernel.layout.name for kernel in kernels})
        if layout not in names:
            raise ConfigError(f"kernels.layout: unknown {layout!r}; have auto, compact, {', '.join(names)}")
    plan, fit = attempt("fastest" if layout == "auto" else layout)
    if layout == "auto" and not fit.fits:
        plan, fit = attempt("compact")  # where not even this fits, it is this that says what context would
    registry.emit(WeightsPlanned(weights=len(plan.weights), arena_bytes=plan.arena_bytes))
    return plan, fit


# what the user holds ---------------------------------------------------------------------------------------------


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
    _lock: threading.RLock = field(factory=threading.RLock, init=False, repr=False)

    def preload(self) -> int:
        """Make all weights resident and open the runtime.

        Returns:
            Bytes written to the device; 0 when everything was resident already, and then nothing has moved.

        """
        with self._lock:
            if self._resident is None:
                self.fit.require()
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
        """The runtime, opened on first use."""
        with self._lock:
            if self._runtime is None:
                self.preload()
            assert self._runtime is not None
            return self._runtime

    @property
    def tokenizer(self) -> Tokenizer:
        """The file's own tokenizer, built on first use."""
        with self._lock:
            if self._tokenizer is None:
                from mortice.core.text.tokenizer import Tokenizer

                self._tokenizer = Tokenizer.from_metadata(self.model.file.metadata)
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

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """Token ids of a prompt."""
        return self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)

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
        """Free device memory and let go of the file; calling twice is fine."""
        with self._lock:
            if self._runtime is not None:
                self._runtime.close()
            elif self._resident is not None:
                self._resident.close()
            self._runtime = self._resident = None
            self.model.file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@define(eq=False)
class Session:
    """One sequence of a pipeline. A prompt that begins like what was fed before is not computed again."""

    pipeline: Pipeline
    sequence: TokenSequence
    fed: list[int] = field(factory=list, init=False)

    def feed(self, token_ids: Sequence[int], logits: str = "last") -> NDArray[np.float32]:
        """Feed tokens after those fed before; float32 logits of the last one, or of all, (rows, vocab_size)."""
        ids = list(token_ids)
        room = self.pipeline.settings.context_length - self.sequence.length
        if not ids:
            raise InputError("no tokens to feed")
        if len(ids) > room:
            raise InputError(
                f"{self.sequence.length} + {len(ids)} tokens do not fit the context of "
                f"{self.pipeline.settings.context_length}"
            )
        size = self.pipeline.settings.step_tokens
        rows = []
        for start in range(0, len(ids), size):
            chunk = ids[start : start + size]
            wanted = logits if logits == "all" or start + size >= len(ids) else "none"
            part = StepPart(sequence=self.sequence, token_ids=chunk, logits=wanted)  # type: ignore[arg-type]
            with self.pipeline._lock:  # noqa: SLF001 (a session is part of its pipeline)
                rows.append(self.pipeline.runtime.step([part]))
            self.fed += chunk
        return np.concatenate(rows) if len(rows) > 1 else rows[0]

    def rewind_to(self, token_ids: Sequence[int]) -> int:
        """Forget what differs from `token_ids`; returns how many of them are fed already, at least one left to feed."""
        shared = 0
        for ours, theirs in zip(self.fed, token_ids[:-1], strict=False):
            if ours != theirs:
                break
            shared += 1
        self.sequence.truncate(shared)
        del self.fed[shared:]
        return shared

    def generate(
        self, prompt_ids: Sequence[int], sampling: SamplingParams, generation: GenerationParams
    ) -> Iterator[Piece]:
        """Generate after a whole prompt, feeding only what was not fed before."""
        from mortice.core.text.detokenizer import IncrementalDetokenizer

        pipeline = self.pipeline
        sampler = Sampler(sampling, pipeline.tokenizer.vocab_size, top_logprobs=generation.logprobs)
        on_device = pipeline.runtime.device_chooser(self.sequence, sampling, generation)

        def choose(ids: Sequence[int], index: int) -> Sampled:
            new = list(ids)[self.rewind_to(ids) :] if index == 0 else list(ids)
            if on_device is None:
                sampler.accept(ids)
                return sampler.sample(self.feed(new)[-1], index)
            with pipeline._lock:  # noqa: SLF001 (a session is part of its pipeline)
                chosen = on_device(new, index)
            self.fed += new
            return chosen

        return stream_pieces(
            choose,
            prompt_ids,
            tokenizer=pipeline.tokenizer,
            detokenizer=IncrementalDetokenizer(pipeline.tokenizer),
            generation=generation,
            context_length=pipeline.settings.context_length,
        )

    def close(self) -> None:
        """Give the sequence's memory back."""
        self.sequence.close()
        self.fed.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _closing(session: Session, pieces: Iterator[Piece]) -> Iterator[Piece]:
    with session:
        yield from pieces
