"""From the mapped file as it is: the driver stages the bytes, on one core."""

from __future__ import annotations

from collections.abc import Sequence

from attrs import define

from mortice.core.model.residency import Intake, RawRows, ResidentWeights, batches
from mortice.plugins.uploads.device.strategy import Arrived

__all__ = ["PageableWay"]


@define(eq=False)
class PageableWay:
    """Needs no pinned memory, and reaches a fraction of the link."""

    name: str = "pageable"

    def move(self, resident: ResidentWeights, intake: Intake, rows: Sequence[RawRows], arrived: Arrived) -> None:
        del resident
        for batch in batches(rows, intake):
            intake.send(batch).wait()
            arrived(batch)
