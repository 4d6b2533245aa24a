"""Ways onto a device, on one that only pretends: what arrives, what is told, and that all is given back."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from attrs import evolve
from numpy.typing import NDArray

from mortice.core.errors import DeviceError, DoesNotFitError, ModelFileError, PluginError, UnsupportedError
from mortice.core.model.residency import RawRows, ResidentWeights, batches
from mortice.core.model.types import ModelFile
from mortice.core.model.weight_plan import ALIGNMENT, PlannedWeight, WeightPlan
from mortice.core.plugin.events import Event, UploadProgress
from mortice.core.plugin.interfaces import UploadStrategy
from mortice.core.synth.model import synth_model
from mortice.plugins.executors.cuda.executor import CudaExecutor
from mortice.plugins.executors.reference.executor import HostArena
from mortice.plugins.uploads.device import mortice_upload_strategies
from mortice.plugins.uploads.device.crew import run_crew
from mortice.plugins.uploads.device.mapped import MappedWay
from mortice.plugins.uploads.device.strategy import DeviceUpload
from tests.plugins.uploads.fakes import (
    FakeArena,
    FakeIntake,
    OnCall,
    open_model,
    plan_for_cuda,
    resident_of,
    stored_by_the_host,
)

STRATEGIES = {strategy.name: strategy for strategy in mortice_upload_strategies()}
SMALL_WINDOWS = DeviceUpload(MappedWay(window_bytes=64 * 1024))

every_strategy = pytest.mark.parametrize(
    "strategy", [*STRATEGIES.values(), SMALL_WINDOWS], ids=[*STRATEGIES, "windows"]
)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelFile]:
    with open_model(tmp_path_factory.mktemp("uploads")) as opened:
        yield opened


@pytest.fixture(scope="module")
def plan(file: ModelFile) -> WeightPlan:
    return plan_for_cuda(file)


def silent(event: Event) -> None:
    """An observer that does nothing."""


def upload_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("mortice-upload")]


def arena_of(resident: ResidentWeights) -> FakeArena:
    return cast(FakeArena, resident.arena)


def check_given_back(arena: FakeArena) -> None:
    assert not arena.held
    assert not arena.intakes_open
    calls = arena.calls.total()
    deadline = time.monotonic() + 10
    while (
        upload_threads() and time.monotonic() < deadline
    ):  # one that an interrupt caught while starting ends by itself
        time.sleep(0.001)
    assert not [thread for thread in upload_threads() if thread.is_alive()]
    assert arena.calls.total() == calls
    assert not arena.held


def test_the_executor_takes_a_strategy_that_exists() -> None:
    assert CudaExecutor().default_upload() in STRATEGIES


@every_strategy
def test_the_arena_is_what_the_host_would_have_stored(strategy: UploadStrategy, plan: WeightPlan) -> None:
    resident = resident_of(plan)
    assert strategy.upload(resident, silent) == sum(planned.nbytes for planned in plan.weights)
    assert resident.complete
    assert np.array_equal(arena_of(resident).memory, stored_by_the_host(plan))
    check_given_back(arena_of(resident))


@every_strategy
def test_a_second_upload_moves_nothing(strategy: UploadStrategy, plan: WeightPlan) -> None:
    resident = resident_of(plan)
    strategy.upload(resident, silent)
    arena_of(resident).calls.clear()
    told: list[Event] = []
    assert strategy.upload(resident, told.append) == 0
    assert not arena_of(resident).calls
    assert not told


@every_strategy
def test_only_what_is_missing_is_uploaded(strategy: UploadStrategy, plan: WeightPlan) -> None:
    resident = resident_of(plan)
    for index in range(3, len(plan.weights)):
        resident.mark(index)
    assert strategy.upload(resident, silent) == sum(planned.nbytes for planned in plan.weights[:3])
    end = plan.weights[3].offset
    memory = arena_of(resident).memory
    assert np.array_equal(memory[:end], stored_by_the_host(plan)[:end])
    assert not memory[end:].any()


@every_strategy
def test_progress_counts_every_byte_of_the_file_once_on_the_calling_thread(
    strategy: UploadStrategy, plan: WeightPlan
) -> None:
    told: list[UploadProgress] = []
    threads = set()

    def observe(event: Event) -> None:
        assert isinstance(event, UploadProgress)
        told.append(event)
        threads.add(threading.current_thread())

    strategy.upload(resident_of(plan), observe)
    assert threads == {threading.current_thread()}
    done = [event.done_bytes for event in told]
    assert done == sorted(set(done))
    assert {event.total_bytes for event in told} == {plan.file_bytes}
    assert done[-1] == plan.file_bytes
    assert {event.strategy for event in told} == {strategy.name}


@every_strategy
def test_slices_of_one_tensor_find_their_places(strategy: UploadStrategy, plan: WeightPlan) -> None:
    index, whole = next((i, p) for i, p in enumerate(plan.weights) if p.rows >= 512)
    parts = []
    offset = 0
    for start, stop in ((0, 128), (128, 256), (256, 512)):
        weight = evolve(whole.weight, row_start=start, row_stop=stop)
        parts.append(type(whole).of(weight, whole.tensor, whole.layout, offset))
        offset += -(-parts[-1].nbytes // ALIGNMENT) * ALIGNMENT
    fused = evolve(plan, weights=tuple(parts), arena_bytes=offset)
    resident = resident_of(fused, capacity=16 * 1024)
    strategy.upload(resident, silent)
    assert np.array_equal(arena_of(resident).memory, stored_by_the_host(fused)), index


def test_pinned_rows_leave_from_pinned_memory_only(plan: WeightPlan) -> None:
    resident = resident_of(plan)
    STRATEGIES["pinned"].upload(resident, silent)
    assert set(arena_of(resident).sources) == {"pinned"}


@pytest.mark.parametrize("cores", [1, 16])
def test_threads_read_pieces_of_one_buffer_side_by_side(
    cores: int, plan: WeightPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mortice.plugins.uploads.device.pinned._PIECE_BYTES", 3000)
    monkeypatch.setattr("mortice.plugins.uploads.device.pinned.cores", lambda: cores)
    at_once: list[int] = []
    reading: set[int] = set()

    read_rows = PlannedWeight.read_rows

    def watched(planned: PlannedWeight, row: int, out: NDArray[np.uint8]) -> None:
        assert out.nbytes <= 3000 + planned.source_bytes // planned.rows
        reading.add(threading.get_ident())
        at_once.append(len(reading))
        time.sleep(1e-4)  # lets other threads in
        read_rows(planned, row, out)
        reading.discard(threading.get_ident())

    monkeypatch.setattr(PlannedWeight, "read_rows", watched)
    resident = resident_of(plan)
    STRATEGIES["pinned"].upload(resident, silent)
    assert np.array_equal(arena_of(resident).memory, stored_by_the_host(plan))
    assert arena_of(resident).calls["send"] < len(at_once) / 4
    assert max(at_once) > 1
    check_given_back(arena_of(resident))


def test_pinned_reads_the_file_and_says_where_it_was_cut_short(tmp_path: Path) -> None:
    with open_model(tmp_path) as file:
        plan = plan_for_cuda(file)
        resident = resident_of(plan)
        last = max(plan.weights, key=lambda planned: planned.tensor.offset).tensor
        assert len(last.shape) == 2
        end = last.offset + last.nbytes - 16  # on the last page, so that the mapping can still be read
        os.truncate(file.path, end)
        with pytest.raises(ModelFileError, match=rf"model.gguf: byte {end}: the file ends, 16 more bytes were there"):
            STRATEGIES["pinned"].upload(resident, silent)
        check_given_back(arena_of(resident))


def test_mapped_rows_leave_from_registered_pages_but_for_those_across_two_windows(plan: WeightPlan) -> None:
    resident = resident_of(plan)
    SMALL_WINDOWS.upload(resident, silent)
    sources = arena_of(resident).sources
    assert arena_of(resident).calls["register"] > 3
    assert 0 < sources["ordinary"] < 0.25 * sources["pinned"]


def test_mapped_refuses_a_model_in_memory() -> None:
    with synth_model("SmolLM2-135M", "Q8_0", layers=1, stored=True) as file:
        resident = resident_of(plan_for_cuda(file))
        with pytest.raises(
            UnsupportedError, match=r"^upload.strategy 'mapped': .* is in memory, wanted a mapped file$"
        ):
            STRATEGIES["mapped"].upload(resident, silent)
        check_given_back(arena_of(resident))


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("name", ["pinned", "pageable", "measured"])
def test_a_model_that_is_no_file_is_uploaded(name: str, stored: bool) -> None:
    with synth_model("SmolLM2-135M", "Q8_0", layers=1, stored=stored) as file:
        plan = plan_for_cuda(file)
        resident = resident_of(plan, capacity=1 << 20)
        STRATEGIES[name].upload(resident, silent)
        assert np.array_equal(arena_of(resident).memory, stored_by_the_host(plan))


@every_strategy
def test_memory_that_takes_no_raw_rows_is_refused(strategy: UploadStrategy, plan: WeightPlan) -> None:
    resident = ResidentWeights(plan=plan, arena=HostArena(plan.arena_bytes))
    with pytest.raises(UnsupportedError, match=r"HostArena takes no raw rows$"):
        strategy.upload(resident, silent)


def failing_at(call: str, count: int, error: BaseException) -> OnCall:
    def on_call(name: str, before: int) -> None:
        if name == call and before == count:
            raise error

    return on_call


POINTS = [("receive", 0), ("write", 0), ("write", 5), ("send", 0), ("send", 1), ("send", 5), ("wait", 0), ("wait", 5)]
POINTS += [("finish", 0)]
OWN_POINTS = {"pinned": [("pin", 0)], "measured": [("pin", 0)], "mapped": [("register", 0)], "pageable": []}
FAILURES = [(name, *point) for name, own in OWN_POINTS.items() for point in (*POINTS, *own)]


@pytest.mark.parametrize(("name", "call", "count"), FAILURES)
def test_a_failure_at_any_point_passes_on_and_gives_everything_back(
    name: str, call: str, count: int, plan: WeightPlan
) -> None:
    resident = resident_of(plan, failing_at(call, count, DeviceError("it broke")))
    with pytest.raises(DeviceError, match=r"^it broke$"):
        STRATEGIES[name].upload(resident, silent)
    assert list(resident.missing())
    check_given_back(arena_of(resident))


def test_a_window_that_cannot_be_registered_leaves_none_registered(plan: WeightPlan) -> None:
    resident = resident_of(plan, failing_at("register", 3, UnsupportedError("no more")))
    with pytest.raises(UnsupportedError, match=r"^no more$"):
        SMALL_WINDOWS.upload(resident, silent)
    check_given_back(arena_of(resident))


@every_strategy
def test_an_observer_that_raises_ends_the_upload(strategy: UploadStrategy, plan: WeightPlan) -> None:
    def observe(event: Event) -> None:
        assert isinstance(event, UploadProgress)
        if event.done_bytes > plan.file_bytes // 2:
            raise PluginError("seen enough")

    resident = resident_of(plan)
    with pytest.raises(PluginError, match=r"^seen enough$"):
        strategy.upload(resident, observe)
    check_given_back(arena_of(resident))


@every_strategy
def test_ctrl_c_ends_the_upload_and_the_file_can_be_closed(strategy: UploadStrategy, tmp_path: Path) -> None:
    def interrupt(name: str, before: int) -> None:
        if name == "send" and before == 2:
            os.kill(os.getpid(), signal.SIGINT)

    file = open_model(tmp_path)
    resident = resident_of(plan_for_cuda(file), interrupt)
    with pytest.raises(KeyboardInterrupt):
        strategy.upload(resident, silent)
    check_given_back(arena_of(resident))
    assert list(resident.missing())
    resident.close()
    del resident
    gc.collect()
    file.close()
    assert str(file.path) not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("cores", [1, 16])
def test_no_more_threads_than_there_is_work_for(cores: int, plan: WeightPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mortice.plugins.uploads.device.pinned.cores", lambda: cores)
    threads: list[int] = []

    def watched(*args: Any, **options: Any) -> None:
        threads.append(options["threads"])
        run_crew(*args, **options)

    monkeypatch.setattr("mortice.plugins.uploads.device.pinned.run_crew", watched)
    STRATEGIES["pinned"].upload(resident_of(plan), silent)
    monkeypatch.setattr("mortice.plugins.uploads.device.pinned._PIECE_BYTES", 4096)
    STRATEGIES["pinned"].upload(resident_of(plan), silent)
    assert threads == [1, 14 if cores > 14 else 2]


@pytest.mark.parametrize("cores", [1, 4])
def test_no_more_is_pinned_than_a_buffer_for_each_thread_and_two_under_way(
    cores: int, plan: WeightPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mortice.plugins.uploads.device.pinned.cores", lambda: cores)
    resident = resident_of(plan, capacity=16 * 1024)
    STRATEGIES["pinned"].upload(resident, silent)
    assert 1 <= arena_of(resident).calls["pin"] <= max(2, cores) + 2


def test_batches_hold_every_row_once_and_never_too_much(plan: WeightPlan) -> None:
    arena = FakeArena(plan.arena_bytes)
    intake = FakeIntake(arena, plan, capacity=8 * 1024)
    rows = [
        RawRows(index=index, row_start=0, data=planned.source())
        for index, planned in enumerate(plan.weights)
        if intake.row_step(index) is not None
    ]
    seen = []
    for batch in batches(rows, intake):
        assert sum(-(-part.data.nbytes // ALIGNMENT) * ALIGNMENT for part in batch) <= intake.capacity
        seen += [(part.index, row) for part in batch for row in range(part.row_start, part.row_start + len(part.data))]
    assert seen == [(part.index, row) for part in rows for row in range(len(part.data))]


def test_no_pinned_memory_is_said_by_pinned(plan: WeightPlan) -> None:
    resident = resident_of(plan, failing_at("pin", 0, DoesNotFitError("8 bytes of pinned host memory are not there")))
    with pytest.raises(DoesNotFitError, match=r"^8 bytes of pinned"):
        STRATEGIES["pinned"].upload(resident, silent)
