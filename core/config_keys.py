"""The keys of a config file, read off the classes of `mortice.core.config`: type, default and what each is for."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from attrs import Factory, fields, frozen

from mortice.arch_contracts.structuring import parse_toml
from mortice.core.config import RunConfig

__all__ = ["ConfigKey", "config_keys", "tables", "variable_of"]

_NAMES = {str: "string", Path: "path", bool: "true or false", int: "integer", float: "number"}


@frozen(kw_only=True)
class ConfigKey:
    """One key.

    Attributes:
        table: the table it stands in (``sampling``).
        name: its own name (``top_k``).
        annotation: its Python type.
        default: what holds when nobody says otherwise.
        doc: what it means, one paragraph.

    """

    table: str
    name: str
    annotation: Any
    default: Any
    doc: str

    @property
    def dotted(self) -> str:
        """``sampling.top_k``."""
        return f"{self.table}.{self.name}"

    @property
    def optional(self) -> bool:
        """Whether it may be left without a value (there is no such thing in TOML: leave the key out)."""
        return NoneType in get_args(self.annotation)

    @property
    def kind(self) -> Any:
        """The type without ``None``: a plain class, or the origin of a generic one (tuple, Mapping, Literal)."""
        annotation = self.annotation
        if get_origin(annotation) in (Union, UnionType):
            annotation = next(part for part in get_args(annotation) if part is not NoneType)
        return get_origin(annotation) or annotation

    @property
    def choices(self) -> tuple[str, ...]:
        """The values allowed, where they are few."""
        return get_args(self.annotation) if self.kind is Literal else ()

    @property
    def type_text(self) -> str:
        """The type in words."""
        if self.choices:
            return ", ".join(f'"{choice}"' for choice in self.choices)
        if self.kind is tuple:
            return "list of strings"
        if self.kind in _NAMES:
            return _NAMES[self.kind]
        items = get_args(self.annotation)[1]
        return "table" if items is Any else "table of numbers" if items is float else "table of strings"

    def parse(self, text: str) -> Any:
        """The value, as TOML would have it, that `text` in a variable or after a flag stands for.

        ``none`` unsets an optional key; lists and tables are written as in TOML; one string is a list of one.

        Raises:
            ValueError: saying what was found and wanted.

        """
        if self.optional and text == "none":
            return None
        if self.kind in (str, Path, Literal):
            return text
        if self.kind is tuple and not text.startswith("["):
            return [text]
        if self.kind is bool:
            if text in ("true", "false"):
                return text == "true"
            raise ValueError(f"found {text!r}, wanted true or false")
        if self.kind is int:
            if re.fullmatch(r"[+-]?[0-9]{1,40}", text):
                return int(text)
            raise ValueError(f"found {text!r}, wanted an integer")
        try:
            return float(text) if self.kind is float else parse_toml(f"value = {text}")["value"]
        except ValueError:
            wanted = "a number" if self.kind is float else f"a {self.type_text}, as in TOML"
            raise ValueError(f"found {text!r}, wanted {wanted}") from None


def tables() -> Mapping[str, type]:
    """The class of each table."""
    return get_type_hints(RunConfig)


@cache
def config_keys() -> Mapping[str, ConfigKey]:
    """Every key by its dotted name, in the order of the classes."""
    keys = {}
    for table, cls in tables().items():
        docs = _attribute_docs(cls)
        types = get_type_hints(cls)
        for attribute in fields(cls):
            default = attribute.default
            key = ConfigKey(
                table=table,
                name=attribute.name,
                annotation=types[attribute.name],
                default=default.factory() if isinstance(default, Factory) else default,  # type: ignore[arg-type]
                doc=docs.get(attribute.name, ""),
            )
            keys[key.dotted] = key
    return keys


def variable_of(key: str) -> str:
    """The environment variable that overrides a key: ``MORTICE_SAMPLING_TOP_K`` for ``sampling.top_k``."""
    return "MORTICE_" + key.replace(".", "_").upper()


def _attribute_docs(cls: type) -> dict[str, str]:
    """What the ``Attributes:`` part of a docstring says of each attribute, lines joined."""
    _, _, part = (inspect.getdoc(cls) or "").partition("Attributes:\n")
    docs: dict[str, str] = {}
    name = ""
    for line in part.splitlines():
        head = re.match(r" {4}(\w+): (.*)", line)
        if head:
            name = head[1]
            docs[name] = head[2].strip()
        elif name and line.startswith(" " * 8):
            docs[name] += " " + line.strip()
        elif line.strip():
            break
    return docs
