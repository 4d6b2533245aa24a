"""Ways to multiply are timed once for a card and a model, and the fastest are taken."""

from __future__ import annotations

import ctypes
import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest
from attrs import evolve

from mortice.core.plugin.events import Event, WaysMeasured
from mortice.plugins.executors.cuda.compile.build import Build
from mortice.plugins.executors.cuda.compile.nvrtc import Compiled, Source
from mortice.plugins.executors.cuda.device.device import Device, open_device
from mortice.plugins.executors.cuda.device.toolkit import Compiler
from mortice.plugins.executors.cuda.lowering.crossovers import (
    GEMM_CANDIDATES,
    RING_CANDIDATES,
    RowCrossovers,
    Timing,
    choose_crossovers,
)
from mortice.plugins.executors.cuda.lowering.launches import LaunchSpec
from mortice.plugins.executors.cuda.lowering.lowering import Lowering
from mortice.plugins.executors.cuda.run import kernels, loaded, tuning
from mortice.plugins.executors.cuda.run.tuned import TunedFile, tuned_for
from mortice.plugins.executors.cuda.run.tuning import Compilation, compile_tuned, measured_kernels, plan_trial
from tests.plugins.cuda.test_matmul import lowering
from tests.support.cuda import FakeDriverApi

DEFAULT = RowCrossovers()
COMPILER = Compiler(
    api=pytest, version=(13, 0), build="13.0.1", archs=(90,), headers=Path("/x"), header_version=(13, 0)
)


# the choice -------------------------------------------------------------------------------------------------------


def rings(*seconds: tuple[float, float]) -> list[Timing]:
    """What `ops/matmul.cu` and rings take for steps of up to 8, 16 … rows."""
    return [
        Timing(least=most // 2 + 1, most=most, rows=most, seconds={"matmul": matmul, "ring": ring})
        for most, (matmul, ring) in zip(RING_CANDIDATES[1:], seconds, strict=False)
    ]


def gemms(*seconds: tuple[float, float]) -> list[Timing]:
    """What `ops/matmul.cu` and cuBLAS take for steps of one, two … passes."""
    return [
        Timing(least=least, most=least + 63, rows=least + 31, seconds={"matmul": matmul, "gemm": gemm})
        for least, (matmul, gemm) in zip(GEMM_CANDIDATES, seconds, strict=False)
    ]


@pytest.mark.parametrize(
    ("timings", "chosen"),
    [
        (rings((2.0, 1.0), (2.0, 1.0)), 16),
        (rings((2.0, 1.0), (1.0, 2.0)), 8),
        (rings((1.0, 2.0), (1.0, 2.0)), 0),
        (rings((1.0, 1.5), (2.0, 1.0)), 16),
        (rings((1.0, 2.0)), 0),
    ],
)
def test_rings_are_taken_up_to_where_they_are_faster(timings: list[Timing], chosen: int) -> None:
    assert choose_crossovers(timings) == evolve(DEFAULT, ring_rows=chosen)


@pytest.mark.parametrize(
    ("timings", "chosen"),
    [
        (gemms((1.0, 2.0), (2.0, 2.1), (3.0, 2.2), (4.0, 2.3)), 129),
        (gemms((1.0, 0.5), (2.0, 0.6), (3.0, 0.7), (4.0, 0.8)), 33),
        (gemms((1.0, 1.5), (2.0, 1.6), (3.0, 1.7), (4.0, 1.8)), 65),
        (gemms((1.0, 4.0), (2.0, 4.0), (3.0, 4.0), (4.0, 3.5)), 193),
        (gemms((1.0, 9.0), (2.0, 9.0), (3.0, 9.0), (4.0, 9.0)), 257),
    ],
)
def test_cublas_is_taken_from_where_it_is_faster(timings: list[Timing], chosen: int) -> None:
    assert choose_crossovers(timings) == evolve(DEFAULT, gemm_from_rows=chosen)


def test_what_is_faster_by_chance_only_changes_nothing() -> None:
    assert choose_crossovers(rings((1.0, 1.01), (1.0, 1.01))) == DEFAULT
    assert choose_crossovers(gemms((1.0, 2.0), (2.0, 1.97), (3.0, 2.0), (4.0, 2.0))) == DEFAULT


def test_what_is_faster_by_more_than_chance_for_some_steps_only_is_taken() -> None:
    chosen = choose_crossovers(gemms((1.0, 2.0), (2.0, 1.9), (3.0, 2.0), (4.0, 2.0)))
    assert chosen == evolve(DEFAULT, gemm_from_rows=65)


def test_without_times_the_built_in_figures_stay() -> None:
    assert choose_crossovers([]) == DEFAULT


# what is kept -----------------------------------------------------------------------------------------------------

CHOSEN = RowCrossovers(ring_rows=8, gemm_from_rows=193)
TIMINGS = [*rings((2.0, 1.0), (1.0, 2.0)), *gemms((1.0, 1.5))]


@pytest.fixture
def file(tmp_path: Path) -> TunedFile:
    return TunedFile(measured_for={"card": "a GPU", "kernels": "abc"}, folder=tmp_path / "cache/tuning")


def test_what_was_chosen_is_read_back(file: TunedFile, caplog: pytest.LogCaptureFixture) -> None:
    assert file.read() is None
    assert file.write(CHOSEN, TIMINGS) == str(file.path)
    assert file.read() == CHOSEN
    assert [path.name for path in file.folder.iterdir()] == [file.path.name]
    assert not caplog.records


def test_the_file_says_what_was_measured_for_whoever_looks(file: TunedFile) -> None:
    file.write(CHOSEN, TIMINGS)
    document = json.loads(file.path.read_text())
    assert document["measured_for"] == {"card": "a GPU", "kernels": "abc"}
    assert document["crossovers"] == {"ring_rows": 8, "gemm_from_rows": 193}
    assert document["timings"][0]["seconds"] == {"matmul": 2.0, "ring": 1.0}


def damaged(change: Callable[[dict[str, Any]], object]) -> Callable[[bytes], bytes]:
    def damage(text: bytes) -> bytes:
        document = json.loads(text)
        change(document)
        return json.dumps(document).encode()

    return damage


DAMAGE: Mapping[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda _: b"", "not JSON"),
    "cut off": (lambda text: text[:-20], "not JSON"),
    "not text": (lambda _: b"\xff\xfe\0", "not JSON"),
    "nested too deeply": (lambda _: b"[" * 50_000, "not JSON"),
    "too long": (lambda text: text + b" " * 70_000, "more than 65536 bytes"),
    "no object": (lambda _: b"[1]", "tuning"),
    "no crossovers": (damaged(lambda d: d.pop("crossovers")), "tuning.crossovers: required"),
    "a text for a number": (damaged(lambda d: d["crossovers"].update(ring_rows="8")), "tuning.crossovers.ring_rows: "),
    "rings of 9 rows": (
        damaged(lambda d: d["crossovers"].update(ring_rows=9)),
        "crossovers.ring_rows: found 9, wanted one of 0, 8, 16",
    ),
    "cuBLAS from one row": (
        damaged(lambda d: d["crossovers"].update(gemm_from_rows=1)),
        "crossovers.gemm_from_rows: found 1, wanted one of 33, 65",
    ),
    "another format": (damaged(lambda d: d.update(format=2)), "format: found 2, wanted 1"),
    "another card": (
        damaged(lambda d: d["measured_for"].update(card="another GPU")),
        "measured_for: card: found 'another GPU', wanted 'a GPU'",
    ),
    "no card": (damaged(lambda d: d["measured_for"].pop("card")), "measured_for: card: found None, wanted 'a GPU'"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_file_is_named_ignored_and_replaced(
    file: TunedFile, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    damage, reason = DAMAGE[kind]
    file.write(CHOSEN, TIMINGS)
    file.path.write_bytes(damage(file.path.read_bytes()))
    assert file.read() is None
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith(f"{file.path}: {reason}"), record.getMessage()
    assert file.write(CHOSEN, TIMINGS)
    assert file.read() == CHOSEN


def test_a_folder_in_the_files_place_is_a_warning_not_an_error(
    file: TunedFile, caplog: pytest.LogCaptureFixture
) -> None:
    file.path.mkdir(parents=True)
    assert file.read() is None
    assert file.write(CHOSEN, TIMINGS) == ""
    messages = [record.getMessage() for record in caplog.records]
    assert [message.partition(": ")[2].partition(":")[0] for message in messages] == [
        "cannot be read",
        "cannot be written",
    ]
    assert all(message.startswith(str(file.path)) for message in messages)


# what it is kept for ----------------------------------------------------------------------------------------------


def key(device: Device, **other: Any) -> Path:
    given: dict[str, Any] = {
        "properties": device.properties,
        "compiler": COMPILER,
        "arch": "sm_90",
        "cublas": "13.0.2",
        "sources": [Source(name="a", text="x", defines={"N": 1}), Source(name="b", text="y", defines={})],
        **other,
    }
    return TunedFile(measured_for=tuned_for(**given), folder=Path()).path


def test_another_card_driver_compiler_or_kernel_has_another_file(device: Device) -> None:
    properties, sources = device.properties, [Source(name="a", text="x", defines={"N": 1})]
    other = [
        key(device),
        key(device, properties=evolve(properties, name="another GPU")),
        key(device, properties=evolve(properties, compute_capability=(10, 0))),
        key(device, properties=evolve(properties, sm_count=1)),
        key(device, properties=evolve(properties, driver_version=(13, 1))),
        key(device, compiler=evolve(COMPILER, build="13.0.2")),
        key(device, arch="sm_100"),
        key(device, cublas=""),
        key(device, sources=sources),
        key(device, sources=[evolve(sources[0], text="z")]),
    ]
    assert len(set(other)) == len(other)
    again = key(device, sources=[Source(name="b", text="y", defines={}), Source(name="a", text="x", defines={"N": 1})])
    assert again == key(device), "the order of sources means nothing"
    index = evolve(properties, index=3, uuid="another card of the same kind", total_bytes=7)
    assert key(device, properties=index) == key(device)


# what is timed ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Lowering:
    """Of two layers, of a type that rings take."""
    sizes = {"hidden_size": 1024, "ffn_size": 2048}
    folder = tmp_path_factory.mktemp("model")
    return lowering(folder, "F16", sizes, bulk_copies=True, other_gemm_from=(33, 257))


@pytest.fixture
def any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of any size are timed."""
    monkeypatch.setattr(tuning, "_LEAST_BYTES", 0)


@pytest.mark.usefixtures("any_size")
def test_each_number_of_rows_is_timed_by_the_ways_it_may_go(model: Lowering) -> None:
    trial = plan_trial(model)
    assert trial is not None
    assert [(point.least, point.most, point.rows, sorted(point.ways)) for point in trial.points] == [
        (2, 8, 5, ["matmul", "ring"]),
        (9, 16, 12, ["matmul", "ring"]),
        (33, 64, 48, ["gemm", "matmul"]),
        (65, 128, 96, ["gemm", "matmul"]),
        (129, 192, 160, ["gemm", "matmul"]),
        (193, 256, 224, ["gemm", "matmul"]),
    ]
    assert trial.share == 1.0
    assert [bool(point.ways["matmul"].head) for point in trial.points] == [True, True, False, False, False, False]


@pytest.mark.usefixtures("any_size")
def test_ways_are_timed_with_the_launches_of_a_step(model: Lowering) -> None:
    trial = plan_trial(model)
    assert trial is not None
    for point in trial.points:
        for way, sample in point.ways.items():
            chosen = RowCrossovers(ring_rows=16 if way == "ring" else 0, gemm_from_rows=33 if way == "gemm" else 257)
            other = evolve(model, crossovers=chosen)
            body, head = other.launches(other.path(point.rows))
            for found, step in ((sample.body, body), (sample.head, head if sample.head else [])):
                linear = [spec for spec in step if not isinstance(spec, LaunchSpec) or _is_product(spec)]
                assert [(spec.name, spec.label) for spec in found] == [(spec.name, spec.label) for spec in linear]


def _is_product(spec: LaunchSpec) -> bool:
    return spec.entry in {"matmul", "matmul_ring", "matmul_input", "matmul_finish", "dequantise", "gemv"}


@pytest.mark.usefixtures("any_size")
def test_only_ways_that_are_there_are_timed(model: Lowering) -> None:
    def rows(**options: Any) -> list[int]:
        trial = plan_trial(evolve(model, **options))
        return [point.rows for point in trial.points] if trial is not None else []

    assert rows(cublas=False) == [5, 12]
    assert rows(rows=100) == [5, 12, 48, 96]
    assert rows(rows=1) == []
    assert rows(quantize_activations=False) == []
    assert rows(bulk_copies=False) == [48, 96, 160, 224]


def test_models_that_stay_in_the_cache_are_not_timed(model: Lowering) -> None:
    assert plan_trial(model) is None


@pytest.mark.usefixtures("any_size")
def test_of_a_large_model_some_layers_are_timed_and_stand_for_all(
    model: Lowering, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "_SAMPLE_BYTES", 1)
    trial = plan_trial(model)
    assert trial is not None
    timed = {spec.name for spec in trial.points[0].ways["ring"].body}
    every = {
        spec.name for spec in model.launches(model.path(5))[0] if isinstance(spec, LaunchSpec) and _is_product(spec)
    }
    assert timed < every
    sizes = {"+".join(o.name for o in group.operators): tuning._bytes(model, group) for group in model.groups}
    assert trial.share == pytest.approx(sum(sizes[name] for name in timed) / sum(sizes[name] for name in every))


# on a card that only pretends -------------------------------------------------------------------------------------

Cost = Callable[[str, Mapping[str, str | int]], float]
"""Milliseconds that a kernel takes, by its name and its constants; products by cuBLAS are called ``gemm``."""


class Card(FakeDriverApi):
    """A driver whose clock goes on by what each launch costs."""

    def __init__(self, cost: Cost) -> None:
        super().__init__()
        self.cost = cost
        self.clock = 0.0
        self.graph: list[float] | None = None
        self.sources: dict[bytes, Source] = {}
        self.answers["cuDriverGetVersion"] = (12030,)  # which knows no sizes of parameters

    def spend(self, milliseconds: float) -> tuple[int]:
        if self.graph is not None:
            self.graph.append(milliseconds)
        else:
            self.clock += milliseconds
        return (0,)

    def __getattr__(self, name: str) -> Any:
        known = {
            "CUlaunchAttribute": lambda: SimpleNamespace(value=SimpleNamespace()),
            "cuModuleLoadData": lambda cubin: (0, self.sources[cubin]),
            "cuModuleGetFunction": lambda module, name: (0, (name.decode(), dict(module.defines))),
            "cuModuleGetGlobal": lambda *_: (0, 4096, 4),
            "cuMemcpyDtoHAsync": lambda host, _, nbytes, __: (ctypes.memset(host, 0, nbytes) and 0,),
            "cuLaunchKernelEx": lambda _, function, *__: self.spend(self.cost(*function)),
            "cuStreamBeginCapture": lambda *_: self._begin_capture(),
            "cuStreamEndCapture": self._end_capture,
            "cuGraphInstantiate": lambda graph, _: (0, graph),
            "cuGraphLaunch": lambda graph, _: self.spend(sum(graph)),
            "cuEventCreate": lambda _: (0, [0.0]),
            "cuEventRecord": lambda event, _: self._record(event),
            "cuEventElapsedTime": lambda start, end: (0, end[0] - start[0]),
        }
        return known[name] if name in known else super().__getattr__(name)

    def _record(self, event: list[float]) -> tuple[int]:
        event[0] = self.clock
        return (0,)

    def _begin_capture(self) -> tuple[int]:
        self.graph = []
        return (0,)

    def _end_capture(self, _: Any) -> tuple[int, list[float]]:
        graph, self.graph = self.graph, None
        assert graph, "a graph of nothing"
        return 0, graph


class Library:
    """Stands for cuBLAS."""

    def __init__(self, card: Card) -> None:
        self.card = card

    def __getattr__(self, name: str) -> Any:
        return lambda *_: self.card.spend(self.card.cost("gemm", {}))[0] if name == "cublasGemmEx" else 0


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Card]:
    card, package = Card(lambda _, __: 1.0), ModuleType("cuda.bindings")
    package.__version__ = "12.3.0"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cuda.bindings", package)
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", cast(ModuleType, card))
    monkeypatch.setattr(Device, "arch", "sm_90")
    monkeypatch.setenv("MORTICE_CACHE", str(tmp_path / "cache"))

    def compile_all(sources: set[Source], *_: Any, known: Mapping[Source, Compiled], **__: Any) -> Build:
        code = dict(known)
        for source in sources - known.keys():
            name = str(len(card.sources)).encode()
            card.sources[name], code[source] = source, Compiled(cubin=name, functions={})
        return Build(kernels={source: code[source] for source in sources}, compiled=0, cached=0, seconds=0.0)

    monkeypatch.setattr(kernels, "compile_all", compile_all)
    monkeypatch.setattr(tuning, "find_compiler", lambda: COMPILER)
    for module in (tuning, loaded):
        monkeypatch.setattr(module, "find_cublas", lambda: Library(card))
    yield card
    assert len(card.called("cuMemAlloc")) == len(card.called("cuMemFree"))
    assert len(card.called("cuStreamCreateWithPriority")) == len(card.called("cuStreamDestroy"))


@pytest.fixture
def device(card: Card) -> Device:
    return open_device()


def start(device: Device, of: Lowering, tuning: Any = "auto") -> tuple[Compilation, Lowering, list[Event]]:
    """What a start compiles, the lowering it ends up with, and what it tells."""
    model = SimpleNamespace(plan=of.plan, resident=SimpleNamespace(address=lambda i: (i + 1) << 20))
    events: list[Event] = []
    compilation = compile_tuned(of, device, tuning)
    found = measured_kernels(device, compilation, cast(Any, model), events.append)
    steps = [spec for path in found.lowering.paths for part in found.specs[path] for spec in part]
    needed = {spec.source for spec in steps if isinstance(spec, LaunchSpec)}
    assert needed <= found.build.kernels.keys()
    assert not found.beside
    return compilation, found.lowering, events


def slow_rings(entry: str, constants: Mapping[str, str | int]) -> float:
    """A card whose rings are good for 8 rows only, and whose cuBLAS is very slow."""
    if entry == "matmul_ring":
        return 1.0 if constants["PASS"] == 8 else 100.0
    return {"matmul": 5.0, "gemm": 1000.0}.get(entry, 0.1)


@pytest.mark.usefixtures("any_size")
def test_the_first_start_measures_and_the_second_reads(
    card: Card, device: Device, model: Lowering, tmp_path: Path
) -> None:
    card.cost = slow_rings
    first, found, events = start(device, model)
    assert first.trial is not None
    assert found.crossovers == RowCrossovers(ring_rows=8, gemm_from_rows=257)
    (event,) = events
    assert isinstance(event, WaysMeasured)
    assert event.choices == {"products by rings": "to 8 rows", "products by cuBLAS": "from 257 rows"}
    assert Path(event.kept).parent == tmp_path / "cache/tuning"
    assert found.scratch == model.scratch, "memory is what `fit` was told, whatever is chosen"

    launched = len(card.called("cuMemAlloc"))
    second, again, events = start(device, model)
    assert second.trial is None
    assert again.crossovers == found.crossovers
    assert events == []
    assert len(card.called("cuMemAlloc")) == launched, "nothing is measured"


@pytest.mark.usefixtures("any_size", "card")
def test_what_the_built_in_figures_say_too_needs_no_other_kernels(device: Device, model: Lowering) -> None:
    def cost(entry: str, _: Mapping[str, str | int]) -> float:
        return {"matmul_ring": 1.0, "matmul": 2.0, "gemm": 2.0}.get(entry, 0.01)

    cast(Card, device._driver.api).cost = cost
    compilation, found, events = start(device, model)
    assert compilation.kernels.lowering is found
    assert len(events) == 1


@pytest.mark.usefixtures("any_size")
def test_cached_reads_and_never_measures(card: Card, device: Device, model: Lowering) -> None:
    card.cost = slow_rings
    compilation, found, events = start(device, model, "cached")
    assert (compilation.trial, found.crossovers, events) == (None, DEFAULT, [])
    start(device, model)
    assert start(device, model, "cached")[1].crossovers.ring_rows == 8


@pytest.mark.usefixtures("any_size")
def test_off_takes_the_built_in_figures_whatever_is_kept(card: Card, device: Device, model: Lowering) -> None:
    card.cost = slow_rings
    start(device, model)
    compilation, found, events = start(device, model, "off")
    assert (compilation.trial, found.crossovers, events) == (None, DEFAULT, [])


@pytest.mark.usefixtures("any_size")
def test_a_damaged_file_is_measured_again(
    card: Card, device: Device, model: Lowering, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    card.cost = slow_rings
    start(device, model)
    (path,) = (tmp_path / "cache/tuning").iterdir()
    path.write_text("{")
    _, found, events = start(device, model)
    assert found.crossovers.ring_rows == 8
    assert len(events) == 1
    assert str(path) in caplog.text
    assert start(device, model)[2] == []


@pytest.mark.usefixtures("any_size")
def test_where_nothing_can_be_kept_each_start_measures(
    card: Card, device: Device, model: Lowering, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    card.cost = slow_rings
    (tmp_path / "cache").write_text("no folder")
    for _ in range(2):
        _, found, (event,) = start(device, model)
        assert found.crossovers.ring_rows == 8
        assert isinstance(event, WaysMeasured)
        assert event.kept == ""
    assert "the next start measures again" in caplog.text


@pytest.mark.usefixtures("any_size")
def test_a_card_that_fails_while_it_is_timed_gives_everything_back(
    card: Card, device: Device, model: Lowering, tmp_path: Path
) -> None:
    def cost(entry: str, _: Mapping[str, str | int]) -> float:
        if entry == "gemm":
            raise RuntimeError("a fault")
        return 1.0

    card.cost = cost
    with pytest.raises(Exception, match="a fault"):
        start(device, model)
    assert not list((tmp_path / "cache").rglob("*.json"))
    modules = len(card.called("cuModuleUnload"))
    assert modules > 0
