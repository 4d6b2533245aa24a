"""Through pinned memory: threads read the file into buffers, the device reads these.

Only the calling thread talks to the driver. So a reading thread needs the interpreter once for each buffer, and threads
seldom wait for each other there, which costs them more than the work itself.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from queue import Empty, SimpleQueue
from threading import Lock

import numpy as np
from attrs import define, field
from numpy.typing import NDArray

from mortice.core.model.residency import Intake, PinnedBuffer, RawRows, ResidentWeights, Sent, batches
from mortice.core.model.weight_plan import ALIGNMENT, WeightPlan
from mortice.plugins.uploads.device.crew import cores, run_crew
from mortice.plugins.uploads.device.strategy import Arrived

__all__ = ["PinnedWay"]

Batch = tuple[RawRows, ...]

_MOST_THREADS = 12
"""A core reads some 5 GB/s."""
_UNDER_WAY = 2
"""Buffers that the device may be reading, so that it always has the next one."""


@define(eq=False)
class PinnedWay:
    """As fast as the link, given some cores."""

    name: str = "pinned"

    def move(self, resident: ResidentWeights, intake: Intake, rows: Sequence[RawRows], arrived: Arrived) -> None:
        pieces = -(-sum(part.data.nbytes for part in rows) // intake.capacity)
        threads = max(1, min(pieces, max(2, cores()), _MOST_THREADS))
        with ExitStack() as stack:
            buffers = _Buffers(intake, threads + _UNDER_WAY)
            stack.callback(buffers.close)
            sending = _Sending(intake, buffers, arrived)
            stack.callback(sending.drop)

            def read(jobs: Iterator[Batch]) -> Iterator[tuple[Batch, list[RawRows], PinnedBuffer]]:
                for batch in jobs:
                    buffer = buffers.take()
                    if buffer is None:
                        return
                    yield batch, _read(batch, resident.plan, buffer.array), buffer

            run_crew(
                read,
                batches(rows, intake),
                threads=threads,
                name="mortice-upload",
                done=lambda filled: sending.send(*filled),
                stop=buffers.stop,
            )
            sending.finish()


@define(eq=False)
class _Buffers:
    """Pinned memory that goes round. Not more is pinned than is asked for at once."""

    _intake: Intake
    _most: int
    _all: list[PinnedBuffer] = field(factory=list, init=False)
    _begun: int = field(default=0, init=False)
    _free: SimpleQueue[PinnedBuffer | None] = field(factory=SimpleQueue, init=False)
    _lock: Lock = field(factory=Lock, init=False)

    def take(self) -> PinnedBuffer | None:
        """One to fill, as soon as there is one; None when there will be none any more."""
        with suppress(Empty):
            return self._free.get_nowait()
        with self._lock:
            another = self._begun < self._most
            self._begun += another
        if not another:
            return self._free.get()
        buffer = self._intake.pin(self._intake.capacity)
        self._all.append(buffer)
        return buffer

    def give_back(self, buffer: PinnedBuffer) -> None:
        """The device has read it."""
        self._free.put(buffer)

    def stop(self) -> None:
        """Let those go that wait for a buffer."""
        for _ in range(self._most):
            self._free.put(None)

    def close(self) -> None:
        """Let go of the memory; nobody uses it."""
        for buffer in self._all:
            buffer.close()


@define(eq=False)
class _Sending:
    """What is on its way to the device, the oldest first."""

    _intake: Intake
    _buffers: _Buffers
    _arrived: Arrived
    _under_way: deque[tuple[Sent, PinnedBuffer, Batch]] = field(factory=deque, init=False)

    def send(self, batch: Batch, staged: Sequence[RawRows], buffer: PinnedBuffer) -> None:
        """Send a buffer; wait for an older one when many are under way."""
        self._under_way.append((self._intake.send(staged), buffer, batch))
        if len(self._under_way) > _UNDER_WAY:
            self._wait()

    def finish(self) -> None:
        """Wait for all."""
        while self._under_way:
            self._wait()

    def _wait(self) -> None:
        sent, buffer, batch = self._under_way[0]
        sent.wait()
        self._under_way.popleft()
        self._buffers.give_back(buffer)
        self._arrived(batch)

    def drop(self) -> None:
        """After an error: wait until the device reads none of the buffers."""
        while self._under_way:
            with suppress(Exception):  # of the device, which has then stopped reading
                self._under_way.popleft()[0].wait()


def _read(batch: Batch, plan: WeightPlan, buffer: NDArray[np.uint8]) -> list[RawRows]:
    """Bring a batch into pinned memory, past the pages of the mapping where the file can be read."""
    staged = []
    at = 0
    for part in batch:
        data = buffer[at : at + part.data.nbytes]
        plan.weights[part.index].read_rows(part.row_start, data)
        staged.append(RawRows(index=part.index, row_start=part.row_start, data=data.reshape(part.data.shape)))
        at += -(-part.data.nbytes // ALIGNMENT) * ALIGNMENT  # as on the device: all of it is one copy
    return staged
