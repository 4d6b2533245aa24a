"""``mortice config``: write a config, explain its keys, show what holds and why."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from mortice.core.cli.flags import (
    ConfigFlags,
    ConfigOrModel,
    ExecutorFlags,
    GenerationFlags,
    ModelFlags,
    OutputFlags,
    PluginFlags,
    PromptFlags,
    TalkFlags,
    config_or_model,
    settings,
)
from mortice.core.cli.render import Screen, json_text
from mortice.core.cli.written_files import ForceFlag, require_writable
from mortice.core.config_keys import config_keys
from mortice.core.errors import MorticeError
from mortice.core.whole_file import write_text

if TYPE_CHECKING:
    from mortice.core.config import RunConfig
    from mortice.core.plugin.registry import Registry

__all__ = ["init", "schema", "show"]


def init(
    file: Annotated[Path | None, Parameter(help="Where to write it; standard output when left out.")] = None,
    /,
    *,
    force: ForceFlag = False,
    talk: TalkFlags | None = None,
) -> int:
    """Write a config with every key, explained and set to its default."""
    from mortice.core.cli.config_text import commented_toml

    text = commented_toml()
    if file is None:
        print(text, end="")
        return 0
    require_writable("", file, force=force)
    write_text(file, text)
    Screen(quiet=talk is not None and talk.quiet).note(
        f"wrote {file}; set model.path and prompt.text in it, or pass --model and --prompt: mortice run {file}"
    )
    return 0


def schema(
    *,
    format_: Annotated[
        Literal["md", "json"],
        Parameter(name="--format", help="A reference in Markdown, or JSON Schema for editors."),
    ] = "md",
    talk: TalkFlags | None = None,  # noqa: ARG001 (main reads --debug)
) -> int:
    """Explain every key of a config."""
    from mortice.core.cli.config_text import json_schema, markdown

    print(markdown() if format_ == "md" else json_text(json_schema()))
    return 0


def show(
    config: ConfigOrModel = None,
    /,
    *,
    model: ModelFlags | None = None,
    prompt: PromptFlags | None = None,
    generation: GenerationFlags | None = None,
    executor: ExecutorFlags | None = None,
    plugins: PluginFlags | None = None,
    any_key: ConfigFlags | None = None,
    output: OutputFlags | None = None,
) -> int:
    """Show every effective value, where it came from and which plugin serves it."""
    from mortice.core.stages import registry_for

    output = output or OutputFlags()
    screen = Screen(json=output.json, quiet=output.quiet)
    config, model = config_or_model(config, model)
    effective = settings(config, model, prompt, generation, executor, plugins, any_key)
    served = _served_by(registry_for(effective.config), effective.config)
    screen.result(
        {
            key: {
                "value": effective.value(key),
                "from": effective.origins[key].layer,
                "source": effective.origins[key].name or None,
                "served_by": served.get(key),
            }
            for key in config_keys()
        }
    )
    screen.table(
        ("key", "value", "from", "served by"),
        [
            (key, _value_text(effective.value(key)), str(effective.origins[key]), served.get(key) or "")
            for key in config_keys()
        ],
    )
    return 0


def _value_text(value: Any) -> str:
    from mortice.core.cli.config_text import toml_text

    return "" if value is None else toml_text(value)


def _served_by(registry: Registry, config: RunConfig) -> dict[str, str]:
    """Who serves a key; where nobody can, the reason in its place."""
    from mortice.core.stages import choose_executor, choose_upload, open_file

    served: dict[str, str] = {}
    key = "executor.name"
    try:
        executor, device, why = choose_executor(registry, config.executor.name)
        served[key] = f"{executor.name} of plugin {registry.executors[executor.name].plugin} ({why})"
        key = "upload.strategy"
        upload = choose_upload(registry, executor, device, config.upload.strategy)
        served[key] = f"{upload.name} of plugin {registry.uploads[upload.name].plugin}"
    except MorticeError as error:
        served[key] = f"none: {error}"
    if config.model.path is None:
        return served
    key = "model.path"
    try:
        with open_file(registry, config.model.path) as file:
            served[key] = f"loader of plugin {file.loader}"
            if config.model.contract is None:
                key = "model.contract"
                contract = registry.contract_for(file)
                plugin = registry.contracts[file.architecture].plugin
                served[key] = f"{contract.name} of plugin {plugin}"
    except MorticeError as error:
        served[key] = f"none: {error}"
    return served
