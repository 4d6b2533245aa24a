"""The qtype suite: the built-in types pass, and types that are wrong in one place are found out."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attrs import evolve
from numpy.typing import NDArray

from mortice.core.model.qtypes import GGML_TYPES, QType
from mortice.core.plugin.interfaces import QuantizationType
from mortice.core.testing.qtype_suite import QTypeSuite
from mortice.core.testing.random_rows import random_rows
from mortice.plugins.qtypes import mortice_qtypes
from tests.kit.running import failures, run
from tests.support.cuda import needs_nvrtc

TYPES = {type_.qtype.name: type_ for type_ in mortice_qtypes()}
Q8_0 = TYPES["Q8_0"]
WITHOUT_HEADER = sorted(name for name, type_ in TYPES.items() if type_.traits is None)
Values = NDArray[np.float32]
Bytes = NDArray[np.uint8]


def fault(type_: QuantizationType, check: str = "") -> dict[str, str]:
    """What the suite says of a type; one architecture is enough here."""
    return failures(QTypeSuite.of(type=type_, archs=("sm_90",)), check)


@pytest.mark.parametrize("name", WITHOUT_HEADER)
def test_every_built_in_type_without_a_header_passes(name: str) -> None:
    failed, counts = run(QTypeSuite.of(type=TYPES[name]))
    assert failed == {}
    assert counts["passed"] >= 6


@pytest.mark.parametrize("name", sorted(TYPES))
def test_random_rows_are_finite_and_fill_every_byte(name: str) -> None:
    rows = random_rows(TYPES[name], 64, 512, np.random.default_rng(1))
    values = TYPES[name].dequantize(rows)
    assert np.isfinite(values).all()
    assert np.abs(values).max() <= 1e6
    assert len(np.unique(rows)) > 200


def dequantize_as(change: Callable[[Values, Bytes], Any]) -> QuantizationType:
    return evolve(Q8_0, dequantize=lambda rows: change(Q8_0.dequantize(rows), rows))


def noisy(values: Values, rows: Bytes) -> Values:
    return values * np.float32(1 + 0.001 * len(rows))


@pytest.mark.parametrize(
    ("change", "check", "words"),
    [
        (lambda values, rows: values.astype(np.float64), "a block means the same wherever it stands", "float64"),
        (lambda values, rows: values[:, ::2], "a block means the same wherever it stands", "returned float32"),
        (
            lambda values, rows: values * np.nan,
            "dequantise gives finite float32 of the right shape",
            "no finite values",
        ),
        (noisy, "a block means the same wherever it stands", "a row by itself gives other values"),
        (
            lambda values, rows: np.where(np.arange(values.shape[1]) < 32, values, -values),
            "a block means the same wherever it stands",
            "a block by itself",
        ),
        (lambda values, rows: np.abs(values), "the header equals the reference on the cpu [0]", "dequantise4"),
        (lambda values, rows: values * np.float32(1.0001), "the header equals the reference on the cpu [1]", "says"),
    ],
    ids=["float64", "half the columns", "NaN", "depends on neighbours", "depends on the place", "no sign", "scaled"],
)
def test_a_wrong_reference_is_reported(change: Callable[[Values, Bytes], Any], check: str, words: str) -> None:
    found = fault(dequantize_as(change), check)
    assert words in found[check]


def test_a_reference_that_writes_to_the_file_is_reported() -> None:
    def scribbling(rows: Bytes) -> Values:
        rows[:, 0] ^= 1
        return Q8_0.dequantize(rows)

    found = fault(evolve(Q8_0, dequantize=scribbling, traits=None, planes=None))
    assert "read-only" in found["dequantise leaves its input alone"]


def test_bits_without_effect_are_reported() -> None:
    wide = QType(1900, "WIDE", 32, 36)

    def dequantize(rows: Bytes) -> Values:
        blocks = rows.reshape(-1, 36)[:, :34]
        return Q8_0.dequantize(np.ascontiguousarray(blocks)).reshape(len(rows), rows.shape[1] // 36 * 32)

    found = fault(QuantizationType(qtype=wide, dequantize=dequantize))
    assert list(found) == ["every bit counts"]
    assert "bits [272, 273" in found["every bit counts"]


@pytest.mark.parametrize(
    ("quantize", "check"),
    [
        (lambda values: np.zeros((len(values), 34 * values.shape[1] // 32), np.uint8), "quantise is the way back"),
        (lambda values: Q8_0.quantize(values[:, ::-1]), "quantise is the way back"),  # type: ignore[misc]
        (lambda values: Q8_0.quantize(values).astype(np.int16), "quantise is the way back"),  # type: ignore[misc]
        (lambda values: Q8_0.quantize(values / np.abs(values).max()), "quantise takes zeros"),  # type: ignore[misc]
    ],
    ids=["zeros", "backwards", "int16", "divides by zero"],
)
def test_a_wrong_way_back_is_reported(quantize: Callable[[Values], Bytes], check: str) -> None:
    assert check in fault(evolve(Q8_0, quantize=quantize, traits=None, planes=None), check)


def test_the_example_of_one_bit_keeps_the_bound_it_states_and_not_the_common_one() -> None:
    path = Path(__file__).parents[2] / "docs" / "examples" / "mortice-q1" / "mortice_q1" / "plugin.py"
    type_ = runpy.run_path(str(path))["mortice_qtypes"]()[0]
    assert fault(type_, "quantise is the way back") == {}
    common = fault(evolve(type_, largest_error=0.5), "quantise is the way back")["quantise is the way back"]
    assert common == "normal random values are 0.59 off after rounding, wanted at most 0.5, the type's largest_error"


@pytest.mark.parametrize("bound", [0.0, 1.0, -0.1, float("nan")])
def test_a_bound_that_everything_or_nothing_keeps_is_refused(bound: float) -> None:
    with pytest.raises(ValueError, match=r"'largest_error' must be [<>] [01]\.0"):
        evolve(Q8_0, largest_error=bound)


def test_a_reference_that_cannot_take_no_rows_is_told_so() -> None:
    def dequantize(rows: Bytes) -> Values:
        return Q8_0.dequantize(rows) * np.float32(rows.max() > 0)

    found = fault(evolve(Q8_0, dequantize=dequantize), "dequantise gives finite float32 of the right shape")
    said = found["dequantise gives finite float32 of the right shape"]
    assert said.startswith("0 rows, uint8 of shape (0, 204): ValueError: zero-size array")


def test_a_name_of_ggml_for_something_else_is_reported() -> None:
    found = fault(evolve(Q8_0, qtype=QType(1901, "Q8_0", 32, 34), traits=None, planes=None))
    assert "contradicts GGML's" in found["it is what the core will use"]


def test_planes_that_lose_bits_are_reported() -> None:
    assert Q8_0.planes is not None
    whole = Q8_0.planes

    def planes(blocks: Bytes) -> tuple[Bytes, ...]:
        low, _, scales = whole(blocks)
        return low, low, scales

    found = fault(evolve(Q8_0, planes=planes))
    assert "are in no plane" in found["planes keep every bit once"]
    assert "repack and planes differ" in found["the header equals the reference on the cpu [0]"]


def changed_header(folder: Path, old: str, new: str) -> QuantizationType:
    """Q8_0 with another header."""
    assert Q8_0.traits is not None
    text = Q8_0.traits.read_text(encoding="utf-8")
    assert old in text
    path = folder / "traits.cuh"
    path.write_text(text.replace(old, new), encoding="utf-8")
    return evolve(Q8_0, traits=path)


@pytest.mark.parametrize(
    ("old", "new", "check", "words"),
    [
        ("dot_all<Q8_0>(w, x)", "dot_low<Q8_0>(w, x)", "the header equals the reference on the cpu [0]", "dot: chunk"),
        (
            "scaled4(integers4(w, group)",
            "scaled4(integers4(w, group ^ 1)",
            "the header equals the reference on the cpu [0]",
            "dequantise4",
        ),
        (
            "raw_words4<Q8_0>(block + 18)",
            "raw_words4<Q8_0>(block + 2)",
            "the header equals the reference on the cpu [2]",
            "repack and planes differ",
        ),
        (
            "make_float2(half_bits(w.d), 0.f)",
            "make_float2(half_bits(w.d), 0.5f)",
            "the header equals the reference on the cpu [0]",
            "affine differs",
        ),
    ],
    ids=["half a product", "groups exchanged", "half the elements twice", "another affine"],
)
def test_a_wrong_header_is_reported(old: str, new: str, check: str, words: str, tmp_path: Path) -> None:
    assert words in fault(changed_header(tmp_path, old, new), check)[check]


@needs_nvrtc
def test_a_header_that_does_not_compile_is_reported(tmp_path: Path) -> None:
    found = fault(changed_header(tmp_path, "uint32 d;", "uint32 d"), "the header compiles")
    assert "traits.cuh" in found["the header compiles [sm_90]"]


def test_what_is_not_there_is_skipped_with_a_reason() -> None:
    from mortice.core.testing.suite import outcomes

    suite = QTypeSuite.of(type=evolve(TYPES["IQ1_S"]), archs=("sm_90",))
    reasons = {outcome.check: outcome.message for outcome in outcomes(suite) if outcome.status == "skipped"}
    assert reasons["the header compiles [sm_90]"].startswith("IQ1_S has no CUDA traits header")
    assert GGML_TYPES[19].name == "IQ1_S"
