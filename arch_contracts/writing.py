"""A contract as TOML text: what `parse_contract` reads, short where the defaults say it, with remarks at the lines."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from attrs import NOTHING, Attribute, fields

from mortice.arch_contracts.expressions import Expression
from mortice.arch_contracts.schema import RoleEntry
from mortice.arch_contracts.vocabulary import STANDARD_HYPERPARAMETERS, Contract, Hyperparameter, Role

__all__ = ["contract_text", "role_text"]

_HEAD = ("name", "architectures", "description", "ignored", "ignored_keys")
_SECTIONS = ("norm", "attention", "rope", "ffn", "embedding", "residual", "output")
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_OPEN = '"?"'


def contract_text(
    contract: Contract,
    *,
    unknown: Mapping[str, str] | None = None,
    notes: Mapping[str, str] | None = None,
    remarks: Sequence[str] = (),
) -> str:
    """Write a contract.

    Args:
        contract: what to write; what equals a default is left out.
        unknown: dotted keys whose value is not known, with the reason. Their value is written as ``"?"``, which no
            reader takes, and the line ends in ``# unknown: `` and the reason.
        notes: dotted keys whose line ends in a comment.
        remarks: comment lines above everything.

    """
    writer = _Writer(contract, dict(unknown or {}), dict(notes or {}))
    lines = [f"# {_comment(line)}" for line in remarks]
    for table in filter(None, writer.tables()):
        lines += ["", *table] if lines else table
    return "\n".join(lines) + "\n"


class _Writer:
    def __init__(self, contract: Contract, unknown: dict[str, str], notes: dict[str, str]) -> None:
        self.contract, self.unknown, self.notes = contract, unknown, notes

    def tables(self) -> Iterator[list[str]]:
        contract = self.contract
        head = [attribute for attribute in fields(Contract) if attribute.name in _HEAD]
        yield self.table("contract", self.settings("contract", contract, head))
        own = {
            name: self.hyperparameter(name, item)
            for name, item in contract.hyperparameters.items()
            if STANDARD_HYPERPARAMETERS.get(name) != item
        }
        yield self.table("hyperparameters", own)
        for section in _SECTIONS:
            spec = getattr(contract, section)
            if spec is not None:
                yield self.table(section, self.settings(section, spec, fields(type(spec))))
        yield self.table("roles.global", self.roles("global", contract.global_roles))
        yield self.table("roles.layer", self.roles("layer", contract.layer_roles))

    def table(self, name: str, values: Mapping[str, str]) -> list[str]:
        if not values and not name.startswith("roles."):
            return []
        return [f"[{name}]", *(self.line(f"{name}.{key}", key, value) for key, value in values.items())]

    def line(self, dotted: str, key: str, value: str) -> str:
        if dotted in self.unknown:
            return f"{_key(key)} = {value}  # unknown: {_comment(self.unknown[dotted])}"
        note = self.notes.get(dotted)
        return f"{_key(key)} = {value}" + (f"  # {_comment(note)}" if note else "")

    def settings(self, section: str, spec: object, attributes: Sequence[Attribute[Any]]) -> dict[str, str]:
        written = {}
        for attribute in attributes:
            value, dotted = getattr(spec, attribute.name), f"{section}.{attribute.name}"
            if dotted in self.unknown:
                written[attribute.name] = _OPEN
            elif value is not None and (
                attribute.default is NOTHING or value != attribute.default or dotted in self.notes
            ):
                written[attribute.name] = _value(value)
        return written

    def hyperparameter(self, name: str, item: Hyperparameter) -> str:
        values = self.settings(f"hyperparameters.{name}", item, fields(Hyperparameter))
        if f"hyperparameters.{name}" in self.unknown:
            values["default"] = _OPEN
        return _inline(values)

    def roles(self, scope: str, roles: Mapping[str, Role]) -> dict[str, str]:
        return {key: role_text(key, role, layer=scope == "layer") for key, role in roles.items()}


def role_text(key: str, role: Role, *, layer: bool) -> str:
    """A role as it is written in TOML: its shape alone where that says all."""
    usual_name = RoleEntry().role(key, layer=layer).name
    values = {}
    if role.name != usual_name:
        values["name"] = _value(role.name)
    if role.shape:
        values["shape"] = _value(role.shape)
    if role.presence == "forbidden":
        values["forbidden"] = "true"
    elif role.presence == "optional" and role.fallback is None:
        values["optional"] = "true"
    if role.fallback is not None:
        values["else"] = _value(role.fallback)
    if role.split:
        values["split"] = _inline({part: _value(rows) for part, rows in role.split.items()})
    return values["shape"] if values.keys() == {"shape"} else _inline(values)


def _inline(values: Mapping[str, str]) -> str:
    return f"{{ {', '.join(f'{_key(key)} = {value}' for key, value in values.items())} }}"


def _key(name: str) -> str:
    return name if _BARE_KEY.fullmatch(name) else _string(name)


def _value(value: Any) -> str:
    match value:
        case bool():
            return str(value).lower()
        case int() | float():
            return repr(value)
        case Expression():
            return _number(value.text) or _string(value.text)
        case str():
            return _string(value)
        case tuple():
            return f"[{', '.join(map(_value, value))}]"
    raise AssertionError(f"a contract holds no {type(value).__name__}")


def _number(text: str) -> str | None:
    """The text as a TOML number, where reading that gives the same text again."""
    for kind in (int, float):
        try:
            if repr(kind(text)) == text and text.lstrip("-")[:1].isdigit():
                return text
        except ValueError:
            continue
    return None


def _comment(text: str) -> str:
    """Text from a file stands in comments, and a comment ends where its line does."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)


def _string(text: str) -> str:
    # JSON's escapes are TOML's; what a terminal would not show as it is (DEL, marks of direction) is escaped, too
    return "".join(
        char if char.isprintable() else f"\\U{ord(char):08x}" for char in json.dumps(text, ensure_ascii=False)
    )
