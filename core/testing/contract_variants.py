"""The kinds of file a contract allows: which optional weights are there, in every way that differs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from attrs import field, frozen

from mortice.arch_contracts.schema import Contract, Role

__all__ = ["Variant", "variants_of"]

_TOGETHER = (("attn_k_norm", "attn_q_norm"), ("rope_factors_long", "rope_factors_short"))
"""Roles of which a file has both or none."""


@frozen(eq=False)
class Variant:
    """A kind of file.

    Attributes:
        label: what is special about it.
        arguments: for `write_tiny_model`.

    """

    label: str
    arguments: Mapping[str, Any] = field(factory=dict)


def variants_of(contract: Contract) -> Iterator[Variant]:
    """The plainest file first; then fused weights, a head of its own, and each optional weight by itself."""
    roles: Mapping[str, Role] = {**contract.global_roles, **contract.layer_roles}
    needed = {role for role, _ in (*contract.needed_global_roles(), *contract.needed_layer_roles(parallel=False))}
    optional = {key: role for key, role in roles.items() if role.presence == "optional" and role.fallback is None}
    fused = {key: role for key, role in optional.items() if role.split}
    parts = {part for role in fused.values() for part in role.split}
    base = sorted(key for key in optional.keys() & needed if key not in fused)
    # what only a fused weight can give
    base += sorted(key for key, role in fused.items() if not role.split.keys() <= roles.keys())
    yield Variant("plain", {"include": base})
    if fused.keys() - base:
        yield Variant("fused", {"include": sorted({*base, *fused} - parts)})
    if any(role.fallback is not None for role in roles.values()):
        yield Variant("untied", {"include": base, "tied": False})
    for key in sorted(optional.keys() - fused.keys() - set(base)):
        together = next((pair for pair in _TOGETHER if key in pair and optional.keys() >= set(pair)), (key,))
        if key == together[0]:
            yield Variant("with " + " and ".join(together), {"include": [*base, *together]})
