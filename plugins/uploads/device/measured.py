"""The fastest way, found while uploading: each way is judged by the rate at which rows arrive."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
from attrs import define, field

from mortice.core.errors import DoesNotFitError, UnsupportedError
from mortice.core.model.residency import Intake, RawRows, ResidentWeights
from mortice.core.plugin.interfaces import Emit
from mortice.plugins.uploads.device.strategy import Arrived, Way, upload_by

__all__ = ["MeasuredUpload", "MeasuredWay"]

_TRIAL_BYTES = 256 << 20
_WORTH_A_TRIAL = 4
"""Trials left to send: with fewer, the end is nearer than an answer."""
_GOOD_ENOUGH = 12e9
"""Bytes per second. Pinned memory is tried first; where it reaches this, no other way was seen to be faster."""


class _TooSlowError(Exception):
    """Another way deserves the rest."""

    def __init__(self, rate: float) -> None:
        super().__init__(f"{rate / 1e9:.1f} GB/s")
        self.rate = rate


@define(eq=False)
class MeasuredUpload:
    """What ``upload.strategy = "auto"`` takes on a GPU."""

    ways: Sequence[Way]
    name: str = field(default="measured", init=False)
    device_kind: str = field(default="cuda", init=False)

    def upload(self, resident: ResidentWeights, emit: Emit) -> int:
        return upload_by(MeasuredWay(self.ways), resident, emit)


@define(eq=False)
class MeasuredWay:
    """Goes the first of `ways` that is good enough, else the fastest of those that can be gone.

    A way is stopped after a trial, counted from its first arrival, when it is slower than the best before it, or too
    slow to leave those after it untried. Rows then on their way are sent again.
    """

    ways: Sequence[Way]
    name: str = "measured"
    trial_bytes: int = field(default=_TRIAL_BYTES, kw_only=True)
    good_enough: float = field(default=_GOOD_ENOUGH, kw_only=True)
    clock: Callable[[], float] = field(default=time.perf_counter, kw_only=True)

    def move(self, resident: ResidentWeights, intake: Intake, rows: Sequence[RawRows], arrived: Arrived) -> None:
        left = _Left(rows, arrived)
        best: Way | None = None
        best_rate = 0.0
        refusals = []
        for number, way in enumerate(self.ways):
            if best is not None and left.nbytes < _WORTH_A_TRIAL * self.trial_bytes:
                break
            last = number == len(self.ways) - 1
            wanted = best_rate if last else max(best_rate, self.good_enough)
            try:
                way.move(resident, intake, left.rows(), self._judged(left, wanted))
            except _TooSlowError as slow:
                if slow.rate > best_rate:
                    best, best_rate = way, slow.rate
            except (UnsupportedError, DoesNotFitError) as refusal:
                refusals.append(str(refusal))
            else:
                return
        if best is None:
            raise UnsupportedError("\n".join(refusals))
        best.move(resident, intake, left.rows(), left.arrived)

    def _judged(self, left: _Left, wanted: float) -> Arrived:
        """`left.arrived`, until a trial says that the way is slower than `wanted`, where enough is left to care."""
        began: float | None = None
        seen = 0

        def arrived(parts: Sequence[RawRows]) -> None:
            nonlocal began, seen
            left.arrived(parts)
            if seen >= self.trial_bytes:  # judged
                return
            if began is None:  # what came before, such as pinning memory, is paid already
                began = self.clock()
                return
            seen += sum(part.data.nbytes for part in parts)
            if seen >= self.trial_bytes and left.nbytes >= _WORTH_A_TRIAL * self.trial_bytes:
                rate = seen / (self.clock() - began)
                if rate < wanted:
                    raise _TooSlowError(rate)

        return arrived


class _Left:
    """Which rows have not arrived, whatever parts they come in.

    Parts are only noted when they come: the thread that hears of them is the one that feeds the device.
    """

    def __init__(self, rows: Sequence[RawRows], arrived: Arrived) -> None:
        self._rows = rows
        self._arrived = arrived
        self._parts: list[RawRows] = []

    def arrived(self, parts: Sequence[RawRows]) -> None:
        self._parts += parts
        self._arrived(parts)

    @property
    def nbytes(self) -> int:
        """Of the rows left."""
        return sum(part.data.nbytes for part in self._rows) - sum(part.data.nbytes for part in self._parts)

    def rows(self) -> list[RawRows]:
        """Those left, in their order, neighbours together."""
        if not self._parts:  # most often: the first way is also the last
            return list(self._rows)
        missing = {part.index: np.ones(len(part.data), np.bool_) for part in self._rows}
        first = {part.index: part.row_start for part in self._rows}
        for part in self._parts:
            start = part.row_start - first[part.index]
            missing[part.index][start : start + len(part.data)] = False
        left = []
        for weight in self._rows:
            edges = np.flatnonzero(np.diff(missing[weight.index], prepend=False, append=False))
            for start, stop in edges.reshape(-1, 2).tolist():
                row_start = weight.row_start + start
                left.append(RawRows(index=weight.index, row_start=row_start, data=weight.data[start:stop]))
        return left
