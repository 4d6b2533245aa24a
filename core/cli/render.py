"""What a command prints: results on standard output, all else on standard error.

Where the stream is no terminal there are no colours, no bars and no line breaks of ours.
"""

from __future__ import annotations

import io
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

from attrs import define, field

from mortice.core.plugin.events import Event, StepDone, UploadProgress, WaysMeasured

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Screen", "json_text", "printable", "size_text"]

_WIDE = 100_000
"""Columns of a stream that is no terminal: nothing is wrapped or cut."""


def printable(text: str, limit: int | None = None) -> str:
    """Text from a file, safe to print: control characters escaped, cut to `limit` characters."""
    if limit is not None and len(text) > limit:
        text = text[: limit - 1] + "…"
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)


def size_text(count: int) -> str:
    """Bytes for a person: ``93.1 MiB``."""
    size, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"


def json_text(value: Any) -> str:
    """`value` as ASCII JSON; what JSON has no number for becomes ``"inf"``, ``"-inf"``, ``"nan"``, a path its text."""
    return json.dumps(_plain(value))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


@define(eq=False)
class Screen:
    """Where a command prints.

    Attributes:
        json: results are JSON; `result` and tables for people are then not printed.
        quiet: no notes.

    """

    json: bool = False
    quiet: bool = False
    _answer_open: bool = field(default=False, init=False)

    # standard error ---------------------------------------------------------------------------------------------

    def note(self, text: str = "") -> None:
        """A line for a person who watches."""
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def warn(self, text: str) -> None:
        """A line that is not suppressed."""
        print(f"mortice: warning: {text}", file=sys.stderr, flush=True)

    def note_table(self, columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
        """A table for a person who watches. A column written ``>name`` is aligned to the right."""
        if not self.quiet:
            _print_table(sys.stderr, columns, rows, title)

    @contextmanager
    def upload_progress(self, observers: list[Callable[[Event], None]]) -> Iterator[None]:
        """Show uploads while inside: a bar on a terminal, else one line at the end; then what was measured for them."""
        if self.quiet:
            yield
            return
        started = time.perf_counter()
        last: list[UploadProgress] = []
        measured: list[WaysMeasured] = []
        bar = _bar("upload") if sys.stderr.isatty() else nullcontext()
        with bar as show:

            def watch(event: Event) -> None:
                if isinstance(event, WaysMeasured):
                    measured.append(event)
                elif isinstance(event, UploadProgress):
                    last[:] = [event]
                    if show is not None:
                        show(event.done_bytes, event.total_bytes)

            observers.append(watch)
            try:
                yield
            finally:
                observers.remove(watch)
        if last and show is None:
            seconds = time.perf_counter() - started
            self.note(f"upload: {size_text(last[0].total_bytes)} with {last[0].strategy} in {seconds:.2f} s")
        for event in measured:
            self.note(str(event))

    @contextmanager
    def byte_progress(self, title: str) -> Iterator[Callable[[int, int], None]]:
        """Show how much of something is done while inside: a bar on a terminal that goes away again, else nothing."""
        if self.quiet or not sys.stderr.isatty():
            yield lambda *_: None
        else:
            with _bar(title) as show:
                yield show

    @contextmanager
    def prompt_progress(
        self, observers: list[Callable[[Event], None]], tokens: int, step_tokens: int
    ) -> Iterator[None]:
        """Show how much of a prompt is fed while inside, where that takes several steps: a bar, as `byte_progress` has.

        Args:
            observers: those of the registry.
            tokens: what is fed in all.
            step_tokens: what is fed in one step at most.

        """
        if self.quiet or tokens <= step_tokens or not sys.stderr.isatty():
            yield
            return
        with _bar("prompt", unit="tokens") as show:
            fed = 0

            def watch(event: Event) -> None:
                nonlocal fed
                if isinstance(event, StepDone):
                    fed += event.tokens
                    show(fed, tokens)

            show(0, tokens)
            observers.append(watch)
            try:
                yield
            finally:
                observers.remove(watch)

    # standard output --------------------------------------------------------------------------------------------

    def result(self, value: Any) -> None:
        """The result, when JSON is wanted."""
        if self.json:
            print(json_text(value), flush=True)

    def say(self, text: str = "") -> None:
        """A line of the result for a person."""
        if not self.json:
            print(text)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
        """A table of the result for a person."""
        if not self.json:
            _print_table(sys.stdout, columns, rows, title)

    def stream(self, text: str) -> None:
        """A piece of an answer, shown at once. On a terminal control characters other than white space are escaped."""
        if self.json or not text:
            return
        if sys.stdout.isatty():
            text = "".join(char if char.isprintable() or char.isspace() else printable(char) for char in text)
        sys.stdout.write(text)
        sys.stdout.flush()
        self._answer_open = not text.endswith("\n")

    def end_stream(self) -> None:
        """Close the line an answer stands on."""
        if self._answer_open:
            print(flush=True)
            self._answer_open = False


def _print_table(stream: TextIO, columns: Sequence[str], rows: Sequence[Sequence[str]], title: str) -> None:
    from rich.console import Console

    terminal = stream.isatty()
    if terminal:
        Console(file=stream, markup=False, highlight=False, emoji=False).print(_table(columns, rows, title, boxed=True))
        return
    buffer = io.StringIO()
    Console(file=buffer, width=_WIDE, markup=False, highlight=False, emoji=False).print(
        _table(columns, rows, title, boxed=False)
    )
    for line in buffer.getvalue().splitlines():
        print(line.rstrip(), file=stream)
    stream.flush()


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str, *, boxed: bool) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=Text(title) if title else None, title_justify="left", box=SIMPLE_HEAD if boxed else None, pad_edge=False
    )
    for column in columns:
        name = column.removeprefix(">")
        table.add_column(Text(name), justify="left" if name == column else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    return table


@contextmanager
def _bar(title: str, unit: Literal["bytes", "tokens"] = "bytes") -> Iterator[Callable[[int, int], None]]:
    """A bar on the terminal; what it gives is told how many bytes or tokens are done and how many there are."""
    from rich import progress as parts
    from rich.console import Console

    columns: dict[str, tuple[parts.ProgressColumn, ...]] = {
        "bytes": (parts.DownloadColumn(binary_units=True), parts.TransferSpeedColumn()),
        # a step can take a minute, and the clock shows that it goes on
        "tokens": (parts.MofNCompleteColumn(), parts.TextColumn("tokens"), parts.TimeElapsedColumn()),
    }
    progress = parts.Progress(
        parts.TextColumn("{task.description}", markup=False),
        parts.BarColumn(),
        *columns[unit],
        console=Console(file=sys.stderr),
        transient=title != "upload",
    )
    task = progress.add_task(title, total=None)
    with progress:
        yield lambda done, total: progress.update(task, completed=done, total=total)
