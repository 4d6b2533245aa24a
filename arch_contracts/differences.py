"""What two contracts say differently, key by key; defaults count as said."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from attrs import fields, frozen, has

from mortice.arch_contracts.expressions import Expression
from mortice.arch_contracts.vocabulary import Contract
from mortice.arch_contracts.writing import role_text

__all__ = ["Difference", "differences"]


@frozen
class Difference:
    """A key that two contracts say differently; None where one does not have it."""

    key: str
    first: str | None
    second: str | None


def differences(first: Contract, second: Contract) -> list[Difference]:
    """Every difference, in the order of the vocabulary; a role is one value.

    Expressions are compared by their text, roles and hyperparameters by name whatever their order, and the parts of a
    fused weight in order.
    """
    left, right = dict(_contract(first)), dict(_contract(second))
    return [
        Difference(key, left.get(key), right.get(key))
        for key in dict.fromkeys([*left, *right])
        if left.get(key) != right.get(key)
    ]


def _contract(contract: Contract) -> Iterator[tuple[str, str]]:
    for attribute in fields(Contract):
        value = getattr(contract, attribute.name)
        if attribute.name in ("global_roles", "layer_roles"):
            scope = attribute.name.removesuffix("_roles")
            for key, role in value.items():
                yield f"roles.{scope}.{key}", role_text(key, role, layer=scope == "layer")
        else:
            yield from _flat(attribute.name, value)


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _flat(f"{prefix}.{name}", item)
    elif has(type(value)) and not isinstance(value, Expression):
        for attribute in fields(type(value)):
            yield from _flat(f"{prefix}.{attribute.name}", getattr(value, attribute.name))
    elif value is not None:
        yield prefix, _text(value)


def _text(value: Any) -> str:
    if isinstance(value, Expression):
        return value.text
    if isinstance(value, tuple):
        return f"[{', '.join(map(_text, value))}]"
    return str(value)
