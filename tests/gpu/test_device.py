"""The device layer on a real card."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from mortice.core.errors import DoesNotFitError
from mortice.plugins.executors.cuda.compile.nvrtc import Source, compile_cubin
from mortice.plugins.executors.cuda.device.device import Device, open_device
from mortice.plugins.executors.cuda.device.module import Float, Function, Int, Module, Pointer
from mortice.plugins.executors.cuda.device.stream import Stream
from tests.support.cuda import needs_gpu, needs_nvrtc

pytestmark = [pytest.mark.gpu, needs_gpu, needs_nvrtc]

KERNELS = """
struct Pair { int a; float b; };
extern "C" __device__ int counter = 5;
extern "C" __global__ void axpy(float* y, const float* x, float a, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = a * x[i] + y[i];
}
extern "C" __global__ void add_pair(float* y, Pair pair) { y[threadIdx.x] += pair.a + pair.b; }
extern "C" __global__ void big_shared(float* y) {
    extern __shared__ float s[];
    s[20000 + threadIdx.x] = threadIdx.x;
    __syncthreads();
    y[threadIdx.x] = s[20000 + (threadIdx.x + 1) % blockDim.x];
}
extern "C" __global__ void own_and_given(float* y) {
    extern __shared__ float s[];
    __shared__ float own[32];
    own[threadIdx.x] = threadIdx.x;
    s[threadIdx.x] = 100.0f;
    __syncthreads();
    y[threadIdx.x] = s[threadIdx.x] + own[(threadIdx.x + 1) % 32];
}
extern "C" __global__ void spin(float* y, long long cycles) {
    const long long start = clock64();
    while (clock64() - start < cycles) {}
    y[0] += 1.0f;
}
extern "C" __global__ void after(float* y) {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
    y[1] = y[0];
}
"""
N = 1000


class Pair(ctypes.Structure):
    _fields_ = (("a", ctypes.c_int32), ("b", ctypes.c_float))


@pytest.fixture(scope="module")
def device() -> Iterator[Device]:
    with open_device() as device:
        yield device


@pytest.fixture(autouse=True)
def current(device: Device) -> None:
    device.make_current()


@pytest.fixture(scope="module")
def module(device: Device) -> Iterator[Module]:
    module = device.load(compile_cubin(Source(name="k.cu", text=KERNELS), device.arch).cubin)
    yield module
    module.close()


@pytest.fixture
def stream(device: Device) -> Iterator[Stream]:
    stream = device.new_stream()
    yield stream
    stream.close()


def axpy(module: Module, stream: Stream, device: Device, a: float, **kind: Any) -> np.ndarray:
    """3a + 1, computed on the device; `kind` goes to the launch."""
    with device.allocate(4 * N) as x, device.allocate(4 * N) as y:
        stream.write(x.address, np.full(N, 3, np.float32))
        stream.write(y.address, np.ones(N, np.float32))
        module.function("axpy").prepare((4, 1, 1), 256, [y, x, Float(a), Int(N)], **kind)(stream)
        result = np.zeros(N, np.float32)
        stream.read(result, y.address)
    return result


def test_a_kernel_computes_on_what_was_written(module: Module, stream: Stream, device: Device) -> None:
    np.testing.assert_array_equal(axpy(module, stream, device, 2.0), np.full(N, 7, np.float32))
    assert device.allocated_bytes == 0


def test_a_struct_is_an_argument(module: Module, stream: Stream, device: Device) -> None:
    with device.allocate(4 * 32) as y:
        stream.fill(y.address, 0, y.nbytes)
        module.function("add_pair").prepare(1, 32, [y, Pair(2, 0.5)])(stream)
        result = np.empty(32, np.float32)
        stream.read(result, y.address)
    np.testing.assert_array_equal(result, np.full(32, 2.5, np.float32))


def test_wrong_arguments_are_refused_before_the_launch(module: Module) -> None:
    with pytest.raises(TypeError, match=r"axpy: arguments of \[8, 8, 4\] bytes given, .* have \[8, 8, 4, 4\]"):
        module.function("axpy").prepare(1, 32, [Pointer(0), Pointer(0), Float(1)])


def test_a_changed_argument_is_used_by_the_next_launch(module: Module, stream: Stream, device: Device) -> None:
    with device.allocate(4 * 64) as y:
        stream.fill(y.address, 0, y.nbytes)
        pair = Pair(1, 0)
        launch = module.function("add_pair").prepare(1, 32, [y, pair])
        launch(stream)
        pair.a = 10
        launch(stream)
        result = np.empty(64, np.float32)
        stream.read(result, y.address)
    np.testing.assert_array_equal(result, [11] * 32 + [0] * 32)


def test_more_shared_memory_than_the_default_is_given(module: Module, stream: Stream, device: Device) -> None:
    nbytes = 4 * (20000 + 128)
    with device.allocate(4 * 128) as y:
        function = module.function("big_shared")
        assert function.blocks_per_sm(128, nbytes) >= 1
        function.prepare(1, 128, [y], dynamic_shared=nbytes)(stream)
        result = np.empty(128, np.float32)
        stream.read(result, y.address)
    np.testing.assert_array_equal(result, np.roll(np.arange(128), -1))


def test_the_default_of_shared_memory_beside_what_a_kernel_has_itself_is_given(
    module: Module, stream: Stream, device: Device
) -> None:
    with device.allocate(4 * 32) as y:
        module.function("own_and_given").prepare(1, 32, [y], dynamic_shared=48 << 10)(stream)
        result = np.empty(32, np.float32)
        stream.read(result, y.address)
    np.testing.assert_array_equal(result, 100 + np.roll(np.arange(32), -1))


def test_a_variable_of_the_module_is_found(module: Module, stream: Stream) -> None:
    address, nbytes = module.symbol("counter")
    value = np.zeros(1, np.int32)
    assert nbytes == 4
    stream.read(value, address)
    assert value[0] == 5
    assert module.function("axpy").attribute("NUM_REGS") > 0


def test_copies_and_fills_stay_in_order_on_their_stream(stream: Stream, device: Device) -> None:
    with device.allocate(64) as one, device.allocate(64) as two, device.allocate_host(64) as host:
        stream.fill32(one.address, 0x01020304, 16)
        stream.copy(two.address, one.address, 32)
        stream.fill(two.address + 32, 0xFF, 32)
        stream.copy_to_host(host.address, two.address, 64)
        stream.synchronize()
        np.testing.assert_array_equal(host.array, np.array([4, 3, 2, 1] * 8 + [255] * 32, np.uint8))
        host.array[:] = np.arange(64)
        stream.copy_from_host(one.address, host.address, 64)
        back = np.zeros(64, np.uint8)
        stream.read(back, one.address)
        np.testing.assert_array_equal(back, np.arange(64))


def page_aligned(nbytes: int) -> np.ndarray:
    raw = np.zeros(nbytes + 4096, np.uint8)
    start = -raw.ctypes.data % 4096
    return raw[start : start + nbytes]


def test_memory_of_others_can_be_pinned_and_is_seen_by_kernels(module: Module, stream: Stream, device: Device) -> None:
    if not device.properties.host_register:
        pytest.skip("this device cannot pin memory of others")
    host = page_aligned(1 << 16)
    values = host.view(np.float32)
    values[:N] = 5
    with device.register_host(host.ctypes.data, host.nbytes) as registered, device.allocate(4 * N) as y:
        stream.fill(y.address, 0, y.nbytes)
        module.function("axpy").prepare(4, 256, [y, Pointer(registered.device_address), Float(1), Int(N)])(stream)
        result = np.zeros(N, np.float32)
        stream.read(result, y.address)
    np.testing.assert_array_equal(result, np.full(N, 5, np.float32))


def test_a_graph_replays_what_was_captured_and_allocates_nothing(
    module: Module, stream: Stream, device: Device
) -> None:
    with device.allocate(4 * N) as x, device.allocate(4 * N) as y:
        stream.write(x.address, np.ones(N, np.float32))
        stream.write(y.address, np.zeros(N, np.float32))
        launch = module.function("axpy").prepare(4, 256, [y, x, Float(2), Int(N)])
        with stream.capture() as graph:
            launch(stream)
            launch(stream)
        assert graph.node_count == 2
        result = np.empty(N, np.float32)
        stream.read(result, y.address)
        assert not result.any(), "capturing runs nothing"
        executable = graph.instantiate()
        executable.upload(stream)
        before = device.allocations
        for _ in range(5):
            executable.launch(stream)
        stream.read(result, y.address)
        np.testing.assert_array_equal(result, np.full(N, 20, np.float32))
        assert device.allocations == before

        launch.args[2].value = 3
        with stream.capture() as other:
            launch(stream)
            launch(stream)
        assert executable.update(other)
        executable.launch(stream)
        stream.read(result, y.address)
        np.testing.assert_array_equal(result, np.full(N, 26, np.float32))
        with stream.capture() as longer:
            for _ in range(3):
                launch(stream)
        assert not executable.update(longer)
        for thing in (executable, graph, other, longer):
            thing.close()


def test_an_error_during_capture_leaves_the_stream_usable(module: Module, stream: Stream, device: Device) -> None:
    with pytest.raises(ZeroDivisionError), stream.capture():
        raise ZeroDivisionError
    np.testing.assert_array_equal(axpy(module, stream, device, 1.0), np.full(N, 4, np.float32))


def test_events_order_streams_and_measure_time(module: Module, device: Device) -> None:
    one, two = device.new_stream(), device.new_stream(priority=-1)
    start, end = device.new_event(timing=True), device.new_event(timing=True)
    spin: Function = module.function("spin")
    with device.allocate(8) as y:
        one.fill(y.address, 0, 8)
        one.synchronize()
        start.record(one)
        spin.prepare(1, 1, [y, ctypes.c_int64(20_000_000)])(one)
        one.record(end)
        two.wait(end)
        spin.prepare(1, 1, [y, ctypes.c_int64(1)])(two)
        two.synchronize()
        assert end.done
        assert one.idle
        assert end.milliseconds_since(start) > 1.0, "20 million cycles take more than 1 ms on any clock"
        result = np.zeros(2, np.float32)
        two.read(result, y.address)
        assert result[0] == 2
    for thing in (one, two, start, end):
        thing.close()


def test_a_dependent_launch_waits_for_what_it_depends_on(module: Module, stream: Stream, device: Device) -> None:
    if device.properties.compute_capability < (9, 0):
        pytest.skip("programmatic dependent launch begins with compute capability 9.0")
    with device.allocate(8) as y:
        stream.fill(y.address, 0, 8)
        module.function("spin").prepare(1, 1, [y, ctypes.c_int64(1_000_000)])(stream)
        module.function("after").prepare(1, 1, [y], pdl=True)(stream)
        result = np.zeros(2, np.float32)
        stream.read(result, y.address)
    np.testing.assert_array_equal(result, [1, 1])


def test_cooperative_and_clustered_launches_run(module: Module, stream: Stream, device: Device) -> None:
    kinds: list[dict[str, Any]] = [{"cooperative": True}]
    if device.properties.compute_capability >= (9, 0):
        kinds.append({"cluster": 2})
    for kind in kinds:
        np.testing.assert_array_equal(axpy(module, stream, device, 2.0, **kind), np.full(N, 7, np.float32))


def test_a_second_thread_can_use_the_device(module: Module, device: Device) -> None:
    results: list[np.ndarray] = []

    def work() -> None:
        device.make_current()
        stream = device.new_stream()
        results.append(axpy(module, stream, device, 4.0))
        stream.close()

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 2
    for result in results:
        np.testing.assert_array_equal(result, np.full(N, 13, np.float32))


def test_more_memory_than_the_card_has_is_refused(device: Device) -> None:
    total = device.memory()[1]
    with pytest.raises(DoesNotFitError, match=f"{4 * total:,} bytes of device memory needed"):
        device.allocate(4 * total)


def test_the_device_describes_itself(device: Device) -> None:
    properties, info = device.properties, device.info()
    assert info.compute_capability is not None
    assert info.compute_capability >= (8, 0)
    assert 0 < info.free_bytes <= info.total_bytes
    assert properties.sm_count > 0
    assert properties.shared_bytes_per_block >= 99 * 1024
    assert device.arch.startswith(f"sm_{info.compute_capability[0]}")
