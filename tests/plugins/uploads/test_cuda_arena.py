"""What the CUDA arena's intake asks of the driver, on one that only pretends."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from attrs import evolve

from mortice.core.errors import DoesNotFitError, UnsupportedError
from mortice.core.model.residency import RawRows, ResidentWeights
from mortice.core.model.weight_plan import ALIGNMENT, WeightPlan
from mortice.plugins.executors.cuda import arena as arena_module
from mortice.plugins.executors.cuda.arena import CudaArena, repack_source
from mortice.plugins.executors.cuda.device import Device, open_device
from mortice.plugins.executors.cuda.errors import CudaError
from mortice.plugins.executors.cuda.layouts import TileLayout, tile_geometry
from mortice.plugins.executors.cuda.module import Int, Pointer
from mortice.plugins.executors.cuda.nvrtc import compile_cubin
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
    with pytest.raises(DoesNotFitError, match=r"100,663,296 bytes of device memory needed"), arena.receive(plan):
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


def test_pinned_memory_can_be_filled_and_is_given_back_once(
    api: FakeDriverApi, arena: CudaArena, plan: WeightPlan
) -> None:
    with arena.receive(plan) as intake:
        buffer = intake.pin(10_000)
        assert buffer.array.nbytes >= 10_000
        assert buffer.array.ctypes.data % 4096 == 0
        assert api.called("cuMemHostRegister") == [[buffer.array.ctypes.data, 12288, 3]]  # whole pages
        buffer.array[:] = 7
        buffer.close()
        buffer.close()
    check_given_back(api)


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
    with arena.receive(plan) as intake, pytest.raises(DoesNotFitError, match=r"^10,000 bytes of pinned host memory"):
        intake.pin(10_000)


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
