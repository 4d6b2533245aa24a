"""Reading places of an open file into memory that is there."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import numpy as np
import pytest

from mortice.core.errors import ModelFileError
from mortice.core.model.file_reader import FileReader
from mortice.core.model.qtypes import GGML_TYPES
from mortice.core.model.types import TensorView

CONTENT = np.random.default_rng(0).integers(0, 256, 5000, np.uint8)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "model.bin"
    path.write_bytes(CONTENT.tobytes())
    return path


def reader_of(path: Path) -> FileReader:
    with path.open("rb") as file:
        return FileReader.of(path, file)


def descriptors_of(path: Path) -> int:
    links = Path("/proc/self/fd").iterdir()
    return sum(1 for link in links if link.is_symlink() and os.path.realpath(link) == str(path))


def test_any_place_is_read_after_the_file_it_was_made_from_is_closed(path: Path) -> None:
    reader = reader_of(path)
    for start, stop in ((0, 5000), (17, 4099), (4999, 5000), (5000, 5000)):
        out = np.zeros(stop - start, np.uint8)
        reader.read_into(out, start)
        np.testing.assert_array_equal(out, CONTENT[start:stop])
    reader.close()


def test_reads_that_give_less_than_asked_go_on(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, views, at: whole(file, [views[0][:700]], at))
    out = np.zeros(4000, np.uint8)
    reader_of(path).read_into(out, 600)
    np.testing.assert_array_equal(out, CONTENT[600:4600])


def test_a_file_cut_short_is_named_with_the_byte_at_which_it_ends(path: Path) -> None:
    reader = reader_of(path)
    os.truncate(path, 4500)
    with pytest.raises(ModelFileError, match=r"model.bin: byte 4500: the file ends, 300 more bytes were there when"):
        reader.read_into(np.zeros(800, np.uint8), 4000)


def test_a_file_replaced_under_its_name_is_still_the_one_that_was_opened(path: Path) -> None:
    reader = reader_of(path)
    other = path.with_name("other")
    other.write_bytes(bytes(5000))
    other.replace(path)
    out = np.zeros(5000, np.uint8)
    reader.read_into(out, 0)
    np.testing.assert_array_equal(out, CONTENT)


def test_a_closed_reader_says_so_and_may_be_closed_twice(path: Path) -> None:
    reader = reader_of(path)
    reader.close()
    reader.close()
    with pytest.raises(ModelFileError, match=r"model.bin: is closed$"):
        reader.read_into(np.zeros(1, np.uint8), 0)


def test_the_descriptor_goes_with_the_reader_closed_or_not(path: Path) -> None:
    for close in (True, False):
        reader = reader_of(path)
        assert descriptors_of(path) == 1
        if close:
            reader.close()
        else:
            del reader
            gc.collect()
        assert descriptors_of(path) == 0


def test_a_tensor_is_read_from_its_place_by_its_reader_or_from_its_bytes(path: Path) -> None:
    reader = reader_of(path)
    data = CONTENT[1000:1160]
    for read in (reader.read_into, None):
        view = TensorView(name="t", shape=(10, 4), qtype=GGML_TYPES[0], data=data, offset=1000, path=path, reader=read)
        out = np.zeros(48, np.uint8)
        view.read_into(out, 32)
        np.testing.assert_array_equal(out, CONTENT[1032:1080])


def test_bytes_of_a_tensor_that_is_made_are_those_of_its_rows() -> None:
    rows = CONTENT[:160].reshape(10, 16)
    view = TensorView(
        name="t",
        shape=(10, 4),
        qtype=GGML_TYPES[0],
        make=lambda start, stop: rows[start:stop],
        offset=0,
        path=Path("t"),
    )
    out = np.zeros(50, np.uint8)
    view.read_into(out, 21)
    np.testing.assert_array_equal(out, CONTENT[21:71])
