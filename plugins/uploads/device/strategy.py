"""What all ways onto a device have in common: what is missing, what the host lays out, progress."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from attrs import define, field

from mortice.core.errors import PluginError, UnsupportedError
from mortice.core.model.residency import DeviceArena, Intake, RawRows, ResidentWeights
from mortice.core.model.weight_plan import PlannedWeight
from mortice.core.plugin.events import UploadProgress
from mortice.core.plugin.interfaces import Emit

__all__ = ["Arrived", "DeviceUpload", "Way", "upload_by"]

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
    total = sum(planned.source().nbytes for _, planned in missing)
    done = 0

    def arrived(parts: Sequence[RawRows]) -> None:
        nonlocal done
        done += sum(part.data.nbytes for part in parts)
        emit(UploadProgress(strategy=way.name, done_bytes=done, total_bytes=total))

    with arena.receive(resident.plan) as intake:
        rows = []
        for index, planned in missing:
            part = RawRows(index=index, row_start=0, data=planned.source())
            if intake.row_step(index) is not None:
                rows.append(part)
                continue
            arena.write(planned.offset, _laid_out(planned))
            arrived([part])
        way.move(resident, intake, rows, arrived)
        intake.finish()
    for index, _ in missing:
        resident.mark(index)
    return sum(planned.nbytes for _, planned in missing)


def _place_in_file(planned: PlannedWeight) -> tuple[str, int, int]:
    """Reading in the order of the file is fastest where it has to come from a disk."""
    return str(planned.tensor.path), planned.tensor.offset, planned.weight.row_start


def _laid_out(planned: PlannedWeight) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    out = np.empty(planned.nbytes, np.uint8)
    try:
        planned.layout.store(planned.source(), planned.columns, out)
    except PluginError as error:
        raise PluginError(f"{planned.tensor.name}: {error}") from error
    return out
