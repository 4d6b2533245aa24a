"""Through pinned memory: threads copy from the mapped file into buffers of their own, the device reads these.

A thread waits for its own buffer only. While one is being read by the device, those of the other threads are being
filled, and what came before is being laid out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

import numpy as np
from attrs import define
from numpy.typing import NDArray

from mortice.core.model.residency import Intake, RawRows, ResidentWeights, batches
from mortice.plugins.uploads.device.crew import cores, run_crew
from mortice.plugins.uploads.device.strategy import Arrived

__all__ = ["PinnedWay"]

Batch = tuple[RawRows, ...]

_MOST_THREADS = 12
"""Their buffers together are what is pinned, which takes time by the byte; a core copies some 5 GB/s."""


@define(eq=False)
class PinnedWay:
    """As fast as the link, given some cores."""

    name: str = "pinned"

    def move(self, resident: ResidentWeights, intake: Intake, rows: Sequence[RawRows], arrived: Arrived) -> None:
        del resident

        def work(jobs: Iterator[Batch]) -> Iterator[Batch]:
            for first in jobs:  # nothing is pinned for a thread that has nothing to do
                buffer = intake.pin(intake.capacity)
                try:
                    for batch in chain([first], jobs):
                        yield _sent(batch, buffer.array, intake)
                finally:
                    buffer.close()

        pieces = -(-sum(part.data.nbytes for part in rows) // intake.capacity)
        threads = max(1, min(pieces, max(2, cores()), _MOST_THREADS))
        run_crew(work, batches(rows, intake), threads=threads, name="mortice-upload", done=arrived)


def _sent(batch: Batch, buffer: NDArray[np.uint8], intake: Intake) -> Batch:
    """Copy a batch into pinned memory and from there to the device; the buffer is free again afterwards."""
    staged = []
    at = 0
    for part in batch:
        data = buffer[at : at + part.data.nbytes].reshape(part.data.shape)
        data[...] = part.data
        staged.append(RawRows(index=part.index, row_start=part.row_start, data=data))
        at += part.data.nbytes
    intake.send(staged).wait()
    return batch
