"""A device of ordinary memory, as slow as a real one: a buffer is read when it is waited for, and no sooner.

What a real device would punish with wrong bytes, a buffer let go or changed too early, is noticed here and said.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import NoReturn

import numpy as np
from attrs import define, field, frozen
from numpy.typing import NDArray

from mortice.core.model.qtypes import QType
from mortice.core.model.residency import RawRows, ResidentWeights
from mortice.core.model.types import DeviceInfo
from mortice.core.model.weight_plan import ALIGNMENT, Kernel, PlannedWeight, WeightPlan
from mortice.core.testing.suite import CheckError

__all__ = [
    "FakeArena",
    "FakeHostArena",
    "FakeIntake",
    "GroupedRows",
    "Held",
    "OnCall",
    "fake_device_info",
    "fake_kernels",
    "row_step_of",
    "stored_by_the_host",
]

OnCall = Callable[[str, int], None]
"""Told before each call of the device, with its name and how many there were before; it may raise."""

RowStep = Callable[[PlannedWeight], int | None]
"""Rows of a weight come in multiples of this many; None where only the host can lay it out."""

_PAGE = 4096


def fake_device_info(kind: str = "cuda") -> DeviceInfo:
    """A device with 1 GiB, all of it free."""
    capability = (9, 0) if kind == "cuda" else None
    return DeviceInfo(
        kind=kind, name="a fake device", total_bytes=1 << 30, free_bytes=1 << 30, compute_capability=capability
    )


# layouts ----------------------------------------------------------------------------------------------------------


@frozen(eq=False)
class GroupedRows:
    """A layout that no plain copy makes: rows in groups, and in a group the bytes of all rows by turns.

    Attributes:
        name: of the layout.
        by_device: whether the device can lay rows out; else the host has to.
        on_store: called before the host lays a weight out; it may raise.

    """

    name: str = "grouped rows"
    by_device: bool = True
    on_store: Callable[[], None] = field(default=lambda: None)

    def rows_together(self, rows: int) -> int:
        """Rows of a group."""
        return next(size for size in (4, 2, 1) if rows % size == 0)

    def nbytes(self, qtype: QType, rows: int, columns: int) -> int:
        return qtype.row_bytes(columns) * rows

    def store(self, rows: NDArray[np.uint8], columns: int, out: NDArray[np.uint8]) -> None:
        self.on_store()
        self.place(rows, columns, out)

    def place(self, rows: NDArray[np.uint8], columns: int, out: NDArray[np.uint8]) -> None:
        """What `store` does, without telling."""
        del columns
        group = self.rows_together(len(rows))
        out[...] = rows.reshape(-1, group, rows.shape[1]).transpose(0, 2, 1).reshape(-1) ^ 0x5A


def fake_kernels(qtypes: Sequence[str], on_store: Callable[[], None] = lambda: None) -> list[Kernel]:
    """Kernels of the fake device: matrices are laid out by it, vectors by the host."""
    matrices, vectors = GroupedRows(on_store=on_store), GroupedRows("by the host", by_device=False, on_store=on_store)
    operators = [(name, matrices) for name in ("linear", "embed", "embed_positions")]
    operators += [(name, vectors) for name in ("norm", "add_bias", "rope")]
    return [Kernel(operator=name, qtype=qtype, layout=layout) for qtype in qtypes for name, layout in operators]


def row_step_of(planned: PlannedWeight) -> int | None:
    """`RowStep` of the layouts above."""
    layout = planned.layout
    return layout.rows_together(planned.rows) if isinstance(layout, GroupedRows) and layout.by_device else None


def stored_by_the_host(plan: WeightPlan) -> NDArray[np.uint8]:
    """The arena as `Layout.store` fills it; zeros between the weights."""
    arena = np.zeros(plan.arena_bytes, np.uint8)
    for planned in plan.weights:
        _place(planned, planned.source(), arena)
    return arena


def _place(planned: PlannedWeight, rows: NDArray[np.uint8], arena: NDArray[np.uint8]) -> None:
    out = arena[planned.offset : planned.offset + planned.nbytes]
    place = planned.layout.place if isinstance(planned.layout, GroupedRows) else planned.layout.store
    place(rows, planned.columns, out)


# the device -------------------------------------------------------------------------------------------------------


class Held:
    """Something that has to be closed, after the device has read it."""

    def __init__(self, arena: FakeArena, nbytes: int, address: int = 0) -> None:
        self.arena, self.closed = arena, False
        self.array = np.zeros(nbytes if not address else 0, np.uint8)
        self.start = address or self.array.ctypes.data
        self.stop = self.start + nbytes
        with arena.lock:
            arena.held.append(self)

    def close(self) -> None:
        """Let it go; a device that still reads it is a misuse."""
        if self.closed:
            return
        if any(self.has(rows) for sent in list(self.arena.under_way) for rows in sent.rows):
            self.arena.misused("host memory is let go while the device still reads it; wait() first")
        self.closed = True
        with self.arena.lock:
            self.arena.held.remove(self)

    def has(self, rows: RawRows) -> bool:
        """Whether all of `rows` lies in it."""
        start = rows.data.ctypes.data
        return self.start <= start and start + rows.data.nbytes <= self.stop

    def touches(self, rows: RawRows) -> bool:
        """Whether some of `rows` lies in it."""
        start = rows.data.ctypes.data
        return start < self.stop and self.start < start + rows.data.nbytes


class _Sent:
    def __init__(self, intake: FakeIntake, rows: Sequence[RawRows]) -> None:
        self.intake, self.rows = intake, rows

    def wait(self) -> None:
        arena = self.intake.arena
        with arena.lock:
            if self in arena.under_way:
                arena.under_way.remove(self)
                for part in self.rows:
                    stop = part.row_start + len(part.data)
                    self.intake.raw[part.index][part.row_start : stop] = part.data
                    self.intake.times[part.index][part.row_start : stop] += 1
        arena.called("wait")


class FakeIntake:
    """Keeps rows until all are there, then lays them out."""

    def __init__(self, arena: FakeArena, plan: WeightPlan, capacity: int) -> None:
        self.arena, self.plan, self.capacity = arena, plan, capacity
        self.raw = [
            np.zeros((planned.rows, planned.source_bytes // planned.rows), np.uint8) for planned in plan.weights
        ]
        self.times = [np.zeros(len(rows), np.int64) for rows in self.raw]

    def row_step(self, index: int) -> int | None:
        """See `Intake.row_step`."""
        return self.arena.row_step(self.plan.weights[index])

    def pin(self, nbytes: int) -> Held:
        """See `Intake.pin`."""
        self.arena.called("pin")
        return Held(self.arena, nbytes)

    def register(self, address: int, nbytes: int, *, read_only: bool) -> Held:
        """See `Intake.register`."""
        self.arena.called("register")
        if address % _PAGE or nbytes % _PAGE:
            self.arena.misused(f"register wants whole pages, found {nbytes} bytes at {address:#x}")
        if not read_only:
            self.arena.misused("register: a model file is mapped for reading; wanted read_only=True")
        with self.arena.lock:
            overlapping = [held for held in self.arena.held if address < held.stop and held.start < address + nbytes]
        if overlapping:
            self.arena.misused("a page is registered twice")
        return Held(self.arena, nbytes, address)

    def send(self, rows: Sequence[RawRows]) -> _Sent:
        """See `Intake.send`."""
        arena = self.arena
        arena.called("send")
        nbytes = sum(-(-part.data.nbytes // ALIGNMENT) * ALIGNMENT for part in rows)
        if nbytes > self.capacity:
            arena.misused(f"send: {nbytes} bytes at once, the intake takes {self.capacity}")
        for part in rows:
            self._check(part)
        sent = _Sent(self, list(rows))
        with arena.lock:
            arena.under_way.append(sent)
        return sent

    def _check(self, part: RawRows) -> None:
        arena, name = self.arena, self.plan.weights[part.index].tensor.name
        step = self.row_step(part.index)
        if step is None:
            arena.misused(f"{name}: sent as rows, but only the host can lay it out")
        if part.row_start % step or len(part.data) % step:
            arena.misused(f"{name}: rows {part.row_start} to {part.row_start + len(part.data)}, wanted whole {step}")
        with arena.lock:
            inside = any(held.has(part) for held in arena.held)
            across = any(not held.has(part) and held.touches(part) for held in arena.held)
        arena.sources["pinned" if inside else "ordinary"] += part.data.nbytes
        if across:
            arena.misused(f"{name}: a copy reaches over the end of pinned memory")

    def finish(self) -> None:
        """See `Intake.finish`."""
        self.arena.called("finish")
        while self.arena.under_way:
            self.arena.under_way[0].wait()
        for index, planned in enumerate(self.plan.weights):
            times = self.times[index]
            if self.row_step(index) is None or not times.any():
                continue
            if not times.all():
                self.arena.misused(f"{planned.tensor.name}: {int((times == 0).sum())} of its rows never came")
            _place(planned, self.raw[index], self.arena.memory)


class FakeArena:
    """Fits `DeviceArena`.

    Attributes:
        calls: how often each function was called.
        sources: bytes sent from pinned and from ordinary memory.
        held: pinned memory that was not given back.
        under_way: what was sent and not waited for.
        misuses: what a real device would not forgive; each was raised as well.
        memory: the device's.

    """

    kind = "cuda"
    address = 1 << 40

    def __init__(
        self,
        nbytes: int,
        capacity: int = 64 * 1024,
        on_call: OnCall | None = None,
        row_step: RowStep = row_step_of,
    ) -> None:
        self.nbytes, self.capacity, self.on_call, self.row_step = nbytes, capacity, on_call, row_step
        self.memory = np.zeros(nbytes, np.uint8)
        self.calls: Counter[str] = Counter()
        self.sources: Counter[str] = Counter()
        self.held: list[Held] = []
        self.under_way: list[_Sent] = []
        self.misuses: list[str] = []
        self.intakes_open = 0
        self.lock = Lock()

    def called(self, name: str) -> None:
        """Count a call, and tell `on_call`."""
        with self.lock:
            before = self.calls[name]
            self.calls[name] += 1
        if self.on_call is not None:
            self.on_call(name, before)

    def misused(self, what: str) -> NoReturn:
        """Remember a misuse and raise it: a strategy's threads may swallow what is raised."""
        self.misuses.append(what)
        raise CheckError(what)

    def host_view(self) -> None:
        """None: the host cannot write device memory."""

    def write(self, offset: int, data: NDArray[np.uint8]) -> None:
        """See `Arena.write`."""
        self.called("write")
        if offset < 0 or offset + len(data) > self.nbytes:
            self.misused(f"write: bytes {offset} to {offset + len(data)} of an arena of {self.nbytes}")
        self.memory[offset : offset + len(data)] = data

    @contextmanager
    def receive(self, plan: WeightPlan) -> Iterator[FakeIntake]:
        """See `DeviceArena.receive`."""
        self.called("receive")
        self.intakes_open += 1
        try:
            yield FakeIntake(self, plan, self.capacity)
        finally:
            self.intakes_open -= 1
            if self.held:
                self.misuses.append(f"{len(self.held)} pieces of pinned memory outlive the intake they came from")

    def close(self) -> None:
        """See `Arena.close`."""
        self.called("close")

    def resident(self, plan: WeightPlan) -> ResidentWeights:
        """A plan of which nothing is resident here yet."""
        return ResidentWeights(plan=plan, arena=self)


@define(eq=False)
class FakeHostArena:
    """Host memory that fits `Arena`; the strategy's own calls are counted like the device's."""

    nbytes: int
    on_call: OnCall | None = None
    kind: str = "cpu"
    memory: NDArray[np.uint8] = field(init=False, repr=False)
    calls: Counter[str] = field(factory=Counter, init=False)

    def __attrs_post_init__(self) -> None:
        self.memory = np.zeros(self.nbytes, np.uint8)

    @property
    def address(self) -> int:
        """Of the first byte."""
        return int(self.memory.ctypes.data)

    def called(self, name: str) -> None:
        """Count a call, and tell `on_call`."""
        before = self.calls[name]
        self.calls[name] += 1
        if self.on_call is not None:
            self.on_call(name, before)

    def host_view(self) -> NDArray[np.uint8]:
        """The memory itself."""
        self.called("host_view")
        return self.memory

    def write(self, offset: int, data: NDArray[np.uint8]) -> None:
        """See `Arena.write`."""
        self.called("write")
        self.memory[offset : offset + len(data)] = data

    def close(self) -> None:
        """See `Arena.close`."""
        self.called("close")
