"""The reference executor with the input of its products rounded as steps of one token round it on a card."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import numpy as np
from numpy.typing import NDArray

from mortice.plugins.executors.reference import runtime

__all__ = ["int8_activations", "through_int8"]

Array = NDArray[np.float32]

_FLOAT_TYPES = frozenset({"F32", "F16", "BF16"})
_GROUP = 32


def through_int8(x: Array) -> Array:
    """`x` (tokens, columns) as it comes back from int8, one scale for 32 columns: ``ops/activations.cuh``."""
    groups = np.ascontiguousarray(x, np.float32).reshape(-1, _GROUP)
    largest = np.abs(groups).max(1, keepdims=True)
    inverse = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=largest > 0)
    rounded: Array = np.rint(groups * inverse) * (largest / np.float32(127))
    return rounded.reshape(x.shape)


@contextmanager
def int8_activations() -> Iterator[None]:
    """Within, products with quantised weights on the reference executor take int8 activations."""
    apply = runtime._Weight.apply

    def rounded(weight: runtime._Weight, x: Array) -> Array:
        integer = weight.planned.tensor.qtype.name not in _FLOAT_TYPES
        return apply(weight, through_int8(x) if integer else x)

    with mock.patch.object(runtime._Weight, "apply", rounded):
        yield
