"""The command ``mortice``: finds the subcommand, and turns every error into one clear line and an exit code.

0 ok, 1 failure, 2 refused input, 130 interrupted, 141 nobody reads on.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, TextIO

from cyclopts import App, CycloptsError

from mortice.core.cli.bench import bench
from mortice.core.cli.chat import chat
from mortice.core.cli.config import init, schema, show
from mortice.core.cli.contract import derive, diff
from mortice.core.cli.contract import show as show_contract
from mortice.core.cli.fit import fit
from mortice.core.cli.flags import source_of
from mortice.core.cli.inspect import inspect
from mortice.core.cli.parity import parity
from mortice.core.cli.plugins import list_plugins, show_plugin
from mortice.core.cli.plugins_check import check_plugin
from mortice.core.cli.plugins_new import new_plugin
from mortice.core.cli.render import json_text, printable
from mortice.core.cli.replay import replay
from mortice.core.cli.run import run
from mortice.core.cli.synth import synth
from mortice.core.cli.tokenize import tokenize
from mortice.core.cli.usage import usage_error
from mortice.core.cli.validate import validate
from mortice.core.errors import ConfigError, ModelFileError, MorticeError, PluginError
from mortice.core.text_file import oddity
from mortice.core.version import __version__

__all__ = ["main", "make_app"]

_REFUSED = 2
_INTERRUPTED = 130
_NOBODY_READS = 141
"""128 + SIGPIPE: what a shell reports of tools that do not care about a closed pipe."""
_TAKES_NO_MORE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)


def make_app() -> App:
    """All commands."""
    app = App(
        name="mortice",
        help="Turns a quantised model file into a validated, resident inference pipeline.",
        version=__version__,
        help_flags=("--help", "-h"),
        help_format="plaintext",
    )
    commands: list[Callable[..., int]] = [run, replay, chat, validate, inspect, tokenize, fit, bench, parity, synth]
    for command in commands:
        app.command(command)
    plugins = App(name="plugins", help="What is installed, and what it gives.")
    plugins.command(list_plugins, name="list")
    plugins.command(show_plugin, name="show")
    plugins.command(check_plugin, name="check")
    plugins.command(new_plugin, name="new")
    app.command(plugins)
    config = App(name="config", help="Write, explain and check a config.")
    commands = [init, schema, show]
    for command in commands:
        config.command(command)
    app.command(config)
    contract = App(name="contract", help="Draft, compare and show architecture contracts.")
    contract.command(derive)
    contract.command(diff)
    contract.command(show_contract, name="show")
    app.command(contract)
    return app


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments without the program's name; by default those of the process.

    Returns:
        The exit code.

    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the shell (>&-)
            setattr(sys, name, _closed_stream(name))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # an ASCII terminal must not end an answer
    warnings = _Warnings()
    logger = logging.getLogger("mortice")
    logger.addHandler(warnings)
    try:
        return _run(arguments, as_json="--json" in arguments, debug="--debug" in arguments)
    finally:
        logger.removeHandler(warnings)


def _closed_stream(name: str) -> TextIO:
    """Stands for a stream that was closed: standard output fails like a full disk when written, messages are lost."""
    access = os.O_RDONLY if name == "stdout" else os.O_WRONLY
    return open(os.open(os.devnull, access), "w", encoding="utf-8")  # noqa: PTH123 (a descriptor)


class _Warnings(logging.Handler):
    """Shows what the library logs like our own warnings."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)

    def emit(self, record: logging.LogRecord) -> None:
        print(f"mortice: warning: {printable(record.getMessage())}", file=sys.stderr, flush=True)


def _run(arguments: Sequence[str], *, as_json: bool, debug: bool) -> int:
    try:
        app = make_app()
        command, bound, _ = app.parse_args(arguments, exit_on_error=False, print_error=False)
        result = _call(command, bound.args, bound.kwargs)
        sys.stdout.flush()
    except CycloptsError as error:
        return _fail(_REFUSED, "UsageError", usage_error(app, error), as_json)
    except MorticeError as error:
        if debug:
            traceback.print_exc()
        notes = getattr(error, "__notes__", ())  # the registry notes the plugin an error came from
        source = source_of(str(error)) if isinstance(error, ConfigError | PluginError) else ""
        if isinstance(error, ModelFileError):
            source = oddity(error.path)
        message = _escaped("\n".join([f"{error}{source}", *notes]), arguments)
        return _fail(error.exit_code, type(error).__name__, message, as_json)
    except KeyboardInterrupt as error:
        notes = getattr(error, "__notes__", ())  # which plugin was at work
        return _fail(_INTERRUPTED, "KeyboardInterrupt", "; ".join(["interrupted", *notes]), as_json)
    except BrokenPipeError:
        return _nobody_reads()
    except SystemExit as error:
        if not isinstance(error.__context__, BrokenPipeError):
            raise
        return _nobody_reads()  # rich, which prints the help, makes an exit of it
    except Exception as error:  # noqa: BLE001 (the outermost frame: a person gets a line, not a traceback)
        if isinstance(error, OSError) and _came_from_printing(error):
            _discard(sys.stdout)
            found = "is closed" if error.errno == errno.EBADF else error.strerror
            return _fail(1, type(error).__name__, f"standard output: {found}", as_json)
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
    _last_words(sys.stderr, f"mortice: error: {text}")
    if as_json:
        _last_words(sys.stdout, json_text({"error": {"type": kind, "message": message, "exit_code": code}}))
    return code


def _last_words(stream: TextIO, text: str) -> None:
    try:
        print(text, file=stream, flush=True)
    except OSError:  # there is nobody left to tell
        _discard(stream)


def _nobody_reads() -> int:
    """Whoever read our output has what they wanted; the interpreter must not try to flush the rest at exit."""
    for stream in (sys.stdout, sys.stderr):
        _discard(stream)
    return _NOBODY_READS


def _came_from_printing(error: OSError) -> bool:
    """Whether `error` is a failed write to a stream that the command line, or rich for it, prints on."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    printer = str(frames[-1].f_globals.get("__name__"))
    return (
        error.errno in _TAKES_NO_MORE and error.filename is None and printer.startswith(("mortice.core.cli.", "rich."))
    )


def _discard(stream: TextIO) -> None:
    """Let what `stream` still holds go nowhere; the interpreter would try to write it at exit, and complain."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


def _escaped(message: str, arguments: Sequence[str]) -> str:
    """The message with line ends that came from an argument escaped: a line of it is then a line of ours."""
    for argument in arguments:
        for part in (argument, argument.partition("=")[2]):
            if len(part.splitlines()) > 1:
                message = message.replace(part, printable(part))
    return message
