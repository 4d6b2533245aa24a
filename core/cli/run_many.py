"""``mortice run --jsonl``: many prompts from lines of JSON, each answer as a line as soon as it is finished."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

from attrs import frozen

from mortice.core.cli.answer import prompt_encoder, read_stdin, require_chat
from mortice.core.cli.render import Screen, json_text
from mortice.core.cli.stages import note_model, planned, resident
from mortice.core.cli.written_files import require_writable
from mortice.core.counts import counted
from mortice.core.errors import ExecutionError, InputError
from mortice.core.text_file import parse_json

if TYPE_CHECKING:
    from mortice.core.batch import Request, Result
    from mortice.core.config import RunConfig
    from mortice.core.pipeline import Pipeline

__all__ = ["run_many"]

_SHOWN = 20
"""Bad lines that are listed; the rest is counted."""

_Id = str | int
_T = TypeVar("_T")
_R = TypeVar("_R")


@frozen
class _Line:
    """A line that was understood: what it is called, what it asks, and what it says of sampling and generation."""

    number: int
    id: _Id
    prompt: str | list[int]
    options: dict[str, Any]


def run_many(
    screen: Screen,
    config: RunConfig,
    source: Path,
    output: Path | None,
    inputs: Iterable[Path | None] = (),
    *,
    force: bool = False,
) -> int:
    """Answer the prompts of `source`, ``-`` for standard input; 1 when one of them failed on the way.

    `output` is overwritten only with `force`, and never where it is `source` or one of `inputs`, files that are read.
    """
    from mortice.core.batch import finished_results

    require_chat(config.prompt)
    _require_output(output, [source, *inputs], force=force)
    lines = _read_lines(source)
    with planned(screen, config) as pipeline:
        note_model(screen, pipeline)
        _require_output(output, pipeline.model.file.files, force=force)
        pipeline.fit.require()
        requests = _requests(screen, pipeline, config, source, lines)
        with _opened(output) as stream:
            resident(screen, pipeline)
            started = time.perf_counter()
            tokens = failed = 0
            for result in finished_results(pipeline, requests):
                _write(stream, output, json_text(_as_dict(lines[result.index].id, result)))
                tokens += len(result.pieces)
                failed += result.error is not None
            seconds = time.perf_counter() - started
    failures = f", {failed} failed" if failed else ""
    speed = f", {tokens / seconds:.1f} tok/s in all" if tokens else ""
    screen.note(f"{counted(len(requests), 'prompt')}{failures}; answers {counted(tokens, 'token')}{speed}")
    return 1 if failed else 0


def _require_output(output: Path | None, inputs: Iterable[Path | None], *, force: bool) -> None:
    """Refuse an output that could not be written, or that would overwrite what is read, before all the work."""
    if output is not None:
        require_writable("--output", output, force=force, devices=True, inputs=inputs)


def _text_of(source: Path) -> str:
    if str(source) == "-":
        return read_stdin()
    try:
        with source.open("rb") as stream:
            if stat.S_ISCHR(os.fstat(stream.fileno()).st_mode) and not stream.isatty():
                raise InputError(f"{source}: cannot be read: found a device, wanted a file or a pipe")
            return stream.read().decode("utf-8")
    except OSError as error:
        raise InputError(f"{source}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{source}: byte {error.start}: not UTF-8") from None


def _read_lines(source: Path) -> list[_Line]:
    """The lines that are not blank.

    Raises:
        InputError: naming every line that is wrong, as far as that can be told without the model.

    """
    text = _text_of(source).removeprefix("\ufeff")  # the mark that some editors begin a file with
    numbered = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not numbered:
        raise InputError(f"{_name(source)}: found no line with a prompt")
    lines: list[_Line] = _each_line(source, numbered, lambda item: _parse(*item))
    seen: dict[tuple[type, _Id], int] = {}
    for line in lines:
        first = seen.setdefault((type(line.id), line.id), line.number)
        if first != line.number:
            raise InputError(f"{_name(source)}: line {line.number}: id {line.id!r} is that of line {first}, too")
    return lines


def _parse(number: int, text: str) -> _Line:
    try:
        found = parse_json(text)
    except ValueError as error:
        raise InputError(f"not JSON: {error}") from None
    if not isinstance(found, dict):
        raise InputError(f"found {_kind(found)}, wanted an object with a prompt")
    name, prompt = found.pop("id", number), found.pop("prompt", None)
    if not isinstance(name, str | int) or isinstance(name, bool):
        raise InputError(f"id: found {_kind(name)}, wanted a string or an integer")
    is_ids = isinstance(prompt, list) and all(type(token) is int for token in prompt)
    if not (isinstance(prompt, str) or is_ids):
        raise InputError(f"prompt: found {_kind(prompt)}, wanted a string or a list of token ids")
    if isinstance(found.get("logit_bias"), dict):
        found["logit_bias"] = {_token_id(key): bias for key, bias in found["logit_bias"].items()}
    return _Line(number, name, prompt, found)


def _token_id(key: str) -> int:
    if not (key.isascii() and key.isdecimal() and len(key) < 20):
        raise InputError(f"logit_bias: found token id {key!r:.40}, wanted an integer >= 0")
    return int(key)


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "nothing"}
    return names.get(type(value), "a number")


def _requests(
    screen: Screen, pipeline: Pipeline, config: RunConfig, source: Path, lines: Sequence[_Line]
) -> list[Request]:
    """What the lines ask, checked against the model; refused together, as in `_read_lines`."""
    with prompt_encoder(screen, pipeline, config.prompt) as encode:

        def request(item: tuple[int, _Line]) -> Request:
            line = item[1]
            if isinstance(line.prompt, list) and config.prompt.chat:
                raise InputError("prompt: found token ids, wanted a string for a chat")
            return pipeline.request(encode(line.prompt) if isinstance(line.prompt, str) else line.prompt, line.options)

        return _each_line(source, [(line.number, line) for line in lines], request)


def _each_line(source: Path, items: Sequence[tuple[int, _T]], make: Callable[[tuple[int, _T]], _R]) -> list[_R]:
    """What `make` makes of each (line number, item); refused once for all lines that it refuses."""
    made, wrong = [], []
    for number, item in items:
        try:
            made.append(make((number, item)))
        except InputError as error:
            wrong.append(f"line {number}: {error}")
    if len(wrong) == 1:
        raise InputError(f"{_name(source)}: {wrong[0]}")
    if wrong:
        more = [f"and {len(wrong) - _SHOWN} more"] if len(wrong) > _SHOWN else []
        shown = "".join(f"\n  {text}" for text in [*wrong[:_SHOWN], *more])
        raise InputError(f"{_name(source)}: {len(wrong)} lines are refused{shown}")
    return made


def _name(source: Path) -> str:
    return "standard input" if str(source) == "-" else str(source)


@contextmanager
def _opened(output: Path | None) -> Iterator[TextIO | None]:
    """The file of the results; None stands for standard output."""
    if output is None:
        yield None
        return
    try:
        stream = output.open("w", encoding="utf-8")
    except OSError as error:
        raise InputError(f"{output}: cannot be written: {error.strerror}") from None
    try:
        yield stream
    finally:
        with suppress(OSError):  # each line was flushed, and what went wrong then is told already
            stream.close()


def _write(stream: TextIO | None, output: Path | None, line: str) -> None:
    try:
        print(line, file=stream, flush=True)
    except OSError as error:
        if stream is None:  # the command line knows what to say of its own streams
            raise
        raise ExecutionError(f"{output}: cannot be written: {error.strerror}") from None


def _as_dict(name: _Id, result: Result) -> Mapping[str, Any]:
    """A line of the results."""
    sampling = result.request.sampling
    found: dict[str, Any] = {
        "id": name,
        "text": result.text,
        "tokens": result.token_ids,
        "finish_reason": result.pieces[-1].finish_reason if result.pieces else None,
        "stop_reason": result.pieces[-1].stop_reason if result.pieces else None,
        "prompt_tokens": len(result.request.prompt_ids),
        "seed": None if sampling.greedy else sampling.seed,
        "logprobs": [piece.logprob for piece in result.pieces],
    }
    if result.request.generation.logprobs:
        found["top_logprobs"] = [
            [{"id": token, "logprob": logprob} for token, logprob in piece.top_logprobs] for piece in result.pieces
        ]
    if result.error is not None:
        found["error"] = {"type": type(result.error).__name__, "message": str(result.error)}
    return found
