"""``mortice run --jsonl``: many prompts from lines of JSON, each answer as a line as soon as it is finished."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import define, field, frozen

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
_Wrong = dict[int, str]
"""What is wrong with lines, by their numbers."""


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
    lines, wrong = _read_lines(source)
    with planned(screen, config) as pipeline:
        note_model(screen, pipeline)
        _require_output(output, pipeline.model.file.files, force=force)
        pipeline.fit.require()
        requests = _requests(screen, pipeline, config, lines, wrong)
        _require_right(source, wrong)
        with _opened(output) as out:
            resident(screen, pipeline)
            started = time.perf_counter()
            tokens = failed = 0
            for result in finished_results(pipeline, requests):
                _write(out, json_text(_as_dict(lines[result.index].id, result)))
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


def _read_lines(source: Path) -> tuple[list[_Line], _Wrong]:
    """The lines that are not blank, and what is wrong with those that cannot be understood.

    Raises:
        InputError: when there is no line, or none that can be understood.

    """
    text = _text_of(source).removeprefix("\ufeff")  # the mark that some editors begin a file with
    numbered = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not numbered:
        raise InputError(f"{_name(source)}: found no line with a prompt")
    wrong: _Wrong = {}
    lines = []
    seen: dict[tuple[type, _Id], int] = {}
    for number, item in numbered:
        with _noting(number, wrong):
            line = _parse(number, item)
            first = seen.setdefault((type(line.id), line.id), number)
            if first != number:
                raise InputError(f"id {line.id!r} is that of line {first}, too")
            lines.append(line)
    if not lines:
        _require_right(source, wrong)
    return lines, wrong


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
    screen: Screen, pipeline: Pipeline, config: RunConfig, lines: Sequence[_Line], wrong: _Wrong
) -> list[Request]:
    """What the lines ask, checked against the model; what is wrong with one is added to `wrong`."""
    requests = []
    with prompt_encoder(screen, pipeline, config.prompt) as encode:
        for line in lines:
            with _noting(line.number, wrong):
                if isinstance(line.prompt, list) and config.prompt.chat:
                    raise InputError("prompt: found token ids, wanted a string for a chat")
                ids = encode(line.prompt) if isinstance(line.prompt, str) else line.prompt
                requests.append(pipeline.request(ids, line.options))
    return requests


@contextmanager
def _noting(number: int, wrong: _Wrong) -> Iterator[None]:
    """Note what is refused, so that one look finds all that is wrong with a file."""
    try:
        yield
    except InputError as error:
        wrong[number] = str(error)


def _require_right(source: Path, wrong: _Wrong) -> None:
    """Refuse a file of prompts once for all its wrong lines."""
    found = [f"line {number}: {wrong[number]}" for number in sorted(wrong)]
    if len(found) == 1:
        raise InputError(f"{_name(source)}: {found[0]}")
    if found:
        more = [f"and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
        shown = "".join(f"\n  {text}" for text in [*found[:_SHOWN], *more])
        raise InputError(f"{_name(source)}: {len(found)} lines are refused{shown}")


def _name(source: Path) -> str:
    return "standard input" if str(source) == "-" else str(source)


@define(eq=False)
class _ResultFile:
    """A file of results, written line by line; what stands in it in the end is whole lines."""

    path: Path
    _stream: FileIO
    _nbytes: int = field(default=0, init=False)
    """How many the whole lines have."""

    def write(self, line: str) -> None:
        """Add a line, at once: a person may read along."""
        data = memoryview(f"{line}\n".encode())
        rest = data
        while rest:
            rest = rest[self._stream.write(rest) or 0 :]
        self._nbytes += data.nbytes

    def close(self) -> None:
        """Cut off a line that was not finished; a file without a line is removed, to be in nobody's way."""
        with suppress(OSError), self._stream:
            if stat.S_ISREG(os.fstat(self._stream.fileno()).st_mode):
                self._stream.truncate(self._nbytes)
                if not self._nbytes:
                    self.path.resolve().unlink()


@contextmanager
def _opened(output: Path | None) -> Iterator[_ResultFile | None]:
    """The file of the results; None stands for standard output."""
    if output is None:
        yield None
        return
    try:
        stream = output.open("wb", buffering=0)
    except OSError as error:
        raise _cannot(output, error) from None
    with closing(_ResultFile(output, stream)) as out:
        yield out


def _cannot(output: Path, error: OSError) -> ExecutionError:
    return ExecutionError(f"{output}: cannot be written: {error.strerror}")


def _write(out: _ResultFile | None, line: str) -> None:
    if out is None:
        print(line, flush=True)  # the command line knows what to say of its own streams
        return
    try:
        out.write(line)
    except OSError as error:
        raise _cannot(out.path, error) from None


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
