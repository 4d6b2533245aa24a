"""How fast this very card reads its memory, measured."""

from __future__ import annotations

import ctypes

from mortice.plugins.executors.cuda.compile.build import compile_all
from mortice.plugins.executors.cuda.compile.cache import KernelCache
from mortice.plugins.executors.cuda.device.device import Device
from mortice.plugins.executors.cuda.device.stream import Stream
from mortice.plugins.executors.cuda.lowering.sources import KernelSources

__all__ = ["measure_read_bandwidth"]

_MOST_BYTES = 8 << 30
_REPEATS = 5


def measure_read_bandwidth(device: Device, stream: Stream) -> float:
    """Bytes per second of a kernel that reads a large buffer once; the best of a few runs."""
    source = KernelSources({}).read()
    module = device.load(compile_all([source], device.arch, cache=KernelCache()).kernels[source].cubin)
    free, _ = device.memory()
    nbytes = min(_MOST_BYTES, free // 2) // 4096 * 4096
    start, end = device.new_event(timing=True), device.new_event(timing=True)
    try:
        with device.allocate(nbytes) as data:
            stream.fill(data.address, 0x5A, nbytes)
            args = (ctypes.c_uint64(data.address), ctypes.c_uint64(nbytes // 16), ctypes.c_uint64(data.address))
            launch = module.function("read_all").prepare(device.properties.sm_count * 4, 512, args)
            times = []
            for _ in range(_REPEATS):
                start.record(stream)
                launch(stream)
                end.record(stream)
                end.synchronize()
                times.append(end.milliseconds_since(start))
            return nbytes / (min(times) / 1000)
    finally:
        start.close()
        end.close()
        module.close()
