"""Every way onto a real card: the arena byte by byte, a second upload, and what is left after a failure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from numpy.typing import NDArray

import mortice
from mortice.core.config import ExecutorConfig, ModelConfig, RunConfig, UploadConfig
from mortice.core.errors import PluginError, UnsupportedError
from mortice.core.model.program import build_program
from mortice.core.model.residency import ResidentWeights
from mortice.core.model.types import LoadOptions
from mortice.core.model.validation import validate
from mortice.core.model.weight_plan import WeightPlan, plan_weights
from mortice.core.plugin.events import Event, UploadProgress
from mortice.core.plugin.interfaces import UploadStrategy
from mortice.core.testing.tiny_models import write_tiny_model
from mortice.plugins.executors.cuda.executor import CudaExecutor
from mortice.plugins.executors.cuda.weights.arena import CudaArena
from mortice.plugins.loaders.gguf.loader import open_gguf
from mortice.plugins.qtypes import mortice_qtypes
from mortice.plugins.uploads.device import mortice_upload_strategies
from mortice.plugins.uploads.device.mapped import MappedWay
from mortice.plugins.uploads.device.strategy import DeviceUpload
from tests.support.cuda import needs_gpu, needs_nvrtc
from tests.support.tiny import CONTRACTS

pytestmark = [pytest.mark.gpu, needs_gpu, needs_nvrtc]

STRATEGIES: dict[str, UploadStrategy] = {strategy.name: strategy for strategy in mortice_upload_strategies()}
WITH_SMALL_WINDOWS: UploadStrategy = DeviceUpload(MappedWay(window_bytes=1 << 20))
EVERY = {**STRATEGIES, "mapped, small windows": WITH_SMALL_WINDOWS}
QTYPES = (
    "F32",
    "F16",
    "BF16",
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q8_0",
    "Q2_K",
    "Q3_K",
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "IQ4_NL",
    "IQ4_XS",
)
SIZES = {"hidden_size": 256, "ffn_size": 4864, "num_layers": 1}
POISON = 0xA5

every_strategy = pytest.mark.parametrize("name", EVERY)


def silent(event: Event) -> None:
    """An observer that does nothing."""


@pytest.fixture(scope="module")
def executor() -> CudaExecutor:
    return CudaExecutor()


@pytest.fixture(scope="module")
def path_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("uploads")

    def write(qtype: str) -> Path:
        path = folder / f"{qtype}.gguf"
        contract = CONTRACTS["llama"]
        return path if path.exists() else write_tiny_model(path, contract, qtypes=qtype, sizes=SIZES, tied=False)

    return write


@contextmanager
def planned(path: Path, executor: CudaExecutor) -> Iterator[WeightPlan]:
    file = open_gguf(path, LoadOptions())
    assert file is not None
    with file:
        model = validate(file, CONTRACTS["llama"]).model()
        kernels = executor.kernels(executor.device(), list(mortice_qtypes()))
        yield plan_weights(model, build_program(model), kernels)


@contextmanager
def on_the_card(plan: WeightPlan, executor: CudaExecutor) -> Iterator[ResidentWeights]:
    """Nothing resident yet, in poisoned memory; uploads have to leave the card as they found it."""
    arena = executor.allocate(plan.arena_bytes)
    resident = ResidentWeights(plan=plan, arena=arena)
    try:
        arena.stream.fill(arena.address, POISON, arena.nbytes)
        arena.stream.synchronize()
        before = arena.device.allocated_bytes
        yield resident
        assert arena.device.allocated_bytes == before
        assert not arena.device._held
    finally:
        resident.close()


@pytest.fixture
def small_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one send carries is less than a weight, and several threads read it."""
    monkeypatch.setattr("mortice.plugins.executors.cuda.weights.arena._LANE_BYTES", 1 << 17)
    monkeypatch.setattr("mortice.plugins.uploads.device.pinned._PIECE_BYTES", 1 << 15)


def bytes_on_the_card(resident: ResidentWeights) -> NDArray[np.uint8]:
    arena = cast(CudaArena, resident.arena)
    host = np.empty(arena.nbytes, np.uint8)
    arena.device.make_current()
    arena.stream.read(host, arena.address)
    return host


def stored_by_the_host(plan: WeightPlan) -> NDArray[np.uint8]:
    memory = np.full(plan.arena_bytes, POISON, np.uint8)
    for weight in plan.weights:
        weight.layout.store(weight.source(), weight.columns, memory[weight.offset : weight.offset + weight.nbytes])
    return memory


def upload(name: str, resident: ResidentWeights, observer: Callable[[Event], None] = silent) -> int:
    """Upload; a card that cannot register a file's pages says so, and the test is skipped."""
    try:
        return EVERY[name].upload(resident, observer)
    except UnsupportedError as refusal:
        if not name.startswith("mapped"):
            raise
        pytest.skip(str(refusal))


@every_strategy
@pytest.mark.parametrize("qtype", QTYPES)
def test_the_arena_is_what_the_host_would_have_stored(
    name: str, qtype: str, path_of: Callable[[str], Path], executor: CudaExecutor
) -> None:
    with planned(path_of(qtype), executor) as plan, on_the_card(plan, executor) as resident:
        assert upload(name, resident) == sum(weight.nbytes for weight in plan.weights)
        assert np.array_equal(bytes_on_the_card(resident), stored_by_the_host(plan))


@pytest.mark.usefixtures("small_lanes")
@every_strategy
@pytest.mark.parametrize("qtype", ["Q4_K", "Q6_K", "Q8_0", "F16"])
def test_weights_larger_than_a_lane_are_cut_at_row_groups(
    name: str, qtype: str, path_of: Callable[[str], Path], executor: CudaExecutor
) -> None:
    with planned(path_of(qtype), executor) as plan, on_the_card(plan, executor) as resident:
        upload(name, resident)
        assert np.array_equal(bytes_on_the_card(resident), stored_by_the_host(plan))


@every_strategy
def test_a_second_upload_moves_nothing_and_addresses_stay(
    name: str, path_of: Callable[[str], Path], executor: CudaExecutor
) -> None:
    with planned(path_of("Q4_K"), executor) as plan, on_the_card(plan, executor) as resident:
        upload(name, resident)
        addresses = [resident.address(index) for index in range(len(plan.weights))]
        allocations = executor.opened().allocations
        assert EVERY[name].upload(resident, silent) == 0
        assert [resident.address(index) for index in range(len(plan.weights))] == addresses
        assert executor.opened().allocations == allocations


@pytest.mark.usefixtures("small_lanes")
@every_strategy
@pytest.mark.parametrize("error", [PluginError("seen enough"), KeyboardInterrupt()], ids=["error", "ctrl-c"])
def test_what_ends_an_upload_early_leaves_nothing_on_the_card(
    name: str, error: BaseException, path_of: Callable[[str], Path], executor: CudaExecutor
) -> None:
    def observe(event: Event) -> None:
        if isinstance(event, UploadProgress) and event.done_bytes > event.total_bytes // 2:
            raise error

    with planned(path_of("Q8_0"), executor) as plan, on_the_card(plan, executor) as resident:
        with pytest.raises(type(error)):
            upload(name, resident, observe)
        assert list(resident.missing())
        # the device is as good as before
        assert upload(name, resident) == sum(weight.nbytes for weight in plan.weights)
        assert np.array_equal(bytes_on_the_card(resident), stored_by_the_host(plan))


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_pipeline_gives_the_same_logits_whatever_the_way(name: str, path_of: Callable[[str], Path]) -> None:
    def logits(strategy: str) -> NDArray[np.float32]:
        config = RunConfig(
            model=ModelConfig(path=path_of("Q4_K")),
            executor=ExecutorConfig(name="cuda", context=64),
            upload=UploadConfig(strategy=strategy),
        )
        with mortice.load(config) as pipeline:
            assert pipeline.preload() == 0
            return pipeline.logits([1, 2, 3])

    try:
        found = logits(name)
    except UnsupportedError as refusal:
        assert name == "mapped"
        pytest.skip(str(refusal))
    assert np.array_equal(found, logits("auto"))
