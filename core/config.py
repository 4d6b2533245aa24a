"""What a run is made of: the config file's tables as frozen data.

Each class is one table, each attribute one key; the docstrings are what ``mortice config schema`` prints. Where a value
came from (default, file, environment, flag) is the matter of `mortice.core.config_layers`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from attrs import Attribute, converters, field, frozen

from mortice.core.errors import ConfigError
from mortice.core.text.params import GenerationParams, SamplingParams
from mortice.core.text.template_variables import check_variables

__all__ = [
    "ExecutorConfig",
    "GenerationParams",
    "KernelsConfig",
    "LimitsConfig",
    "ModelConfig",
    "PluginsConfig",
    "PromptConfig",
    "RunConfig",
    "SamplingParams",
    "UploadConfig",
]


def _at_least(low: int) -> Callable[[Any, Attribute[int], int], None]:
    def check(_: Any, attribute: Attribute[int], value: int) -> None:
        if value < low:
            raise ConfigError(f"{attribute.name}: found {value}, wanted at least {low}")

    return check


def _variables(_: Any, attribute: Attribute[dict[str, Any]], value: dict[str, Any]) -> None:
    try:
        check_variables(value)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{attribute.name}: {error}") from None


@frozen(kw_only=True)
class ModelConfig:
    """Which model.

    Attributes:
        path: the model file or folder; relative to the config file it stands in.
        contract: a contract in TOML to use instead of the registered one; relative to the config file.
        quantize: the type that matrices of F32, F16 and BF16 are quantised to while they are uploaded (``Q8_0``,
            ``Q4_0``, or a plugin's); ``none`` leaves them as they are.

    """

    path: Path | None = field(default=None, converter=converters.optional(Path))
    contract: Path | None = field(default=None, converter=converters.optional(Path))
    quantize: str = "none"


@frozen(kw_only=True)
class PromptConfig:
    """What is asked.

    Attributes:
        text: the prompt.
        system: a system message, for chat.
        chat: whether the prompt goes through the model's own chat template.
        chat_variables: more that the chat template may ask for, by name, such as ``enable_thinking = false``; what it
            does not ask for changes nothing and is warned of.

    """

    text: str | None = None
    system: str | None = None
    chat: bool = False
    chat_variables: dict[str, Any] = field(factory=dict, validator=_variables)


@frozen(kw_only=True)
class PluginsConfig:
    """Which plugins take part.

    Attributes:
        allow: if not empty, only these installed plugins; one that is missing or broken is an error.
        block: never these.
        strict: fail on any broken plugin instead of skipping it.
        prefer: decides which of two plugins gives a key: ``"qtype:Q4_K" = "plugin"``; kinds are contract, qtype,
            upload, executor, loader (its key is a suffix: ``loader:gguf``) and ``kernel:OPERATOR:QTYPE``.

    """

    allow: tuple[str, ...] = ()
    block: tuple[str, ...] = ()
    strict: bool = False
    prefer: dict[str, str] = field(factory=dict)


@frozen(kw_only=True)
class ExecutorConfig:
    """Where and how the program runs.

    Attributes:
        name: an executor's name, or ``auto``: CUDA where a usable GPU is, else the reference.
        context: tokens a sequence may hold; 0 takes the model's own context, at most 4096.
        kv: the type of the KV cache; ``auto`` is the executor's own choice. ``q8_0`` takes 34 bytes for 32 elements
            and wants heads of a multiple of 32 elements.
        activations: what products with quantised weights take: ``int8`` (fast, rounded; half precision where a GPU
            multiplies several rows) or ``f32``, in which a GPU then attends, too; ``auto`` is the executor's own
            choice.
        kv_tokens: tokens that all sequences together may hold in the KV cache, counted in pages of 64, a prefix that
            several share once; 0 is as many as one sequence that fills the context.
        prefix_cache: whether a prompt that begins like one before takes over its pages of the KV cache, as far as they
            are still there. Where products of few and of many rows are rounded differently, logits differ by that.
        step_tokens: the most tokens fed at once; longer prompts are fed in several steps.
        tuning: whether the executor times ways to compute on the device and takes the fastest: ``auto`` does so at the
            first start with a model's shapes and keeps the result on disk; ``cached`` takes what was kept and measures
            nothing; ``off`` takes built-in figures. Other choices change rounding.

    """

    name: str = "auto"
    context: int = field(default=0, validator=_at_least(0))
    kv: Literal["auto", "f32", "f16", "q8_0"] = "auto"
    activations: Literal["auto", "f32", "int8"] = "auto"
    kv_tokens: int = field(default=0, validator=_at_least(0))
    prefix_cache: bool = True
    step_tokens: int = field(default=2048, validator=_at_least(1))
    tuning: Literal["auto", "cached", "off"] = "auto"


@frozen(kw_only=True)
class UploadConfig:
    """How weights become resident.

    Attributes:
        strategy: a strategy's name, or ``auto``: the executor's own choice.

    """

    strategy: str = "auto"


@frozen(kw_only=True)
class KernelsConfig:
    """How weights are kept.

    Attributes:
        layout: ``auto`` takes the fastest layouts that fit, ``compact`` the smallest; a name takes that one wherever a
            kernel has it.

    """

    layout: str = "auto"


@frozen(kw_only=True)
class LimitsConfig:
    """Bounds on what a run may take.

    Attributes:
        memory_mib: device memory that may be used, in MiB; 0 is all that is free.

    """

    memory_mib: int = field(default=0, validator=_at_least(0))


@frozen(kw_only=True)
class RunConfig:
    """Everything a run is made of, one table each."""

    model: ModelConfig = field(factory=ModelConfig)
    prompt: PromptConfig = field(factory=PromptConfig)
    plugins: PluginsConfig = field(factory=PluginsConfig)
    executor: ExecutorConfig = field(factory=ExecutorConfig)
    upload: UploadConfig = field(factory=UploadConfig)
    kernels: KernelsConfig = field(factory=KernelsConfig)
    sampling: SamplingParams = field(factory=SamplingParams)
    generation: GenerationParams = field(factory=GenerationParams)
    limits: LimitsConfig = field(factory=LimitsConfig)
