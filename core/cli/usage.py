"""What is wrong with a command line, in one line that ends with how the command is used."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from inspect import Parameter as Argument

from cyclopts import App, CycloptsError, MissingArgumentError, UnusedCliTokensError

__all__ = ["usage_error", "usage_of"]


def usage_error(app: App, error: CycloptsError) -> str:
    """``synth: SHAPE is missing; usage: mortice synth SHAPE RECIPE OUT [flags]``."""
    names = tuple(error.command_chain or ())
    where = f"{' '.join(names)}: " if names else ""
    if isinstance(error, MissingArgumentError) and error.argument is not None:
        name = getattr(error, "keyword", None) or error.argument.names[0]
        found = f"{where}{name} {'wants a value' if name.startswith('-') else 'is missing'}"
    elif isinstance(error, UnusedCliTokensError):
        beyond = " ".join(map(repr, error.unused_tokens or ()))
        found = f"{where}found {beyond} beyond its arguments"
    else:
        text = " ".join(str(error).split())
        found = where + (text if text.endswith("...") else text.removesuffix("."))
    command = app
    for name in names:
        command = command[name]
    return f"{found}; usage: {usage_of(command, names)}"


def usage_of(command: App, names: Sequence[str]) -> str:
    """``mortice fit FILE [flags]``: the arguments of a command, in brackets what may be left out."""
    inner = [name for name in command if not name.startswith("-")]
    parts = ["COMMAND, see mortice " + " ".join([*names, "--help"])] if inner else [*_arguments(command), "[flags]"]
    return " ".join(["mortice", *names, *parts])


def _arguments(command: App) -> Iterator[str]:
    for argument in command.assemble_argument_collection():
        name = argument.names[0]
        if name.startswith(("-", "*")):
            continue
        if argument.field_info.kind is Argument.VAR_POSITIONAL:
            name += "…"
        yield name if argument.required else f"[{name}]"
