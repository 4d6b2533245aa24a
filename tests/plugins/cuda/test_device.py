"""What the device layer does when something is missing or fails, and that it gives everything back."""

from __future__ import annotations

import ctypes
import sys
from types import ModuleType
from typing import cast

import numpy as np
import pytest

from mortice.core.errors import DeviceError, DoesNotFitError
from mortice.plugins.executors.cuda.device import driver
from mortice.plugins.executors.cuda.device.device import Device, open_device
from mortice.plugins.executors.cuda.device.driver import Driver, load_driver
from mortice.plugins.executors.cuda.device.errors import CudaError
from mortice.plugins.executors.cuda.device.module import Function, Int, Pointer
from mortice.plugins.executors.cuda.device.properties import list_devices
from mortice.plugins.executors.cuda.device.stream import Graph, GraphExec, Stream
from tests.support.cuda import FakeDriverApi


def no_driver() -> bool:
    """Whether libcuda is missing from this machine."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return True
    return False


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> FakeDriverApi:
    """A driver that only pretends, found where ``cuda.bindings`` would be."""
    api, package = FakeDriverApi(), ModuleType("cuda.bindings")
    package.__version__ = "13.1.0"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cuda.bindings", package)
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", cast(ModuleType, api))
    return api


@pytest.fixture
def device(api: FakeDriverApi) -> Device:
    return open_device()


def driver_of(api: FakeDriverApi) -> Driver:
    return Driver(cast(ModuleType, api), (13, 0))


@pytest.mark.skipif(not no_driver(), reason="an NVIDIA driver is installed")
def test_a_machine_without_a_driver_is_told_so_and_the_way_back() -> None:
    pytest.importorskip("cuda.bindings", reason="cuda-python is not installed")
    with pytest.raises(DeviceError, match=r'^no NVIDIA driver \(libcuda.so.1 was not found\); executor = "reference"'):
        open_device()


def test_without_a_driver_no_package_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    monkeypatch.setattr(driver, "is_driver_installed", lambda: False)
    with pytest.raises(DeviceError, match=r'^no NVIDIA driver \(libcuda.so.1 was not found\); executor = "reference"'):
        open_device()


def test_missing_cuda_python_names_the_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    monkeypatch.setattr(driver, "is_driver_installed", lambda: True)
    with pytest.raises(DeviceError, match=r'install mortice\[cuda12\] or mortice\[cuda13\]; executor = "reference"'):
        list_devices()


def test_a_driver_older_than_cuda_python_names_both_ways_out(api: FakeDriverApi) -> None:
    api.answers["cuDriverGetVersion"] = (12040,)
    with pytest.raises(DeviceError) as caught:
        load_driver()
    assert "the NVIDIA driver runs CUDA 12.4 at most, cuda-python 13.1.0 needs 13.0" in str(caught.value)
    assert "install mortice[cuda12] or update the driver to 580 or newer" in str(caught.value)
    assert api.called("cuInit") == []


def test_no_visible_device_is_told_with_the_drivers_own_word(api: FakeDriverApi) -> None:
    api.failures["cuInit"] = 100
    with pytest.raises(
        DeviceError, match=r"cannot start: cuInit: CUDA_ERROR_MADE_UP .*CUDA_VISIBLE_DEVICES.*reference"
    ):
        open_device()


@pytest.mark.parametrize("index", [-1, 1])
def test_an_index_past_the_devices_is_refused(api: FakeDriverApi, index: int) -> None:
    with pytest.raises(DeviceError, match=f"CUDA device {index} does not exist: 1 visible"):
        open_device(index)


def test_a_device_that_is_too_old_is_refused(api: FakeDriverApi) -> None:
    api.answers["cuDeviceGetAttribute"] = (7,)
    with pytest.raises(DeviceError, match=r"Pretence has compute capability 7.7, mortice needs 8.0 or newer"):
        open_device()
    assert api.called("cuDevicePrimaryCtxRetain") == []


def test_a_function_the_driver_lacks_is_an_error_of_ours(api: FakeDriverApi) -> None:
    def lacking(*_: object) -> None:
        raise RuntimeError('Function "cuNew" not found')

    api.cuNew = lacking  # type: ignore[attr-defined]
    with pytest.raises(CudaError, match=r'cuNew: not in this driver .*"cuNew" not found'):
        driver_of(api)("cuNew")


def test_a_failing_call_names_call_code_and_what_to_do(api: FakeDriverApi) -> None:
    api.failures["cuStreamSynchronize"] = 700
    with pytest.raises(
        CudaError, match=r"^cuStreamSynchronize: CUDA_ERROR_MADE_UP \(made up\); .* new process"
    ) as caught:
        Stream(driver_of(api), 7).synchronize()
    assert (caught.value.call, caught.value.code, caught.value.name) == (
        "cuStreamSynchronize",
        700,
        "CUDA_ERROR_MADE_UP",
    )


def test_the_device_describes_itself(device: Device) -> None:
    info = device.info()
    assert (info.kind, info.name, info.total_bytes, info.free_bytes) == ("cuda", "Pretence", 1000, 600)
    assert info.compute_capability == (9, 9)
    assert device.properties.memory_bandwidth == pytest.approx(2 * 9000 * 9 / 8)
    assert device.properties.uuid == "00000000-0000-0000-0000-000000000000"


def test_memory_that_is_not_there_says_needed_and_free(device: Device, api: FakeDriverApi) -> None:
    api.failures["cuMemAlloc"] = 2
    with pytest.raises(
        DoesNotFitError, match=r'Pretence: 70,000 bytes .* 600 of 1,000 are free .*executor = "reference"'
    ):
        device.allocate(70_000)
    assert (device.allocations, device.allocated_bytes) == (0, 0)


def test_allocations_are_counted_and_freed_once(device: Device, api: FakeDriverApi) -> None:
    with device.allocate(100) as first:
        second = device.allocate(200)
        assert (device.allocations, device.allocated_bytes) == (2, 300)
    first.close()
    assert api.called("cuMemFree") == [[first.address]]
    assert device.allocated_bytes == 200
    device.close()
    device.close()
    second.close()
    assert api.called("cuMemFree") == [[first.address], [second.address]]
    assert device.allocations == 2
    assert len(api.called("cuDevicePrimaryCtxRelease")) == 1


def test_closing_the_device_lets_pinned_memory_go_and_releases_the_context_even_after_a_fault(
    device: Device, api: FakeDriverApi
) -> None:
    device.allocate_host(64)
    registered = device.register_host(1 << 30, 4096, read_only=True)
    assert registered.device_address == 1 << 20
    device.allocate(8)
    api.failures["cuMemFree"] = 700
    with pytest.raises(CudaError, match="cuMemFree"):
        device.close()
    assert len(api.called("cuMemFreeHost")) == 1
    assert api.called("cuMemHostUnregister") == [[1 << 30]]
    assert len(api.called("cuDevicePrimaryCtxRelease")) == 1


def test_pinned_memory_the_device_cannot_see_is_given_back(device: Device, api: FakeDriverApi) -> None:
    api.failures["cuMemHostGetDevicePointer"] = 1
    with pytest.raises(CudaError):
        device.allocate_host(64)
    assert len(api.called("cuMemFreeHost")) == 1


def test_a_failing_capture_ends_and_passes_the_error_on(device: Device, api: FakeDriverApi) -> None:
    stream = device.new_stream()
    with pytest.raises(ZeroDivisionError), stream.capture():
        raise ZeroDivisionError
    assert api.called("cuStreamEndCapture") == [[7]]
    assert api.called("cuGraphDestroy") == [[8]]


def test_an_update_of_another_shape_is_false_and_other_failures_are_errors(api: FakeDriverApi) -> None:
    executable, graph = GraphExec(driver_of(api), 1), Graph(driver_of(api), 2)
    assert executable.update(graph)
    api.failures["cuGraphExecUpdate"] = 910
    assert not executable.update(graph)
    api.failures["cuGraphExecUpdate"] = 1
    with pytest.raises(CudaError):
        executable.update(graph)


def test_an_event_that_is_not_ready_is_no_error(device: Device, api: FakeDriverApi) -> None:
    event = device.new_event()
    assert event.done
    api.failures["cuEventQuery"] = 600
    assert not event.done
    api.failures["cuEventQuery"] = 700
    with pytest.raises(CudaError):
        _ = event.done


def test_arrays_that_cannot_be_copied_as_a_block_are_refused(device: Device) -> None:
    stream = device.new_stream()
    with pytest.raises(ValueError, match="not C-contiguous"):
        stream.write(4096, np.zeros((4, 4))[:, :2])
    with pytest.raises(ValueError, match="not writable"):
        stream.read(np.broadcast_to(np.float32(1), ()), 4096)


def test_arguments_without_a_known_width_are_refused(api: FakeDriverApi) -> None:
    function = Function(Driver(cast(ModuleType, api), (12, 0)), 1, "scale")
    with pytest.raises(TypeError, match="scale: argument 1 is 3; give a ctypes value"):
        function.prepare(1, 32, [Pointer(1), 3])
    assert len(function.prepare(1, 32, [Pointer(1), Int(3)]).args) == 2


def test_arguments_of_other_sizes_than_the_kernels_are_refused(api: FakeDriverApi) -> None:
    sizes = [8, 8, 4]

    def parameter(_: object, index: int) -> tuple[int, int | None, int | None]:
        return (0, 8 * index, sizes[index]) if index < len(sizes) else (1, None, None)

    api.cuFuncGetParamInfo = parameter  # type: ignore[attr-defined]
    function = Function(driver_of(api), 1, "scale")
    with pytest.raises(TypeError, match=r"scale: arguments of \[8, 4\] bytes given, .* have \[8, 8, 4\]"):
        function.prepare(1, 32, [Pointer(1), Int(3)])
    assert function.prepare(1, 32, [Pointer(1), Pointer(2), Int(3)]).name == "scale"


def test_dynamic_shared_memory_past_the_default_is_asked_for_once(api: FakeDriverApi) -> None:
    function = Function(driver_of(api), 1, "scale")
    function.set_dynamic_shared(48 * 1024)
    assert api.called("cuFuncSetAttribute") == []
    function.set_dynamic_shared(100_000)
    assert function.blocks_per_sm(128, 90_000) == 2
    assert [arguments[-1] for arguments in api.called("cuFuncSetAttribute")] == [100_000]


def test_what_a_kernel_declares_itself_counts_against_the_default(api: FakeDriverApi) -> None:
    api.answers["cuFuncGetAttribute"] = (192,)  # bytes of static shared memory
    function = Function(driver_of(api), 1, "scale")
    function.set_dynamic_shared(48 * 1024 - 192)
    assert api.called("cuFuncSetAttribute") == []
    assert function.blocks_per_sm(128, 48 * 1024) == 2
    assert [arguments[-1] for arguments in api.called("cuFuncSetAttribute")] == [48 * 1024]
