"""Properties of the GGUF loader that hold for any file."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mortice.core.errors import ModelFileError
from mortice.core.model.qtypes import GGML_TYPES
from mortice.core.model.types import LoadOptions
from mortice.plugins.loaders.gguf.loader import open_gguf
from mortice.plugins.loaders.gguf.parser import read_header
from tests.support import gguf_bytes as raw
from tests.support.gguf_bytes import GgufBytes

quietly = settings(deadline=None, max_examples=60)

RANGES = {
    raw.UINT8: (0, 2**8 - 1),
    raw.INT8: (-(2**7), 2**7 - 1),
    raw.UINT16: (0, 2**16 - 1),
    raw.INT16: (-(2**15), 2**15 - 1),
    raw.UINT32: (0, 2**32 - 1),
    raw.INT32: (-(2**31), 2**31 - 1),
    raw.UINT64: (0, 2**64 - 1),
    raw.INT64: (-(2**63), 2**63 - 1),
}
numbers: dict[int, st.SearchStrategy[Any]] = {
    type_id: st.integers(low, high) for type_id, (low, high) in RANGES.items()
}
numbers[raw.FLOAT32] = st.floats(allow_nan=False, width=32)
numbers[raw.FLOAT64] = st.floats(allow_nan=False)
numbers[raw.BOOL] = st.booleans()

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)
scalars = st.sampled_from(sorted(numbers)).flatmap(lambda t: st.tuples(st.just(t), numbers[t]))
arrays = st.sampled_from(sorted(numbers)).flatmap(
    lambda t: st.tuples(st.just(t), st.lists(numbers[t], min_size=1, max_size=20))
)
values = scalars | arrays | st.tuples(st.just(raw.STRING), texts | st.lists(texts, min_size=1, max_size=20))
keys = st.text("abcdefghijklmnopqrstuvwxyz._0123456789", min_size=1, max_size=40)
metadata = st.dictionaries(keys.map("x.".__add__), values, max_size=8)

tensor_names = st.text("abcdefghijklmnopqrstuvwxyz.", min_size=1, max_size=63)


@st.composite
def tensor(draw: st.DrawFn) -> tuple[int, tuple[int, ...], bytes]:
    """Type id, shape (rows first) and data."""
    qtype = draw(st.sampled_from(sorted(GGML_TYPES.values(), key=lambda t: t.id)))
    leading = draw(st.lists(st.integers(1, 3), max_size=3))
    shape = (*leading, qtype.block_elements * draw(st.integers(1, 3)))
    return qtype.id, shape, np.random.default_rng(draw(st.integers(0, 9))).bytes(qtype.nbytes(shape))


tensors = st.dictionaries(tensor_names, tensor(), max_size=5)


def add_keys(made: GgufBytes, items: dict[str, tuple[int, Any]]) -> None:
    for key, (type_id, value) in items.items():
        if type_id == raw.STRING:
            made.strings(key, value) if isinstance(value, list) else made.text(key, value)
        elif isinstance(value, list):
            made.numbers(key, type_id, value)
        else:
            made.number(key, type_id, value)


def assert_metadata(found: Any, wanted: dict[str, tuple[int, Any]]) -> None:
    assert list(found) == list(wanted)
    for key, (_, value) in wanted.items():
        assert (list(found[key]) if isinstance(value, list) else found[key]) == value


@quietly
@given(items=metadata, weights=tensors, order=st.sampled_from("<>"), version=st.sampled_from([2, 3]))
def test_any_metadata_come_back_equal(
    items: dict[str, tuple[int, Any]], weights: dict[str, Any], order: str, version: int
) -> None:
    made = GgufBytes(order=order, version=version)
    add_keys(made, items)
    for name, (type_id, shape, data) in weights.items():
        made.tensor(name, shape[::-1], type_id, data)
    header = read_header(Path("m.gguf"), made.build(), GGML_TYPES)
    assert_metadata(header.metadata, items)
    assert [(t.name, t.shape, t.qtype.id) for t in header.tensors] == [
        (name, shape, type_id) for name, (type_id, shape, _) in weights.items()
    ]


@quietly
@given(items=metadata, weights=tensors)
def test_any_tensors_come_back_equal(items: dict[str, tuple[int, Any]], weights: dict[str, Any]) -> None:
    made = GgufBytes()
    add_keys(made, items)
    for name, (type_id, shape, data) in weights.items():
        made.tensor(name, shape[::-1], type_id, data)
    with tempfile.TemporaryDirectory() as folder:
        model = open_gguf(made.write(Path(folder) / "m.gguf"), LoadOptions())
        assert model is not None
        found = {name: (view.qtype.id, view.shape, bytes(view.data)) for name, view in model.tensors.items()}
        assert found == weights
        assert list(found) == list(weights)


@quietly
@given(
    items=metadata,
    weights=st.dictionaries(tensor_names, st.lists(st.integers(1, 4), min_size=1, max_size=4), max_size=4),
)
def test_what_the_gguf_package_writes_and_reads_is_read_the_same(
    items: dict[str, tuple[int, Any]], weights: dict[str, list[int]]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        for key, (type_id, value) in items.items():
            if isinstance(value, list):
                sub_type = gguf.GGUFValueType(type_id)
                writer.add_key_value(key, value, gguf.GGUFValueType.ARRAY, sub_type)
            else:
                writer.add_key_value(key, value, gguf.GGUFValueType(type_id))
        for index, (name, shape) in enumerate(weights.items()):
            writer.add_tensor(name, np.full(shape, index, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

        model = open_gguf(path, LoadOptions())
        assert model is not None
        assert_metadata(model.metadata, {"general.architecture": (raw.STRING, "llama"), **items})
        theirs = gguf.GGUFReader(path)
        assert list(model.tensors) == [str(t.name) for t in theirs.tensors]
        for read in theirs.tensors:
            view = model.tensors[read.name]
            assert view.shape == read.data.shape
            np.testing.assert_array_equal(view.data.view("<f4").reshape(view.shape), read.data)


def small_file(order: str) -> bytes:
    made = GgufBytes(order=order).text("general.architecture", "llama").u32("general.alignment", 32)
    made.strings("s", ["a", "größe", "x" * 130]).numbers("n", raw.FLOAT32, [1, 2])
    made.numbers("b", raw.BOOL, [1, 0]).number("q", raw.UINT64, 7)
    return made.f32("first", [1, 2, 3]).tensor("second", [32, 2], raw.Q8_0, bytes(68)).build()


def opens_or_refuses(data: bytes) -> None:
    """Any other exception than a refusal fails the test."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.gguf"
        path.write_bytes(data)
        try:
            model = open_gguf(path, LoadOptions())
        except ModelFileError:
            return
        assert model is not None
        for value in model.metadata.values():
            if not isinstance(value, str | int | float):
                assert len(list(value)) == len(value)
        for view in model.tensors.values():
            assert view.data.nbytes == view.qtype.nbytes(view.shape)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("flip", [0x01, 0x80, 0xFF])
def test_a_file_with_any_one_byte_changed_opens_or_is_refused(order: str, flip: int) -> None:
    data = small_file(order)
    for at in range(len(data)):
        opens_or_refuses(data[:at] + bytes([data[at] ^ flip]) + data[at + 1 :])


@settings(deadline=None, max_examples=200)
@given(st.data(), st.sampled_from("<>"))
def test_a_file_with_several_bytes_changed_opens_or_is_refused(draw: st.DataObject, order: str) -> None:
    data = bytearray(small_file(order))
    for _ in range(draw.draw(st.integers(1, 4))):
        at = draw.draw(st.integers(0, len(data) - 1))
        piece = draw.draw(st.binary(min_size=1, max_size=8))
        data[at : at + len(piece)] = piece
    opens_or_refuses(bytes(data[: draw.draw(st.integers(0, len(data)))]))


@quietly
@given(st.binary(max_size=300))
def test_any_bytes_after_a_good_start_open_or_are_refused(tail: bytes) -> None:
    opens_or_refuses(GgufBytes().build(num_tensors=2, num_keys=2) + tail)
