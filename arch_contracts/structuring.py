"""TOML tables into frozen attrs classes, strictly: every mistake is named with the dotted key it stands at.

A thin layer over cattrs: no value is converted silently (``1`` is no string, ``"1"`` no number), an unknown key names
the nearest known one, and all mistakes of a document are reported together.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypeVar, get_args, get_origin

import cattrs
from attrs import fields, has
from cattrs.errors import ClassValidationError, ForbiddenExtraKeysError, IterableValidationError, IterableValidationNote
from cattrs.gen import make_dict_structure_fn, override

__all__ = ["make_converter", "mistakes", "parse_toml", "toml_key", "unknown_key"]

T = TypeVar("T")


_INTEGER_BITS = 64
"""TOML asks for no more; a longer one could not even be shown, for Python prints 4300 digits at most."""


def parse_toml(text: str) -> dict[str, Any]:
    """TOML text as a dict, whoever wrote it.

    Raises:
        ValueError: not TOML, nested too deeply, or with an integer of more than 64 bits.

    """
    try:
        document = tomllib.loads(text)
    except RecursionError:
        raise ValueError("not TOML that can be read: nested too deeply") from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"not TOML: {error}") from None
    except ValueError:  # Python's own bound on decimal digits
        raise ValueError(f"not TOML: an integer has more than {_INTEGER_BITS} bits") from None
    pending: list[Any] = [document]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            pending.extend(value.values())
        elif isinstance(value, list):
            pending.extend(value)
        elif isinstance(value, int) and value.bit_length() > _INTEGER_BITS:
            raise ValueError(f"not TOML: an integer has more than {_INTEGER_BITS} bits")
    return document


def toml_key(name: str) -> str:
    """How an attribute is spelt in TOML: a trailing underscore guards a Python keyword (``else_``, ``global_``)."""
    return name.removesuffix("_")


_KINDS = {str: "a string", bool: "true or false", int: "an integer", float: "a number"}


def _strict(kind: type) -> Callable[[Any, type], Any]:
    def convert(value: Any, _: type) -> Any:
        if kind is float and type(value) is int:
            return float(value)
        if type(value) is not kind:
            raise TypeError(f"wanted {_KINDS.get(kind, kind.__name__)}, found {value!r}")
        return value

    return convert


def _literal(value: Any, annotation: Any) -> Any:
    choices = get_args(annotation)
    if value not in choices:
        raise ValueError(f"wanted one of {', '.join(map(repr, choices))}, found {value!r}")
    return value


def _each(
    pairs: Iterable[tuple[str | int, Any]], item: Any, converter: cattrs.Converter, where: Any
) -> list[tuple[str | int, Any]]:
    """Structure the items of an array or a table, with all their mistakes reported together."""
    done: list[tuple[str | int, Any]] = []
    errors: list[Exception] = []
    for key, value in pairs:
        try:
            done.append((key, converter.structure(value, item)))
        except Exception as error:  # noqa: BLE001 (kept, and raised with the others)
            error.__notes__ = [*getattr(error, "__notes__", []), IterableValidationNote(f"at {key!r}", key, item)]
            errors.append(error)
    if errors:
        raise IterableValidationError(f"While structuring {where!r}", errors, where)
    return done


def _register_containers(converter: cattrs.Converter) -> None:
    """Arrays and tables from just that: cattrs would take a string for an array of its characters."""

    def array(value: Any, kind: Any) -> Any:
        if not isinstance(value, (list, tuple)):
            raise TypeError(f"wanted an array, found {value!r}")
        return tuple(item for _, item in _each(enumerate(value), get_args(kind)[0], converter, kind))

    def table(value: Any, kind: Any) -> Any:
        if not isinstance(value, dict):
            raise TypeError(f"wanted a table, found {value!r}")
        return dict(_each(value.items(), get_args(kind)[1], converter, kind))

    converter.register_structure_hook_func(lambda kind: _origin(kind) is tuple, array)
    converter.register_structure_hook_func(lambda kind: _origin(kind) in (dict, Mapping), table)


def _origin(kind: Any) -> Any:
    return get_origin(kind)


def make_converter() -> cattrs.Converter:
    """A converter with the strictness above; callers register hooks for types of their own."""
    converter = cattrs.Converter(forbid_extra_keys=True)
    for kind in (str, bool, int, float):
        converter.register_structure_hook(kind, _strict(kind))
    converter.register_structure_hook_func(lambda kind: _origin(kind) is Literal, _literal)
    _register_containers(converter)

    def structure_class(cls: type) -> Callable[[Any, type], Any]:
        renames: dict[str, Any] = {
            attribute.name: override(rename=toml_key(attribute.name))
            for attribute in fields(cls)
            if attribute.name.endswith("_")
        }
        inner: Callable[[Any, type], Any] = make_dict_structure_fn(
            cls, converter, _cattrs_forbid_extra_keys=True, **renames
        )

        def structure(value: Any, kind: type) -> Any:
            if not isinstance(value, dict):
                raise TypeError(f"wanted a table, found {value!r}")
            return inner(value, kind)

        return structure

    converter.register_structure_hook_factory(has, structure_class)
    return converter


def mistakes(error: BaseException, where: str = "") -> list[str]:
    """The mistakes in what a converter raised, one line each: ``norm.type: wanted one of …``."""
    prefix = f"{where}: " if where else ""
    match error:
        case ClassValidationError():
            lines = []
            noted, rest = error.group_exceptions()
            for inner, note in noted:
                lines += mistakes(inner, _join(where, toml_key(note.name)))
            for inner in rest:
                lines += mistakes(inner, where)
            return lines
        case IterableValidationError():
            noted_items, rest = error.group_exceptions()
            lines = [line for inner, note in noted_items for line in mistakes(inner, _join(where, str(note.index)))]
            return lines + [line for inner in rest for line in mistakes(inner, where)]
        case ForbiddenExtraKeysError():
            return [
                prefix + unknown_key(key, [toml_key(a.name) for a in fields(error.cl)])
                for key in sorted(error.extra_fields)
            ]
        case KeyError():
            return [f"{prefix}required, but not there"]
        case _:
            return [f"{prefix}{error}"]


def unknown_key(key: str, known: list[str]) -> str:
    """The line for a key that does not exist, with the nearest that does."""
    near = difflib.get_close_matches(key, known, 1)
    return f"unknown key {key!r}" + (
        f", did you mean {near[0]!r}?" if near else f"; known are {', '.join(sorted(known))}"
    )


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key
