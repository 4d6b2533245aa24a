"""What lives how long on the card: memory against what was said, graphs, and what is left when something breaks off."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

from mortice.core.config import ExecutorConfig, ModelConfig, RunConfig
from mortice.core.errors import DoesNotFitError
from mortice.core.pipeline import Pipeline, prepare, prepare_opened
from mortice.core.plugin.events import Event, GraphCaptured, UploadProgress
from mortice.core.synth.model import synth_model
from mortice.core.testing.tiny_models import write_tiny_model
from mortice.plugins.executors.cuda.compile import build
from mortice.plugins.executors.cuda.device.device import Device, open_device
from mortice.plugins.executors.cuda.device.memory import DeviceBuffer
from mortice.plugins.executors.cuda.device.module import Launch
from mortice.plugins.executors.cuda.executor import CudaExecutor
from mortice.plugins.executors.cuda.run import tuning
from mortice.plugins.executors.cuda.run.kernels import compile_kernels
from mortice.plugins.executors.cuda.run.runtime import CudaRuntime
from tests.gpu.test_executor import ROUNDED, error, load, prompt
from tests.support.cuda import needs_gpu
from tests.support.registry import make_registry
from tests.support.tiny import CONTRACTS

pytestmark = [pytest.mark.gpu, needs_gpu]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 256, "ffn_size": 512, "num_heads": 4, "num_kv_heads": 2}
    file = tmp_path_factory.mktemp("lifetimes") / "model.gguf"
    return write_tiny_model(file, CONTRACTS["llama"], qtypes="Q8_0", sizes=sizes)


@pytest.fixture
def cuda(path: Path) -> Iterator[Pipeline]:
    with load(path, "cuda", exact=False) as pipeline:
        yield pipeline


def device_of(pipeline: Pipeline) -> Device:
    runtime = pipeline.runtime
    assert isinstance(runtime, CudaRuntime)
    return runtime.device


def text(pipeline: Pipeline, ids: list[int], length: int = 40) -> list[int]:
    return [piece.id for piece in pipeline.generate(ids, max_tokens=length, stop_at_eos=False)]


def config_of(path: Path, **executor: Any) -> RunConfig:
    return RunConfig(model=ModelConfig(path=path), executor=ExecutorConfig(name="cuda", context=512, **executor))


# memory --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "recipe", "kv"),
    [("Llama-3.2-1B", "Q4_K_M", "f16"), ("Llama-3.2-1B", "Q4_K_M", "q8_0"), ("SmolLM2-135M", "Q4_1", "f16")],
)
def test_the_card_has_as_much_less_memory_as_fit_said(shape: str, recipe: str, kv: Literal["f16", "q8_0"]) -> None:
    config = RunConfig(executor=ExecutorConfig(name="cuda", context=8192, kv=kv))
    device = open_device()
    free, _ = device.memory()
    with prepare_opened(config, make_registry(), synth_model(shape, recipe)) as cuda:
        text(cuda, prompt(cuda, 700), 8)
        taken = free - device.memory()[0]
        assert taken == pytest.approx(cuda.fit.total_bytes, rel=0.03)
    left = free - device.memory()[0]
    assert left < 0.03 * taken, "closing gives it back, but for what the driver keeps"


def test_a_hundred_steps_take_nothing_from_the_card(cuda: Pipeline) -> None:
    device = device_of(cuda)
    pieces = cuda.generate(prompt(cuda, 60), max_tokens=130, stop_at_eos=False)
    for _ in range(10):
        next(pieces)
    free, allocations = device.memory()[0], device.allocations
    for _ in range(100):
        next(pieces)
    assert (device.memory()[0], device.allocations) == (free, allocations)


@pytest.mark.parametrize("allocation", [1, 2, 4, 6])
def test_a_runtime_that_cannot_be_opened_leaves_nothing(
    allocation: int, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allocate, left = Device.allocate, iter(range(allocation))

    def some(self: Device, nbytes: int) -> DeviceBuffer:
        if next(left, None) is None:
            raise DoesNotFitError("no more")
        return allocate(self, nbytes)

    monkeypatch.setattr(Device, "allocate", some)
    pipeline = prepare(config_of(path), make_registry())
    with pipeline, pytest.raises(DoesNotFitError, match="no more"):
        pipeline.preload()
    monkeypatch.undo()
    assert isinstance(pipeline.executor, CudaExecutor)
    assert pipeline.executor.opened().allocated_bytes == 0
    with load(path, "cuda") as again:
        assert len(text(again, [1, 2, 3], 5)) == 5


def test_an_upload_that_is_interrupted_can_be_begun_again(path: Path) -> None:
    registry = make_registry()
    interrupts = iter([KeyboardInterrupt()])

    def interrupt(event: Event) -> None:
        if isinstance(event, UploadProgress):
            for error in interrupts:
                raise error

    registry.observers.append(interrupt)
    with prepare(config_of(path), registry) as cuda:
        with pytest.raises(KeyboardInterrupt):
            cuda.preload()
        assert isinstance(cuda.executor, CudaExecutor)
        assert cuda.executor.opened().allocated_bytes == 0
        assert cuda.preload() > 0
        assert len(text(cuda, [1, 2, 3], 5)) == 5


# breaking off --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 1, 7])
def test_a_generation_that_is_interrupted_leaves_the_runtime_usable(
    at: int, cuda: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = prompt(cuda, 70)
    wanted, runtime = text(cuda, ids), cuda.runtime
    assert isinstance(runtime, CudaRuntime)
    free = runtime.pool.free
    wait, left = CudaRuntime.wait, iter(range(at))

    def interrupted(self: CudaRuntime, work: Any) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        wait(self, work)

    monkeypatch.setattr(CudaRuntime, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        text(cuda, ids)
    monkeypatch.undo()
    assert runtime.pool.free == free, "its pages came back"
    assert text(cuda, ids) == wanted


@pytest.mark.parametrize("launch", [0, 1])
def test_a_capture_that_fails_leaves_no_graph_behind(
    launch: int, path: Path, cuda: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trap 32: a capture that failed fell back to stale state."""
    ids = prompt(cuda, 20)
    wanted = text(cuda, ids)
    with load(path, "cuda", exact=False) as fresh:
        call, left = Launch.__call__, iter(range(launch))

        def failing(self: Launch, stream: Any) -> None:
            if capturing(stream) and next(left, None) is None:
                raise RuntimeError("the capture breaks")
            call(self, stream)

        monkeypatch.setattr(Launch, "__call__", failing)
        with pytest.raises(RuntimeError, match="the capture breaks"):
            text(fresh, ids)
        monkeypatch.undo()
        assert text(fresh, ids) == wanted


def capturing(stream: Any) -> bool:
    status = stream._driver("cuStreamIsCapturing", stream.cu)
    return int(status) != 0


# graphs --------------------------------------------------------------------------------------------------------------


def test_one_capture_serves_every_position_and_sequence(path: Path) -> None:
    """Trap 21: position or sequence length baked in the captured graph."""
    registry, captured = make_registry(), []
    registry.observers.append(lambda event: captured.append(event) if isinstance(event, GraphCaptured) else None)
    with prepare(config_of(path), registry) as cuda:
        first = text(cuda, prompt(cuda, 5), 200)
        assert len(captured) == 1
        assert text(cuda, prompt(cuda, 150), 100)
        assert text(cuda, prompt(cuda, 5), 200) == first
        assert len(captured) == 1
        with cuda.session() as session:
            for token in first:  # logits to the host: a graph of their own
                session.feed([token])
        assert len(captured) == 2


def test_nothing_is_compiled_after_the_weights_are_there(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap 22: compile or cuBLAS initialisation inside capture."""
    cuda = load(path, "cuda", exact=False)

    def refuse(*_: Any) -> None:
        raise AssertionError("compiled too late")

    monkeypatch.setattr(build, "compile_cubin", refuse)
    monkeypatch.setattr(build, "compile_all", refuse)
    with cuda:
        for length in (1, 2, 9, 33, 200):
            cuda.logits(prompt(cuda, length))
        assert len(text(cuda, prompt(cuda, 9))) == 40


def test_kernels_are_compiled_once_and_before_there_is_memory_for_weights(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def noted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            calls.append(name)
            return function(*given)

        return call

    monkeypatch.setattr(tuning, "compile_kernels", noted("compile", compile_kernels))
    monkeypatch.setattr(CudaExecutor, "allocate", noted("allocate", CudaExecutor.allocate))
    with load(path, "cuda"):
        assert calls == ["compile", "allocate"]


def test_other_pipelines_come_and_go_while_a_graph_lives(path: Path, cuda: Pipeline) -> None:
    """Trap 20: reallocation under a live graph."""
    ids = prompt(cuda, 30)
    wanted = text(cuda, ids, 60)
    pieces = cuda.generate(ids, max_tokens=60, stop_at_eos=False)
    found = [next(pieces).id for _ in range(20)]
    with load(path, "cuda", exact=False, context=256) as other:
        assert text(other, ids, 30) == wanted[:30]
        found += [next(pieces).id for _ in range(20)]
    assert cuda.preload() == 0
    found += [piece.id for piece in pieces]
    assert found == wanted


def test_two_pipelines_run_in_two_threads(path: Path, cuda: Pipeline) -> None:
    """Trap 23: host to device copy on another stream."""
    ids = prompt(cuda, 30)
    wanted = text(cuda, ids, 100)
    found: dict[str, list[int]] = {}

    def work(name: str, pipeline: Pipeline) -> Callable[[], None]:
        return lambda: found.__setitem__(name, text(pipeline, ids, 100))

    with load(path, "cuda", exact=False) as other:
        threads = [threading.Thread(target=work(name, one)) for name, one in (("first", cuda), ("second", other))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == {"first": wanted, "second": wanted}


@pytest.mark.parametrize("rows", [1, 8, 40, 200])
def test_activations_of_one_input_are_not_taken_for_those_of_another(rows: int, tmp_path: Path) -> None:
    """Trap 24: quantised activations reused for another input. Attention and feed-forward have a norm each of the same
    residual stream here, and inputs of one width.
    """
    sizes = {"hidden_size": 256, "ffn_size": 256, "num_heads": 4, "num_kv_heads": 4, "rope_dim": 16}
    include = ["ffn_norm", "ffn_norm_bias"]
    file = write_tiny_model(tmp_path / "m.gguf", CONTRACTS["stablelm"], qtypes="Q8_0", sizes=sizes, include=include)
    with load(file, "reference") as reference, load(file, "cuda", exact=False) as cuda:
        ids = prompt(cuda, rows)
        assert error(cuda.logits(ids), reference.logits(ids)) < ROUNDED
