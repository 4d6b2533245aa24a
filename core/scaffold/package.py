"""Writes the package of a new plugin: complete, tested and installable, to be changed step by step.

A template is a file below ``templates/KIND`` or ``templates/common``; its path without ``.in`` is that in the package,
with ``MODULE`` for the module's name. In its text ``$name`` and the other names of `Names` are filled in.
"""

from __future__ import annotations

import difflib
import keyword
import os
import re
import shutil
import sys
import zlib
from collections.abc import Iterator
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path, PurePosixPath
from string import Template
from typing import Literal, get_args

from attrs import asdict, frozen

from mortice.core.errors import ConfigError
from mortice.core.plugin.hookspecs import CONTRACT_VERSION
from mortice.core.plugin.manager import BUILTIN_PLUGINS, builtin_name
from mortice.core.version import __version__

__all__ = ["KINDS", "Kind", "Names", "names_for", "write_package"]

Kind = Literal["arch", "qtype", "upload", "loader"]
KINDS: tuple[str, ...] = get_args(Kind)
"""What a plugin may be started as. A package may give several things; these are beginnings."""

_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
_MOST_LETTERS = 40
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
        raise ConfigError(f"name: found {name!r}, wanted {wanted}, such as acme-ternary")
    module = name.replace("-", "_")
    if name in map(builtin_name, BUILTIN_PLUGINS):
        raise ConfigError(f"name: {name!r} is the name of a built-in plugin")
    if keyword.iskeyword(module) or module in sys.stdlib_module_names or module in ("mortice", "tests", "test"):
        raise ConfigError(f"name: {name!r}: import {module} means something else already; take another name")
    return Names(
        name=name,
        module=module,
        camel="".join(word.capitalize() for word in name.split("-")),
        upper=module.upper(),
        type_id=_FIRST_ID + zlib.crc32(name.encode()) % _IDS,
    )


def write_package(name: str, kind: str, folder: Path) -> Path:
    """Write a package into a new folder `name` of `folder`.

    Returns:
        The new folder.

    Raises:
        ConfigError: for a bad name or kind, when the folder exists already, or when it cannot be written. Nothing is
            left of what was begun.

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
    try:
        for path, text in _files(names, kind):
            file = part / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        part.rename(target)  # in one step: a package is there as a whole or not at all
    except OSError as error:
        raise ConfigError(f"{target}: cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return target


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
