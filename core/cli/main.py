"""The command ``mortice``: finds the subcommand, and turns every error into one clear line and an exit code.

0 ok, 1 failure, 2 refused input, 130 interrupted.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from cyclopts import App, CycloptsError

from mortice.core.cli.bench import bench
from mortice.core.cli.chat import chat
from mortice.core.cli.config import init, schema, show
from mortice.core.cli.fit import fit
from mortice.core.cli.inspect import inspect
from mortice.core.cli.parity import parity
from mortice.core.cli.plugins import list_plugins
from mortice.core.cli.render import json_text, printable
from mortice.core.cli.run import run
from mortice.core.cli.synth import synth
from mortice.core.cli.tokenize import tokenize
from mortice.core.cli.validate import validate
from mortice.core.errors import MorticeError
from mortice.core.version import __version__

__all__ = ["main", "make_app"]

_REFUSED = 2
_INTERRUPTED = 130


def make_app() -> App:
    """All commands."""
    app = App(
        name="mortice",
        help="Turns a quantised model file into a validated, resident inference pipeline.",
        version=__version__,
        help_flags=("--help", "-h"),
        help_format="plaintext",
    )
    commands: list[Callable[..., int]] = [run, chat, validate, inspect, tokenize, fit, bench, parity, synth]
    for command in commands:
        app.command(command)
    plugins = App(name="plugins", help="What is installed, and what it gives.")
    plugins.command(list_plugins, name="list")
    app.command(plugins)
    config = App(name="config", help="Write, explain and check a config.")
    commands = [init, schema, show]
    for command in commands:
        config.command(command)
    app.command(config)
    return app


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments without the program's name; by default those of the process.

    Returns:
        The exit code.

    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # an ASCII terminal must not end an answer
    warnings = _Warnings()
    logger = logging.getLogger("mortice")
    logger.addHandler(warnings)
    try:
        return _run(arguments, as_json="--json" in arguments, debug="--debug" in arguments)
    finally:
        logger.removeHandler(warnings)


class _Warnings(logging.Handler):
    """Shows what the library logs like our own warnings."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)

    def emit(self, record: logging.LogRecord) -> None:
        print(f"mortice: warning: {printable(record.getMessage())}", file=sys.stderr, flush=True)


def _run(arguments: Sequence[str], *, as_json: bool, debug: bool) -> int:
    try:
        command, bound, _ = make_app().parse_args(arguments, exit_on_error=False, print_error=False)
        result = _call(command, bound.args, bound.kwargs)
        sys.stdout.flush()
    except CycloptsError as error:
        return _fail(_REFUSED, "UsageError", f"{error}\nmortice --help lists the commands and their flags", as_json)
    except MorticeError as error:
        if debug:
            traceback.print_exc()
        notes = getattr(error, "__notes__", ())  # the registry notes the plugin an error came from
        return _fail(error.exit_code, type(error).__name__, "\n".join([str(error), *notes]), as_json)
    except KeyboardInterrupt:
        return _fail(_INTERRUPTED, "KeyboardInterrupt", "interrupted", as_json)
    except BrokenPipeError:
        # whoever read our output has what they wanted; the interpreter must not try to flush the rest at exit
        null = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):
            os.dup2(null, stream.fileno())
        return 0
    except Exception as error:  # noqa: BLE001 (the outermost frame: a person gets a line, not a traceback)
        if debug:
            traceback.print_exc()
        hint = "" if debug else "\nthis is a fault in mortice or a plugin; --debug shows where"
        return _fail(1, type(error).__name__, f"{type(error).__name__}: {error}{hint}", as_json)
    return result


def _call(command: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    result = command(*args, **kwargs)
    return result if isinstance(result, int) else 0


def _fail(code: int, kind: str, message: str, as_json: bool) -> int:
    text = "\n".join(printable(line) for line in message.splitlines()) or kind
    print(f"mortice: error: {text}", file=sys.stderr, flush=True)
    if as_json:
        print(json_text({"error": {"type": kind, "message": message, "exit_code": code}}), flush=True)
    return code
