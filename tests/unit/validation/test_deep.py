"""Tensor data, read once: NaN and Inf, zeros, values no weight has; for every type, and for files of any size."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from mortice.core.errors import ModelFileError
from mortice.core.model.findings import Finding
from mortice.core.model.qtypes import GGML_TYPES, QType
from mortice.core.model.types import ModelFile, TensorView
from mortice.core.plugin.registry import Registry
from mortice.core.testing.blocks import encode
from mortice.core.validation import deep
from mortice.core.validation.deep import data_findings
from mortice.core.validation.magnitudes import FLOAT16_MAX, Rows, reads_scales, row_magnitudes
from tests.support.hf_folders import write_folder
from tests.support.models import smollm2_path
from tests.support.registry import make_registry, plugin_of, qtype
from tests.support.tiny import tiny

REGISTRY = make_registry()
BY_NAME = {known.name: known for known in GGML_TYPES.values()}
WEIGHT_TYPES = [BY_NAME[name] for name in REGISTRY.qtypes]
WITH_SCALES = [known for known in WEIGHT_TYPES if reads_scales(known) and known.is_quantized]

Bytes = NDArray[np.uint8]


def values_of(rows: Bytes, known: QType) -> NDArray[np.float32]:
    return REGISTRY.qtypes[known.name].value.dequantize(rows)


def judged(rows: Bytes, known: QType) -> Rows:
    return row_magnitudes(rows, known, lambda part: values_of(part, known))


def random_rows(known: QType, seed: int = 0, rows: int = 6) -> Bytes:
    rng = np.random.default_rng(seed)
    return np.ascontiguousarray(encode(rng.standard_normal((rows, 512), np.float32), known, rng))


def file_of(*tensors: TensorView) -> ModelFile:
    return ModelFile(
        path=Path("made.gguf"),
        format="made",
        version="1",
        metadata={"general.architecture": "llama"},
        tensors={tensor.name: tensor for tensor in tensors},
        files=(Path("made.gguf"),),
    )


def tensor(rows: Bytes, known: QType, name: str = "blk.0.attn_q.weight") -> TensorView:
    columns = rows.shape[1] // known.block_bytes * known.block_elements
    shape = (len(rows), columns) if len(rows) > 1 else (columns,)
    return TensorView(
        name=name, shape=shape, qtype=known, data=rows.reshape(-1).copy(), offset=64, path=Path("made.gguf")
    )


def f32(values: object, name: str = "blk.0.attn_q.weight") -> TensorView:
    array = np.atleast_2d(np.asarray(values, np.float32))
    return tensor(array.view(np.uint8).reshape(len(array), -1), BY_NAME["F32"], name)


def found_in(*tensors: TensorView) -> list[Finding]:
    return data_findings(file_of(*tensors), REGISTRY)


# types -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("known", WEIGHT_TYPES, ids=lambda known: known.name)
def test_good_rows_of_any_type_have_no_faults(known: QType) -> None:
    rows = judged(random_rows(known), known)
    assert not rows.broken.any()
    assert not rows.zero.any()
    assert not rows.large.any()


@pytest.mark.parametrize("known", WEIGHT_TYPES, ids=lambda known: known.name)
def test_a_row_is_broken_exactly_when_its_values_are(known: QType) -> None:
    """Random bytes hit NaN, Inf and good scales alike."""
    rng = np.random.default_rng(5)
    rows = rng.integers(0, 256, (400, known.row_bytes(256)), np.uint8)
    with np.errstate(all="ignore"):
        values = values_of(rows, known)
    finite = np.isfinite(values).all(axis=1)
    found = judged(rows, known).broken
    assert not found[finite].any() or known.is_quantized
    assert found[~finite].all()


@pytest.mark.parametrize("known", WITH_SCALES, ids=lambda known: known.name)
@pytest.mark.parametrize("bits", [0x7C00, 0xFC00, 0x7E01], ids=["inf", "-inf", "nan"])
def test_a_scale_that_is_no_number_breaks_its_row_only(known: QType, bits: int) -> None:
    for place in scale_places(known):
        rows = random_rows(known)
        rows[3, known.block_bytes + place : known.block_bytes + place + 2] = np.array([bits], "<u2").view(np.uint8)
        assert judged(rows, known).broken.tolist() == [row == 3 for row in range(6)]


@pytest.mark.parametrize("known", WITH_SCALES, ids=lambda known: known.name)
def test_no_value_is_larger_than_the_scale_allows(known: QType) -> None:
    """What is called too large may be; what is not called so never is."""
    rng = np.random.default_rng(2)
    rows = rng.integers(0, 256, (3000, known.row_bytes(256)), np.uint8)
    for place in scale_places(known):
        scales = rng.uniform(0, 60, (3000, 256 // known.block_elements)).astype("<f2")
        blocks = rows.reshape(3000, -1, known.block_bytes)
        blocks[:, :, place : place + 2] = scales[:, :, None].view(np.uint8)
    largest = np.abs(values_of(rows, known)).max(axis=1)
    assert not (largest > FLOAT16_MAX)[~judged(rows, known).large].any()


@pytest.mark.parametrize("known", WEIGHT_TYPES, ids=lambda known: known.name)
def test_a_row_of_zeros_is_found_as_the_quantiser_writes_it(known: QType) -> None:
    rows = random_rows(known)
    try:
        rows[2] = encode(np.zeros((1, 512), np.float32), known, np.random.default_rng(0))
    except (ValueError, ZeroDivisionError):
        rows[2] = 0
    if not np.any(values_of(rows[2:3], known)):
        assert judged(rows, known).zero.tolist() == [row == 2 for row in range(6)]
    else:  # a random encoder, or a format without a zero
        assert not judged(rows, known).zero.any()


def scale_places(known: QType) -> list[int]:
    """Byte places of a block at which a float16 NaN makes values NaN."""
    block = random_rows(known, rows=1)[:, : known.row_bytes(256)]
    places = []
    for place in range(0, known.block_bytes, 2):
        changed = block.copy()
        changed[0, place : place + 2] = (0, 0x7E)
        with np.errstate(all="ignore"):
            if np.isnan(values_of(changed, known)).any():
                places.append(place)
    assert places, known.name
    return places


# findings --------------------------------------------------------------------------------------------------------


def test_a_nan_is_an_error_that_names_tensor_row_and_offset() -> None:
    values = np.ones((5, 8))
    values[3, 7] = np.nan
    (finding,) = found_in(f32(values))
    assert (finding.rule, finding.severity, finding.subject, finding.offset) == (
        "data.not_finite",
        "error",
        "blk.0.attn_q.weight",
        64,
    )
    assert str(finding).startswith("blk.0.attn_q.weight: 1 of 5 rows, the first is row 3:; a NaN or infinite value")


def test_a_weight_beyond_float16_is_a_warning() -> None:
    (finding,) = found_in(f32([[1, 2], [1e9, 1]]))
    assert (finding.rule, finding.severity) == ("data.range", "warning")


@pytest.mark.parametrize(
    ("name", "rule", "severity"),
    [
        ("blk.0.ffn_up.weight", "data.zero_rows", "warning"),
        ("token_embd.weight", "data.zero_rows", "note"),
        ("output.weight", "data.zero_rows", "note"),
    ],
)
def test_a_row_of_zeros_is_odd_but_in_tables_of_tokens(name: str, rule: str, severity: str) -> None:
    (finding,) = found_in(f32([[1, 2], [0, -0.0], [0, 0]], name))
    assert (finding.rule, finding.severity) == (rule, severity)
    assert finding.found.startswith("2 of 3 rows, the first is row 1: zero")


def test_a_tensor_of_zeros_is_said_once_and_a_bias_may_be_zero() -> None:
    (weight,) = found_in(f32([[0, 0], [0, 0]]))
    assert (weight.rule, weight.found) == ("data.zero", "all values are zero")
    (bias,) = found_in(f32([0, 0, 0], "blk.0.attn_q.bias"))
    assert bias.severity == "note"


def test_integer_tensors_are_left_out_and_types_nobody_reads_are_named() -> None:
    integers = tensor(np.zeros((2, 8), np.uint8), BY_NAME["I32"], "a.weight")
    unread = tensor(np.zeros((1, 36), np.uint8), BY_NAME["NVFP4"], "b.weight")
    (finding,) = found_in(integers, unread)
    assert (finding.rule, finding.subject, finding.severity) == ("data.unread", "b.weight", "note")


def test_a_type_of_a_plugin_is_judged_by_its_values() -> None:
    mine = qtype()  # one float32 a block
    registry = make_registry({"mine": plugin_of(mortice_qtypes=lambda: [mine])})
    rows = np.array([[1, np.inf], [2, 3]], np.float32).view(np.uint8).reshape(2, -1)
    (finding,) = data_findings(file_of(tensor(rows, mine.qtype)), registry)
    assert (finding.rule, finding.found) == ("data.not_finite", "1 of 2 rows, the first is row 0:")


# files -----------------------------------------------------------------------------------------------------------


def test_a_row_longer_than_a_piece_is_judged_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deep, "PIECE_BYTES", 64)
    values = np.zeros((3, 100), np.float32)
    values[0, 99] = values[2, 0] = 1
    (finding,) = found_in(f32(values))
    assert finding.found == "1 of 3 rows, the first is row 1: zero"
    rows = random_rows(BY_NAME["Q6_K"])  # a block is longer than a piece, too
    rows[4, 210 + 208 : 210 + 210] = (0, 0x7E)
    (finding,) = found_in(tensor(rows, BY_NAME["Q6_K"]))
    assert finding.found == "1 of 6 rows, the first is row 4:"


def test_progress_ends_with_every_byte_and_never_goes_back(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    with REGISTRY.open_model(tiny(tmp_path)) as file:
        assert data_findings(file, REGISTRY, lambda done, total: told.append((done, total))) == []
        assert told[-1] == (file.tensor_bytes, file.tensor_bytes)
    assert [done for done, _ in told] == sorted({done for done, _ in told})


def test_memory_does_not_grow_with_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deep, "PIECE_BYTES", 1 << 16)
    row = np.ones((1, 1 << 14), np.float32).view(np.uint8).reshape(-1)
    data = np.broadcast_to(row, (1 << 10, len(row))).reshape(-1)  # 64 MiB
    big = TensorView(name="a", shape=(1 << 10, 1 << 14), qtype=BY_NAME["F32"], data=data, offset=0, path=Path("a"))
    tracemalloc.start()
    try:
        assert data_findings(file_of(big), REGISTRY) == []
        assert tracemalloc.get_traced_memory()[1] < data.nbytes / 8
    finally:
        tracemalloc.stop()


def test_a_file_that_shrank_meanwhile_is_refused(tmp_path: Path) -> None:
    path = tiny(tmp_path)
    with REGISTRY.open_model(path) as file:
        with path.open("r+b") as stream:
            stream.truncate(path.stat().st_size // 2)
        with pytest.raises(ModelFileError, match="the file ends"):
            data_findings(file, REGISTRY)


def test_a_real_model_has_good_data() -> None:
    registry: Registry = REGISTRY
    with registry.open_model(smollm2_path()) as file:
        assert [finding for finding in data_findings(file, registry) if finding.severity != "note"] == []


def test_tensors_that_are_made_row_by_row_are_judged_as_they_will_be(tmp_path: Path) -> None:
    with REGISTRY.open_model(tiny(tmp_path)) as source:
        folder = write_folder(tmp_path / "hf", source)
    with REGISTRY.open_model(folder) as file:
        assert any(view.make is not None for view in file.tensors.values()), "Q and K change the order of rows"
        assert data_findings(file, REGISTRY) == []
