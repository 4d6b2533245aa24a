"""Through pinned memory: threads read the file into buffers, the device reads these.

Several threads read pieces of one buffer side by side. The calling thread does all the rest: it cuts the pieces, talks
to the driver and hands freed buffers out again. So a buffer can be large enough to be worth what queueing it costs, a
piece small enough for a core's cache, and a thread that reads needs the interpreter for some microseconds a piece:
waiting for each other there is what threads would lose their time with.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from itertools import islice, repeat
from queue import Empty, SimpleQueue

import numpy as np
from attrs import define, field, frozen
from numpy.typing import NDArray

from mortice.core.model.residency import Intake, PinnedBuffer, RawRows, ResidentWeights, Sent, batches
from mortice.core.model.weight_plan import ALIGNMENT, PlannedWeight, WeightPlan
from mortice.plugins.uploads.device.crew import cores, run_crew
from mortice.plugins.uploads.device.strategy import Arrived

__all__ = ["PinnedWay"]

Batch = tuple[RawRows, ...]

_MOST_THREADS = 14
"""Side by side, a core reads some 4 GB/s."""
_PIECE_BYTES = 4 << 20
"""Bytes of a buffer that one thread reads at a time."""
_UNDER_WAY = 2
"""Buffers that the device may be reading, so that it always has the next one."""


@define(eq=False)
class PinnedWay:
    """As fast as the link, given some cores."""

    name: str = "pinned"

    def move(self, resident: ResidentWeights, intake: Intake, rows: Sequence[RawRows], arrived: Arrived) -> None:
        total = sum(part.data.nbytes for part in rows)
        threads = max(1, min(-(-total // _PIECE_BYTES), max(2, cores() - 1), _MOST_THREADS))
        being_read = min(threads, -(-threads * _PIECE_BYTES // intake.capacity) + 1)
        with ExitStack() as stack:
            reading = _Reading(intake, resident.plan, batches(rows, intake), threads)
            stack.callback(reading.close)
            sending = _Sending(intake, reading, arrived)
            stack.callback(sending.drop)
            run_crew(
                _read,
                repeat(reading.pieces, threads),
                threads=threads,
                name="mortice-upload",
                done=sending.send,
                started=lambda: reading.begin(being_read + _UNDER_WAY),
                stop=reading.stop,
            )
            sending.finish()


@frozen(eq=False)
class _Load:
    """A batch in a buffer.

    Attributes:
        batch: the rows in the file.
        staged: the rows in the buffer, the same parts.
        buffer: pinned.
        unread: the numbers of the pieces that are still to be read, in any order.

    """

    batch: Batch
    staged: Sequence[RawRows]
    buffer: PinnedBuffer
    unread: list[int]


@frozen(eq=False)
class _Piece:
    """Rows of a load for one thread to read."""

    load: _Load
    planned: PlannedWeight
    row: int
    out: NDArray[np.uint8]


Pieces = SimpleQueue[_Piece | None]
"""What is to be read, in order; None ends the thread that takes it."""


@define(eq=False)
class _Reading:
    """Buffers, each with the next batch that none has yet. The calling thread hands pieces out, so no lock is needed.

    Attributes:
        pieces: for the threads that read.

    """

    _intake: Intake
    _plan: WeightPlan
    _batches: Iterator[Batch]
    _threads: int
    pieces: Pieces = field(factory=SimpleQueue, init=False)
    _buffers: list[PinnedBuffer] = field(factory=list, init=False)

    def begin(self, most: int) -> None:
        """Hand out what `most` buffers hold.

        When all threads are there: a new thread waits for those that fault in the pages of new buffers.
        """
        for batch in islice(self._batches, most):
            self._buffers.append(self._intake.pin(self._intake.capacity))
            self._hand_out(batch, self._buffers[-1])
        if len(self._buffers) < most:
            self._end()

    def go_on(self, buffer: PinnedBuffer) -> None:
        """Use a buffer again, which the device has read."""
        batch = next(self._batches, None)
        if batch is None:
            self._end()
        else:
            self._hand_out(batch, buffer)

    def _hand_out(self, batch: Batch, buffer: PinnedBuffer) -> None:
        staged = _staged(batch, buffer.array)
        cuts = [(part, start, stop) for part in staged for start, stop in _cuts(part)]
        load = _Load(batch, staged, buffer, list(range(len(cuts))))
        for part, start, stop in cuts:
            out = part.data[start:stop].reshape(-1)
            self.pieces.put(_Piece(load, self._plan.weights[part.index], part.row_start + start, out))

    def _end(self) -> None:
        for _ in range(self._threads):
            self.pieces.put(None)

    def stop(self) -> None:
        """End the threads after the piece each has in hand."""
        with suppress(Empty):
            while True:
                self.pieces.get_nowait()
        self._end()

    def close(self) -> None:
        """Let go of the memory; nobody uses it."""
        for buffer in self._buffers:
            buffer.close()


def _staged(batch: Batch, buffer: NDArray[np.uint8]) -> list[RawRows]:
    """Where the parts of a batch will lie, apart as on the device: all of it is one copy."""
    staged = []
    at = 0
    for part in batch:
        data = buffer[at : at + part.data.nbytes].reshape(part.data.shape)
        staged.append(RawRows(index=part.index, row_start=part.row_start, data=data))
        at += -(-part.data.nbytes // ALIGNMENT) * ALIGNMENT
    return staged


def _cuts(part: RawRows) -> Iterator[tuple[int, int]]:
    """Start and stop of rows worth one thread's while, about equally many each."""
    rows, count = len(part.data), -(-part.data.nbytes // _PIECE_BYTES)
    step = -(-rows // count)
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def _read(queues: Iterator[Pieces]) -> Iterator[_Load]:
    """Read pieces past the mapping where the file can be read so; the thread with a load's last yields the load."""
    for pieces in queues:
        while (piece := pieces.get()) is not None:
            piece.planned.read_rows(piece.row, piece.out)
            if piece.load.unread.pop() == 0:  # one call, so that no two threads find themselves the last
                yield piece.load


@define(eq=False)
class _Sending:
    """What is on its way to the device, the oldest first."""

    _intake: Intake
    _reading: _Reading
    _arrived: Arrived
    _under_way: deque[tuple[Sent, _Load]] = field(factory=deque, init=False)

    def send(self, load: _Load) -> None:
        """Send a load; wait for an older one when many are under way."""
        self._under_way.append((self._intake.send(load.staged), load))
        if len(self._under_way) > _UNDER_WAY:
            self._wait()

    def finish(self) -> None:
        """Wait for all."""
        while self._under_way:
            self._wait()

    def _wait(self) -> None:
        sent, load = self._under_way[0]
        sent.wait()
        self._under_way.popleft()
        self._reading.go_on(load.buffer)
        self._arrived(load.batch)

    def drop(self) -> None:
        """After an error: wait until the device reads none of the buffers."""
        while self._under_way:
            with suppress(Exception):  # of the device, which has then stopped reading
                self._under_way.popleft()[0].wait()
