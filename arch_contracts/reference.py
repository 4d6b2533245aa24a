"""The contract reference, written from the vocabulary itself: each table, each key, its kind, default and meaning."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from attrs import NOTHING, Attribute, fields, has

from mortice.arch_contracts.expressions import FUNCTIONS, Expression
from mortice.arch_contracts.schema import (
    GLOBAL_ROLES,
    LAYER_ROLES,
    PRESENCE,
    STANDARD_HYPERPARAMETERS,
    ContractDocument,
    Hyperparameter,
    RoleEntry,
    RoleTables,
)
from mortice.arch_contracts.structuring import toml_key

__all__ = ["attribute_texts", "contract_reference"]

_ENTRY = re.compile(r"^ {4}(\w+): (.*(?:\n {6,}.*)*)", re.MULTILINE)


def attribute_texts(cls: type) -> Mapping[str, str]:
    """The ``Attributes`` of a class's docstring: name to text, on one line."""
    _, _, listed = (cls.__doc__ or "").partition("Attributes:\n")
    listed = re.sub(r"^ {8}", "    ", listed, flags=re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in _ENTRY.findall(listed)}


def contract_reference() -> str:
    """The reference page, Markdown."""
    lines = [
        "# Contract reference",
        "",
        "A contract is a TOML file that states what a model family is. This page is made from the vocabulary itself",
        "(`python -m mortice.arch_contracts.reference`); a test keeps it up to date.",
        "",
        *_expressions(),
        *_table("", ContractDocument),
        "## Standard hyperparameters",
        "",
        "Every contract has these; one that is given again under `[hyperparameters]` takes another key or default.",
        "",
        "| name | key | default |",
        "| --- | --- | --- |",
        *(
            f"| `{name}` | `{item.key}` | {'`' + item.default.text + '`' if item.default else 'required'} |"
            for name, item in STANDARD_HYPERPARAMETERS.items()
        ),
        "",
        "## Roles",
        "",
        f"Global: {', '.join(f'`{role}`' for role in GLOBAL_ROLES)}.",
        "",
        f"Of each layer: {', '.join(f'`{role}`' for role in LAYER_ROLES)}.",
    ]
    return "\n".join(lines) + "\n"


def _expressions() -> Iterator[str]:
    yield "## Expressions"
    yield ""
    yield "Where a kind below is *expression*, a number may stand, or text that computes one from hyperparameters:"
    yield "`+ - * / // % **`, comparisons, `and or not`, `a if test else b` and the functions"
    yield f"{', '.join(f'`{name}`' for name in FUNCTIONS)}. Besides the hyperparameters there are `vocab_size` and, in"
    yield "what belongs to a layer, `layer` (from 0). In `attention`, `rope` and `residual` there is"
    yield f"`{PRESENCE}ROLE` too: 1 in a layer with a weight for the role, else 0; all layers or none must have it."
    yield "Nothing else is read, and nothing is evaluated as Python."
    yield ""


def _table(path: str, cls: type) -> Iterator[str]:
    """A section for `cls` at the dotted `path`, then those of the tables in it."""
    texts = attribute_texts(cls)
    summary = " ".join((cls.__doc__ or "").partition("Attributes:")[0].split())
    yield f"## `[{path}]`" if path else "## The tables"
    yield ""
    yield summary
    yield ""
    yield "| key | kind | default | meaning |"
    yield "| --- | --- | --- | --- |"
    hints = get_type_hints(cls)
    inner: list[tuple[str, type]] = []
    for attribute in fields(cls):
        key = toml_key(attribute.name)
        kind = hints[attribute.name]
        yield f"| `{key}` | {_kind(kind)} | {_default(attribute)} | {texts[attribute.name]} |"
        table = next((item for item in (kind, *get_args(kind)) if isinstance(item, type) and has(item)), None)
        if table is not None and table is not Expression and not (cls is RoleTables and key == "layer"):
            inner.append((f"{path}.{key}".lstrip("."), table))
    yield ""
    for where, table in inner:
        name = {Hyperparameter: f"{where}.NAME", RoleEntry: "roles.global.ROLE]` and `[roles.layer.ROLE"}.get(
            table, where
        )
        yield from _table(name, table)


def _kind(kind: Any) -> str:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return " or ".join(f"`{choice}`" for choice in arguments)
    if origin in (Union, UnionType):
        return " or ".join(_kind(item) for item in arguments if item is not NoneType)
    if origin is tuple:
        return f"array of {_kind(arguments[0])}"
    if origin is dict or origin is Mapping or (isinstance(kind, type) and has(kind) and kind is not Expression):
        return "table"
    names = {str: "text", bool: "true or false", float: "number", int: "integer", Expression: "expression"}
    return names[kind]


def _default(attribute: Attribute[Any]) -> str:
    default = attribute.default
    if default is NOTHING:
        return "required"
    if has(getattr(default, "factory", None)):  # type: ignore[arg-type]  # made by calling its class
        return "its defaults"
    if isinstance(default, Expression):
        return f"`{default.text}`"
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    return f"`{default}`" if isinstance(default, str) and default else "none"


if __name__ == "__main__":
    print(contract_reference(), end="")  # noqa: T201 (this is what it is run for)
