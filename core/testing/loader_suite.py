"""Checks of a loader: what a good file shows, and what happens to files that are broken in every place.

::

    class TestNpz(LoaderSuite):
        plugin = my_package.plugin

        def sample(self, folder: Path) -> Path:
            return write_npz(self.tiny(folder), folder / "model.npz")

The suite damages copies of the sample itself: cuts, flipped bits, absurd numbers wherever a number may stand, foreign
content, missing parts. What only someone who knows the format can break goes into `damaged`.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from mortice.core.model.qtypes import GGML_TYPES
from mortice.core.model.types import LoadOptions, ModelFile
from mortice.core.plugin.conformance import model_faults
from mortice.core.plugin.interfaces import QuantizationType
from mortice.core.plugin.registry import Registry
from mortice.core.stages import open_file
from mortice.core.testing.file_damage import DAMAGES, FOREIGN, WRONG_CONTENT, open_files, spread
from mortice.core.testing.registries import registry_with
from mortice.core.testing.suite import Suite, each, fail, require, skip
from mortice.core.testing.tiny_models import write_tiny_model
from mortice.core.testing.watched_opening import MOST_SECONDS, Seen, open_with, see

__all__ = ["LoaderSuite"]

_CUTS, _PLACES = 160, 120


class LoaderSuite(Suite):
    """Holds a loader against files that it writes and breaks.

    Attributes:
        plugin: the module or object with the hook `mortice_open_model`.
        sample_path: a good file or folder, instead of `sample`.
        qtypes: quantisation types of the same plugin, where the sample has tensors of them.

    """

    plugin: object
    sample_path: Path | None = None
    qtypes: Sequence[QuantizationType] = ()

    def sample(self, folder: Path) -> Path:
        """Write a small good file, or folder of files, into `folder`; some 10 kB to 1 MB."""
        if self.sample_path is None:
            skip("there is no sample: a good file of the format is needed")
        target = folder / self.sample_path.name
        if self.sample_path.is_dir():
            return Path(shutil.copytree(self.sample_path, target))
        return Path(shutil.copy(self.sample_path, target))

    def damaged(self, folder: Path) -> Iterable[tuple[str, Path]]:
        """Files that have to be refused for a reason only this format has: a name for each, and where it is."""
        del folder
        return ()

    def tiny(self, folder: Path, **arguments: Any) -> ModelFile:
        """A tiny llama in Q8_0 to write in the loader's own format; `arguments` are those of `write_tiny_model`."""
        registry = self._registry()
        given = {"sizes": {"hidden_size": 32, "ffn_size": 64, "num_layers": 1}, "qtypes": "Q8_0", **arguments}
        path = write_tiny_model(folder / "tiny.gguf", registry.contracts["llama"].value, **given)
        return open_file(registry, path)

    # a good file ------------------------------------------------------------------------------------------------

    def test_a_good_file_opens(self, tmp_path: Path) -> None:
        """Format, version, files and architecture are told, and every tensor is what the core takes for granted."""
        path = self.sample(tmp_path)
        with self._opened(path) as model:
            faults = list(model_faults(model))
            require(not faults, "; ".join(faults))
            require(model.format and model.version, "format or version is empty")
            require(model.path == path or model.path in model.files, f"path is {model.path}, wanted {path}")
            there = model.files and all(file.is_file() for file in model.files)
            require(there, "files does not list the model's files")
            require(model.architecture, "metadata has no general.architecture, which finds the contract")
            require(model.tensors, "a good sample has tensors")

    def test_views_are_the_bytes_of_the_file(self, tmp_path: Path) -> None:
        """Nothing is copied or changed, offsets are right, and nobody can write."""
        with self._opened(self.sample(tmp_path)) as model:
            for name, view in model.tensors.items():
                if view.make is not None:
                    continue
                require(not view.data.flags.writeable, f"{name}: the view can be written")
                with view.path.open("rb") as file:
                    file.seek(view.offset)
                    stored = file.read(view.nbytes)
                require(view.data.tobytes() == stored, f"{name}: its bytes are not those at {view.offset} of the file")

    def test_rows_that_are_made_are_the_same_each_time(self, tmp_path: Path) -> None:
        """A tensor that no file holds as it is wanted gives any rows, alone or among others."""
        with self._opened(self.sample(tmp_path)) as model:
            made = [view for view in model.tensors.values() if view.make is not None]
            if not made:
                skip("the loader makes no rows")
            for view in made:
                whole = view.row_bytes(0, view.rows)
                parts = np.vstack([view.row_bytes(row, row + 1) for row in range(view.rows)])
                require(np.array_equal(whole, parts), f"{view.name}: rows one by one are not those made at once")

    def test_closing_gives_everything_back(self, tmp_path: Path) -> None:
        """Closing twice is fine, and no file stays open."""
        path = self.sample(tmp_path)
        before = open_files()
        model = self._open(path)
        require(isinstance(model, ModelFile), "the sample was declined")
        assert isinstance(model, ModelFile)
        model.close()
        model.close()
        require(open_files() == before, "a file is open after the model was closed")

    def test_opening_again_shows_the_same(self, tmp_path: Path) -> None:
        """Nothing is remembered from one opening to the next."""
        path = self.sample(tmp_path)
        require(self._see(path) == self._see(path), "a second opening shows another model")

    def test_the_types_of_this_run_are_used(self, tmp_path: Path) -> None:
        """Quantised types come from the options; one that is not among them is refused, not guessed."""
        path = self.sample(tmp_path)
        with self._opened(path) as model:
            stored = [view.qtype for view in model.tensors.values() if view.make is None]
        used = {qtype.name for qtype in stored if qtype.is_quantized}
        if not used:
            skip("the sample has no quantised tensor")
        fewer = {key: qtype for key, qtype in self._options().qtypes.items() if qtype.name not in used}
        found = self._see(path, LoadOptions(qtypes=fewer))
        require(not found.opened, f"opens with {', '.join(sorted(used))} tensors though no such type is known")

    # what is not this loader's ----------------------------------------------------------------------------------

    @each("what", FOREIGN)
    def test_other_files_are_declined(self, what: str, tmp_path: Path) -> None:
        """Files of no known format are none of this loader's business, whatever they are called."""
        path = tmp_path / "other.unknown"
        path.write_bytes(FOREIGN[what])
        self._expect_declined(path, what)

    def test_a_file_of_another_format_is_declined(self, tmp_path: Path) -> None:
        """A GGUF file belongs to the GGUF loader."""
        with self._opened(self.sample(tmp_path)) as model:
            if model.format == "gguf":
                skip("GGUF is this loader's format")
        (tmp_path / "other").mkdir()
        with self.tiny(tmp_path / "other") as tiny:
            self._expect_declined(tiny.path, "a GGUF file")

    def test_folders_are_declined(self, tmp_path: Path) -> None:
        """An empty folder and one with other files are no models."""
        folder = tmp_path / "other"
        folder.mkdir()
        self._expect_declined(folder, "an empty folder")
        (folder / "notes.txt").write_text("nothing")
        self._expect_declined(folder, "a folder of notes")

    # broken files -----------------------------------------------------------------------------------------------

    @each("content", WRONG_CONTENT)
    def test_wrong_content_under_the_right_name_is_refused(self, content: str, tmp_path: Path) -> None:
        """A download that went wrong, say."""
        for copy, file in self._each_file(tmp_path):
            file.write_bytes(WRONG_CONTENT[content])
            self._expect_refused(copy, f"{file.name} of {content}")

    def test_a_file_that_is_cut_short_is_refused(self, tmp_path: Path) -> None:
        """Anywhere: in the header, between tensors, one byte before the end."""
        for copy, file in self._each_file(tmp_path):
            whole, data = self._see(copy), file.read_bytes()
            for cut in spread(len(data), _CUTS, dense=self._header_bytes(copy, file)):
                file.write_bytes(data[:cut])
                found = self._see(copy)
                if found.opened and found != whole:
                    fail(f"{file.name} cut at byte {cut} of {len(data)} opens, with another content")
            file.write_bytes(data)

    @each("damage", DAMAGES)
    def test_damage_anywhere_in_the_header_is_survived(self, damage: str, tmp_path: Path) -> None:
        """Whatever stands in it: a refusal in one line, or a model whose tensors lie within the file."""
        for copy, file in self._each_file(tmp_path):
            data, patch = file.read_bytes(), DAMAGES[damage]
            header = self._header_bytes(copy, file)
            for place in spread(header, _PLACES, dense=64):
                file.write_bytes(data[:place] + patch + data[place + len(patch) :])
                self._see(copy, what=f"{file.name} with {damage} at byte {place}")
            file.write_bytes(data)

    def test_flipped_bits_are_survived(self, tmp_path: Path) -> None:
        """One bit at a time."""
        for copy, file in self._each_file(tmp_path):
            data = bytearray(file.read_bytes())
            for number, place in enumerate(spread(self._header_bytes(copy, file), 3 * _PLACES, dense=64)):
                data[place] ^= 1 << number % 8
                file.write_bytes(data)
                self._see(copy, what=f"{file.name} with a bit of byte {place} flipped")
                data[place] ^= 1 << number % 8
            file.write_bytes(data)

    def test_a_missing_part_is_refused_by_name(self, tmp_path: Path) -> None:
        """A model in several files needs each that holds tensors."""
        files = list(self._each_file(tmp_path, count_only=True))
        if len(files) < 2:
            skip("the sample is one file")
        for copy, file in self._each_file(tmp_path):
            with self._opened(copy) as model:
                holding = {view.path for view in model.tensors.values()}
            if file == copy or file not in holding:
                continue
            file.unlink()
            found = self._see(copy)
            require(not found.opened, f"opens without {file.name}")
            named = file.name in found.error or not found.error
            require(named, f"without {file.name}: the message does not name it: {found.error}")

    def test_a_folder_in_the_place_of_the_file_is_refused(self, tmp_path: Path) -> None:
        """Named like a model, and none."""
        name = self._single(tmp_path).name
        path = tmp_path / "place" / name
        path.mkdir(parents=True)
        self._expect_refused(path, f"a folder named {name}")

    def test_a_pipe_in_the_place_of_the_file_is_refused(self, tmp_path: Path) -> None:
        """Without waiting for someone to write into it."""
        path = tmp_path / "place" / self._single(tmp_path).name
        path.parent.mkdir()
        os.mkfifo(path)
        results: list[BaseException | None] = []

        def attempt() -> None:
            try:
                self._expect_refused(path, "a named pipe")
            except BaseException as error:  # noqa: BLE001 (told on the test's own thread)
                results.append(error)
            else:
                results.append(None)

        thread = threading.Thread(target=attempt, daemon=True)
        thread.start()
        thread.join(MOST_SECONDS)
        if not results:
            os.close(os.open(path, os.O_RDWR | os.O_NONBLOCK))  # lets it go on
            fail("a named pipe is waited for")
        if results[0] is not None:
            raise results[0]

    def test_a_file_that_may_not_be_read_is_refused(self, tmp_path: Path) -> None:
        """As one of this loader's, if the name says so."""
        path = self._single(tmp_path)
        path.chmod(0)
        try:
            if os.access(path, os.R_OK):
                skip("this user may read everything")
            self._expect_refused(path, "a file without permission")
        finally:
            path.chmod(0o600)

    def test_damage_that_only_this_format_knows_is_refused(self, tmp_path: Path) -> None:
        """See `damaged`."""
        cases = list(self.damaged(tmp_path))
        if not cases:
            skip("`damaged` gives nothing")
        opened = [name for name, path in cases if self._see(path, what=name).opened]
        require(not opened, f"opens: {'; '.join(opened)}")

    # ------------------------------------------------------------------------------------------------------------

    def _registry(self) -> Registry:
        return self.once("registry", lambda: registry_with(qtypes=self.qtypes))

    def _options(self) -> LoadOptions:
        return LoadOptions(qtypes={**GGML_TYPES, **{given.qtype.id: given.qtype for given in self.qtypes}})

    def _open(self, path: Path) -> object:
        return open_with(self.plugin, path, self._options())

    @contextmanager
    def _opened(self, path: Path) -> Iterator[ModelFile]:
        model = self._open(path)
        if not isinstance(model, ModelFile):
            fail(f"{path.name}: a good file; the hook returned {model!r}, wanted a ModelFile")
        with model:
            yield model

    def _see(self, path: Path, options: LoadOptions | None = None, *, what: str = "") -> Seen:
        return see(self.plugin, path, options or self._options(), what=what or path.name)

    def _expect_refused(self, path: Path, what: str) -> None:
        require(not self._see(path, what=what).opened, f"{what} opens")

    def _expect_declined(self, path: Path, what: str) -> None:
        found = self._see(path, what=what)
        require(not found.opened, f"{what} opens")
        require(not found.error, f"{what}: refused ({found.error}), wanted None: it is not surely this loader's")

    def _single(self, folder: Path) -> Path:
        path = self.sample(folder)
        if not path.is_file():
            skip("the model is a folder")
        return path

    def _each_file(self, folder: Path, *, count_only: bool = False) -> Iterator[tuple[Path, Path]]:
        """A fresh copy of the sample for each of its files, and that file in the copy."""
        home = folder / "whole"
        if not home.exists():
            home.mkdir()
            self.sample(home)
        sample = next((path for path in sorted(home.iterdir()) if self._is_model(path)), None)
        if sample is None:
            fail("the sample was declined")
        with self._opened(sample) as model:
            files = [file.relative_to(home) for file in model.files]
        for number, file in enumerate(files):
            if count_only:
                yield sample, home / file
                continue
            copy = folder / f"copy-{len(list(folder.iterdir()))}-{number}"
            shutil.copytree(home, copy)
            yield copy / sample.relative_to(home), copy / file

    def _is_model(self, path: Path) -> bool:
        model = self._open(path)
        if isinstance(model, ModelFile):
            model.close()
        return isinstance(model, ModelFile)

    def _header_bytes(self, copy: Path, file: Path) -> int:
        """Bytes before the first tensor's data."""
        with self._opened(copy) as model:
            offsets = [view.offset for view in model.tensors.values() if view.path == file and view.make is None]
        size = file.stat().st_size
        return min(offsets, default=size) or size
