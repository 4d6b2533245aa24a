"""What a chat template may be given besides the conversation: names of its own choice, such as ``enable_thinking``."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from mortice.core.text_file import parse_json, require_utf8

__all__ = ["GIVEN", "check_variables", "map_texts", "texts_of", "unused_variables", "variable_value"]

GIVEN = frozenset(
    {
        *("messages", "tools", "documents", "add_generation_prompt"),
        *("bos_token", "eos_token", "pad_token", "unk_token"),
        *("raise_exception", "strftime_now"),
        # what Jinja2 itself puts there
        *("self", "range", "dict", "namespace", "lipsum", "cycler", "joiner"),
    }
)
"""Names that every template is given anyway; no variable may take one of them over."""

_DEEPEST = 32
_NO_JSON = frozenset({"NaN", "Infinity", "-Infinity"})  # though Python reads them as such


def check_variables(variables: object) -> None:
    """Refuse what no template could use, or what would take the place of something it is given.

    Raises:
        TypeError: for what JSON does not have, naming the variable, not where it was given.
        ValueError: for a name or a value that is refused, likewise.

    """
    if not isinstance(variables, Mapping):
        raise TypeError(f"found {type(variables).__name__}, wanted a mapping of names to values")
    for name, value in variables.items():
        if not isinstance(name, str) or not (name.isascii() and name.isidentifier()):
            raise ValueError(f"found {name!r:.40}, wanted a name of letters, digits and _")
        if name in GIVEN:
            raise ValueError(f"found {name!r}, which every template is given anyway, wanted another name")
        _check_value(name, value, _DEEPEST)


def _check_value(name: str, value: object, deepest: int) -> None:
    if deepest < 0:
        raise ValueError(f"{name}: found values nested deeper than {_DEEPEST}")
    if isinstance(value, str):
        _check_text(name, value)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{name}: found the key {key!r:.40}, wanted a string")
            _check_text(name, key)
            _check_value(name, item, deepest - 1)
    elif isinstance(value, list | tuple):
        for item in value:
            _check_value(name, item, deepest - 1)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name}: found {value}, wanted a finite number")
    elif value is not None and not isinstance(value, bool | int | float):
        raise TypeError(f"{name}: found {type(value).__name__}, wanted what JSON has")


def _check_text(name: str, text: str) -> None:
    try:
        require_utf8(text)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def variable_value(text: str) -> Any:
    """What the text after ``NAME=`` stands for: JSON where it is JSON, else the text itself.

    Raises:
        ValueError: for JSON that `parse_json` refuses though its form is right, such as a key that is there twice;
            for ``False`` and the like, which would be a text and is hardly meant.

    """
    if text in _NO_JSON:
        return text
    try:
        return parse_json(text)
    except json.JSONDecodeError:
        pass
    meant = "null" if text == "None" else text.lower()
    if meant in ("true", "false", "null"):  # as a text each of them would count as true
        raise ValueError(f"found {text}, wanted {meant}, or '\"{text}\"' for the text")
    return text


def texts_of(value: object) -> list[str]:
    """Every text in JSON values, keys included."""
    found: list[str] = []

    def keep(text: str) -> str:
        found.append(text)
        return text

    map_texts(value, keep)
    return found


def map_texts(value: Any, change: Callable[[str], str]) -> Any:
    """JSON values with every text in them, keys included, replaced by what `change` makes of it."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(key): map_texts(item, change) for key, item in value.items()}
    return [map_texts(item, change) for item in value] if isinstance(value, list | tuple) else value


def unused_variables(names: Iterable[str], source: str) -> list[str]:
    """The names that do not stand in a template's source at all, so that it cannot read them."""
    words = set(re.findall(r"\w+", source))
    return [name for name in names if name not in words]
