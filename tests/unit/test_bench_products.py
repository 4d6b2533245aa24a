"""The benchmark of single products: which rows it has, what it counts, what it leaves out and refuses."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from attrs import evolve

from mortice.core.bench.product_report import products_as_dict, products_csv, products_markdown
from mortice.core.bench.products import (
    LeftOut,
    ProductModel,
    ProductReport,
    ProductRow,
    bench_products,
    models_of_shape,
)
from mortice.core.cli.main import main
from mortice.core.config import ExecutorConfig, RunConfig
from mortice.core.errors import ConfigError, DoesNotFitError, UnsupportedError
from mortice.core.model.operators import Linear
from mortice.core.model.qtypes import GGML_TYPES
from mortice.core.pipeline import Pipeline, prepare_opened
from mortice.core.plugin.product_times import ProductTime
from mortice.core.plugin.registry import make_registry
from mortice.core.synth.model import synth_model
from mortice.core.synth.recipes import OneType
from mortice.core.testing.registries import registry_with
from mortice.plugins.executors.reference.executor import ReferenceExecutor
from mortice.plugins.executors.reference.runtime import ReferenceRuntime
from tests.support.tiny import QTYPES

CONFIG = RunConfig(executor=ExecutorConfig(name="reference", context=16))
TYPES = {qtype.name: qtype for qtype in GGML_TYPES.values()}
SECONDS = (3e-6, 1e-6, 2e-6)


def silent(_: str) -> None:
    """Notes nobody reads."""


class Timed:
    """Stands for the times of products: each map by itself, and always as long."""

    asked: list[tuple[int, int]]

    def __init__(self) -> None:
        self.asked = []

    def __call__(self, _: ReferenceExecutor, runtime: ReferenceRuntime, rows: int, repeats: int) -> list[ProductTime]:
        self.asked.append((rows, repeats))
        plan = runtime.model.plan
        sizes = {planned.weight: planned.nbytes for planned in plan.weights}
        maps = [o for o in plan.program.operators if isinstance(o, Linear)]
        return [ProductTime(weights=(o.weight,), nbytes=sizes[o.weight], launches=2, seconds=SECONDS) for o in maps]


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Timed:
    """The reference executor, able to time products."""
    made = Timed()
    monkeypatch.setattr(ReferenceExecutor, "time_products", lambda *given: made(*given), raising=False)
    monkeypatch.setattr(ReferenceRuntime, "measure_read_bandwidth", lambda _: 2e12)
    return made


def measured(*names: str, rows: Sequence[int] = (1,), shape: str = "SmolLM2-135M") -> ProductReport:
    registry = make_registry()
    executor = registry.executor("reference")
    models = models_of_shape(CONFIG, registry, executor, shape, names)
    return bench_products(models, executor, rows, 3, silent)


# what is measured


@pytest.mark.usefixtures("timed")
def test_there_is_a_row_for_each_type_and_product_and_those_of_a_product_stand_together() -> None:
    report = measured("Q8_0", "F16")
    products = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down", "token_embd"]
    assert [(row.product, row.qtype) for row in report.rows] == [(p, q) for p in products for q in ("Q8_0", "F16")]
    gate = next(row for row in report.rows if row.product == "ffn_gate")
    assert (gate.outputs, gate.columns, gate.launches, gate.sequences) == (1536, 576, 2, 1)


@pytest.mark.usefixtures("timed")
def test_a_row_compares_its_bytes_at_the_median_with_what_was_measured() -> None:
    row = measured("Q8_0").rows[0]
    assert row.median == 2e-6
    assert row.bytes_per_second == row.nbytes / 2e-6
    assert row.bandwidth_share == pytest.approx(row.nbytes / 2e-6 / 2e12)
    assert evolve(row, read_bandwidth=None).bandwidth_share is None


@pytest.mark.usefixtures("timed")
def test_products_whose_width_a_type_cannot_have_are_left_out_with_the_reason() -> None:
    report = measured("Q4_K")
    assert [row.product for row in report.rows] == ["ffn_down"]  # 1536 columns; all others have 576
    assert len(report.left_out) == 7
    assert report.left_out[0] == LeftOut(
        model="SmolLM2-135M",
        product="attn_q",
        qtype="Q4_K",
        reason="rows of 576 are no whole number of blocks of 256",
    )


@pytest.mark.usefixtures("timed")
def test_what_does_not_fit_the_device_is_left_out_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: Pipeline) -> int:
        raise DoesNotFitError("9 bytes needed, 8 are free")

    monkeypatch.setattr(Pipeline, "preload", full)
    report = measured("Q8_0")
    assert report.rows == ()
    assert report.left_out == (
        LeftOut(model="SmolLM2-135M", product="", qtype="Q8_0", reason="9 bytes needed, 8 are free"),
    )


def test_each_number_of_rows_is_measured_as_often_as_asked_for(timed: Timed) -> None:
    report = measured("Q8_0", rows=(1, 8))
    assert timed.asked == [(1, 3), (8, 3)]
    assert [row.sequences for row in report.rows[:2]] == [1, 8]


@pytest.mark.usefixtures("timed")
def test_products_of_a_model_are_of_the_types_it_has() -> None:
    registry = make_registry()
    file = synth_model("SmolLM2-135M", "Q4_K_M", layers=1, stored=True)
    model = ProductModel(name="a", open=lambda: prepare_opened(CONFIG, registry, file))
    report = bench_products([model], registry.executor("reference"), (1,), 1, silent)
    assert {row.product: row.qtype for row in report.rows}["ffn_down"] == "Q6_K"
    assert report.left_out == ()


@pytest.mark.usefixtures("timed")
def test_by_default_all_types_that_the_executor_multiplies_with_are_measured() -> None:
    registry = make_registry()
    executor = registry.executor("reference")
    able = {kernel.qtype for kernel in registry.kernels(executor, executor.device()) if kernel.operator == "linear"}
    models = models_of_shape(CONFIG, registry, executor, "SmolLM2-135M")
    assert {model.qtype.name for model in models if model.qtype is not None} == able & TYPES.keys()
    assert len(able & TYPES.keys()) > 20


@pytest.mark.usefixtures("timed")
def test_a_type_of_a_plugin_is_left_out_and_how_to_measure_it_is_said() -> None:
    odd = evolve(QTYPES["Q8_0"], qtype=evolve(QTYPES["Q8_0"].qtype, name="Q8_ODD", id=900))
    registry = registry_with(qtypes=[odd])
    models = models_of_shape(CONFIG, registry, registry.executor("reference"), "SmolLM2-135M", ["Q8_ODD"])
    report = bench_products(models, registry.executor("reference"), (1,), 1, silent)
    assert [left.qtype for left in report.left_out] == ["Q8_ODD"]
    assert "measure a file that has it" in report.left_out[0].reason


def test_a_model_of_one_type_has_it_everywhere_but_in_a_table_that_is_not_the_head() -> None:
    model = synth_model("Llama-3.1-8B", OneType(name="Q6_K", base="Q6_K"), layers=1)
    assert model.path.name == "Llama-3.1-8B:Q6_K"
    types = {tensor.name: tensor.qtype.name for tensor in model.tensors.values() if len(tensor.shape) > 1}
    assert types.pop("token_embd.weight") == "Q4_0"
    assert set(types.values()) == {"Q6_K"}
    assert "output.weight" in types


# refusals


def test_an_executor_that_cannot_time_products_is_refused_before_anything_is_opened() -> None:
    plain: Any = SimpleNamespace(name="plain")
    with pytest.raises(UnsupportedError, match=r"products: executor plain \(asked for\) cannot time them"):
        bench_products([], plain, (1,), 1, silent)


def test_a_type_that_the_executor_does_not_have_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"products: unknown type 'Q9_K'; reference has F32, F16, "):
        measured("Q9_K")


@pytest.mark.usefixtures("timed")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--products", "-n", "5"], "--products: takes -b and -r; -p, -n, -d and --profile are for whole steps"),
        (["--products", "-o", "plot"], "--products: found -o plot, wanted md, json or csv"),
        (["SmolLM3-135M", "--products"], "shape: unknown 'SmolLM3-135M', did you mean 'SmolLM2-135M'?"),
        (["SmolLM2-135M:Q8_0", "--products", "--types", "Q8_0"], "--types: SmolLM2-135M:Q8_0 has types of its own"),
        (["SmolLM2-135M:Q8_0", "--types", "Q8_0"], "--types: only with --products"),
        ([], "bench: no model given"),
    ],
)
def test_what_makes_no_sense_is_refused_with_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *arguments, "--executor", "reference"]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


# text


def made() -> ProductReport:
    row = ProductRow(
        model="Llama-3.1-8B",
        product="ffn_gate+ffn_up",
        qtype="Q4_K",
        outputs=28672,
        columns=4096,
        sequences=1,
        nbytes=66_060_288,
        launches=1,
        seconds=(24e-6, 26e-6, 25e-6),
        read_bandwidth=3e12,
    )
    left = LeftOut(model="Llama-3.1-8B", product="", qtype="F32", reason="too large")
    return ProductReport(
        executor="cuda",
        device="a GPU",
        read_bandwidth=3e12,
        rows=(row, evolve(row, qtype="Q6_K", read_bandwidth=None)),
        left_out=(left,),
    )


def test_markdown_has_a_line_a_row_and_one_for_what_was_left_out() -> None:
    text = products_markdown(made())
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "|" in line]
    assert text.startswith("executor cuda on a GPU; read bandwidth 3.000 TB/s measured; mortice ")
    assert lines[0] == ["model", "product", "shape", "type", "seqs", "MB", "µs", "TB/s", "% of read"]
    shown = ["Llama-3.1-8B", "ffn_gate+ffn_up", "28672 x 4096", "Q4_K", "1", "66.06", "25.0", "2.642", "88.1"]
    assert lines[2] == shown
    assert lines[3][-1] == "-"
    assert text.endswith("\n\nleft out: Llama-3.1-8B F32: too large")


def test_json_and_csv_hold_the_same_rows_in_bytes_and_seconds() -> None:
    plain = json.loads(json.dumps(products_as_dict(made())))
    assert plain["rows"][0]["bandwidth_share"] == pytest.approx(66_060_288 / 25e-6 / 3e12)
    assert plain["left_out"][0]["reason"] == "too large"
    lines = list(csv.DictReader(io.StringIO(products_csv(made()))))
    assert [line["qtype"] for line in lines] == ["Q4_K", "Q6_K"]
    assert lines[0]["bytes"] == "66060288"
    assert lines[0]["seconds"] == "2.4e-05 2.6e-05 2.5e-05"
    assert lines[1]["bandwidth_share"] == ""


# the command


def test_the_command_measures_a_shape_with_the_types_asked_for(
    timed: Timed, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["bench", "smollm2-135m", "--products", "--types", "Q8_0,q4_0", "-r", "2", "-b", "1,2", "-o", "csv"]
    assert main([*command, "--executor", "reference"]) == 0
    captured = capsys.readouterr()
    lines = list(csv.DictReader(io.StringIO(captured.out)))
    assert {line["qtype"] for line in lines} == {"Q8_0", "Q4_0"}
    assert timed.asked == [(1, 2), (2, 2)] * 2
    assert "Q4_0 measured" in captured.err


@pytest.mark.usefixtures("timed")
def test_the_command_measures_the_products_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "m.gguf"
    assert main(["synth", "SmolLM2-135M", "Q4_0", str(path), "--layers", "1", "--quiet"]) == 0
    capsys.readouterr()
    assert main(["bench", str(path), "--products", "--executor", "reference", "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert {row["model"] for row in found["rows"]} == {"m.gguf"}
    assert found["read_bandwidth"] == 2e12
