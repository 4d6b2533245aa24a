"""What uploading and binding give back: resident weights, and operators bound to them by index."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

import numpy as np
from attrs import define, field, frozen
from numpy.typing import NDArray

from mortice.core.model.operators import Operator
from mortice.core.model.weight_plan import ALIGNMENT, PlannedWeight, WeightPlan

__all__ = [
    "Arena",
    "BoundModel",
    "BoundOperator",
    "DeviceArena",
    "Intake",
    "Pinned",
    "PinnedBuffer",
    "RawRows",
    "ResidentWeights",
    "Sent",
    "batches",
    "bind",
]


class Arena(Protocol):
    """One block of memory that holds all weights of a model."""

    @property
    def kind(self) -> str:
        """``cpu`` or ``cuda``."""
        ...

    @property
    def address(self) -> int:
        """Address of the first byte, in the device's own address space."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes."""
        ...

    def host_view(self) -> NDArray[np.uint8] | None:
        """The bytes themselves where the host can write them, else None."""
        ...

    def write(self, offset: int, data: NDArray[np.uint8]) -> None:
        """Copy `data`, one dimension, to `offset`; done when it returns."""
        ...

    def close(self) -> None:
        """Give the memory back; calling twice is fine."""
        ...


@frozen(eq=False, kw_only=True)
class RawRows:
    """Neighbouring rows of a planned weight, as the file has them.

    Attributes:
        index: the weight in the plan.
        row_start: the first of them, counted in the weight.
        data: ``uint8``, shape (rows, bytes of a row), C-contiguous.

    """

    index: int
    row_start: int
    data: NDArray[np.uint8] = field(repr=False)


class Pinned(Protocol):
    """Host memory that the device reads by itself, until it is closed."""

    def close(self) -> None:
        """Let it go; nothing that was sent from it may still be on its way. Calling twice is fine."""
        ...


class PinnedBuffer(Pinned, Protocol):
    """Pinned host memory to fill."""

    @property
    def array(self) -> NDArray[np.uint8]:
        """The bytes, one dimension, writable; not to be used after `close`."""
        ...


class Sent(Protocol):
    """Rows on their way to the device."""

    def wait(self) -> None:
        """Return when the host memory they were sent from is no longer read."""
        ...


class Intake(Protocol):
    """An upload under way: takes rows as they are in the file, lays them out on the device. Threads may share it."""

    @property
    def capacity(self) -> int:
        """Bytes that one `send` may bring, a multiple of `ALIGNMENT`; each part counts as whole `ALIGNMENT`."""
        ...

    def row_step(self, index: int) -> int | None:
        """Rows of this weight come in multiples of this many; None when only the host can lay it out."""
        ...

    def pin(self, nbytes: int) -> PinnedBuffer:
        """Pinned host memory, to be closed by the caller.

        A device may pin it when it was filled, at the first `send` from it.

        Raises:
            DoesNotFitError: when it is not there.

        """
        ...

    def register(self, address: int, nbytes: int, *, read_only: bool) -> Pinned:
        """Pin memory that is there already, to be closed by the caller.

        Args:
            address: the start of a page.
            nbytes: whole pages, none of them registered.
            read_only: the memory cannot be written.

        Raises:
            UnsupportedError: when the device or its driver does not do that with this memory.

        """
        ...

    def send(self, rows: Sequence[RawRows]) -> Sent:
        """Queue rows, each part in one piece of pinned memory, to be copied and laid out.

        From other memory it works too, and returns once the bytes have left it.

        Raises:
            DoesNotFitError: when memory that `pin` gave cannot be pinned.

        """
        ...

    def finish(self) -> None:
        """Return when all that was sent is in its place."""
        ...


@runtime_checkable
class DeviceArena(Arena, Protocol):
    """An arena that lays weights out itself, so that an upload moves nothing but bytes of the file."""

    def receive(self, plan: WeightPlan) -> AbstractContextManager[Intake]:
        """Take in weights of `plan`. What that needs on the device is there inside the ``with`` only.

        Raises:
            DoesNotFitError: when there is no memory for the bytes in passing.
            DeviceError: when the code that lays weights out cannot be built.

        """
        ...


def batches(rows: Iterable[RawRows], intake: Intake) -> Iterator[tuple[RawRows, ...]]:
    """Cut and collect rows into what one `Intake.send` takes each, in their order."""
    batch: list[RawRows] = []
    room = intake.capacity
    for part in rows:
        step = intake.row_step(part.index)
        assert step is not None, "weights that the host lays out do not come as rows"
        done, group_bytes = 0, step * part.data.shape[1]
        while done < len(part.data):
            fitting = room // group_bytes * step
            if not fitting:
                assert batch, "an empty batch has room for some rows of every weight"
                yield tuple(batch)
                batch, room = [], intake.capacity
                continue
            data = part.data[done : done + fitting]
            batch.append(RawRows(index=part.index, row_start=part.row_start + done, data=data))
            room -= -(-data.nbytes // ALIGNMENT) * ALIGNMENT
            done += len(data)
    if batch:
        yield tuple(batch)


@define(eq=False, kw_only=True)
class ResidentWeights:
    """The arena of a plan and which of its weights are in it.

    A weight that is resident stays where it is: uploading again moves nothing.
    """

    plan: WeightPlan
    arena: Arena
    _resident: set[int] = field(factory=set, repr=False)

    def missing(self) -> Iterator[tuple[int, PlannedWeight]]:
        """Weights still to be uploaded, with their index in the plan."""
        for index, planned in enumerate(self.plan.weights):
            if index not in self._resident:
                yield index, planned

    def mark(self, index: int) -> None:
        """Say that a weight is in place; IndexError for a number that no weight of the plan has."""
        if index not in range(len(self.plan.weights)):
            raise IndexError(f"mark: there is no weight {index!r:.40}, the plan has {len(self.plan.weights)}")
        self._resident.add(index)

    @property
    def complete(self) -> bool:
        """Whether every weight is in place."""
        return len(self._resident) == len(self.plan.weights)

    def address(self, index: int) -> int:
        """Where a weight starts."""
        return self.arena.address + self.plan.weights[index].offset

    def close(self) -> None:
        """Free the arena."""
        self._resident.clear()
        self.arena.close()


@frozen(eq=False)
class BoundOperator:
    """An operator and the indices in the plan of the weights it reads."""

    operator: Operator
    weights: tuple[int, ...]


@frozen(eq=False, kw_only=True)
class BoundModel:
    """A program whose operators know their weights by index. No name is looked up from here on."""

    resident: ResidentWeights
    operators: tuple[BoundOperator, ...] = field(repr=False)

    @property
    def plan(self) -> WeightPlan:
        """The plan the weights follow."""
        return self.resident.plan


def bind(resident: ResidentWeights) -> BoundModel:
    """Bind each operator to its resident weights, once."""
    assert resident.complete, "only resident weights can be bound"
    index: dict[Any, int] = {planned.weight: number for number, planned in enumerate(resident.plan.weights)}
    operators = tuple(
        BoundOperator(operator, tuple(index[weight] for weight in operator.weights))
        for operator in resident.plan.program.operators
    )
    return BoundModel(resident=resident, operators=operators)
