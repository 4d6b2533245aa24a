"""Which kernel attends for rows by themselves, and how it is cut."""

from __future__ import annotations

from typing import Literal

from attrs import frozen

from mortice.core.model.operators import Attention

__all__ = ["LEAST_WARPS", "RowsKernel", "rows_kernel"]

_HEAD_DIMS, _MOST_GROUP = (64, 128, 256), 8
"""What ``ops/attention_rows.cu`` takes: sizes of a head, and query heads of a KV head."""
LEAST_WARPS, _MOST_WARPS = 4, 8
_SUMS_BYTES = 48 << 10
"""Of the sums of a block's warps."""


@frozen(kw_only=True)
class RowsKernel:
    """A kernel for rows by themselves.

    Attributes:
        name: of the file in ``ops`` and of the kernel.
        warps: of a block; each takes every so many pieces of the context.

    """

    name: Literal["attention", "attention_rows"]
    warps: int


def rows_kernel(attention: Attention, kv_type: str, *, exact: bool) -> RowsKernel:
    """Tensor cores where they apply, with as many warps a block as shared memory allows.

    They multiply halves. So where float32 is wanted, of activations (`exact`) or of the cache, they do not apply.
    """
    group = attention.num_heads // attention.num_kv_heads
    if exact or kv_type == "f32" or attention.head_dim not in _HEAD_DIMS or group > _MOST_GROUP:
        return RowsKernel(name="attention", warps=LEAST_WARPS)
    warps = _MOST_WARPS
    while warps > LEAST_WARPS and warps * 4 * group * (attention.head_dim + 2) > _SUMS_BYTES:
        warps //= 2
    return RowsKernel(name="attention_rows", warps=warps)
