"""Writes the package of a new plugin: complete, tested and installable, to be changed step by step.

A template is a file below ``templates/KIND`` or ``templates/common``; its path without ``.in`` is that in the package,
with ``MODULE`` for the module's name. In its text ``$name`` and the other names of `Names` are filled in.
"""

from __future__ import annotations

import difflib
import importlib.util
import keyword
import os
import re
import shutil
import sys
import zlib
from collections.abc import Iterator
from importlib import metadata, resources
from importlib.resources.abc import Traversable
from pathlib import Path, PurePosixPath
from string import Template
from typing import Literal, get_args

from attrs import asdict, frozen

from mortice.core.errors import ConfigError, ExecutionError
from mortice.core.plugin.hookspecs import CONTRACT_VERSION
from mortice.core.plugin.manager import BUILTIN_PLUGINS, builtin_name
from mortice.core.plugin.registry import Registry, survey
from mortice.core.version import __version__

__all__ = ["KINDS", "Kind", "Names", "names_for", "write_package"]

Kind = Literal["arch", "qtype", "upload", "loader"]
KINDS: tuple[str, ...] = get_args(Kind)
"""What a plugin may be started as. A package may give several things; these are beginnings."""

_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
_MOST_LETTERS = 40
_PARTS_OF_MORTICE = frozenset({"mortice", "mortice_core", "mortice_plugins", "mortice_arch_contracts"})
_USED_BY_A_PACKAGE = frozenset({"src", "conftest", "test", "tests", "hatchling", "pip", "pytest", "setuptools"})
_RESERVED = _PARTS_OF_MORTICE | _USED_BY_A_PACKAGE
_FIRST_ID, _IDS = 1000, 1_000_000  # far from GGML's own


@frozen(kw_only=True)
class Names:
    """What is filled into templates.

    Attributes:
        name: the distribution, the entry point and the folder.
        module: the Python package; also the architecture, the file suffix and the like.
        camel: for classes.
        upper: for a quantisation type and its C++ struct.
        type_id: of that type; the same for the same name.
        contract_version: of the hooks.
        version: the least version of mortice.

    """

    name: str
    module: str
    camel: str
    upper: str
    type_id: int
    contract_version: int = CONTRACT_VERSION
    version: str = __version__


def names_for(name: str) -> Names:
    """Everything that follows from a package's name.

    Raises:
        ConfigError: for a name that is none, or is taken.

    """
    if not _NAME.fullmatch(name) or len(name) > _MOST_LETTERS:
        wanted = "lower-case words of letters and digits joined by single hyphens, 40 characters at most"
        found = name if len(name) <= _MOST_LETTERS else name[:_MOST_LETTERS] + "…"
        raise ConfigError(f"name: found {found!r}, wanted {wanted}, such as acme-ternary")
    module = name.replace("-", "_")
    if name in map(builtin_name, BUILTIN_PLUGINS):
        raise ConfigError(f"name: {name!r} is the name of a built-in plugin")
    if keyword.iskeyword(module) or module in _RESERVED or module.startswith("test_") or _is_importable(module):
        raise ConfigError(f"name: {name!r}: import {module} means something else already; take another name")
    version = _installed_version(name)
    if version is not None:
        raise ConfigError(f"name: {name!r}: a package of that name is installed, version {version}; take another name")
    return Names(
        name=name,
        module=module,
        camel="".join(word.capitalize() for word in name.split("-")),
        upper=module.upper(),
        type_id=_FIRST_ID + zlib.crc32(name.encode()) % _IDS,
    )


def _is_importable(module: str) -> bool:
    try:
        return module in sys.stdlib_module_names or importlib.util.find_spec(module) is not None
    except ValueError:  # imported, and without a record of where from
        return True


def _installed_version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _refuse_what_is_given(names: Names, kind: str, registry: Registry) -> None:
    """ConfigError when a plugin that is installed has the name, or gives what the new one would give."""
    manager = registry.manager
    if names.name in manager.records:
        raise ConfigError(f"name: {names.name!r} is the name of {manager.origin(names.name)}; take another name")
    givers: dict[str, tuple[str, ...]] = {conflict.key: conflict.plugins for conflict in registry.conflicts}
    for what, table in (("contract", registry.contracts), ("qtype", registry.qtypes), ("upload", registry.uploads)):
        givers |= {f"{what}:{key}": (provided.plugin,) for key, provided in table.items()}
    givers |= {f"contract:{it.value.name}": (it.plugin,) for it in registry.contracts.values()}
    for plugin in manager.records:
        if manager.has(plugin, "mortice_open_model"):
            givers[f"loader:{plugin.removeprefix('loaders-')}"] = (plugin,)
    given = "contract" if kind == "arch" else kind
    key = {"arch": names.module, "qtype": names.upper}.get(kind, names.name)
    plugins = givers.get(f"{given}:{key}", ())
    if plugins:
        origins = " and by ".join(map(manager.origin, plugins))
        raise ConfigError(f"name: {names.name!r}: {given} {key} is given by {origins} already; take another name")
    if kind == "qtype" and names.type_id in registry.qtype_table:
        other = registry.qtype_table[names.type_id].name
        raise ConfigError(f"name: {names.name!r}: its type id, {names.type_id}, is that of {other}; take another name")


def write_package(name: str, kind: str, folder: Path) -> Path:
    """Write a package into a new folder `name` of `folder`.

    Returns:
        The new folder.

    Raises:
        ConfigError: for a bad name or kind, when an installed plugin gives the same, when the new folder is there
            already, or when `folder` is no folder.
        ExecutionError: when it cannot be written. Nothing is left of what was begun.

    """
    if kind not in KINDS:
        near = difflib.get_close_matches(kind, KINDS, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"kind: found {kind!r}, wanted one of {', '.join(KINDS)}{hint}")
    names = names_for(name)
    target = folder / name
    part = folder / f".{name}.{os.getpid()}.part"
    if target.exists() or target.is_symlink():
        raise ConfigError(f"{target}: is there already, and is not overwritten")
    if not _may_be_folder(folder):
        raise ConfigError(f"{target}: cannot be written: {folder} is no folder")
    _refuse_what_is_given(names, kind, survey())
    try:
        for path, text in _files(names, kind):
            file = part / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        part.rename(target)  # in one step: a package is there as a whole or not at all
    except OSError as error:
        raise ExecutionError(f"{target}: cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return target


def _may_be_folder(path: Path) -> bool:
    """Whether it is a folder, or none of the files that are there stands in its way."""
    nearest = next((each for each in (path, *path.parents) if each.exists()), path)
    return nearest.is_dir()


def _files(names: Names, kind: str) -> Iterator[tuple[PurePosixPath, str]]:
    """Paths in the package and their text."""
    values = {**asdict(names), "kind": kind}
    templates = resources.files("mortice.core.scaffold") / "templates"
    for part in ("common", kind):
        for path, source in _walk(templates / part, PurePosixPath()):
            place = PurePosixPath(str(path).removesuffix(".in").replace("MODULE", names.module))
            yield place, Template(source.read_text(encoding="utf-8")).substitute(values)


def _walk(folder: Traversable, path: PurePosixPath) -> Iterator[tuple[PurePosixPath, Traversable]]:
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.is_dir():
            yield from _walk(entry, path / entry.name)
        elif entry.name.endswith(".in"):
            yield path / entry.name, entry
