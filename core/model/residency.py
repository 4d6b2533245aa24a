"""What uploading and binding give back: resident weights, and operators bound to them by index."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
from attrs import define, field, frozen
from numpy.typing import NDArray

from mortice.core.model.operators import Operator
from mortice.core.model.weight_plan import PlannedWeight, WeightPlan

__all__ = ["Arena", "BoundModel", "BoundOperator", "ResidentWeights", "bind"]


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
        """Say that a weight is in place."""
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
