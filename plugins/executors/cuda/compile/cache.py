"""Compiled kernels on disk, shared by all processes of a user.

An entry is one file: the SHA-256 of the rest in hex, a line of JSON (what `Compiled` says besides the code), the cubin.
Files appear complete or not at all (`os.replace`); whatever does not match its hash counts as absent. A folder that
cannot be written or a full disk costs time only.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from threading import Lock

from attrs import asdict, define, field

from mortice.plugins.executors.cuda.compile.nvrtc import Compiled, KernelResources, Source
from mortice.plugins.executors.cuda.device.toolkit import Compiler

__all__ = ["KernelCache", "cache_folder", "cache_key", "write_whole"]

_FORMAT = 2
_ABANDONED_SECONDS = 3600.0
"""A temporary file this old belongs to a process that died."""
_TRIM_TO = 0.9


def cache_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """Where caches live: ``$MORTICE_CACHE``, ``$XDG_CACHE_HOME/mortice`` or ``~/.cache/mortice``."""
    if environ.get("MORTICE_CACHE"):
        return Path(environ["MORTICE_CACHE"]).expanduser()
    base = environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if Path(base).is_absolute() else Path("~/.cache").expanduser()) / "mortice"


def cache_key(source: Source, arch: str, compiler: Compiler) -> str:
    """SHA-256 in hex of all that decides the machine code; where mortice and the headers are installed does not."""
    parts = [_FORMAT, source.name, _digest(source.text), source.flags, arch, compiler.identity]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@lru_cache(maxsize=128)
def _digest(text: str) -> str:
    """Many sources differ in their constants only, and each is asked for several times."""
    return hashlib.sha256(text.encode()).hexdigest()


def write_whole(path: Path, content: bytes) -> None:
    """Write a file, and its folder where there is none; it appears complete or not at all.

    Raises:
        OSError: when that fails; nothing is left behind.

    """
    temporary = None
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", suffix=".tmp", delete=False) as file:
            temporary = Path(file.name)
            file.write(content)
        temporary.replace(path)
    except OSError:
        if temporary is not None:
            _remove(temporary)
        raise


@define(eq=False)
class KernelCache:
    """A folder of compiled kernels. Threads and processes may share it.

    Attributes:
        folder: created when first needed.
        max_bytes: beyond it the entries unused for longest are deleted.

    """

    folder: Path = field(factory=lambda: cache_folder() / "kernels")
    max_bytes: int = 512 * 1024**2
    _notes: list[str] = field(factory=list, init=False, repr=False)
    _lock: Lock = field(factory=Lock, init=False, repr=False)

    @property
    def notes(self) -> tuple[str, ...]:
        """Why entries could not be kept, once."""
        return tuple(self._notes)

    def get(self, key: str) -> Compiled | None:
        """The entry of that key, or None when it is absent or damaged."""
        path = self._path(key)
        try:
            content = path.read_bytes()
        except OSError:
            return None
        digest, _, payload = content.partition(b"\n")
        if hashlib.sha256(payload).hexdigest().encode() != digest:
            return None
        with suppress(OSError):  # in a read-only folder nothing is evicted either
            os.utime(path)  # its last use
        return _unpack(payload)

    def put(self, key: str, compiled: Compiled) -> None:
        """Keep an entry; when that fails, `notes` says why."""
        payload = _pack(compiled)
        digest = hashlib.sha256(payload).hexdigest().encode()
        try:
            write_whole(self._path(key), digest + b"\n" + payload)
        except OSError as error:
            self._note(f"compiled kernels are not kept: {self.folder}: {error.strerror or error}")

    def trim(self) -> None:
        """Delete the entries unused for longest when there are too many bytes, and what dead processes left."""
        files = []
        try:
            for path in self.folder.iterdir():
                try:
                    status = path.stat()
                except OSError:  # another process deleted it
                    continue
                if path.suffix == ".tmp" and time.time() - status.st_mtime > _ABANDONED_SECONDS:
                    _remove(path)
                elif path.suffix == ".kernel":
                    files.append((status.st_mtime_ns, status.st_size, path))
        except OSError:  # no folder
            return
        total = sum(size for _, size, _ in files)
        if total <= self.max_bytes:
            return
        for _, size, path in sorted(files):
            if total <= self.max_bytes * _TRIM_TO:
                break
            _remove(path)
            total -= size

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.kernel"

    def _note(self, note: str) -> None:
        with self._lock:
            if not self._notes:
                self._notes.append(note)


def _pack(compiled: Compiled) -> bytes:
    functions = {name: asdict(used) for name, used in compiled.functions.items()}
    head = {"functions": functions, "warnings": compiled.warnings}
    return json.dumps(head).encode() + b"\n" + compiled.cubin


def _unpack(payload: bytes) -> Compiled:
    head, _, cubin = payload.partition(b"\n")
    fields = json.loads(head)
    functions = {name: KernelResources(**used) for name, used in fields["functions"].items()}
    return Compiled(cubin=cubin, functions=functions, warnings=tuple(fields["warnings"]))


def _remove(path: Path) -> None:
    with suppress(OSError):  # it stays; the next trim tries again
        path.unlink(missing_ok=True)
