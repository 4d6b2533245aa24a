"""The stages of the flow, one function each; `mortice.core.pipeline.prepare` joins them."""

from __future__ import annotations

import time
from os import PathLike
from pathlib import Path

from attrs import evolve, frozen

from mortice.arch_contracts.schema import Contract, ContractFormatError, parse_contract
from mortice.core.config import RunConfig
from mortice.core.errors import ConfigError, ContractError, DeviceError, InputError, UnsupportedError
from mortice.core.model.program import Program
from mortice.core.model.quantize_at_load import FLOATS, quantized
from mortice.core.model.template_check import template_findings
from mortice.core.model.types import DeviceInfo, ModelFile
from mortice.core.model.validation import ValidatedModel, ValidationReport, validate
from mortice.core.model.weight_plan import FitReport, WeightPlan, fit_report, plan_weights
from mortice.core.plugin.events import ModelOpened, ModelValidated, WeightsPlanned
from mortice.core.plugin.interfaces import Executor, RuntimeSettings, UploadStrategy, Wakes
from mortice.core.plugin.manager import PluginPolicy
from mortice.core.plugin.registry import Registry, make_registry
from mortice.core.text_file import read_small_text

__all__ = [
    "Support",
    "choose_executor",
    "choose_upload",
    "open_file",
    "plan_and_fit",
    "quantize_opened",
    "read_contract",
    "registry_for",
    "runtime_settings",
    "supports",
    "try_open_file",
    "validate_file",
    "validate_opened",
]

_DEFAULT_CONTEXT = 4096


def registry_for(config: RunConfig, *, wake: bool = False) -> Registry:
    """The plugins of a run; `wake` as `wake_executor` does, but before plugins are asked for all else."""
    plugins = config.plugins
    policy = PluginPolicy(allow=plugins.allow, block=plugins.block, strict=plugins.strict)
    return make_registry(policy, prefer=plugins.prefer, waking=_first_executor(config.executor.name) if wake else "")


def open_file(registry: Registry, path: Path | None) -> ModelFile:
    """Open the model and tell observers."""
    if path is None:
        raise ConfigError("model.path: no model given; pass --model FILE or set it in the config")
    started = time.perf_counter()
    return _told(registry, registry.open_model(path), started)


def try_open_file(registry: Registry, path: Path) -> ModelFile | None:
    """Like `open_file`, but None for what no loader takes."""
    started = time.perf_counter()
    file = registry.try_open_model(path)
    return None if file is None else _told(registry, file, started)


def _told(registry: Registry, file: ModelFile, started: float) -> ModelFile:
    seconds = time.perf_counter() - started
    registry.emit(ModelOpened(path=file.path, loader=file.loader, tensors=len(file.tensors), seconds=seconds))
    return file


def quantize_opened(registry: Registry, file: ModelFile, name: str) -> ModelFile:
    """The file with its matrices quantised to the type `name`, or as it is for ``none``; it takes `file` over.

    Raises:
        ConfigError: for a type that nothing here can quantise to.

    """
    if name == "none":
        return file
    types = {key: provided.value for key, provided in registry.qtypes.items()}
    able = sorted(key for key, type_ in types.items() if type_.quantize is not None)
    quantize = types[name].quantize if name in able else None
    if quantize is None:
        raise ConfigError(f"model.quantize: unknown {name!r}; have none, {', '.join(able)}")
    dequantize = {key: type_.dequantize for key, type_ in types.items() if key in FLOATS}
    return quantized(file, types[name].qtype, quantize, dequantize)


def validate_opened(
    registry: Registry, file: ModelFile, contract_path: Path | None, *, check_template: bool = False
) -> ValidationReport:
    """Hold an opened file against its contract, plugins' findings included; a chat template's only when asked for."""
    contract = read_contract(contract_path) if contract_path is not None else registry.contract_for(file)
    extra = [*file.notes, *registry.findings(file, contract)]
    if check_template:  # starts a process; what is only run is spared that
        extra += template_findings(file)
    report = validate(file, contract, extra)
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
        return parse_contract(read_small_text(path, ContractError), str(path))
    except ContractFormatError as error:
        raise ContractError(str(error)) from None


def choose_executor(registry: Registry, name: str, *, advice: str = "") -> tuple[Executor, DeviceInfo, str]:
    """The executor, its device, and why it was chosen.

    Args:
        registry: the plugins.
        name: its name, or ``auto``.
        advice: what to do where the executor asked for has no device; by default what it says itself, which is how to
            run on the CPU. That helps no command for which the CPU is not enough.

    Raises:
        DeviceError: when the executor asked for has no device it can use.

    """
    if name != "auto":
        executor = registry.executor(name)
        try:
            return executor, executor.device(), "asked for"
        except DeviceError as error:
            if not advice:
                raise
            raise DeviceError(f"{_fact(error)}; {advice}") from error
    if "cuda" in registry.executors:
        executor = registry.executor("cuda")
        try:
            return executor, executor.device(), "auto: a usable GPU is there"
        except DeviceError as error:
            why = f"auto: {_fact(error)}"
    else:
        why = "auto: no CUDA executor is registered"
    executor = registry.executor("reference")
    return executor, executor.device(), why


def _fact(error: DeviceError) -> str:
    """What an error says without the advice it ends with."""
    return str(error).partition("; ")[0]


def wake_executor(registry: Registry, name: str) -> None:
    """Let the executor that `choose_executor` will try first bring its device up while the file is read."""
    first = _first_executor(name)
    if first == registry.woken or first not in registry.executors:
        return
    executor = registry.executor(first)
    if isinstance(executor, Wakes):
        with registry.naming(executor, "wake"):
            executor.wake()


def _first_executor(name: str) -> str:
    return "cuda" if name == "auto" else name


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
    if 0 < config.executor.kv_tokens < context:
        raise ConfigError(
            f"executor.kv_tokens: found {config.executor.kv_tokens}, wanted at least the {context} of executor.context"
        )
    return RuntimeSettings(
        context_length=context,
        kv_type=config.executor.kv,
        activations=config.executor.activations,
        step_tokens=config.executor.step_tokens,
        kv_tokens=config.executor.kv_tokens,
        prefix_cache=config.executor.prefix_cache,
        tuning=config.executor.tuning,
    )


@frozen
class Support:
    """Whether an executor can run a program; true when it can, with the reasons when it cannot."""

    reasons: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return not self.reasons

    def require(self, what: str) -> None:
        """Refuse with all reasons; `what` begins the message.

        Raises:
            UnsupportedError: when there are any.

        """
        if self.reasons:
            raise UnsupportedError(f"{what}: " + "; ".join(self.reasons))


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
            kv_tokens=settings.kv_tokens,
            kv_bytes=lambda tokens: executor.kv_bytes(program, evolve(settings, context_length=tokens, kv_tokens=0)),
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


def validate_file(
    path: str | Path, *, contract: str | Path | None = None, registry: Registry | None = None
) -> ValidationReport:
    """Hold a file against its contract, or the one given, and report everything found. No tensor is read."""
    if not isinstance(path, str | PathLike):
        raise InputError(f"path: found {path!r:.40}, wanted a model file or folder")
    registry = registry or make_registry()
    with open_file(registry, Path(path)) as file:
        return validate_opened(registry, file, None if contract is None else Path(contract), check_template=True)
