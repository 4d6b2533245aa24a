"""The flags. Those that stand for a config key take their help from the key's own docstring.

Attribute names of the classes below are dotted keys with the first dot written ``_``, so that a flag needs no table
of its own to find its key.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any

from attrs import evolve, fields, frozen
from cyclopts import Parameter

from mortice.core.cli.flag_pairs import PAIRS
from mortice.core.cli.render import Screen
from mortice.core.config_keys import config_keys
from mortice.core.errors import ConfigError

if TYPE_CHECKING:
    from mortice.core.config_layers import EffectiveConfig, Flag, Origin

__all__ = [
    "FLAGS",
    "CommonFlags",
    "ConfigFile",
    "ConfigFlags",
    "ConfigOrModel",
    "ContractFlag",
    "ConversationFlags",
    "ExecutorFlags",
    "FileFlags",
    "GenerationFlags",
    "ModelFlags",
    "ModelPath",
    "OutputFlags",
    "PluginFlags",
    "PromptFlags",
    "TalkFlags",
    "config_or_model",
    "counts",
    "settings",
    "source_of",
]


def _path(_: Any, tokens: Sequence[Any]) -> Path:
    text: str = tokens[0].value
    if not text:  # Path would make it the working directory
        raise ValueError("found '', wanted a path")
    return Path(text)


def counts(_: Any, tokens: Sequence[Any]) -> tuple[int, ...]:
    """Numbers separated by commas, of one flag or of several: a converter of a parameter."""
    return tuple(_count(part) for token in tokens for part in token.value.split(","))


def _count(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"found {text!r:.40}, wanted integers separated by commas") from None


ConfigFile = Annotated[
    Path | None, Parameter(help="A config file in TOML; flags override its keys.", converter=_path, n_tokens=1)
]
ConfigOrModel = Annotated[
    Path | None,
    Parameter(
        name="CONFIG|MODEL",
        help="A config file in TOML, whose keys flags override; or a model, as if given by --model.",
        converter=_path,
        n_tokens=1,
    ),
]
ModelPath = Annotated[Path, Parameter(help="A model file or folder.", converter=_path, n_tokens=1)]

FLAGS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "model.path": ("--model", "-m"),
        "model.contract": ("--contract",),
        "model.quantize": ("--quantize",),
        "prompt.text": ("--prompt", "-p"),
        "prompt.system": ("--system",),
        "prompt.chat": ("--chat",),
        "prompt.chat_variables": ("--chat-variable",),
        "plugins.allow": ("--allow-plugin",),
        "plugins.block": ("--block-plugin",),
        "plugins.strict": ("--strict-plugins",),
        "plugins.prefer": ("--prefer",),
        "executor.name": ("--executor",),
        "executor.context": ("--context", "-c"),
        "executor.kv": ("--kv",),
        "executor.activations": ("--activations",),
        "executor.kv_tokens": ("--kv-tokens",),
        "executor.prefix_cache": ("--prefix-cache",),
        "executor.step_tokens": ("--step-tokens",),
        "executor.tuning": ("--tuning",),
        "upload.strategy": ("--upload",),
        "kernels.layout": ("--layout",),
        "sampling.temperature": ("--temperature", "-t"),
        "sampling.top_k": ("--top-k",),
        "sampling.top_p": ("--top-p",),
        "sampling.min_p": ("--min-p",),
        "sampling.repetition_penalty": ("--repetition-penalty",),
        "sampling.presence_penalty": ("--presence-penalty",),
        "sampling.frequency_penalty": ("--frequency-penalty",),
        "sampling.penalty_window": ("--penalty-window",),
        "sampling.logit_bias": ("--logit-bias",),
        "sampling.seed": ("--seed", "-s"),
        "generation.max_tokens": ("--max-tokens", "-n"),
        "generation.stop": ("--stop",),
        "generation.stop_at_eos": ("--stop-at-eos",),
        "generation.logprobs": ("--logprobs",),
        "limits.memory_mib": ("--memory-mib",),
    }
)
"""Every config key has a flag; the first name is the one in messages."""

_ORIGINS: ContextVar[Mapping[str, Origin]] = ContextVar("origins", default=MappingProxyType({}))
_LOOK = 4096
_MODEL_SUFFIXES = (".gguf", ".safetensors")
_MORE = {
    "executor.name": " Built in are cuda and reference; mortice plugins list names all that are installed.",
    "upload.strategy": " Built in are pinned, mapped, pageable and measured for cuda, host for the reference; mortice "
    "plugins list names all that are installed.",
    "kernels.layout": " Built in are tiles and vector-f32 of cuda, f32 and file of the reference.",
    "prompt.text": " - reads it from standard input, without the line end it may close with.",
    "prompt.chat_variables": " Written NAME=VALUE, where VALUE is JSON or else a text; may be given several times.",
    "plugins.allow": " May be given several times.",
    "plugins.block": " May be given several times.",
    "plugins.prefer": " Written KIND:KEY=PLUGIN; may be given several times.",
    "sampling.logit_bias": " Written ID=BIAS; may be given several times.",
    "generation.stop": " May be given several times.",
}
"""What differs on the command line."""


def _flag(key: str) -> Parameter:
    known = config_keys()[key]

    def convert(_: Any, tokens: Sequence[Any]) -> Any:
        return known.parse(tokens[0].value)

    doc = known.doc
    if not doc.startswith("`"):
        doc = doc[:1].upper() + doc[1:]
    choices = f" One of {', '.join(known.choices)}." if known.choices else ""
    return Parameter(
        name=FLAGS[key],
        help=doc.replace("`", "") + choices + _MORE.get(key, ""),
        converter=convert if known.kind in (int, float) else _path if known.kind is Path else None,
        negative=None if known.kind is bool else (),
        allow_leading_hyphen=known.kind is not bool,
        show_default=False,
    )


def _switch(help_text: str, *names: str) -> Parameter:
    return Parameter(name=names, help=help_text, negative=(), show_default=False)


@Parameter(name="*", group="Output")
@frozen(kw_only=True)
class TalkFlags:
    """How a command speaks to a person."""

    quiet: Annotated[bool, _switch("No notes on standard error, only warnings.", "--quiet", "-q")] = False
    debug: Annotated[bool, _switch("Show the traceback of an error.", "--debug")] = False


@Parameter(name="*", group="Output")
@frozen(kw_only=True)
class OutputFlags(TalkFlags):
    """How a command speaks."""

    json: Annotated[bool, _switch("Print JSON on standard output and nothing else.", "--json")] = False


@Parameter(name="*", group="Config")
@frozen(kw_only=True)
class ConfigFlags:
    """Any key."""

    set_: Annotated[
        tuple[str, ...],
        Parameter(
            name="--set",
            negative=(),
            allow_leading_hyphen=True,
            show_default=False,
            help="Set any config key: TABLE.KEY=VALUE. May be given several times.",
        ),
    ] = ()


@Parameter(name="*", group="Plugins")
@frozen(kw_only=True)
class PluginFlags:
    """Which plugins take part."""

    plugins_allow: Annotated[tuple[str, ...], _flag("plugins.allow")] = ()
    plugins_block: Annotated[tuple[str, ...], _flag("plugins.block")] = ()
    plugins_strict: Annotated[bool | None, _flag("plugins.strict")] = None
    plugins_prefer: Annotated[tuple[str, ...], _flag("plugins.prefer")] = ()


@Parameter(name="*")
@frozen(kw_only=True)
class CommonFlags:
    """What nearly every command takes: a config and keys of it, which plugins take part, how it speaks."""

    config: ConfigFile = None
    plugins: PluginFlags = PluginFlags()
    any_key: ConfigFlags = ConfigFlags()
    output: OutputFlags = OutputFlags()

    def settings(self, *groups: object | None) -> EffectiveConfig:
        """`settings` with the flags of `groups` besides."""
        return settings(self.config, *groups, self.plugins, self.any_key)

    def screen(self) -> Screen:
        """Where the command prints."""
        return Screen(json=self.output.json, quiet=self.output.quiet)


@Parameter(name="*", group="Model")
@frozen(kw_only=True)
class ContractFlag:
    """What a file is held against."""

    model_contract: Annotated[Path | None, _flag("model.contract")] = None


@Parameter(name="*", group="Model")
@frozen(kw_only=True)
class FileFlags(ContractFlag):
    """How a file is taken."""

    model_quantize: Annotated[str | None, _flag("model.quantize")] = None


@Parameter(name="*", group="Model")
@frozen(kw_only=True)
class ModelFlags(FileFlags):
    """Which model."""

    model_path: Annotated[Path | None, _flag("model.path")] = None


@Parameter(name="*", group="Executor")
@frozen(kw_only=True)
class ExecutorFlags:
    """Where and how it runs."""

    executor_name: Annotated[str | None, _flag("executor.name")] = None
    executor_context: Annotated[int | None, _flag("executor.context")] = None
    executor_kv: Annotated[str | None, _flag("executor.kv")] = None
    executor_activations: Annotated[str | None, _flag("executor.activations")] = None
    executor_kv_tokens: Annotated[int | None, _flag("executor.kv_tokens")] = None
    executor_prefix_cache: Annotated[bool | None, _flag("executor.prefix_cache")] = None
    executor_step_tokens: Annotated[int | None, _flag("executor.step_tokens")] = None
    executor_tuning: Annotated[str | None, _flag("executor.tuning")] = None
    upload_strategy: Annotated[str | None, _flag("upload.strategy")] = None
    kernels_layout: Annotated[str | None, _flag("kernels.layout")] = None
    limits_memory_mib: Annotated[int | None, _flag("limits.memory_mib")] = None


@Parameter(name="*", group="Prompt")
@frozen(kw_only=True)
class ConversationFlags:
    """How a model shall behave."""

    prompt_system: Annotated[str | None, _flag("prompt.system")] = None
    prompt_chat_variables: Annotated[tuple[str, ...], _flag("prompt.chat_variables")] = ()


@Parameter(name="*", group="Prompt")
@frozen(kw_only=True)
class PromptFlags(ConversationFlags):
    """What is asked."""

    prompt_text: Annotated[str | None, _flag("prompt.text")] = None
    prompt_chat: Annotated[bool | None, _flag("prompt.chat")] = None


@Parameter(name="*", group="Generation")
@frozen(kw_only=True)
class GenerationFlags:
    """How tokens are chosen, and when to end."""

    sampling_temperature: Annotated[float | None, _flag("sampling.temperature")] = None
    sampling_top_k: Annotated[int | None, _flag("sampling.top_k")] = None
    sampling_top_p: Annotated[float | None, _flag("sampling.top_p")] = None
    sampling_min_p: Annotated[float | None, _flag("sampling.min_p")] = None
    sampling_repetition_penalty: Annotated[float | None, _flag("sampling.repetition_penalty")] = None
    sampling_presence_penalty: Annotated[float | None, _flag("sampling.presence_penalty")] = None
    sampling_frequency_penalty: Annotated[float | None, _flag("sampling.frequency_penalty")] = None
    sampling_penalty_window: Annotated[int | None, _flag("sampling.penalty_window")] = None
    sampling_logit_bias: Annotated[tuple[str, ...], _flag("sampling.logit_bias")] = ()
    sampling_seed: Annotated[int | None, _flag("sampling.seed")] = None
    generation_max_tokens: Annotated[int | None, _flag("generation.max_tokens")] = None
    generation_stop: Annotated[tuple[str, ...], _flag("generation.stop")] = ()
    generation_stop_at_eos: Annotated[bool | None, _flag("generation.stop_at_eos")] = None
    generation_logprobs: Annotated[int | None, _flag("generation.logprobs")] = None


def config_or_model(file: Path | None, model: ModelFlags | None) -> tuple[Path | None, ModelFlags | None]:
    """Sort out a positional argument that may be either: the config, and the flags with the model it turned out to be.

    Raises:
        ConfigError: when it is a model, and ``--model`` gives another.

    """
    if file is None or not _is_model(file):
        return file, model
    model = model or ModelFlags()
    if model.model_path is not None:
        raise ConfigError(f"{file}: is a model, and so is --model {model.model_path}; wanted one")
    return None, evolve(model, model_path=file)


def _is_model(path: Path) -> bool:
    """Whether `path` is a model: by its name where that says so, else a folder, or a file that is no TOML.

    No TOML is what has a null byte near its start.
    """
    if path.suffix.lower() in _MODEL_SUFFIXES:
        return True  # however broken or empty: whoever reads such a name expects to hear of a model
    try:
        if path.is_dir():
            return True
        if not path.is_file():  # a FIFO or a device would be waited for
            return False
        with path.open("rb") as stream:
            return b"\0" in stream.read(_LOOK)
    except (OSError, ValueError):
        return False


def settings(
    config: Path | None, *groups: object | None, environment: Mapping[str, str] | None = None
) -> EffectiveConfig:
    """The effective config: file, environment (the process's own by default) and the flags of `groups`.

    Raises:
        ConfigError: listing every mistake.

    """
    from mortice.core.config_layers import resolve_config

    flags = [flag for group in groups if group is not None for flag in _flags_of(group)]
    effective = resolve_config(config, os.environ if environment is None else environment, flags)
    _ORIGINS.set(effective.origins)
    return effective


def source_of(message: str) -> str:
    """Where the key that `message` begins with got its value: `` (from environment MORTICE_EXECUTOR_NAME)``.

    Some values can be judged only once the plugins or the model are there, and by those who do not know the layers.
    """
    origin = _ORIGINS.get().get(message.partition(":")[0])
    return "" if origin is None or origin.layer == "default" else f" (from {origin})"


def _flags_of(group: object) -> Iterator[Flag]:
    from mortice.core.config_layers import Flag

    for attribute in fields(type(group)):  # type: ignore[arg-type]
        value = getattr(group, attribute.name)
        if attribute.name == "set_":
            for text in value:
                key, equals, rest = text.partition("=")
                if not equals:
                    raise ConfigError(f"--set: found {text!r}, wanted TABLE.KEY=VALUE")
                yield Flag(key.strip(), rest, f"--set {key.strip()}")
        elif value not in (None, ()):
            key = attribute.name.replace("_", ".", 1)
            yield Flag(key, PAIRS[key](value) if key in PAIRS else value, FLAGS[key][0])
