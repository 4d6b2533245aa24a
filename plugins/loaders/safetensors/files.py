"""Reads the JSON files of a folder, bounded and with duplicate keys refused."""

from __future__ import annotations

import gc
import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from attrs import frozen

from mortice.core.errors import ModelFileError
from mortice.core.text_file import kind_of

__all__ = ["MAX_JSON_BYTES", "Json", "parse_json", "quoted", "read_json", "read_text"]

MAX_JSON_BYTES = 64 << 20
"""Largest file read as JSON: the tokenizer.json of a vocabulary of 260 thousand tokens has half of it."""


def quoted(value: object) -> str:
    """A value from a file as it may appear in a one-line message: escaped, cut at 80 characters."""
    text = value if isinstance(value, str) else repr(value)
    text = text if len(text) <= 80 else text[:79] + "…"
    return repr(text) if isinstance(value, str) else text.encode("unicode_escape").decode("ascii")


def read_text(path: Path, max_bytes: int = MAX_JSON_BYTES) -> str:
    """The text of a regular file.

    Raises:
        ModelFileError: when it cannot be read, is no regular file, is too large or is not UTF-8.

    """
    try:
        # without O_NONBLOCK the open of a FIFO waits for a writer
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as stream:
            status = os.fstat(stream.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ModelFileError(path, f"wanted a regular file, found {kind_of(status.st_mode)}")
            if status.st_size > max_bytes:
                raise ModelFileError(path, f"found {status.st_size} bytes, wanted at most {max_bytes}")
            data = stream.read(status.st_size)
    except OSError as error:
        raise ModelFileError(path, f"cannot be read: {error.strerror}") from None
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ModelFileError(path, f"not UTF-8: {error.reason}", error.start) from None


def parse_json(path: Path, text: str, offset: int = 0) -> Any:
    """What a JSON text of `path` says; `offset` is where it begins in the file.

    Raises:
        ModelFileError: when it is not JSON, has a key twice or a number that JSON does not have, or is nested too deep.

    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise ModelFileError(path, f"key {quoted(twice)} is there twice", offset)
        return found

    def no_number(name: str) -> NoReturn:
        raise ModelFileError(path, f"found {name}, which is no number in JSON", offset)

    try:
        with _no_collection():
            return json.loads(text, object_pairs_hook=unique, parse_constant=no_number)
    except json.JSONDecodeError as error:
        at = offset + len(text[: error.pos].encode())
        raise ModelFileError(path, f"not JSON: {error.msg}", at) from None
    except RecursionError:
        raise ModelFileError(path, "JSON is nested too deep", offset) from None
    except ValueError as error:  # a whole number of thousands of digits
        raise ModelFileError(path, f"not JSON: {error}", offset) from None


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep the garbage collector out: it would go through the lists of 280 thousand merges again and again.

    Nothing is garbage while JSON is read, and a tokenizer.json is read in a third of the time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def read_json(path: Path) -> Json:
    """A JSON file that holds an object.

    Raises:
        ModelFileError: when it cannot be read, is not JSON or holds something else.

    """
    value = parse_json(path, read_text(path))
    if not isinstance(value, dict):
        raise ModelFileError(path, f"found {_kind(value)}, wanted an object")
    return Json(path, value)


@frozen(eq=False)
class Json:
    """An object of a JSON file, read with types; a key that is null counts as missing.

    Attributes:
        path: the file, for messages.
        values: the object.
        place: where in the file it stands (``rope_scaling.``); empty for the whole.

    """

    path: Path
    values: Mapping[str, Any]
    place: str = ""

    def error(self, name: str, found: str, wanted: str) -> ModelFileError:
        """The error to raise about a key."""
        return ModelFileError(self.path, f"{self.place}{name}: {found}, wanted {wanted}")

    def has(self, name: str) -> bool:
        """Whether a key has a value."""
        return self.values.get(name) is not None

    def _value(self, name: str, wanted: str, kinds: type | tuple[type, ...], default: Any) -> Any:
        value = self.values.get(name)
        if value is None:
            if default is None:
                raise self.error(name, "missing", wanted)
            return default
        right = isinstance(value, kinds) and (kinds is bool or not isinstance(value, bool))
        if not right:
            raise self.error(name, f"found {quoted(value)}", wanted)
        return value

    def integer(self, name: str, default: int | None = None) -> int:
        """A whole number below 2**31; without a default it has to be there."""
        value = self._value(name, "a whole number", int, default)
        if not 0 <= value < 2**31:
            raise self.error(name, f"found {quoted(value)}", "0 to 2**31 - 1")
        return int(value)

    def number(self, name: str, default: float | None = None) -> float:
        """A number."""
        value = self._value(name, "a number", (int, float), default)
        if abs(value) > 1e30:
            raise self.error(name, f"found {quoted(value)}", "a number up to 1e30")
        return float(value)

    def string(self, name: str, default: str | None = None) -> str:
        """A string."""
        return str(self._value(name, "a string", str, default))

    def boolean(self, name: str, *, default: bool) -> bool:
        """True or false."""
        return bool(self._value(name, "true or false", bool, default))

    def sequence(self, name: str, default: Sequence[Any] | None = None) -> Sequence[Any]:
        """An array."""
        value: Sequence[Any] = self._value(name, "an array", (list, tuple), default)
        return value

    def object(self, name: str) -> Json | None:
        """An object, None when it is missing."""
        value = self._value(name, "an object", dict, {})
        return Json(self.path, value, f"{self.place}{name}.") if value else None


def _kind(value: object) -> str:
    return {list: "an array", str: "a string", bool: "a truth value", type(None): "null"}.get(type(value), "a number")
