"""Files are hashed whole, beside other work, and let go of when nobody waits."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path

import pytest

from mortice.core.errors import ModelFileError
from mortice.core.file_hash import FileHashes


def test_hashes_are_those_of_sha256sum(tmp_path: Path) -> None:
    contents = [b"", b"abc", bytes(range(256)) * 40_000]
    paths = [tmp_path / str(number) for number in range(3)]
    for path, data in zip(paths, contents, strict=True):
        path.write_bytes(data)
    seen: list[tuple[int, int]] = []
    with FileHashes(paths) as hashes:
        found = hashes.result(lambda done, total: seen.append((done, total)))
    assert [(one.name, one.nbytes, one.sha256) for one in found] == [
        (path.name, len(data), hashlib.sha256(data).hexdigest()) for path, data in zip(paths, contents, strict=True)
    ]
    total = sum(map(len, contents))
    assert hashes.done == hashes.total == total
    assert all(whole == total and 0 <= done <= total for done, whole in seen)


def test_leaving_stops_the_threads(tmp_path: Path) -> None:
    path = tmp_path / "big"
    with path.open("wb") as file:
        file.truncate(8 << 30)
    with pytest.raises(KeyboardInterrupt), FileHashes([path]) as hashes:
        raise KeyboardInterrupt
    assert hashes.done < hashes.total
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("mortice-hash")]


def test_a_file_that_vanishes_is_named(tmp_path: Path) -> None:
    path = tmp_path / "gone"
    path.mkdir()
    with FileHashes([path]) as hashes, pytest.raises(ModelFileError, match=r"gone: cannot be read: "):
        hashes.result()
