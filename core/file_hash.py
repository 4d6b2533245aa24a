"""SHA-256 of whole files, computed beside other work."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Event, Lock
from types import TracebackType
from typing import Self

from attrs import define, field, frozen

from mortice.core.errors import ModelFileError

__all__ = ["FileHash", "FileHashes"]

_CHUNK_BYTES = 4 << 20
_THREADS = 4


@frozen(kw_only=True)
class FileHash:
    """A file and its bytes.

    Attributes:
        name: of the file, without its folder.
        nbytes: its size.
        sha256: of all its bytes, in hex: what ``sha256sum`` prints, and what model hubs list.

    """

    name: str
    nbytes: int
    sha256: str


@define(eq=False)
class FileHashes:
    """Hashes of files under way on threads of their own; use it as a context manager, which stops them.

    A thread hashes about 1 to 2 GB a second where the file is in memory, and Python's lock is not held meanwhile.

    Attributes:
        paths: the files.
        total: their bytes when this was made.
        done: bytes hashed so far.

    """

    paths: Sequence[Path]
    total: int = field(default=0, init=False)
    done: int = field(default=0, init=False)
    _lock: Lock = field(factory=Lock, init=False, repr=False)
    _stopped: Event = field(factory=Event, init=False, repr=False)
    _pool: ThreadPoolExecutor = field(init=False, repr=False)
    _jobs: list[Future[FileHash]] = field(factory=list, init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="mortice-hash")
        self.total = sum(path.stat().st_size for path in self.paths)
        self._jobs += [self._pool.submit(self._hash, path) for path in self.paths]

    def _hash(self, path: Path) -> FileHash:
        digest = hashlib.sha256()
        nbytes = 0
        try:
            with path.open("rb", buffering=0) as file:
                while not self._stopped.is_set() and (chunk := file.read(_CHUNK_BYTES)):
                    digest.update(chunk)
                    nbytes += len(chunk)
                    with self._lock:
                        self.done += len(chunk)
        except OSError as error:
            raise ModelFileError(path, f"cannot be read: {os.strerror(error.errno or 0)}") from error
        return FileHash(name=path.name, nbytes=nbytes, sha256=digest.hexdigest())

    def result(self, progress: Callable[[int, int], None] | None = None) -> tuple[FileHash, ...]:
        """Wait for all; `progress` is told bytes done and in all meanwhile.

        Raises:
            ModelFileError: for a file that cannot be read.

        """
        found = []
        for job in self._jobs:
            while True:
                if progress is not None:
                    progress(self.done, self.total)
                try:
                    found.append(job.result(timeout=0.1))
                    break
                except TimeoutError:
                    continue
        return tuple(found)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._pool.shutdown(cancel_futures=True)
