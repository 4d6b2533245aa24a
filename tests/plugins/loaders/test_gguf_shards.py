"""Split models: any shard opens all of them, and shards that do not belong together are refused."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from mortice.core.errors import ModelFileError
from mortice.core.model.types import LoadOptions, ModelFile
from mortice.plugins.loaders.gguf.loader import open_gguf
from tests.support import gguf_bytes as raw
from tests.support.gguf_bytes import GgufBytes, shard
from tests.support.resources import open_files


def opened(path: Path) -> ModelFile:
    model = open_gguf(path, LoadOptions())
    assert model is not None
    return model


def shard_path(folder: Path, number: int, count: int = 3) -> Path:
    return folder / f"model-{number + 1:05d}-of-{count:05d}.gguf"


def write_shards(folder: Path, **replaced: GgufBytes) -> list[Path]:
    """Three shards of one, none and two tensors; `s1=...` puts another file in the place of shard 1."""
    made = {
        "s0": shard(0, 3, 3).f32("a", [1.0]),
        "s1": shard(1, 3, 3),
        "s2": shard(2, 3, 3).f32("b", [2.0]).f32("c", [3.0]),
    } | replaced
    return [made[f"s{number}"].write(shard_path(folder, number)) for number in range(3)]


def refuse(path: Path, at_fault: Path, *wanted: str) -> None:
    with pytest.raises(ModelFileError) as caught:
        open_gguf(path, LoadOptions())
    assert open_files(path.parent) == 0
    assert caught.value.path == at_fault
    assert "\n" not in str(caught.value)
    for part in wanted:
        assert part in str(caught.value)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_any_shard_opens_the_whole_model(tmp_path: Path, number: int) -> None:
    paths = write_shards(tmp_path)
    with opened(paths[number]) as model:
        assert model.path == paths[0]
        assert model.files == tuple(paths)
        assert model.architecture == "llama"
        assert model.metadata["split.no"] == 0
        assert model.metadata_offsets["general.architecture"] == 24
        assert list(model.tensors) == ["a", "b", "c"]
        assert [view.path for view in model.tensors.values()] == [paths[0], paths[2], paths[2]]
        assert [float(view.data.view("<f4")[0]) for view in model.tensors.values()] == [1.0, 2.0, 3.0]
    assert open_files(tmp_path) == 0


def test_shards_written_by_the_gguf_package_open(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama", split_max_tensors=2)
    for index in range(5):
        writer.add_tensor(f"t{index}", np.full((2, 3), index, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with opened(tmp_path / "model-00002-of-00003.gguf") as model:
        assert len(model.files) == 3
        assert model.architecture == "llama"
        for index in range(5):
            np.testing.assert_array_equal(model.tensors[f"t{index}"].data.view("<f4"), [index] * 6)


def test_symbolic_links_in_another_folder_find_each_other(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    for number, path in enumerate(write_shards(tmp_path)):
        blob = path.rename(tmp_path / "blobs" / f"{number}")
        shard_path(tmp_path / "snapshot", number).symlink_to(blob)
    with opened(shard_path(tmp_path / "snapshot", 1)) as model:
        assert list(model.tensors) == ["a", "b", "c"]


@pytest.mark.parametrize("count", [None, 0, 1])
def test_a_file_of_one_shard_is_an_ordinary_file(tmp_path: Path, count: int | None) -> None:
    made = GgufBytes().f32("a", [1.0])
    if count is not None:
        made.number("split.count", raw.UINT16, count)
    for name in ("model.gguf", "model-00001-of-00001.gguf"):
        with opened(made.write(tmp_path / name)) as model:
            assert model.files == (tmp_path / name,)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    paths = write_shards(tmp_path)
    paths[1].unlink()
    refuse(paths[2], paths[1], "shard 2 of 3 is missing")


def test_several_missing_shards_are_counted(tmp_path: Path) -> None:
    paths = write_shards(tmp_path)
    paths[0].unlink()
    paths[2].unlink()
    refuse(paths[1], paths[0], "shard 1 of 3 is missing, and 1 more")


def test_a_broken_shard_is_named(tmp_path: Path) -> None:
    paths = write_shards(tmp_path)
    paths[2].write_bytes(paths[2].read_bytes()[:-40])
    refuse(paths[0], paths[2], "bytes are missing")


def test_a_split_file_under_another_name_says_what_name_was_expected(tmp_path: Path) -> None:
    path = write_shards(tmp_path)[1].rename(tmp_path / "renamed.gguf")
    refuse(path, path, "split.count is 3", "model-00001-of-00003.gguf was expected")


def test_a_name_of_a_shard_without_the_keys_is_refused(tmp_path: Path) -> None:
    paths = write_shards(tmp_path, s1=GgufBytes().f32("x", [1.0]))
    refuse(paths[1], paths[1], "by its name this is shard 2 of 3, but split.count is missing")
    refuse(paths[0], paths[1], "split.no is missing, 1 was expected")


def test_a_count_that_differs_from_the_name_is_refused(tmp_path: Path) -> None:
    paths = write_shards(tmp_path, s0=shard(0, 2, 3).f32("a", [1.0]))
    refuse(paths[0], paths[0], "split.count is 2, but by its name this is shard 1 of 3")


@pytest.mark.parametrize("number", ["00000", "00004"])
def test_a_shard_number_outside_the_count_is_refused(tmp_path: Path, number: str) -> None:
    write_shards(tmp_path)
    path = shard(0, 3, 3).write(tmp_path / f"model-{number}-of-00003.gguf")
    refuse(path, path, "split.count is 3, but by its name this is shard")


def test_shards_that_disagree_on_the_count_are_refused(tmp_path: Path) -> None:
    paths = write_shards(tmp_path, s2=shard(2, 4, 3).f32("b", [2.0]).f32("c", [3.0]))
    refuse(paths[0], paths[2], "split.count is 4, 3 was expected")


def test_shards_in_the_wrong_place_are_refused(tmp_path: Path) -> None:
    paths = write_shards(tmp_path, s1=shard(2, 3, 3))
    refuse(paths[0], paths[1], "split.no is 2, 1 was expected")


def test_shards_of_two_architectures_are_refused(tmp_path: Path) -> None:
    paths = write_shards(tmp_path, s1=shard(1, 3, 3).text("general.architecture", "qwen2"))
    refuse(paths[0], paths[1], "general.architecture is 'qwen2', but 'llama' in model-00001-of-00003.gguf")


def test_shards_of_two_byte_orders_are_refused(tmp_path: Path) -> None:
    paths = write_shards(tmp_path, s1=shard(1, 3, 3, order=">"))
    refuse(paths[0], paths[1], "byte order differs from that of model-00001-of-00003.gguf")


def test_a_tensor_that_two_shards_hold_is_refused(tmp_path: Path) -> None:
    paths = write_shards(tmp_path, s2=shard(2, 3, 3).f32("b", [2.0]).f32("a", [3.0]))
    refuse(paths[0], paths[2], "tensor 'a' is there twice, first in model-00001-of-00003.gguf")


def test_a_total_number_of_tensors_that_does_not_add_up_is_refused(tmp_path: Path) -> None:
    paths = write_shards(tmp_path, s2=shard(2, 3, 3).f32("b", [2.0]))
    refuse(paths[0], paths[0], "split.tensors.count is 3, 2 was expected")


@pytest.mark.parametrize(("type_id", "value"), [(raw.FLOAT32, 3.0), (raw.BOOL, True), (raw.INT32, -3)])
def test_a_split_key_of_the_wrong_type_is_refused(tmp_path: Path, type_id: int, value: float) -> None:
    path = shard_path(tmp_path, 0)
    GgufBytes().number("split.no", raw.UINT16, 0).number("split.count", type_id, value).write(path)
    refuse(path, path, f"byte 46: split.count is {value}, a count was expected")


def test_a_split_key_that_is_text_is_refused(tmp_path: Path) -> None:
    path = GgufBytes().text("split.count", "3").write(shard_path(tmp_path, 0))
    refuse(path, path, "split.count is '3', a count was expected")


def test_a_split_key_that_is_an_array_is_refused_in_one_line(tmp_path: Path) -> None:
    path = GgufBytes().numbers("split.count", raw.INT32, [3] * 500).write(shard_path(tmp_path, 0))
    refuse(path, path, "split.count is '[3 3 3", "a count was expected")
