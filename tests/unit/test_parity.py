"""`mortice parity`: a planted fault is found where it was planted, and equal executors are equal."""

from __future__ import annotations

import errno
import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attrs import define, evolve, field
from numpy.typing import NDArray

from mortice.core.cli.main import main
from mortice.core.config import ExecutorConfig, ModelConfig, RunConfig
from mortice.core.errors import ConfigError, ExecutionError, InputError
from mortice.core.model import operators as op
from mortice.core.model.operators import Buffer
from mortice.core.model.residency import BoundModel
from mortice.core.parity import report as parity_report
from mortice.core.parity.compare import compare, covers
from mortice.core.parity.measures import distances, nmse
from mortice.core.parity.report import as_dict, distribution_rows, grid, kind_rows, write_picture
from mortice.core.parity.results import ParityReport
from mortice.core.parity.text import TEXT
from mortice.core.parity.tolerances import EXACT, ROUNDED, tolerances_for
from mortice.core.pipeline import Pipeline, prepare
from mortice.core.plugin.interfaces import Emit, RuntimeSettings, StepPart, Traceable
from mortice.core.stages import open_file
from mortice.plugins.executors.reference.executor import ReferenceExecutor
from mortice.plugins.executors.reference.runtime import ReferenceRuntime
from tests.support.registry import make_registry, plugin_of
from tests.support.tiny import CONTRACTS, REGISTRY, program_of, tiny

IDS: Sequence[int] = np.random.default_rng(5).integers(0, 500, 48).tolist()
Run = Callable[[Any, list[Any]], tuple[Any, ...]]
Fault = Callable[[Run], Run]


@define(eq=False)
class FaultyExecutor(ReferenceExecutor):
    """The reference executor with faults, by operator."""

    name: str = "faulty"
    faults: Mapping[str, Fault] = field(factory=dict)
    hidden: Sequence[str] = ()
    """Kinds of operators whose values stay within a kernel."""
    hidden_alone: Sequence[str] = ()
    """Those that do in steps of one token."""
    traceable: bool = True

    def open(self, model: BoundModel, settings: RuntimeSettings, emit: Emit) -> ReferenceRuntime:
        runtime = _Fused(model, settings, emit)
        runtime.hidden, runtime.hidden_alone = self.hidden, self.hidden_alone
        runtime._plan = [
            evolve(each, run=self.faults[each.name](each.run)) if each.name in self.faults else each
            for each in runtime._plan
        ]
        assert self.faults.keys() <= {each.name for each in runtime._plan}
        return runtime if self.traceable else _Closed(runtime)  # type: ignore[return-value]


@define(eq=False)
class _Fused(ReferenceRuntime):
    """Shows only what a kernel that does several operators would write."""

    hidden: Sequence[str] = field(default=(), init=False)
    hidden_alone: Sequence[str] = field(default=(), init=False)

    def trace(self, parts: Sequence[StepPart], see: Callable[[Buffer, NDArray[np.float32]], None]) -> Any:
        alone = sum(len(part.token_ids) for part in parts) == 1
        hidden = {*self.hidden, *(self.hidden_alone if alone else ())}
        kinds = {buffer: o.kind for o in self.model.plan.program.operators for buffer in o.outputs}

        def see_some(buffer: Buffer, value: NDArray[np.float32]) -> None:
            if kinds[buffer] not in hidden:
                see(buffer, value)

        return ReferenceRuntime.trace(self, parts, see_some)


class _Closed:
    """A runtime that shows no values."""

    def __init__(self, runtime: ReferenceRuntime) -> None:
        self.settings, self.step, self.close = runtime.settings, runtime.step, runtime.close
        self.new_sequence = runtime.new_sequence


def later_position(run: Run) -> Run:
    return lambda step, x: run(evolve(step, positions=step.positions + 1, turns={}), x)


def no_bias(run: Run) -> Run:
    return lambda _, x: (x[0],)


def scaled(factor: float) -> Fault:
    return lambda run: lambda step, x: tuple(np.float32(factor) * out for out in run(step, x))


def sees_one_less(run: Run) -> Run:
    """Attention that leaves out the last row of a step with many."""

    def wrong(step: Any, x: list[Any]) -> tuple[Any, ...]:
        (out,) = run(step, x)
        if len(out) > 1:
            out = out.copy()
            out[-1] = 0
        return (out,)

    return wrong


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("models")
    made: dict[str, Path] = {}
    return lambda family: made.setdefault(family, tiny(folder, family, sizes={"num_layers": 3}))


def pipeline(path: Path, executor: FaultyExecutor | None, **settings: Any) -> Pipeline:
    registry = make_registry({"faulty": plugin_of(mortice_executors=lambda: [executor])} if executor else {})
    chosen = {"kv": "f32", "activations": "f32", "context": 512, **settings}
    name = executor.name if executor else "reference"
    return prepare(RunConfig(model=ModelConfig(path=path), executor=ExecutorConfig(name=name, **chosen)), registry)


def compared(path: Path, *, ids: Sequence[int] = IDS, settings: Any = None, **faulty: Any) -> ParityReport:
    settings = settings or {}
    with pipeline(path, None) as oracle, pipeline(path, FaultyExecutor(**faulty), **settings) as tested:
        return compare(oracle, tested, ids, text="a test", note=lambda _: None)


# measures


def test_the_error_of_a_row_is_relative_to_what_was_wanted() -> None:
    wanted = np.array([[3, 4], [0, 0], [0, 0], [1, 0], [1000, 0]], np.float32)
    found = np.array([[3, 5], [0, 0], [0, 1], [np.nan, 0], [1000, 10]], np.float32)
    assert nmse(found, wanted).tolist() == [1 / 25, 0, math.inf, math.inf, 1e-4]


def test_divergence_and_differences_are_those_worked_out_by_hand() -> None:
    p, q = np.array([0.5, 0.3, 0.1, 0.05, 0.03, 0.02]), np.array([0.3, 0.5, 0.1, 0.05, 0.03, 0.02])
    found = distances(np.log(q)[None].astype(np.float32) + 7, np.log(p)[None].astype(np.float32) - 2)
    assert found.kl[0] == pytest.approx(0.5 * math.log(5 / 3) + 0.3 * math.log(3 / 5), abs=1e-6)
    assert found.top_differences[0] == pytest.approx([math.log(5 / 3)] * 2 + [0] * 3, abs=1e-6)
    assert not found.same_top[0]
    assert found.margin[0] == pytest.approx(math.log(5 / 3), abs=1e-6)


def test_logits_that_are_no_numbers_are_infinitely_far_off() -> None:
    wanted = np.arange(12, dtype=np.float32).reshape(2, 6)
    found = wanted.copy()
    found[1, 2] = np.nan
    apart = distances(found, wanted)
    assert apart.kl.tolist() == [0, math.inf]
    assert apart.same_top.tolist() == [True, False]
    assert np.isinf(apart.top_differences[1]).all()


# tracing


def test_the_reference_shows_every_buffer_once_and_the_logits_of_step(models: Callable[[str], Path]) -> None:
    with pipeline(models("qwen3"), None) as reference:
        runtime = reference.runtime
        assert isinstance(runtime, Traceable)
        sequence = runtime.new_sequence()
        logits = runtime.step([StepPart(sequence=sequence, token_ids=IDS, logits="all")])
        sequence.truncate(0)
        seen: list[tuple[Buffer, NDArray[np.float32]]] = []
        traced = runtime.trace(
            [StepPart(sequence=sequence, token_ids=IDS, logits="all")], lambda *item: seen.append(item)
        )
        assert sequence.length == len(IDS)
        program = reference.program
    assert [buffer for buffer, _ in seen] == [b for o in program.operators for b in o.outputs]
    assert all(value.shape == (len(IDS), buffer.width) for buffer, value in seen)
    assert np.array_equal(traced, logits)
    assert np.array_equal(dict(seen)[program.logits], logits)


def test_more_tokens_than_a_step_has_are_not_traced(models: Callable[[str], Path]) -> None:
    with pipeline(models("llama"), None, step_tokens=16) as reference:
        runtime = reference.runtime
        assert isinstance(runtime, Traceable)
        with pytest.raises(InputError, match=r"found 17 tokens to trace, wanted at most 16"):
            runtime.trace([StepPart(sequence=runtime.new_sequence(), token_ids=IDS[:17])], lambda *_: None)


# comparing


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_the_same_executor_differs_by_nothing(models: Callable[[str], Path], family: str) -> None:
    report = compared(models(family))
    assert report.passed
    assert len(report.comparisons) == 3 * sum(
        len(o.outputs) for o in program_of(models(family), CONTRACTS[family]).operators
    )
    assert {found.nmse for found in report.comparisons} == {0.0}
    assert [len(found.kl) for found in report.distributions] == [48, 48, 2 * (24 - 4) + 6]
    assert all(found.kl.max() == found.top_p99 == 0 and found.same_top == 1 for found in report.distributions)


FAULTS: Mapping[str, tuple[str, str, Fault]] = {
    "RoPE off by one position": ("llama", "layers.1.rope_q", later_position),
    "a bias that is not added": ("qwen2", "layers.2.attn_k_bias", no_bias),
    "an epsilon that is wrong by a thousandth": ("qwen3", "layers.0.attn_q_norm", scaled(0.9995)),
    "a weight scaled wrongly by a twentieth": ("llama", "layers.2.ffn_down", scaled(1.05)),
    "the last row of a step left out": ("qwen3", "layers.1.attention", sees_one_less),
    "the final norm": ("qwen2", "output_norm", scaled(1.01)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_first_wrong_operator_is_the_one_with_the_fault(models: Callable[[str], Path], fault: str) -> None:
    family, operator, wrong = FAULTS[fault]
    report = compared(models(family), faults={operator: wrong})
    found = report.first_wrong
    assert found is not None
    assert found.operator == operator
    assert found.layer == (int(operator.split(".")[1]) if operator.startswith("layers.") else None)
    assert not report.passed
    assert f"first wrong operator: {operator} (" in report.failures[0]
    assert all(each.nmse == 0 for each in report.comparisons if each.place < found.place)


def test_a_fault_within_a_fused_group_is_laid_to_the_group(models: Callable[[str], Path]) -> None:
    hidden = ("norm", "linear", "rope")
    report = compared(models("llama"), faults={"layers.1.rope_k": later_position}, hidden=hidden)
    found = report.first_wrong
    assert found is not None
    assert found.operator == "layers.1.attention"
    assert "layers.1.rope_k" in found.covers
    assert "layers.1.kv_write" in found.covers
    assert "layers.0.ffn_down" not in found.covers
    assert set(found.kind.split("+")) == {"norm", "linear", "rope", "kv_write", "attention"}
    assert "which ends layers.1.attn_norm + layers.1.attn_q" in report.failures[0]


def test_what_one_kind_of_step_fuses_and_another_does_not_is_compared_where_it_is_seen(
    models: Callable[[str], Path],
) -> None:
    faults = {"layers.1.rope_k": later_position}
    report = compared(models("llama"), faults=faults, hidden_alone=("rope", "linear"))
    covers = {(each.operator, each.mode): set(each.kind.split("+")) for each in report.comparisons}
    assert covers["layers.1.attention", "prefill"] == {"attention", "kv_write"}
    assert covers["layers.1.attention", "decode"] == {"attention", "kv_write", "linear", "rope"}
    assert ("layers.1.rope_k", "prefill") in covers
    assert ("layers.1.rope_k", "decode") not in covers
    assert not report.passed


def test_attention_stands_for_the_unseen_values_of_its_cache(models: Callable[[str], Path]) -> None:
    program = program_of(models("llama"), CONTRACTS["llama"])
    attention = next(o for o in program.operators if isinstance(o, op.Attention) and o.layer == 1)
    by_name = {b.name: b for o in program.operators for b in o.outputs}
    seen = {by_name[f"layers.1.{name}"] for name in ("q.rotated", "attn_k.out", "attn_v.out")}
    parts, sources = covers(program, attention, seen)
    assert [part.name for part in parts] == [f"layers.1.{name}" for name in ("rope_k", "kv_write", "attention")]
    assert sources == seen


def test_rounded_settings_let_pass_what_int8_products_lose(models: Callable[[str], Path]) -> None:
    def rounded(run: Run) -> Run:
        noise = np.random.default_rng(1)

        def wrong(step: Any, x: list[Any]) -> tuple[Any, ...]:
            (out,) = run(step, x)
            return ((out * (1 + 0.005 * noise.standard_normal(out.shape))).astype(np.float32),)

        return wrong

    operators = program_of(models("llama"), CONTRACTS["llama"]).operators
    faults = {o.name: rounded for o in operators if isinstance(o, op.Linear)}
    assert compared(models("llama"), faults=faults, settings={"kv": "auto", "activations": "auto"}).passed
    exact = compared(models("llama"), faults=faults)
    assert exact.tolerances is EXACT
    assert any("top 5 log-probabilities" in line for line in exact.failures)


def test_an_executor_that_shows_no_values_is_judged_by_its_distributions(models: Callable[[str], Path]) -> None:
    report = compared(models("llama"), faults={"layers.1.ffn_down": scaled(1.5)}, traceable=False)
    assert report.comparisons == ()
    assert not report.passed
    assert all(line.startswith(("decode", "prefill", "mixed")) for line in report.failures)
    assert compared(models("llama"), traceable=False).passed


@pytest.mark.parametrize(
    ("ids", "settings", "message"),
    [
        (IDS[:15], {}, "found 15 tokens, wanted at least 16"),
        (IDS, {"context": 300}, "48 tokens want a context of 304, executor faulty was given 300"),
        (IDS, {"step_tokens": 8}, "executor.step_tokens: found 8, parity wants at least 16"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    models: Callable[[str], Path], ids: Sequence[int], settings: Mapping[str, int], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        compared(models("llama"), ids=ids, settings=settings)


def test_a_small_step_is_compared_in_several(models: Callable[[str], Path]) -> None:
    report = compared(models("llama"), settings={"step_tokens": 16})
    assert report.passed
    assert [len(found.kl) for found in report.distributions] == [48, 48, 2 * (16 - 4) + 6]


def test_tolerances_follow_the_settings() -> None:
    settings = RuntimeSettings(context_length=1)
    assert tolerances_for(settings) is ROUNDED
    assert tolerances_for(evolve(settings, kv_type="f32")) is ROUNDED
    assert tolerances_for(evolve(settings, kv_type="f32", activations="f32")) is EXACT
    assert EXACT.nmse(["norm"]) == 1e-7
    assert EXACT.nmse(["norm", "linear"]) == 5e-4
    assert (ROUNDED.top_mean, ROUNDED.top_p99) == (0.093, 0.43)


# reports


@pytest.fixture(scope="module")
def faulty(models: Callable[[str], Path]) -> ParityReport:
    return compared(models("llama"), faults={"layers.1.rope_q": later_position})


def test_the_table_of_kinds_names_where_it_is_worst(faulty: ParityReport) -> None:
    rows = {row[0]: row for row in kind_rows(faulty)}
    assert rows["embed"][1:5] == ("1", "0.0e+00", "0.0e+00", "0.0e+00")
    assert rows["embed"][-1] == "ok"
    assert rows["rope"][-2:] == ("layers.1.rope_q", "WRONG")
    assert [row[0] for row in distribution_rows(faulty)] == ["decode", "prefill", "mixed"]
    assert all(row[-1] == "WRONG" for row in distribution_rows(faulty))


def test_a_kind_that_only_one_kind_of_step_has_is_told_for_that_one(faulty: ParityReport) -> None:
    left = tuple(found for found in faulty.comparisons if found.kind != "embed" or found.mode == "prefill")
    rows = {row[0]: row for row in kind_rows(evolve(faulty, comparisons=left))}
    assert rows["embed"][1:5] == ("1", "-", "0.0e+00", "-")


def test_the_grid_is_cold_before_the_fault_and_hot_at_it(faulty: ParityReport) -> None:
    kinds, rows = grid(faulty)
    cells = {name: dict(zip(kinds, found, strict=True)) for name, found in rows}
    assert list(cells) == ["0", "1", "2", "outside"]
    assert all(cell is None or cell.heat == 0 for cell in cells["0"].values())
    hot = cells["1"]["rope"]
    assert hot is not None
    assert hot.heat == 1
    assert not hot.passed
    assert cells["0"]["embed"] is None


def test_the_dictionary_is_plain_and_complete(faulty: ParityReport) -> None:
    found = json.loads(json.dumps(as_dict(faulty)))
    assert found["first_wrong"]["operator"] == "layers.1.rope_q"
    assert found["first_wrong"]["layer"] == 1
    assert not found["passed"]
    assert len(found["distributions"][0]["kl"]) == 48
    assert len(found["operators"]) == len(faulty.comparisons)


class _Figure:
    """Draws nothing and remembers."""

    def __init__(self, **_: Any) -> None:
        self.drawn: list[Any] = []
        made.append(self)

    def add_subplot(self) -> Any:
        return self

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **_: self.drawn.append((name, args))

    def savefig(self, path: Path, **_: Any) -> None:
        path.write_bytes(b"picture")


made: list[_Figure] = []


def test_the_picture_has_a_row_for_each_layer_and_a_column_for_each_kind(
    faulty: ParityReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity_report, "load_matplotlib", lambda: type("module", (), {"Figure": _Figure}))
    write_picture(faulty, tmp_path / "heat.png")
    drawn = dict(reversed(made[-1].drawn))
    kinds, rows = grid(faulty)
    assert drawn["imshow"][0].shape == (len(rows), len(kinds))
    assert drawn["set_yticks"][1] == ["0", "1", "2", "outside"]
    assert (tmp_path / "heat.png").read_bytes() == b"picture"


def test_a_picture_that_cannot_be_written_leaves_the_old_one_alone(
    faulty: ParityReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(_Figure):
        def savefig(self, path: Path, **options: Any) -> None:
            super().savefig(path, **options)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(parity_report, "load_matplotlib", lambda: type("module", (), {"Figure": Full}))
    picture = tmp_path / "heat.png"
    picture.write_bytes(b"mine")
    with pytest.raises(ExecutionError, match=r"heat\.png: cannot be written: No space left on device"):
        write_picture(faulty, picture)
    assert picture.read_bytes() == b"mine"
    assert [found.name for found in tmp_path.iterdir()] == ["heat.png"]


# the command


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes the command find the faulty executor."""

    def install(**faulty: Any) -> None:
        plugin = plugin_of(mortice_executors=lambda: [FaultyExecutor(**faulty)])
        monkeypatch.setattr("mortice.core.stages.registry_for", lambda _: make_registry({"faulty": plugin}))

    return install


def test_the_command_ends_with_zero_for_equal_executors(
    models: Callable[[str], Path], installed: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    installed()
    assert main(["parity", str(models("qwen3")), "--executor", "faulty", "--tokens", "32"]) == 0
    out = capsys.readouterr().out
    assert out.rstrip().endswith("parity: ok")
    assert "executor faulty on CPU" in out
    assert "32 tokens of mortice's own text" in out
    assert "WRONG" not in out


def test_the_command_fails_and_names_operator_and_layer(
    models: Callable[[str], Path], installed: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    installed(faults={"layers.1.rope_q": later_position})
    flags = ["--executor", "faulty", "--tokens", "32", "--kv", "f32", "--activations", "f32"]
    assert main(["parity", str(models("llama")), *flags]) == 1
    out = capsys.readouterr().out
    assert "first wrong operator: layers.1.rope_q (rope, layer 1): decode: NMSE" in out
    assert out.rstrip().endswith("parity: failed")
    assert main(["parity", str(models("llama")), *flags, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["first_wrong"]["operator"] == "layers.1.rope_q"


def test_a_terminal_gets_a_coloured_map(
    models: Callable[[str], Path],
    installed: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    installed(faults={"layers.1.rope_q": later_position})
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    for name, value in {"TERM": "xterm-256color", "COLORTERM": "truecolor", "COLUMNS": "150"}.items():
        monkeypatch.setenv(name, value)
    main(["parity", str(models("llama")), "--executor", "faulty", "--tokens", "32"])
    out = capsys.readouterr().out
    assert "48;2;0;255;80m" in out  # nothing differs
    assert "48;2;255;0;80m" in out  # the fault


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--executor", "reference"], "found 'reference' twice, wanted two executors"),
        (["--executor", "none"], "unknown 'none'; have"),
        (["--executor", "faulty", "--text", "{folder}/none.txt"], "none.txt: cannot be read"),
        (["--executor", "faulty", "--text", "x", "--token-ids", "1,2"], "--text and --token-ids: found both"),
        (["--executor", "faulty", "--token-ids", "1,2,3"], "found 3 tokens, wanted at least 16"),
    ],
)
def test_the_command_refuses_in_one_line(
    models: Callable[[str], Path],
    installed: Callable[..., None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: Sequence[str],
    message: str,
) -> None:
    installed()
    assert main(["parity", str(models("llama")), *(flag.format(folder=tmp_path) for flag in flags)]) == 2
    assert message in capsys.readouterr().err


def test_a_text_of_ones_own_is_fed(
    models: Callable[[str], Path], installed: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    installed()
    text = tmp_path / "text.txt"
    text.write_text("one two three four five six seven " * 4, encoding="utf-8")
    assert main(["parity", str(models("llama")), "--executor", "faulty", "--text", str(text), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == str(text)


def test_a_file_without_a_tokenizer_wants_token_ids(
    installed: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    installed()
    # the vocabulary's size then comes from its own key
    path = tiny(tmp_path, "llama", tokenizer={}, metadata={"llama.vocab_size": 500})
    with open_file(REGISTRY, path) as file:
        assert "tokenizer.ggml.tokens" not in file.metadata
    assert main(["parity", str(path), "--executor", "faulty"]) == 2
    assert "the file has no tokenizer; give --token-ids" in capsys.readouterr().err
    ids = ",".join(map(str, IDS[:20]))
    assert main(["parity", str(path), "--executor", "faulty", "--token-ids", ids]) == 0


def test_a_picture_without_matplotlib_is_refused_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["parity", str(tmp_path / "none.gguf"), "--heatmap", str(tmp_path / "heat.png")]) == 2
    assert "matplotlib is not installed; pip install 'mortice[pictures]', or go without" in capsys.readouterr().err


def test_a_picture_overwrites_only_when_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "heat.png"
    picture.write_text("mine")
    asked = ["parity", str(tmp_path / "none.gguf"), "--heatmap", str(picture)]
    assert main(asked) == 2
    assert "heat.png: is there already; --force overwrites it" in capsys.readouterr().err
    assert main([*asked, "--force"]) == 2
    assert "is there already" not in capsys.readouterr().err


def test_the_bundled_text_has_many_scripts_and_signs_beyond_the_basic_plane() -> None:
    assert 180 <= len(TEXT.split()) <= 320
    assert any(ord(char) > 0xFFFF for char in TEXT)
    for sign in "京моακقह한«🏽":
        assert sign in TEXT
