"""What all ways onto a device have in common: what is missing, what the host lays out, progress."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
from attrs import define, field
from numpy.typing import NDArray

from mortice.core.errors import PluginError, UnsupportedError
from mortice.core.model.residency import Arena, DeviceArena, Intake, RawRows, ResidentWeights
from mortice.core.model.weight_plan import PlannedWeight, WeightPlan
from mortice.core.plugin.events import UploadProgress
from mortice.core.plugin.interfaces import Emit
from mortice.plugins.uploads.device.crew import cores, run_crew

__all__ = ["Arrived", "DeviceUpload", "Way", "upload_by"]

_REPORTS = 200
"""Progress events of an upload, about: observers run on a core that the threads could use."""

_MOST_MAKERS = 16

Arrived = Callable[[Sequence[RawRows]], None]
"""Told on the calling thread which rows have left host memory."""


class Way(Protocol):
    """How rows get from the file to the device."""

    name: str

    def move(self, resident: ResidentWeights, intake: Intake, rows: Sequence[RawRows], arrived: Arrived) -> None:
        """Send `rows`, cut as needed, and tell `arrived` of each part once.

        Whatever is raised, by `arrived` or by an interrupt too, all that the way holds is given back first.

        Raises:
            UnsupportedError: when this way cannot be taken with this model or device.
            DoesNotFitError: when there is no pinned memory for it.

        """
        ...


@define(eq=False)
class DeviceUpload:
    """One way for everything."""

    way: Way
    name: str = field(init=False)
    device_kind: str = field(default="cuda", init=False)

    def __attrs_post_init__(self) -> None:
        self.name = self.way.name

    def upload(self, resident: ResidentWeights, emit: Emit) -> int:
        return upload_by(self.way, resident, emit)


def upload_by(way: Way, resident: ResidentWeights, emit: Emit) -> int:
    """Upload what is missing, see `UploadStrategy.upload`."""
    missing = sorted(resident.missing(), key=lambda item: _place_in_file(item[1]))
    if not missing:
        return 0
    arena = resident.arena
    if not isinstance(arena, DeviceArena):
        raise UnsupportedError(f"upload.strategy {way.name!r}: the executor's {type(arena).__name__} takes no raw rows")
    total = sum(planned.source_bytes for _, planned in missing)
    done = told = 0

    def arrived(parts: Sequence[RawRows]) -> None:
        nonlocal done, told
        done += sum(part.data.nbytes for part in parts)
        if done == total or done - told >= total / _REPORTS:
            told = done
            emit(UploadProgress(strategy=way.name, done_bytes=done, total_bytes=total))

    with arena.receive(resident.plan) as intake, ThreadPoolExecutor(1, "mortice-upload-host") as beside:
        rows, made, own = [], [], []
        for index, planned in missing:
            if intake.row_step(index) is None:
                own.append((index, planned))
            elif planned.tensor.make is not None:
                made.append(index)
            else:
                rows.append(RawRows(index=index, row_start=0, data=planned.source()))
        written = beside.submit(_write, arena, own)  # small, and many: they would keep the rows waiting
        if rows:
            way.move(resident, intake, rows, arrived)
        send_made(resident.plan, intake, made, arrived)
        arrived(written.result())
        intake.finish()
    for index, _ in missing:
        resident.mark(index)
    return sum(planned.nbytes for _, planned in missing)


def send_made(plan: WeightPlan, intake: Intake, indices: Sequence[int], arrived: Arrived) -> None:
    """Send the weights `indices`, which no file holds as they are wanted, in pieces that are made on several threads.

    Each thread holds one piece of at most `Intake.capacity` bytes. That is ordinary memory: making rows takes far
    longer than copying them.
    """
    pieces: list[tuple[int, int, int]] = []
    for index in indices:
        planned, step = plan.weights[index], intake.row_step(index)
        assert step is not None, "weights that the host lays out are not sent"
        row_bytes = planned.source_bytes // planned.rows
        count = max(1, intake.capacity // (step * row_bytes)) * step
        starts = range(0, planned.rows, count)
        pieces += [(index, start, min(start + count, planned.rows)) for start in starts]

    def work(jobs: Iterator[tuple[int, int, int]]) -> Iterator[Sequence[RawRows]]:
        for index, start, stop in jobs:
            part = RawRows(index=index, row_start=start, data=plan.weights[index].source_rows(start, stop))
            intake.send([part]).wait()
            yield [part]

    threads = min(len(pieces), cores(), _MOST_MAKERS)
    run_crew(work, pieces, threads=threads, name="mortice-upload", done=arrived)


def _place_in_file(planned: PlannedWeight) -> tuple[str, int, int]:
    """Reading in the order of the file is fastest where it has to come from a disk."""
    return str(planned.tensor.path), planned.tensor.offset, planned.weight.row_start


def _write(arena: Arena, weights: Sequence[tuple[int, PlannedWeight]]) -> list[RawRows]:
    """Lay out on the host what the device does not, and write it; what has arrived."""
    done = []
    for index, planned in weights:
        source = planned.source()
        arena.write(planned.offset, _laid_out(planned, source))
        done.append(RawRows(index=index, row_start=0, data=source))
    return done


def _laid_out(planned: PlannedWeight, source: NDArray[np.uint8]) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    out = np.empty(planned.nbytes, np.uint8)
    try:
        planned.layout.store(source, planned.columns, out)
    except PluginError as error:
        raise PluginError(f"{planned.tensor.name}: {error}") from error
    return out
