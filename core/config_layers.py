"""Where each value of a run comes from: default < config file < environment < flag.

A value is checked in the layer that gives it, so a mistake is reported with the file, variable or flag it stands in,
and all mistakes of all layers together.
"""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_origin

import cattrs
from attrs import define, field, frozen

from mortice.arch_contracts.structuring import make_converter, mistakes, parse_toml, unknown_key
from mortice.core.config import RunConfig
from mortice.core.config_keys import config_keys, tables, variable_of
from mortice.core.errors import ConfigError
from mortice.core.text_file import read_small_text, require_utf8

__all__ = ["OTHER_VARIABLES", "EffectiveConfig", "Flag", "Origin", "config_from", "read_config", "resolve_config"]

OTHER_VARIABLES = {
    "MORTICE_CACHE": "folder for compiled kernels and for what was measured on a card",
    "MORTICE_TEST_DATA": "folder with test data that is not part of the project",
}
"""Variables of ours that are no config keys."""

_NEAR = 0.88
"""Likeness from which a MORTICE_ variable is taken for a misspelt key and not for somebody else's."""


@frozen
class Origin:
    """Where a value came from.

    Attributes:
        layer: which layer.
        name: the file, the variable or the flag; empty for a default.

    """

    layer: Literal["default", "file", "environment", "flag"] = "default"
    name: str = ""

    def __str__(self) -> str:
        return f"{self.layer} {self.name}".strip()


@frozen
class Flag:
    """A value given on the command line.

    Attributes:
        key: the dotted key.
        value: the value; a `str` is read as text of the key's type.
        name: the flag as the user knows it.

    """

    key: str
    value: Any
    name: str


@frozen(eq=False)
class EffectiveConfig:
    """A config and the origin of every key in it."""

    config: RunConfig
    origins: Mapping[str, Origin] = field(repr=False)

    def value(self, key: str) -> Any:
        """The value of a dotted key."""
        table, _, name = key.partition(".")
        return getattr(getattr(self.config, table), name)


def read_config(path: str | Path, environment: Mapping[str, str] | None = None) -> RunConfig:
    """The config in a TOML file.

    Args:
        path: the file; paths in it are relative to its folder.
        environment: variables that override keys, for instance `os.environ`; by default none do.

    Raises:
        ConfigError: listing every mistake.

    """
    return resolve_config(Path(path), environment or {}).config


def config_from(document: Mapping[str, Any], where: str) -> RunConfig:
    """The config that tables of values, read from somewhere else than TOML, make; `where` names it in errors.

    Raises:
        ConfigError: listing every mistake.

    """
    layers = _Layers()
    layers.add_document(document, where)
    return layers.result().config


def resolve_config(
    file: Path | None = None, environment: Mapping[str, str] | None = None, flags: Iterable[Flag] = ()
) -> EffectiveConfig:
    """Lay file, environment and flags over the defaults.

    Raises:
        ConfigError: listing every mistake with the file, variable or flag it stands in.

    """
    layers = _Layers()
    if file is not None:
        layers.add_file(file)
    layers.add_environment(environment or {})
    for flag in flags:
        layers.add_flag(flag)
    return layers.result()


_LOG = logging.getLogger("mortice.config")


def _nearest(variable: str, known: Mapping[str, str]) -> str:
    """The advice for a variable that is not much like any of ours: the nearest by what follows ``MORTICE``, if any."""
    name = variable.removeprefix("MORTICE")
    by_name = {one.removeprefix("MORTICE"): one for one in [*known, *OTHER_VARIABLES]}
    near = [one for one in by_name if one.endswith(name)] or difflib.get_close_matches(name, by_name, 1)
    return f"; the nearest is {by_name[near[0]]}" if near else ""


@define
class _Layers:
    values: dict[str, Any] = field(factory=dict)
    origins: dict[str, Origin] = field(factory=lambda: dict.fromkeys(config_keys(), Origin()))
    wrong: list[str] = field(factory=list)

    def add_file(self, path: Path) -> None:
        try:
            document = parse_toml(read_small_text(path, ConfigError))
        except ValueError as error:
            raise ConfigError(f"{path}: {error}") from None
        self.add_document(document, str(path), path.parent)

    def add_document(self, document: Mapping[str, Any], where: str, base: Path | None = None) -> None:
        origin = Origin("file", where)
        for table, content in document.items():
            if table not in tables():
                self.wrong.append(f"{where}: {_unknown(table, content)}")
            elif not isinstance(content, dict):
                self.wrong.append(f"{where}: {table}: wanted a table, found {content!r}")
            else:
                for name, value in content.items():
                    self.add(f"{table}.{name}", value, origin, f"{where}: {table}.{name}", base)

    def add_environment(self, environment: Mapping[str, str]) -> None:
        known = {variable_of(key): key for key in config_keys()}
        for variable, text in sorted(environment.items()):
            if variable in known:
                self.add_text(known[variable], text, Origin("environment", variable), variable)
            elif variable.startswith("MORTICE_") and variable not in OTHER_VARIABLES:
                table = variable.removeprefix("MORTICE_").partition("_")[0].lower()
                near = difflib.get_close_matches(variable, known, 1, 0 if table in tables() else _NEAR)
                if near:
                    self.wrong.append(f"environment: unknown variable {variable}, did you mean {near[0]}?")
                else:  # it may be a plugin's
                    _LOG.warning("environment: variable %s is no config key%s", variable, _nearest(variable, known))

    def add_flag(self, flag: Flag) -> None:
        origin = Origin("flag", flag.name)
        if isinstance(flag.value, str):
            self.add_text(flag.key, flag.value, origin, flag.name)
        else:
            self.add(flag.key, flag.value, origin, flag.name)

    def add_text(self, key: str, text: str, origin: Origin, where: str) -> None:
        if key not in config_keys():
            self.wrong.append(f"{where}: {_unknown_dotted(key)}")
            return
        try:
            value = config_keys()[key].parse(text)
        except ValueError as error:
            self.wrong.append(f"{where}: {error}")
            return
        self.add(key, value, origin, where)

    def add(self, key: str, value: Any, origin: Origin, where: str, base: Path | None = None) -> None:
        known = config_keys().get(key)
        if known is None:
            place = origin.name if origin.layer == "file" else where
            self.wrong.append(f"{place}: {_unknown_dotted(key)}")
            return
        try:
            if value is not None or not known.optional:
                value = _converter(base or Path()).structure(value, known.annotation)
                for text in value if known.kind is tuple else (value,):
                    if isinstance(text, str):
                        require_utf8(text)
            tables()[known.table](**{known.name: value})  # the class's own validators
        except ConfigError as error:
            self.wrong.append(f"{where}: {str(error).removeprefix(f'{known.name}: ')}")
        except (cattrs.BaseValidationError, TypeError, ValueError) as error:
            self.wrong += mistakes(error, where)
        else:
            self.values[key], self.origins[key] = value, origin

    def result(self) -> EffectiveConfig:
        if len(self.wrong) == 1:
            raise ConfigError(self.wrong[0])
        if self.wrong:
            lines = "".join(f"\n  {line}" for line in self.wrong)
            raise ConfigError(f"{len(self.wrong)} mistakes in the configuration{lines}")
        given: dict[str, dict[str, Any]] = {table: {} for table in tables()}
        for key, value in self.values.items():
            table, _, name = key.partition(".")
            given[table][name] = value
        return EffectiveConfig(
            RunConfig(**{table: cls(**given[table]) for table, cls in tables().items()}), self.origins
        )


def _unknown(table: str, content: Any) -> str:
    """A table that does not exist; a key that stands outside its table is told where it belongs."""
    at_home = [key for key in config_keys() if key.endswith(f".{table}")]
    if not isinstance(content, dict) and at_home:
        return f"{table!r} stands in no table, did you mean {' or '.join(map(repr, at_home))}?"
    return unknown_key(table, list(tables()))


def _unknown_dotted(key: str) -> str:
    table, _, name = key.partition(".")
    if table not in tables():
        near_table = difflib.get_close_matches(table, tables(), 1)
        same = [known.dotted for known in config_keys().values() if known.name == name]
        near = [key for key in same if not near_table or key.startswith(f"{near_table[0]}.")] or same
        advice = f", did you mean {' or '.join(map(repr, near))}?" if near else f"; tables are {', '.join(tables())}"
        return f"unknown key {key!r}{advice}"
    elsewhere = [known.dotted for known in config_keys().values() if known.name == name]
    own = [known.name for known in config_keys().values() if known.table == table]
    near = elsewhere or [f"{table}.{other}" for other in difflib.get_close_matches(name, own, 1)]
    advice = f", did you mean {' or '.join(map(repr, near))}?" if near else f"; {table} has {', '.join(own)}"
    return f"unknown key {key!r}{advice}"


def _converter(base: Path) -> cattrs.Converter:
    """Strict, with paths taken from `base` and token ids read from the strings that TOML has as keys."""
    converter = make_converter()

    def path(value: Any, _: Any) -> Path:
        if not isinstance(value, str | Path) or not str(value) or "\0" in str(value):
            raise TypeError(f"wanted a path, found {value!r}")
        try:
            return base / Path(value).expanduser()
        except RuntimeError as error:  # ~user that does not exist
            raise ValueError(f"{value!r}: {error}") from None

    def strings(value: Any, _: Any) -> tuple[str, ...]:
        if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
            raise TypeError(f"wanted a list of strings, found {value!r}")
        return tuple(value)

    def pairs(value: Any, annotation: Any) -> dict[Any, Any]:
        if not isinstance(value, dict):
            raise TypeError(f"wanted a table, found {value!r}")
        if annotation == dict[str, Any]:
            return dict(value)  # what may stand in it is for the class's validator to say
        ids = annotation == Mapping[int, float]
        return dict(_pairs(value, ids=ids))

    converter.register_structure_hook(Path, path)

    def is_list(kind: Any) -> bool:
        return get_origin(kind) is tuple

    def is_table(kind: Any) -> bool:
        return get_origin(kind) in (dict, Mapping)

    converter.register_structure_hook_func(is_list, strings)
    converter.register_structure_hook_func(is_table, pairs)
    return converter


def _pairs(table: dict[Any, Any], *, ids: bool) -> Iterator[tuple[Any, Any]]:
    for key, value in table.items():
        if ids:
            if not re.fullmatch(r"[0-9]{1,18}", str(key)):
                raise TypeError(f"wanted token ids as keys, found {key!r}")
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"wanted a number for {key}, found {value!r}")
            yield int(key), float(value)
        else:
            if not isinstance(value, str):
                raise TypeError(f"wanted a string for {key!r}, found {value!r}")
            yield key, value
