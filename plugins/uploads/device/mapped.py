"""From the pages of the mapped file, which the driver pins a window at a time."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from mmap import PAGESIZE

from attrs import define, field, frozen

from mortice.core.errors import UnsupportedError
from mortice.core.model.residency import Intake, RawRows, ResidentWeights, batches
from mortice.plugins.uploads.device.crew import cores, run_crew
from mortice.plugins.uploads.device.strategy import Arrived

__all__ = ["MappedWay"]

_WINDOW_BYTES = 64 << 20
"""Bytes registered in one call."""
_MOST_THREADS = 8


@frozen(eq=False)
class _Window:
    """Neighbouring pages, and the rows that lie in them from end to end."""

    start: int
    stop: int
    rows: list[RawRows] = field(factory=list)

    @property
    def read_only(self) -> bool:
        return not all(part.data.flags.writeable for part in self.rows)


@define(eq=False)
class MappedWay:
    """Copies nothing on the host, but the driver has to pin every page of the file."""

    name: str = "mapped"
    window_bytes: int = field(default=_WINDOW_BYTES, kw_only=True)

    def move(self, resident: ResidentWeights, intake: Intake, rows: Sequence[RawRows], arrived: Arrived) -> None:
        file = resident.plan.model.file
        if not file.files:
            raise UnsupportedError(f"upload.strategy {self.name!r}: {file.path} is in memory, wanted a mapped file")
        windows, across = _windows(rows, intake, self.window_bytes)

        def work(jobs: Iterator[_Window]) -> Iterator[Sequence[RawRows]]:
            for window in jobs:
                with ExitStack() as stack:
                    size = window.stop - window.start
                    stack.callback(intake.register(window.start, size, read_only=window.read_only).close)
                    for batch in batches(window.rows, intake):
                        stack.callback(intake.send(batch).wait)  # before the pages are let go, whatever happens
                yield window.rows

        threads = max(1, min(len(windows), cores(), _MOST_THREADS))
        run_crew(work, windows, threads=threads, name="mortice-upload", done=arrived)
        for batch in batches(across, intake):  # from ordinary memory: no window is registered any more
            intake.send(batch).wait()
            arrived(batch)


def _windows(rows: Sequence[RawRows], intake: Intake, nbytes: int) -> tuple[list[_Window], list[RawRows]]:
    """Windows over the pages of `rows`, and the rows that reach over a window's end.

    A copy by the driver has to lie within one registration, or in memory that is not registered at all.
    """
    windows = [
        _Window(start, min(start + nbytes, stop))
        for begin, stop in _page_runs(rows)
        for start in range(begin, stop, nbytes)
    ]
    starts = [window.start for window in windows]
    across: list[RawRows] = []
    for part in rows:
        step = intake.row_step(part.index)
        assert step is not None, "weights that the host lays out do not come as rows"
        row_bytes, row = part.data.shape[1], 0
        while row < len(part.data):
            here = part.data.ctypes.data + row * row_bytes
            window = windows[bisect(starts, here) - 1]
            inside = (window.stop - here) // (step * row_bytes) * step
            data = part.data[row : row + (inside or step)]
            piece = RawRows(index=part.index, row_start=part.row_start + row, data=data)
            (window.rows if inside else across).append(piece)
            row += len(data)
    return [window for window in windows if window.rows], across


def _page_runs(rows: Sequence[RawRows]) -> list[tuple[int, int]]:
    """Start and stop of runs of neighbouring pages that hold `rows`. No page outside these is known to be there."""
    runs: list[tuple[int, int]] = []
    for part in sorted(rows, key=lambda part: part.data.ctypes.data):
        address = part.data.ctypes.data
        start, stop = address // PAGESIZE * PAGESIZE, -(-(address + part.data.nbytes) // PAGESIZE) * PAGESIZE
        if runs and start <= runs[-1][1]:
            start, stop = runs[-1][0], max(runs.pop()[1], stop)
        runs.append((start, stop))
    return runs
