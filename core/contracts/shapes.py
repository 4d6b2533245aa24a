"""The shapes that roles usually have, as expressions, and the search for the one that a file's tensors have."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import product

from mortice.arch_contracts.expressions import Expression, ExpressionError, Number
from mortice.arch_contracts.vocabulary import GLOBAL_ROLES, LAYER_ROLES

__all__ = ["FUSED", "Shape", "fitting_shape", "usual_shapes"]

Shape = tuple[Expression, ...]
Values = Mapping[str, Number]

_Q, _KV = "num_heads * head_dim", "num_kv_heads * head_dim"
_USUAL: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "token_embd": (("vocab_size", "hidden_size"),),
    "position_embd": (("context_length", "hidden_size"),),
    "rope_freqs": (("rope_dim / 2",),),
    "rope_factors_short": (("rope_dim / 2",),),
    "rope_factors_long": (("rope_dim / 2",),),
    "output": (("vocab_size", "hidden_size"),),
    "attn_q": ((_Q, "hidden_size"),),
    "attn_k": ((_KV, "hidden_size"),),
    "attn_v": ((_KV, "hidden_size"),),
    "attn_qkv": (("(num_heads + 2 * num_kv_heads) * head_dim", "hidden_size"),),
    "attn_q_norm": (("head_dim",), (_Q,), ("num_heads", "head_dim")),
    "attn_k_norm": (("head_dim",), (_KV,), ("num_kv_heads", "head_dim")),
    "attn_output": (("hidden_size", _Q),),
    "ffn_gate": (("ffn_size", "hidden_size"),),
    "ffn_up": (("ffn_size", "hidden_size"),),
    "ffn_gate_up": (("2 * ffn_size", "hidden_size"),),
    "ffn_down": (("hidden_size", "ffn_size"),),
}
_NORM = (("hidden_size",),)
_EXTENTS = ("hidden_size", _Q, _KV, "ffn_size", "head_dim", "num_heads", "num_kv_heads", "vocab_size", "context_length")

FUSED: Mapping[str, Mapping[str, str]] = {
    "attn_qkv": {"attn_q": _Q, "attn_k": _KV, "attn_v": _KV},
    "ffn_gate_up": {"ffn_gate": "ffn_size", "ffn_up": "ffn_size"},
}
"""The parts of fused weights in the usual order, with the rows of each."""


def usual_shapes(role: str) -> tuple[Shape, ...]:
    """The shapes that a role may have, the usual one first; a bias has as many elements as its weight has rows."""
    assert role in GLOBAL_ROLES or role in LAYER_ROLES, role
    base = role.removesuffix("_bias")
    texts = _USUAL.get(base, _NORM)
    if base != role:
        texts = tuple((shape[0],) for shape in texts)
    return tuple(tuple(map(Expression, shape)) for shape in texts)


def fitting_shape(
    candidates: Iterable[Shape], found: Sequence[tuple[tuple[int, ...], Values]]
) -> tuple[Shape | None, bool]:
    """The first candidate that every tensor of a role has.

    Args:
        candidates: shapes to try.
        found: for each layer that has the tensor its shape, and the hyperparameters there.

    Returns:
        The shape, and whether it is one of the candidates; else one put together of what has these extents, else None.

    """
    for candidate in candidates:
        if all(_fits(candidate, shape, values) for shape, values in found):
            return candidate, True
    ranks = {len(shape) for shape, _ in found}
    rank = ranks.pop() if len(ranks) == 1 else 0
    if rank not in (1, 2):  # a contract has vectors and matrices
        return None, False
    for texts in product(_EXTENTS, repeat=rank):
        shape_of_texts = tuple(map(Expression, texts))
        if all(_fits(shape_of_texts, shape, values) for shape, values in found):
            return shape_of_texts, False
    return None, False


def _fits(candidate: Shape, shape: tuple[int, ...], values: Values) -> bool:
    if len(candidate) != len(shape):
        return False
    try:
        return all(extent.evaluate(values) == size for extent, size in zip(candidate, shape, strict=True))
    except ExpressionError:
        return False
