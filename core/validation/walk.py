"""Finds the models among files and folders, each once however many files it consists of."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from attrs import define, field, frozen

from mortice.core.errors import ModelFileError, MorticeError
from mortice.core.model.types import ModelFile

__all__ = ["Found", "find_models"]

_SHARD = re.compile(r"(?P<stem>.+)-[0-9]{5}-of-(?P<count>[0-9]{5})(?P<suffix>\.[^.]+)", re.DOTALL)

_NAMED_MODELS = (".gguf",)
"""A link of such a name that leads nowhere is a model that is missing, as a cache or Git LFS leaves it."""

TryOpen = Callable[[Path], ModelFile | None]
"""Opens a path, None for what no loader takes."""


@frozen(eq=False)
class Found:
    """A model, opened, or the reason why it cannot be; whoever takes it closes the file."""

    path: Path
    file: ModelFile | None = None
    error: MorticeError | None = None


def find_models(
    paths: Iterable[Path], open_required: Callable[[Path], ModelFile], try_open: TryOpen
) -> Iterator[Found]:
    """Open every model at or below `paths`.

    A path that is given must be a model or a folder that holds some. In a folder, what no loader takes is passed over,
    folders whose name begins with a dot and links to folders are not entered, and a file that has several names there
    counts once.

    Args:
        paths: files and folders.
        open_required: opens a file or raises.
        try_open: opens a file or a folder, or gives None.

    """
    walk = _Walk(try_open)
    for path in paths:
        if not path.is_dir():
            if not walk.is_known(path):
                yield from walk.opened(path, open_required)
            continue
        before = walk.found
        yield from walk.folder(path)
        if walk.found == before:
            yield Found(path, error=ModelFileError(path, "no model in this folder, wanted at least one"))


@define(eq=False)
class _Walk:
    try_open: TryOpen
    found: int = 0
    _files: set[tuple[int, int]] = field(factory=set)
    _errors: set[str] = field(factory=set)
    """What was said of a folder is not said again of its files."""
    _shards: set[tuple[Path, str, str, str]] = field(factory=set)

    def folder(self, root: Path) -> Iterator[Found]:
        unreadable: list[OSError] = []
        for name, folders, files in os.walk(root, onerror=unreadable.append):
            folders[:] = sorted(folder for folder in folders if not folder.startswith("."))
            folder = Path(name)
            yield from self.opened(folder, self.try_open)  # some formats are folders
            # a name with a suffix before one without: what a download cache calls a file by its hash comes last
            for path in sorted((folder / file for file in files), key=lambda path: (not path.suffix, path.name)):
                dangling = path.suffix in _NAMED_MODELS and path.is_symlink() and not path.exists()
                if (path.is_file() or dangling) and not self.is_known(path):
                    yield from self.opened(path, self.try_open)
            yield from self._unreadable(unreadable)
        yield from self._unreadable(unreadable)

    def _unreadable(self, errors: list[OSError]) -> Iterator[Found]:
        while errors:
            error = errors.pop()
            path = Path(error.filename)
            self.found += 1
            yield Found(path, error=ModelFileError(path, f"cannot be read: {error.strerror}"))

    def opened(self, path: Path, opening: TryOpen) -> Iterator[Found]:
        try:
            file = opening(path)
        except MorticeError as error:
            self.found += 1
            if opening is not self.try_open or str(error) not in self._errors:
                yield Found(path, error=error)
            self._errors.add(str(error))
            return
        if file is not None:
            self.found += 1
            self._files.update(key for part in file.files if (key := _key(part)) is not None)
            yield Found(path, file=file)

    def is_known(self, path: Path) -> bool:
        """Whether the file belongs to a model that was found before; a further shard of a broken one does, too."""
        key = _key(path)
        if key in self._files:
            return True
        shard = _SHARD.fullmatch(path.name)
        if shard is not None:
            group = (path.parent, shard["stem"], shard["count"], shard["suffix"])
            if group in self._shards:
                return True
            self._shards.add(group)
        return False


def _key(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino
