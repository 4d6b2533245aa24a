"""Times of the linear maps of a step, each by itself: what an executor may offer a benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from attrs import field, frozen, validators

from mortice.core.model.operators import WeightRef
from mortice.core.plugin.interfaces import Runtime

__all__ = ["ProductTime", "TimesProducts"]


@frozen(eq=False, kw_only=True)
class ProductTime:
    """What the linear maps that an executor does together take.

    Attributes:
        weights: of the maps, in their order.
        nbytes: of those weights as they lie on the device.
        launches: what the device is given to do for them.
        seconds: of each repeat, from one such product to the next.

    """

    weights: tuple[WeightRef, ...] = field(validator=validators.min_len(1))
    nbytes: int
    launches: int
    seconds: tuple[float, ...] = field(validator=validators.min_len(1))


@runtime_checkable
class TimesProducts(Protocol):
    """An executor that can time the linear maps of a step by themselves; optional.

    The executor offers it, not its runtime, so that one that cannot is known before anything is uploaded.
    """

    def time_products(self, runtime: Runtime, rows: int, repeats: int) -> Sequence[ProductTime]:
        """Time all maps that differ in role, type or shape, with weights that no cache holds.

        Args:
            runtime: one that this executor opened; no step of it is under way.
            rows: of a step, at least 1.
            repeats: times to measure, at least 1.

        Returns:
            In the order of the program.

        Raises:
            InputError: more rows than it does at once.
            DoesNotFitError: no room for copies of the weights.

        """
        ...
