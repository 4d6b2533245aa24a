"""The benchmark: what it counts, what it reports, what it refuses. How fast anything is does not matter here."""

from __future__ import annotations

import csv
import io
import itertools
import json
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve

from mortice.core.bench import report as bench_report
from mortice.core.bench.measure import bench
from mortice.core.bench.report import as_dict, csv_text, markdown, plot
from mortice.core.bench.results import BenchReport, BenchSettings, ProfileRow, SpeedRow, Startup, Subject
from mortice.core.bench.traffic import Traffic, decode_traffic
from mortice.core.cli.main import main
from mortice.core.config import ExecutorConfig, KernelsConfig, RunConfig
from mortice.core.errors import ConfigError, UnsupportedError
from mortice.core.pipeline import Pipeline, prepare_opened
from mortice.core.plugin.events import WaysMeasured
from mortice.core.plugin.registry import make_registry
from mortice.core.synth.model import synth_model
from mortice.plugins.executors.reference.executor import ReferenceExecutor
from mortice.plugins.executors.reference.runtime import ReferenceRuntime

SMALL = BenchSettings(prompt_tokens=(5,), generated_tokens=(3,), depths=(0, 4), repeats=2)


def silent(_: str) -> None:
    """Notes nobody reads."""


def opener(
    shape: str = "SmolLM2-135M",
    recipe: str = "Q8_0",
    *,
    context: int = 16,
    kv_tokens: int = 0,
    layout: str = "auto",
    step_tokens: int = 512,
) -> Callable[[], Pipeline]:
    """Opens a model of one layer on the reference executor."""
    config = RunConfig(
        executor=ExecutorConfig(name="reference", context=context, kv_tokens=kv_tokens, step_tokens=step_tokens),
        kernels=KernelsConfig(layout=layout),
    )
    return lambda: prepare_opened(config, make_registry(), synth_model(shape, recipe, layers=1, stored=True))


@pytest.fixture(scope="module")
def report() -> BenchReport:
    return bench(opener(step_tokens=2), evolve(SMALL, profile=True), silent)


@pytest.fixture
def no_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bandwidth takes half a gigabyte and a second; here a number will do."""
    monkeypatch.setattr(ReferenceRuntime, "measure_read_bandwidth", lambda _: 2e9)


# bytes


def test_the_bytes_of_a_step_are_those_counted_by_hand() -> None:
    with opener("Qwen2.5-0.5B", "F16")() as pipeline:
        traffic = decode_traffic(pipeline.plan, pipeline.executor, pipeline.settings)
    hidden, ffn, q, kv, vocab = 896, 4864, 14 * 64, 2 * 64, 151936
    matrices = 2 * q * hidden + 2 * kv * hidden + 3 * ffn * hidden + vocab * hidden  # the head is the embedding
    vectors = q + 2 * kv + 3 * hidden  # biases, three norms
    assert traffic.weight_bytes == 4 * (matrices + vectors + hidden)  # float32; one row of the embedding
    assert traffic.kv_token_bytes == (4 * 2 * kv,)
    assert traffic.bytes_at(10) == traffic.weight_bytes + 4 * 2 * kv * 11  # ten read, one written


def test_weights_that_stay_in_the_file_count_with_their_bytes_there() -> None:
    with opener("SmolLM2-135M", "Q8_0", layout="file")() as pipeline:
        traffic = decode_traffic(pipeline.plan, pipeline.executor, pipeline.settings)
    hidden, ffn, kv, vocab = 576, 1536, 192, 49152
    matrices = 2 * hidden * hidden + 2 * kv * hidden + 3 * ffn * hidden + vocab * hidden
    assert traffic.weight_bytes == (matrices + hidden) // 32 * 34 + 4 * 3 * hidden


def test_a_head_of_its_own_is_read_besides_a_row_of_the_embedding() -> None:
    with opener("Llama-3.1-8B", "Q4_0", layout="file")() as pipeline:
        traffic = decode_traffic(pipeline.plan, pipeline.executor, pipeline.settings)
    hidden, ffn, kv, vocab = 4096, 14336, 1024, 128256
    layer = (2 * hidden * hidden + 2 * kv * hidden + 3 * ffn * hidden) // 32 * 18
    head = vocab * hidden // 256 * 210
    assert traffic.weight_bytes == layer + head + hidden // 32 * 18 + 4 * 3 * hidden


def test_a_layer_with_a_window_reads_no_more_than_that() -> None:
    traffic = Traffic(weight_bytes=1000, kv_token_bytes=(10.0, 10.0), windows=(0, 4))
    assert traffic.bytes_at(3) == 1000 + 30 + 30 + 20
    assert traffic.bytes_at(9) == 1000 + 90 + 40 + 20
    assert traffic.mean_bytes(3, 2) == (traffic.bytes_at(3) + traffic.bytes_at(4)) / 2
    assert traffic.mean_bytes(3, 1, 4) == 1000 / 4 + 30 + 30 + 20  # all sequences read the weights once


# rows


@pytest.mark.usefixtures("no_bandwidth")
def test_there_is_a_row_for_each_test_and_depth_with_a_time_for_each_repeat() -> None:
    found = bench(opener(), SMALL, silent)
    assert [(row.test, row.tokens, row.depth) for row in found.rows] == [
        ("prefill", 5, 0),
        ("decode", 3, 0),
        ("prefill", 5, 4),
        ("decode", 3, 4),
    ]
    assert all(len(row.seconds) == 2 and min(row.seconds) > 0 for row in found.rows)
    assert found.read_bandwidth == 2e9
    assert {row.read_bandwidth for row in found.rows if row.test == "decode"} == {2e9}
    assert all(row.token_bytes is None for row in found.rows if row.test == "prefill")


@pytest.mark.usefixtures("no_bandwidth")
def test_a_decode_row_counts_the_kv_cache_at_its_depth() -> None:
    shallow, deep = (row for row in bench(opener(), SMALL, silent).rows if row.test == "decode")
    assert shallow.token_bytes is not None
    assert deep.token_bytes is not None
    assert deep.token_bytes - shallow.token_bytes == 4 * (4 * 2 * 192)


@pytest.mark.usefixtures("no_bandwidth")
def test_the_host_is_busy_for_a_part_of_the_time_only() -> None:
    for row in bench(opener(), SMALL, silent).rows:
        if row.test == "decode":
            assert row.host_seconds is not None
            assert all(0 < host < all_ for host, all_ in zip(row.host_seconds, row.seconds, strict=True))


@pytest.mark.usefixtures("no_bandwidth")
def test_a_runtime_that_counts_its_waiting_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    step = ReferenceRuntime.step

    def counted(self: ReferenceRuntime, parts: Sequence[Any]) -> Any:
        Waiting.waited_seconds += 1000.0
        return step(self, parts)

    class Waiting:
        waited_seconds = 0.0

    monkeypatch.setattr(ReferenceRuntime, "waited_seconds", property(lambda _: Waiting.waited_seconds), raising=False)
    monkeypatch.setattr(ReferenceRuntime, "step", counted)
    decode = bench(opener(), evolve(SMALL, prompt_tokens=(), depths=(0,)), silent).rows[0]
    assert decode.host_seconds is not None
    assert decode.host_seconds == pytest.approx([seconds - 3000 for seconds in decode.seconds], abs=100)


@pytest.mark.usefixtures("no_bandwidth")
def test_a_single_step_that_is_held_up_is_not_the_hosts_work(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = itertools.cycle([1000.0, 1000.0, 400.0, 1000.0])  # a first token, or a decode: one before three measured
    step = ReferenceRuntime.step

    def counted(self: ReferenceRuntime, parts: Sequence[Any]) -> Any:
        Waiting.waited_seconds += next(waits)
        return step(self, parts)

    class Waiting:
        waited_seconds = 0.0

    monkeypatch.setattr(ReferenceRuntime, "waited_seconds", property(lambda _: Waiting.waited_seconds), raising=False)
    monkeypatch.setattr(ReferenceRuntime, "step", counted)
    settings = BenchSettings(prompt_tokens=(), generated_tokens=(3,), repeats=3)
    decode = bench(opener(), settings, silent).rows[0]
    assert decode.host_seconds == pytest.approx([-3000.0] * 3, abs=10.0)  # waits are made up, the time is not


@pytest.mark.usefixtures("no_bandwidth")
def test_the_sequence_is_as_deep_at_the_start_of_each_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    fed: list[tuple[int, int]] = []
    step = ReferenceRuntime.step

    def recorded(self: ReferenceRuntime, parts: Sequence[Any]) -> Any:
        fed.extend((part.sequence.length, len(part.token_ids)) for part in parts)
        return step(self, parts)

    monkeypatch.setattr(ReferenceRuntime, "step", recorded)
    bench(opener(), BenchSettings(prompt_tokens=(5,), generated_tokens=(3,), depths=(4,), repeats=2), silent)
    first_tokens, filled = [(0, 5)] * 3, [(0, 4)]
    warm_up_and_repeats = [(4, 5)] * 3
    decodes = [(4, 1), (5, 1), (6, 1), (7, 1)] * 3
    assert fed == first_tokens + filled + warm_up_and_repeats + decodes


def test_the_profile_has_the_operators_of_a_step_and_shares_that_add_up(report: BenchReport) -> None:
    decode = [row for row in report.profile if row.test == "decode" and row.depth == 4]
    assert {row.label: row.launches for row in decode} == {
        "embed": 1,
        "norm": 3,
        "linear Q8_0": 8,
        "rope": 2,
        "kv_write": 1,
        "attention": 1,
        "add": 2,
        "gated_act": 1,
        "select_rows": 1,
    }
    assert sum(row.share for row in decode) == pytest.approx(1)
    assert [row.seconds for row in decode] == sorted((row.seconds for row in decode), reverse=True)
    assert {row.tokens for row in report.profile if row.test == "prefill"} == {2}  # as much as one step takes


def test_start_up_is_split_into_its_parts(report: BenchReport) -> None:
    startup = report.startup
    parts = startup.plan_seconds + startup.upload_seconds + startup.open_seconds
    assert 0 < parts < startup.first_token_cold
    assert len(startup.first_token_warm) == 2
    with opener()() as pipeline:
        assert startup.upload_bytes == pipeline.model.file.tensor_bytes
    assert startup.upload_rate == startup.upload_bytes / startup.upload_seconds


def test_random_weights_made_on_the_way_have_no_upload_rate() -> None:
    startup = evolve(made().startup, made=True)
    assert startup.upload_rate is None
    assert "| upload of 1.0 MB, made on the way " in markdown(evolve(made(row()), startup=startup))


@pytest.mark.usefixtures("no_bandwidth")
def test_what_was_chosen_by_measuring_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    choices = {"products by rings": "to 8 rows", "products by cuBLAS": "from 129 rows"}
    monkeypatch.setattr(ReferenceRuntime, "measured_choices", lambda _: choices, raising=False)
    open_runtime, notes = ReferenceExecutor.open, list[str]()

    def open_and_tell(self: ReferenceExecutor, *given: Any) -> ReferenceRuntime:
        given[-1](WaysMeasured(choices=choices, kept="", seconds=0.5))
        return open_runtime(self, *given)

    monkeypatch.setattr(ReferenceExecutor, "open", open_and_tell)
    found = bench(opener(), evolve(SMALL, generated_tokens=()), notes.append)
    assert as_dict(found)["choices"] == choices
    assert "products by rings to 8 rows, products by cuBLAS from 129 rows" in markdown(found).splitlines()
    assert "measured in 0.50 s: products by rings to 8 rows, products by cuBLAS from 129 rows; not kept" in notes


def test_the_measured_bandwidth_is_that_of_this_machine(report: BenchReport) -> None:
    assert report.read_bandwidth is not None
    assert 1e8 < report.read_bandwidth < 1e13


# arithmetic and text


def row(**changes: Any) -> SpeedRow:
    values: dict[str, Any] = {"test": "decode", "tokens": 10, "depth": 0, "seconds": (1.0, 2.0, 5.0)} | changes
    return SpeedRow(**values)


def made(*rows: SpeedRow, profile: Sequence[ProfileRow] = ()) -> BenchReport:
    return BenchReport(
        subject=Subject(
            model="m.gguf",
            architecture="llama",
            parameters=2_000_000,
            file_bytes=1 << 20,
            executor="reference",
            device="CPU",
            layouts={"f32": 3},
            upload="host",
            kv_type="auto",
            context_length=64,
            load_average=None,
            cores=2,
        ),
        settings=BenchSettings(),
        startup=Startup(
            plan_seconds=0.25,
            upload_seconds=0.5,
            upload_bytes=1_000_000,
            open_seconds=0.01,
            prompt_tokens=512,
            first_token_cold=3.0,
            first_token_warm=(0.1, 0.2, 0.6),
        ),
        read_bandwidth=100.0,
        rows=rows,
        profile=tuple(profile),
    )


def test_speeds_are_tokens_by_seconds_with_mean_sample_deviation_and_median() -> None:
    assert row().speeds == (10.0, 5.0, 2.0)
    assert row().mean == pytest.approx(17 / 3)
    assert row().deviation == pytest.approx(4.0414519)
    assert row().median == 5.0
    assert row(seconds=(1.0,)).deviation is None


def test_the_share_of_the_bandwidth_is_bytes_at_the_median_speed_over_what_was_measured() -> None:
    assert row(token_bytes=8.0).bytes_per_second == 40.0
    assert row(token_bytes=8.0, read_bandwidth=100.0).bandwidth_share == 0.4
    assert row(token_bytes=8.0).bandwidth_share is None
    assert row(host_seconds=(0.1, 0.2, 0.4)).host_seconds_per_token == pytest.approx(0.02)


def test_markdown_has_a_line_for_each_row_and_a_dash_for_what_is_not_known() -> None:
    text = markdown(made(row(token_bytes=8e6, read_bandwidth=1e8, host_seconds=(1e-3,) * 3), row(test="prefill")))
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "|" in line]
    assert lines[0][:7] == ["test", "tokens", "depth", "seqs", "tok/s", "± sd", "median"]
    assert lines[0][7:] == ["MB/token", "GB/s", "% of read", "host µs/token"]
    assert lines[2] == ["decode", "10", "0", "1", "5.67", "4.04", "5.00", "8.00", "0.04", "40.0", "100.0"]
    assert lines[3] == ["prefill", "10", "0", "1", "5.67", "4.04", "5.00", "-", "-", "-", "-"]
    assert ["upload of 1.0 MB at 0.00 GB/s", "500.0 ms"] in lines
    assert ["first token after 512 tokens, warm (median)", "200.0 ms"] in lines


def test_json_and_csv_hold_the_same_rows_in_bytes_and_seconds() -> None:
    report = made(row(token_bytes=8.0, read_bandwidth=100.0), row(test="prefill"))
    plain = json.loads(json.dumps(as_dict(report)))
    assert plain["rows"][0]["bandwidth_share"] == 0.4
    assert plain["rows"][1]["bytes_per_token"] is None
    assert plain["startup"]["upload_rate"] == 2e6
    lines = list(csv.DictReader(io.StringIO(csv_text(report))))
    assert [line["test"] for line in lines] == ["decode", "prefill"]
    assert lines[0]["tokens_per_second_median"] == "5.0"
    assert lines[0]["seconds"] == "1.0 2.0 5.0"
    assert lines[1]["bytes_per_token"] == ""


def test_a_plot_has_a_diagram_for_each_kind_of_test(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[list[str], list[float]]] = []
    plotext = types.SimpleNamespace(
        clear_figure=lambda: None,
        simple_bar=lambda labels, values, **_: drawn.append((labels, values)),
        build=lambda: "bars",
    )
    monkeypatch.setattr(bench_report, "load_plotext", lambda: plotext)
    assert plot(made(row(), row(test="prefill", depth=7), row(depth=7))) == "bars\nbars"
    assert drawn == [(["10 @ 7"], [5.0]), (["10 @ 0", "10 @ 7"], [5.0, 5.0])]


# refusals


def test_a_depth_and_tokens_beyond_the_context_are_refused_before_the_upload(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pipeline, "preload", lambda _: pytest.fail("uploaded"))
    with pytest.raises(ConfigError, match="need a context of 18, found 16"):
        bench(opener(), BenchSettings(prompt_tokens=(5,), generated_tokens=(7,), depths=(0, 10), repeats=1), silent)


def test_the_context_needed_counts_the_token_before_the_decoded_ones() -> None:
    assert BenchSettings(prompt_tokens=(5,), generated_tokens=(5,), depths=(10,)).needed_context == 16
    assert BenchSettings(prompt_tokens=(9,), generated_tokens=(0,), depths=(10,)).needed_context == 19
    assert BenchSettings(prompt_tokens=(), generated_tokens=(4,), depths=(0,)).needed_context == 5


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prompt_tokens": (-1,)}, "prompt_tokens: found -1"),
        ({"depths": (0, -3)}, "depths: found -3"),
        ({"repeats": 0}, "repeats: found 0, wanted at least 1"),
        ({"prompt_tokens": (0,), "generated_tokens": ()}, "nothing to measure"),
        ({"depths": ()}, "nothing to measure"),
        ({"batch": ()}, "nothing to measure"),
        ({"batch": (1, 0)}, "batch: found 0, wanted at least 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BenchSettings(**values)


class PlainRuntime:
    """A runtime with what the interface asks for and nothing more."""

    def __init__(self, runtime: ReferenceRuntime) -> None:
        self.settings = runtime.settings
        self.new_sequence, self.step, self.close = runtime.new_sequence, runtime.step, runtime.close
        self.device_chooser = runtime.device_chooser


@pytest.fixture
def plain_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference executor without what only it can measure."""
    opened = ReferenceExecutor.open
    monkeypatch.setattr(ReferenceExecutor, "open", lambda *arguments: PlainRuntime(opened(*arguments)))


@pytest.mark.usefixtures("plain_runtime")
def test_a_profile_is_refused_where_the_executor_has_none() -> None:
    with pytest.raises(UnsupportedError, match="the executor reference cannot time its operators"):
        bench(opener(), evolve(SMALL, profile=True), silent)


@pytest.mark.usefixtures("plain_runtime")
def test_what_an_executor_cannot_measure_is_left_out() -> None:
    found = bench(opener(), SMALL, silent)
    assert found.read_bandwidth is None
    assert {row.bandwidth_share for row in found.rows} == {None}
    assert "read bandwidth not measured" in markdown(found)


# the commands


def written(path: Path) -> Path:
    assert main(["synth", "SmolLM2-135M", "Q4_0", str(path), "--layers", "1", "--quiet"]) == 0
    return path


@pytest.mark.usefixtures("no_bandwidth")
def test_bench_prints_json_of_a_file_that_synth_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path / "m.gguf")
    assert list(tmp_path.iterdir()) == [path]
    capsys.readouterr()
    command = [
        "bench",
        str(path),
        "--executor",
        "reference",
        "-p",
        "2,3",
        "-n",
        "2",
        "-d",
        "0",
        "-r",
        "1",
        "-o",
        "json",
    ]
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(line["test"], line["tokens"]) for line in found["rows"]] == [("prefill", 2), ("prefill", 3), ("decode", 2)]
    assert found["context_length"] == 3  # all that is needed


@pytest.mark.usefixtures("no_bandwidth")
def test_bench_takes_a_shape_and_a_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["bench", "smollm2-135m:q8_0", "--executor", "reference", "-p", "0", "-n", "1", "-r", "1", "-o", "csv"]
    assert main(command) == 0
    captured = capsys.readouterr()
    assert [line["model"] for line in csv.DictReader(io.StringIO(captured.out))] == ["SmolLM2-135M:Q8_0"]
    assert "decoding of 1 token at depth 0 measured" in captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["SmolLM3-135M:Q8_0"], "shape: unknown 'SmolLM3-135M', did you mean 'SmolLM2-135M'?"),
        (["SmolLM2-135M:Q8"], "recipe: unknown 'Q8', did you mean 'Q8_0'?"),
        (["SmolLM2-135M:Q8_0", "-d", "8000", "-n", "1000"], "need a context of 9001, the model was made for"),
        (["x.gguf", "-o", "csv", "--json"], "--json and -o csv: found both, wanted one"),
        (["missing.gguf"], "missing.gguf"),
    ],
)
def test_bench_refuses_with_one_clear_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *arguments, "--executor", "reference"]) == 2
    assert message in capsys.readouterr().err


def test_a_plot_without_its_package_is_refused_before_anything_is_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(bench_report, "importlib", types.SimpleNamespace(import_module=missing))
    assert main(["bench", "missing.gguf", "-o", "plot"]) == 2
    assert "the package plotext is not installed" in capsys.readouterr().err


def test_synth_overwrites_only_when_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "m.gguf"
    path.write_text("mine")
    assert main(["synth", "SmolLM2-135M", "Q4_0", str(path), "--layers", "1"]) == 2
    assert "--force overwrites it" in capsys.readouterr().err
    assert path.read_text() == "mine"
    assert main(["synth", "SmolLM2-135M", "Q4_0", str(path), "--layers", "1", "--force", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bytes"] == path.stat().st_size


def test_synth_says_where_it_cannot_write(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["synth", "SmolLM2-135M", "Q4_0", str(tmp_path / "none" / "m.gguf"), "--layers", "1"]) == 2
    assert "m.gguf: found no folder to write it in, wanted the name of a file" in capsys.readouterr().err


def test_synth_refuses_a_negative_seed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["synth", "SmolLM2-135M", "Q4_0", str(tmp_path / "m.gguf"), "--seed", "-1"]) == 2
    assert capsys.readouterr().err == "mortice: error: --seed: found -1, wanted at least 0\n"
