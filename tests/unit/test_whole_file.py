"""A file is written whole, or what was there stays."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mortice.core.errors import ExecutionError
from mortice.core.whole_file import write_text, written_beside


def test_a_file_is_left_alone_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with written_beside(path) as part:
        part.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"


def test_a_failure_that_is_no_fault_of_the_disk_goes_through_and_leaves_nothing(tmp_path: Path) -> None:
    def broken(part: Path) -> None:
        part.write_text("half")
        raise RuntimeError("not the disk")

    with pytest.raises(RuntimeError, match="not the disk"), written_beside(tmp_path / "file") as part:
        broken(part)
    assert not list(tmp_path.iterdir())


def test_what_is_no_file_is_refused_and_stays(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(ExecutionError, match="pipe: cannot be written: found a device, a pipe or a socket"):
        write_text(pipe, "text")
    assert pipe.is_fifo()
    with pytest.raises(ExecutionError, match="cannot be written: found a folder, wanted the name of a file"):
        write_text(tmp_path, "text")


def test_links_in_a_circle_and_folders_that_are_not_there_are_refused(tmp_path: Path) -> None:
    circle = tmp_path / "circle"
    circle.symlink_to(circle)
    for path in (circle, tmp_path / "no" / "file"):
        with pytest.raises(ExecutionError, match="cannot be written"):
            write_text(path, "text")
