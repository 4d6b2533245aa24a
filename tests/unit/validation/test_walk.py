"""Models among files and folders: each once, whatever stands around them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mortice.core.errors import ModelFileError
from mortice.core.model.types import ModelFile
from mortice.core.plugin.registry import Registry
from mortice.core.validation.walk import Found, find_models
from tests.support.gguf_bytes import shard
from tests.support.hf_folders import write_folder
from tests.support.registry import make_registry, plugin_of
from tests.support.tiny import tiny

REGISTRY = make_registry()


def found_in(*paths: Path, registry: Registry = REGISTRY) -> list[Found]:
    found = list(find_models(paths, registry.open_model, registry.try_open_model))
    for each in found:
        if each.file is not None:
            each.file.close()
    return found


def names(found: list[Found], root: Path) -> list[str]:
    return [str(each.path.relative_to(root)) for each in found]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a model, a model in a folder of it, and other files."""
    (tmp_path / "models" / "b").mkdir(parents=True)
    tiny(tmp_path).rename(tmp_path / "models" / "a.gguf")
    (tmp_path / "models" / "b" / "c.bin").write_bytes((tmp_path / "models" / "a.gguf").read_bytes())
    (tmp_path / "models" / "README.md").write_text("no model")
    (tmp_path / "models" / "empty").touch()
    return tmp_path / "models"


def test_a_folder_is_searched_and_what_is_no_model_is_passed_over(folder: Path) -> None:
    found = found_in(folder)
    assert names(found, folder) == ["a.gguf", "b/c.bin"]
    assert all(each.error is None for each in found)


def test_a_file_that_is_named_has_to_be_a_model(folder: Path) -> None:
    (found,) = found_in(folder / "README.md")
    assert "no loader takes it" in str(found.error)


def test_a_folder_without_a_model_is_an_error(tmp_path: Path) -> None:
    (found,) = found_in(tmp_path)
    assert str(found.error) == f"{tmp_path}: no model in this folder, wanted at least one"


def test_a_broken_model_in_a_folder_is_found_and_the_rest_too(folder: Path) -> None:
    (folder / "0.gguf").write_bytes(b"GGUF")
    found = found_in(folder)
    assert names(found, folder) == ["0.gguf", "a.gguf", "b/c.bin"]
    assert isinstance(found[0].error, ModelFileError)


def test_the_shards_of_a_model_count_once(tmp_path: Path) -> None:
    for number in range(3):
        shard(number, 3, 3).f32(f"t{number}", [1.0]).write(tmp_path / f"m-{number + 1:05d}-of-00003.gguf")
    (found,) = found_in(tmp_path)
    assert found.file is not None
    assert len(found.file.files) == 3
    assert len(found_in(*sorted(tmp_path.iterdir()))) == 1, "named one by one, too"


def test_a_missing_shard_is_said_once(tmp_path: Path) -> None:
    for number in (0, 2):
        shard(number, 3, 3).f32(f"t{number}", [1.0]).write(tmp_path / f"m-{number + 1:05d}-of-00003.gguf")
    (found,) = found_in(tmp_path)
    assert "shard 2 of 3 is missing" in str(found.error)


def test_a_file_with_two_names_counts_once_under_the_one_with_a_suffix(folder: Path) -> None:
    (folder / "blobs").mkdir()
    (folder / "a.gguf").rename(folder / "blobs" / "0ff1ce")
    (folder / "snapshots").mkdir()
    (folder / "snapshots" / "a.gguf").symlink_to(folder / "blobs" / "0ff1ce")
    found = found_in(folder / "snapshots", folder)
    assert names(found, folder) == ["snapshots/a.gguf", "b/c.bin"]
    (folder / "0name").hardlink_to(folder / "b" / "c.bin")
    assert "0name" in names(found_in(folder), folder)


def test_hidden_folders_and_links_to_folders_are_not_entered(folder: Path) -> None:
    (folder / ".cache").mkdir()
    (folder / ".cache" / "d.gguf").write_bytes((folder / "a.gguf").read_bytes())
    (folder / "loop").symlink_to(folder)
    assert names(found_in(folder), folder) == ["a.gguf", "b/c.bin"]


def test_a_model_whose_link_leads_nowhere_is_a_model_that_cannot_be_opened(folder: Path) -> None:
    (folder / "d.gguf").symlink_to(folder / "gone")
    (folder / "notes.txt").symlink_to(folder / "gone")
    found = found_in(folder)
    assert [one.error is not None for one in found] == [False, True, False]
    assert "d.gguf" in str(found[1].error)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_cannot_be_read_is_named(folder: Path) -> None:
    (folder / "b").chmod(0)
    found = found_in(folder)
    (folder / "b").chmod(0o755)
    assert "cannot be read" in str(found[-1].error)


def test_a_folder_that_a_loader_takes_is_one_model(folder: Path) -> None:
    def open_folder(path: Path) -> ModelFile | None:
        if not (path / "README.md").exists():
            return None
        parts = (path / "README.md", path / "empty")
        return ModelFile(path=path, format="toy", version="1", metadata={}, tensors={}, files=parts)

    registry = make_registry({"mine": plugin_of(mortice_open_model=open_folder)})
    assert names(found_in(folder, registry=registry), folder) == [".", "a.gguf", "b/c.bin"]


@pytest.mark.parametrize("shards", [1, 2])
def test_a_hugging_face_folder_is_one_model_and_a_broken_one_is_said_once(tmp_path: Path, shards: int) -> None:
    (tmp_path / "hub").mkdir()
    with REGISTRY.open_model(tiny(tmp_path)) as file:
        folder = write_folder(tmp_path / "hub" / "model", file, shards=shards)
    assert names(found_in(tmp_path / "hub"), tmp_path) == ["hub/model"]
    (folder / "config.json").write_text("{")
    (found,) = found_in(tmp_path / "hub")
    assert "config.json" in str(found.error)
