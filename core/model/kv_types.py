"""The types a KV cache can be kept in: GGML's of the same name, in blocks along a head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from mortice.core.model.program import KvShape
from mortice.core.model.qtypes import GGML_TYPES, QType

__all__ = ["KV_TYPES", "kv_cache_bytes", "kv_type_reasons"]

KV_TYPES: Mapping[str, QType] = MappingProxyType(
    {qtype.name.lower(): qtype for qtype in GGML_TYPES.values() if qtype.name in {"F32", "F16", "Q8_0"}}
)
"""By the value of ``executor.kv``."""


def kv_cache_bytes(shape: KvShape, kv_type: str, tokens: int) -> int:
    """Bytes of K and V together of one layer, for `tokens` tokens; `kv_type` is one that suits the shape."""
    return 2 * tokens * shape.num_kv_heads * KV_TYPES[kv_type].row_bytes(shape.head_dim)


def kv_type_reasons(shapes: Sequence[KvShape], kv_type: str, executor: str) -> list[str]:
    """Why an executor that keeps all of `KV_TYPES` cannot keep this cache as `kv_type`; empty when it can."""
    if kv_type not in KV_TYPES:
        return [f"executor.kv = {kv_type!r}: the {executor} executor keeps auto, {', '.join(KV_TYPES)}"]
    block = KV_TYPES[kv_type].block_elements
    odd = sorted({shape.head_dim for shape in shapes if shape.head_dim % block})
    return [f"executor.kv = {kv_type!r}: found head_dim {head_dim}, wanted a multiple of {block}" for head_dim in odd]
