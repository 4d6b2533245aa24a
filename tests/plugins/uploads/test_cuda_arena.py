"""What the CUDA arena's intake asks of the driver, on one that only pretends."""

from __future__ import annotations

import ctypes
import resource
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from attrs import evolve
from numpy.typing import NDArray

from mortice.core.errors import DoesNotFitError, UnsupportedError
from mortice.core.model.residency import RawRows, ResidentWeights
from mortice.core.model.weight_plan import ALIGNMENT, WeightPlan
from mortice.plugins.executors.cuda.compile.nvrtc import Compiled, Source, compile_cubin
from mortice.plugins.executors.cuda.device.device import Device, open_device
from mortice.plugins.executors.cuda.device.errors import CudaError
from mortice.plugins.executors.cuda.device.module import Int, Pointer
from mortice.plugins.executors.cuda.lowering.layouts import TileLayout, tile_geometry
from mortice.plugins.executors.cuda.weights import arena as arena_module
from mortice.plugins.executors.cuda.weights.arena import CudaArena, begin_staging, repack_source, repack_sources
from mortice.plugins.uploads.device import mortice_upload_strategies
from tests.plugins.uploads.fakes import open_model, plan_for_cuda
from tests.support.cuda import FakeDriverApi, needs_nvrtc

KERNEL_PARAMETERS = (8, 8, 4)
GIVEN_BACK = {
    "cuMemAlloc": "cuMemFree",
    "cuMemHostAlloc": "cuMemFreeHost",
    "cuMemHostRegister": "cuMemHostUnregister",
    "cuModuleLoadData": "cuModuleUnload",
    "cuStreamCreateWithPriority": "cuStreamDestroy",
    "cuEventCreate": "cuEventDestroy",
}


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> FakeDriverApi:
    """A driver that only pretends, and a compiler that makes nothing."""
    api, package = FakeDriverApi(), ModuleType("cuda.bindings")
    package.__version__ = "13.1.0"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cuda.bindings", package)
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", cast(ModuleType, api))
    for function, answer in {
        "cuModuleLoadData": "module",
        "cuModuleGetFunction": "repack",
        "cuEventCreate": "event",
    }.items():
        api.answers[function] = (answer,)
    api.cuFuncGetParamInfo = lambda _, i: (0, 0, KERNEL_PARAMETERS[i]) if i < 3 else (1,)  # type: ignore[attr-defined]
    api.cuMemHostAlloc = _real_memory(api)  # type: ignore[attr-defined]
    monkeypatch.setattr(Device, "arch", "sm_90")
    built = lambda sources, *_, **__: SimpleNamespace(  # noqa: E731
        kernels={source: SimpleNamespace(cubin=b"code") for source in sources}
    )
    monkeypatch.setattr(arena_module, "compile_all", built)
    return api


def _real_memory(api: FakeDriverApi) -> Any:
    kept = []

    def allocate(nbytes: int, flags: int) -> tuple[int, int]:
        api.calls.append(("cuMemHostAlloc", nbytes, flags))
        kept.append(np.zeros(nbytes, np.uint8))
        return (0, kept[-1].ctypes.data)

    return allocate


@pytest.fixture
def plan(tmp_path: Path) -> Iterator[WeightPlan]:
    with open_model(tmp_path) as file:
        yield plan_for_cuda(file)


@pytest.fixture
def arena(api: FakeDriverApi, plan: WeightPlan) -> CudaArena:
    device = open_device()
    made = CudaArena(device, device.allocate(plan.arena_bytes), device.new_stream())
    api.calls.clear()
    return made


def check_given_back(api: FakeDriverApi) -> None:
    for take, give in GIVEN_BACK.items():
        assert len(api.called(take)) == len(api.called(give)), take


@pytest.mark.parametrize("name", [strategy.name for strategy in mortice_upload_strategies()])
def test_every_byte_is_copied_once_and_every_weight_laid_out(
    name: str, api: FakeDriverApi, arena: CudaArena, plan: WeightPlan
) -> None:
    strategy = next(strategy for strategy in mortice_upload_strategies() if strategy.name == name)
    resident = ResidentWeights(plan=plan, arena=arena)
    assert strategy.upload(resident, lambda event: None) == sum(planned.nbytes for planned in plan.weights)
    tiled = [planned for planned in plan.weights if isinstance(planned.layout, TileLayout)]
    vectors = [planned for planned in plan.weights if planned not in tiled]
    assert len(api.called("cuLaunchKernelEx")) >= len(tiled)
    copied = sum(nbytes for _, _, nbytes, _ in api.called("cuMemcpyHtoDAsync"))
    expected = sum(planned.source().nbytes for planned in tiled) + sum(planned.nbytes for planned in vectors)
    assert copied == expected
    check_given_back(api)


def test_a_part_of_a_weight_is_laid_out_behind_the_part_before_it(
    api: FakeDriverApi, arena: CudaArena, plan: WeightPlan
) -> None:
    index, planned = next((i, p) for i, p in enumerate(plan.weights) if isinstance(p.layout, TileLayout))
    geometry = tile_geometry(planned.tensor.qtype, planned.rows, planned.columns)
    half = planned.rows // 2
    arguments: list[tuple[int, ...]] = []

    def noting(config: Any, kernel: Any, pointers: int, extra: int) -> tuple[int]:
        raw, tiles, groups = (ctypes.c_void_p * 3).from_address(pointers)
        values = (Pointer.from_address(raw).value, Pointer.from_address(tiles).value, Int.from_address(groups).value)
        arguments.append(values)
        return (0,)

    api.cuLaunchKernelEx = noting  # type: ignore[attr-defined]
    with arena.receive(plan) as intake:
        assert intake.row_step(index) == geometry.tile_rows
        data = planned.source()
        intake.send([RawRows(index=index, row_start=start, data=data[start : start + half]) for start in (0, half)])
        ring = intake._lanes[0].address
    groups, start = geometry.row_groups // 2, arena.address + planned.offset
    assert arguments == [(ring, start, groups), (ring + data.nbytes // 2, start + planned.nbytes // 2, groups)]


def test_code_that_was_compiled_before_is_taken(
    api: FakeDriverApi, arena: CudaArena, plan: WeightPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[Source] = []

    def compile_all(sources: Iterable[Source], *_: Any, **__: Any) -> Any:
        compiled.extend(sources)
        return SimpleNamespace(kernels={source: SimpleNamespace(cubin=b"late") for source in compiled})

    monkeypatch.setattr(arena_module, "compile_all", compile_all)
    first, *others = sorted(repack_sources(plan), key=str)
    assert others
    arena.code = {source: cast(Compiled, SimpleNamespace(cubin=b"early")) for source in others}
    with arena.receive(plan):
        pass
    assert compiled == [first]
    assert sorted(api.called("cuModuleLoadData")) == sorted([[b"late"], *([b"early"] for _ in others)])


def test_vectors_are_left_to_the_host(arena: CudaArena, plan: WeightPlan) -> None:
    with arena.receive(plan) as intake:
        for index, planned in enumerate(plan.weights):
            assert (intake.row_step(index) is None) == (len(planned.weight.shape) == 1)


@pytest.mark.parametrize(
    "call",
    [
        "cuMemAlloc",
        "cuModuleLoadData",
        "cuModuleGetFunction",
        "cuEventCreate",
        "cuStreamCreateWithPriority",
        "cuMemcpyHtoDAsync",
        "cuLaunchKernelEx",
        "cuEventRecord",
        "cuEventSynchronize",
    ],
)
@pytest.mark.parametrize("strategy", mortice_upload_strategies(), ids=lambda strategy: strategy.name)
def test_whatever_the_driver_refuses_everything_is_given_back(
    strategy: Any, call: str, api: FakeDriverApi, arena: CudaArena, plan: WeightPlan
) -> None:
    api.failures[call] = 700
    with pytest.raises(CudaError, match=rf"^{call}"):
        strategy.upload(ResidentWeights(plan=plan, arena=arena), lambda event: None)
    failed = {call: 1}  # what was refused is not there to be given back
    for take, give in GIVEN_BACK.items():
        assert len(api.called(take)) == len(api.called(give)) + failed.get(take, 0), take


def test_no_room_for_bytes_in_passing_is_said_before_anything_is_pinned(
    api: FakeDriverApi, arena: CudaArena, plan: WeightPlan
) -> None:
    api.failures["cuMemAlloc"] = 2
    with pytest.raises(DoesNotFitError, match=r"67,108,864 bytes of device memory needed"), arena.receive(plan):
        pass
    assert not api.called("cuMemHostAlloc")


@pytest.mark.parametrize(
    ("can", "read_only", "message"),
    [
        ({"host_register": False}, False, "cannot register memory; upload.strategy"),
        ({"read_only_host_register": False}, True, "cannot register read-only memory, such as a mapped file; upload"),
    ],
)
def test_a_device_that_cannot_register_memory_says_so(
    can: dict[str, Any], read_only: bool, message: str, arena: CudaArena, plan: WeightPlan
) -> None:
    arena.device.properties = evolve(arena.device.properties, **can)
    with arena.receive(plan) as intake, pytest.raises(UnsupportedError, match=f"^Pretence with this driver {message}"):
        intake.register(1 << 20, 4096, read_only=read_only)


def test_memory_that_the_driver_refuses_to_register_is_named(
    api: FakeDriverApi, arena: CudaArena, plan: WeightPlan
) -> None:
    api.failures["cuMemHostRegister"] = 801
    with arena.receive(plan) as intake, pytest.raises(UnsupportedError, match=r"^4,096 bytes of host memory cannot be"):
        intake.register(1 << 20, 4096, read_only=True)


def rows_in(memory: NDArray[np.uint8], plan: WeightPlan) -> RawRows:
    """The first rows that a card lays out, as though they had been read into `memory`."""
    index, planned = next((i, p) for i, p in enumerate(plan.weights) if isinstance(p.layout, TileLayout))
    rows = tile_geometry(planned.tensor.qtype, planned.rows, planned.columns).tile_rows
    row_bytes = planned.source().shape[1]
    return RawRows(index=index, row_start=0, data=memory[: rows * row_bytes].reshape(rows, row_bytes))


def test_pinned_memory_can_be_filled_is_pinned_when_it_is_sent_from_and_is_given_back_once(
    api: FakeDriverApi, arena: CudaArena, plan: WeightPlan
) -> None:
    with arena.receive(plan) as intake:
        buffer, other = intake.pin(10_000), intake.pin(10_000)
        assert buffer.array.nbytes >= 10_000
        assert buffer.array.ctypes.data % 4096 == 0
        buffer.array[:] = 7
        assert not api.called("cuMemHostRegister")
        for _ in range(2):
            intake.send([rows_in(buffer.array, plan)]).wait()
            assert api.called("cuMemHostRegister") == [[buffer.array.ctypes.data, 12288, 3]]  # whole pages
        for memory in (buffer, buffer, other):
            memory.close()
    check_given_back(api)


def test_memory_at_the_place_of_memory_that_was_let_go_is_not_taken_for_it(
    api: FakeDriverApi, arena: CudaArena, plan: WeightPlan
) -> None:
    with arena.receive(plan) as intake:
        buffer = intake.pin(10_000)
        memory = buffer.array
        buffer.close()
        intake.send([rows_in(memory, plan)]).wait()
    assert not api.called("cuMemHostRegister")


def test_memory_made_ready_is_what_an_upload_takes_first_and_what_is_left_is_given_back(
    api: FakeDriverApi, arena: CudaArena, plan: WeightPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arena_module, "_LANE_BYTES", 1 << 18)
    arena.staging = begin_staging(arena.device, plan)
    assert arena.staging is not None
    arena.staging._thread.join()
    ready = len(api.called("cuMemHostRegister"))
    assert ready == arena_module._STAGED
    with arena.receive(plan) as intake:
        assert intake.pin(intake.capacity + 1).close() is None  # larger than those made ready
        buffers = [intake.pin(intake.capacity) for _ in range(ready - 1)]
        intake.send([rows_in(buffers[0].array, plan)]).wait()
        for buffer in buffers:
            buffer.close()
    assert len(api.called("cuMemHostRegister")) == ready
    check_given_back(api)
    assert arena.staging is None


def test_an_arena_that_nothing_was_uploaded_to_gives_back_what_was_made_ready(
    api: FakeDriverApi, arena: CudaArena, plan: WeightPlan
) -> None:
    arena.staging = begin_staging(arena.device, plan)
    arena.close()
    assert len(api.called("cuMemHostRegister")) == len(api.called("cuMemHostUnregister"))


def test_memory_that_cannot_be_made_ready_is_no_reason_to_fail_yet(
    api: FakeDriverApi, arena: CudaArena, plan: WeightPlan
) -> None:
    api.failures["cuMemHostRegister"] = 2
    arena.staging = begin_staging(arena.device, plan)
    with arena.receive(plan) as intake:
        intake.pin(10_000).close()
    arena.device.properties = evolve(arena.device.properties, host_register=False)
    assert begin_staging(arena.device, plan) is None


def _has_huge_pages() -> bool:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return setting.exists() and "[never]" not in setting.read_text()


@pytest.mark.skipif(not _has_huge_pages(), reason="the system has no transparent huge pages")
def test_pinned_memory_is_faulted_in_by_huge_pages(arena: CudaArena, plan: WeightPlan) -> None:
    with arena.receive(plan) as intake:
        buffer = intake.pin(64 << 20)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        buffer.array[::4096] = 0
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        buffer.close()
    assert faults < (64 << 20) // 4096 // 2, "more than every second small page by itself"


def test_where_memory_cannot_be_registered_the_driver_is_asked_for_some(
    api: FakeDriverApi, arena: CudaArena, plan: WeightPlan
) -> None:
    arena.device.properties = evolve(arena.device.properties, host_register=False)
    with arena.receive(plan) as intake:
        buffer = intake.pin(10_000)
        buffer.array[:] = 7
        buffer.close()
    assert len(api.called("cuMemHostAlloc")) == 1
    check_given_back(api)


def test_memory_that_cannot_be_pinned_is_said_with_its_size(
    api: FakeDriverApi, arena: CudaArena, plan: WeightPlan
) -> None:
    api.failures["cuMemHostRegister"] = 2
    with arena.receive(plan) as intake:
        buffer = intake.pin(10_000)
        with pytest.raises(DoesNotFitError, match=r"^12,288 bytes of pinned host memory are not there: cuMemHostReg"):
            intake.send([rows_in(buffer.array, plan)])
        buffer.close()


def test_parts_that_will_lie_as_they_do_go_in_one_copy(api: FakeDriverApi, arena: CudaArena, plan: WeightPlan) -> None:
    index, planned = next((i, p) for i, p in enumerate(plan.weights) if isinstance(p.layout, TileLayout))
    rows = tile_geometry(planned.tensor.qtype, planned.rows, planned.columns).tile_rows
    row_bytes = planned.source().shape[1]
    place = -(-rows * row_bytes // ALIGNMENT) * ALIGNMENT
    memory = np.zeros(3 * place, np.uint8)

    def part(number: int, at: int) -> RawRows:
        data = memory[at : at + rows * row_bytes].reshape(rows, row_bytes)
        return RawRows(index=index, row_start=number * rows, data=data)

    start = memory.ctypes.data
    with arena.receive(plan) as intake:
        api.calls.clear()
        intake.send([part(0, 0), part(1, place)])
        assert [(host - start, nbytes) for _, host, nbytes, _ in api.called("cuMemcpyHtoDAsync")] == [
            (0, place + rows * row_bytes)
        ]
        api.calls.clear()
        intake.send([part(0, place), part(1, 0)])
        assert [(host - start, nbytes) for _, host, nbytes, _ in api.called("cuMemcpyHtoDAsync")] == [
            (place, rows * row_bytes),
            (0, rows * row_bytes),
        ]


@needs_nvrtc
def test_the_code_of_every_tiling_compiles(plan: WeightPlan) -> None:
    sources = {}
    for planned in plan.weights:
        if isinstance(planned.layout, TileLayout):
            geometry = tile_geometry(planned.tensor.qtype, planned.rows, planned.columns)
            source = repack_source(planned.layout.type, geometry)
            sources[source] = compile_cubin(source, "sm_90")
    assert len(sources) > 2
    assert all("repack" in compiled.functions and not compiled.spills for compiled in sources.values())
