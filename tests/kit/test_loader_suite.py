"""The loader suite: a careful loader passes, and loaders that trust a file too much are found out."""

from __future__ import annotations

import json
import mmap
import struct
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mortice.core.errors import ModelFileError
from mortice.core.model.qtypes import QType
from mortice.core.model.types import LoadOptions, ModelFile, TensorView
from mortice.core.plugin.interfaces import QuantizationType
from mortice.core.testing.loader_suite import LoaderSuite
from mortice.core.testing.suite import outcomes
from tests.kit.running import failures

# a small format, and what can be done wrong with it ---------------------------------------------------------------


def good(path: Path, options: LoadOptions) -> ModelFile | None:
    """A line of JSON, then tensor data; nothing is trusted."""
    if path.suffix != ".toy":
        return None
    if not path.is_file():
        raise ModelFileError(path, "not a regular file")
    try:
        with path.open("rb") as file:
            data = file.read()
        line, _, body = data.partition(b"\n")
        header = json.loads(line)
        start = len(line) + 1
        types = {qtype.name: qtype for qtype in options.qtypes.values()}
        tensors = {}
        for name, (kind, shape, offset) in header["tensors"].items():
            if not all(type(extent) is int and 0 < extent < 2**40 for extent in shape) or type(offset) is not int:
                raise ModelFileError(path, f"{name!r}: no shape or offset")
            nbytes = types[kind].nbytes(tuple(shape))
            if offset < 0 or offset + nbytes > len(body):
                raise ModelFileError(path, f"{name!r} ends beyond the file", start)
            view = np.frombuffer(data, np.uint8)[start + offset : start + offset + nbytes]
            tensors[name] = TensorView(
                name=name, shape=tuple(shape), qtype=types[kind], data=view, offset=start + offset, path=path
            )
        metadata = dict(header["metadata"])
        architecture = metadata["general.architecture"]
    except (OSError, LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ModelFileError(path, f"broken: {' '.join(str(error).split())[:80]}") from None
    metadata["general.architecture"] = str(architecture)
    return ModelFile(path=path, format="toy", version="1", metadata=metadata, tensors=tensors, files=(path,))


def suite_of(hook: Callable[[Path, LoadOptions], Any]) -> LoaderSuite:
    """The suite on a loader of the format above."""

    class Toy(LoaderSuite):
        plugin = SimpleNamespace(mortice_open_model=hook)

        def sample(self, folder: Path) -> Path:
            tensors = {"a": ["F32", [8, 4], 0], "b": ["Q8_0", [2, 32], 128]}
            header = json.dumps({"metadata": {"general.architecture": "toy"}, "tensors": tensors})
            path = folder / "model.toy"
            path.write_bytes(header.encode() + b"\n" + np.random.default_rng(1).bytes(196))
            return path

    return Toy()


def test_a_careful_loader_passes() -> None:
    assert failures(suite_of(good)) == {}


def takes_everything(path: Path, options: LoadOptions) -> Any:
    if path.suffix != ".toy":
        raise ModelFileError(path, "not a toy file")
    return good(path, options)


def lets_errors_through(path: Path, options: LoadOptions) -> Any:
    if path.suffix == ".toy" and path.is_file():
        json.loads(path.read_bytes().partition(b"\n")[0])
    return good(path, options)


def allocates_what_it_is_told(path: Path, options: LoadOptions) -> Any:
    if path.suffix == ".toy" and path.is_file():
        number = struct.unpack("<Q", path.read_bytes()[64:72].ljust(8, b"\0"))[0]
        np.zeros(min(number, 2**28), np.uint8)
    return good(path, options)


def keeps_files_open(path: Path, options: LoadOptions) -> Any:
    model = good(path, options)
    if model is not None:
        KEPT.append(path.open("rb"))
    return model


def maps_and_forgets(path: Path, options: LoadOptions) -> Any:
    if path.suffix == ".toy" and path.is_file() and path.stat().st_size:
        with path.open("rb") as file:
            KEPT.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    return good(path, options)


def copies_tensors(path: Path, options: LoadOptions) -> Any:
    model = good(path, options)
    if model is not None:
        for view in model.tensors.values():
            object.__setattr__(view, "_stored", view.data.copy())
    return model


def gives_other_bytes(path: Path, options: LoadOptions) -> Any:
    model = good(path, options)
    if model is not None:
        for view in model.tensors.values():
            changed = np.roll(view.data, 1)
            changed.flags.writeable = False
            object.__setattr__(view, "_stored", changed)
    return model


def guesses_types(path: Path, options: LoadOptions) -> Any:
    return good(path, LoadOptions())


def does_not_look_at_the_end(path: Path, options: LoadOptions) -> Any:
    if path.suffix == ".toy" and path.is_file():
        data = path.read_bytes()
        if b"\n" in data:
            path.write_bytes(data.ljust(400, b"\0"))
    return good(path, options)


def waits(path: Path, options: LoadOptions) -> Any:
    if path.suffix == ".toy" and path.is_file() and not path.read_bytes():
        time.sleep(2.1)
    return good(path, options)


def says_it_in_two_lines(path: Path, options: LoadOptions) -> Any:
    try:
        return good(path, options)
    except ModelFileError as error:
        raise ModelFileError(path, f"broken:\n{error}") from None


KEPT: list[Any] = []
WRONG = "wrong content under the right name is refused [empty]"
FAULTS = [
    (takes_everything, "other files are declined [a text]", "wanted None"),
    (lets_errors_through, WRONG, "JSONDecodeError"),
    (allocates_what_it_is_told, "damage anywhere in the header is survived [2^62]", "bytes were allocated"),
    (keeps_files_open, "closing gives everything back", "a file is open"),
    (maps_and_forgets, "opening again shows the same", "a file is left open"),
    (copies_tensors, "views are the bytes of the file", "can be written"),
    (gives_other_bytes, "views are the bytes of the file", "are not those at"),
    (guesses_types, "the types of this run are used", "no such type is known"),
    (does_not_look_at_the_end, "a file that is cut short is refused", "opens, with another content"),
    (waits, WRONG, "took 2."),
    (says_it_in_two_lines, WRONG, "several lines"),
]


@pytest.mark.parametrize(("loader", "check", "words"), FAULTS, ids=[loader.__name__ for loader, _, _ in FAULTS])
def test_a_planted_fault_is_reported(loader: Callable[..., Any], check: str, words: str) -> None:
    try:
        assert words in failures(suite_of(loader), check)[check]
    finally:
        for kept in KEPT:
            kept.close()
        KEPT.clear()


def sample_of_own_type(folder: Path) -> Path:
    """A file whose tensor has a type that only the loader's own plugin gives."""
    header = {"metadata": {"general.architecture": "toy"}, "tensors": {"a": ["OWN", [8, 4], 0]}}
    path = folder / "model.toy"
    path.write_bytes(json.dumps(header).encode() + b"\n" + np.random.default_rng(1).bytes(256))
    return path


OWN = QuantizationType(qtype=QType(1901, "OWN", 4, 32), dequantize=lambda rows: rows[:, ::8].astype(np.float32))


def test_a_sample_may_have_tensors_of_a_type_that_the_same_plugin_gives(tmp_path: Path) -> None:
    sample = sample_of_own_type(tmp_path)
    plugin = SimpleNamespace(mortice_open_model=good)
    assert failures(LoaderSuite.of(plugin=plugin, sample_path=sample, qtypes=[OWN])) == {}


def test_a_loader_that_waits_for_a_pipe_is_reported() -> None:
    def waiting(path: Path, options: LoadOptions) -> Any:
        if path.suffix == ".toy":
            path.open("rb").close()
        return good(path, options)

    check = "a pipe in the place of the file is refused"
    assert failures(suite_of(waiting), check) == {check: "a named pipe is waited for"}


def test_without_a_sample_only_what_needs_none_is_checked() -> None:
    suite = LoaderSuite.of(plugin=SimpleNamespace(mortice_open_model=good))
    checked = {outcome.check: outcome.status for outcome in outcomes(suite)}
    assert checked["other files are declined [a text]"] == "passed"
    assert checked["a good file opens"] == "skipped"
