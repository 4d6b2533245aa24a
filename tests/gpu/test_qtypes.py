"""The expansion of every type on a card; the conformance suite runs repacking and the traits there."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from mortice.core.testing.random_rows import random_rows
from mortice.plugins.executors.cuda.compile.nvrtc import Source, compile_cubin
from mortice.plugins.executors.cuda.device.device import Device, open_device
from mortice.plugins.executors.cuda.device.memory import DeviceBuffer
from mortice.plugins.executors.cuda.device.module import Module
from mortice.plugins.executors.cuda.device.stream import Stream
from mortice.plugins.executors.cuda.lowering.layouts import tile_geometry
from mortice.plugins.executors.cuda.type_trial import kernel_text, trial_defines, trial_shapes
from tests.plugins.qtypes.blocks import NAMES, TYPES, stored
from tests.support.cuda import needs_gpu, needs_nvrtc

pytestmark = [pytest.mark.gpu, needs_gpu, needs_nvrtc]

Shape = tuple[int, int]
GUARD = 256
POISON = 0xA5


@pytest.fixture(scope="module")
def device() -> Iterator[Device]:
    opened = open_device()
    yield opened
    opened.close()


@pytest.fixture
def stream(device: Device) -> Iterator[Stream]:
    device.make_current()
    made = device.new_stream()
    yield made
    made.close()


def load(device: Device, name: str, shape: Shape, file: str, **macros: str) -> Module:
    text = kernel_text(TYPES[name], file)
    source = Source(name=file, text=text, defines={**trial_defines(TYPES[name], *shape), **macros})
    return device.load(compile_cubin(source, device.arch).cubin)


class Output:
    """Poisoned device memory with a guard behind it."""

    def __init__(self, device: Device, stream: Stream, nbytes: int) -> None:
        self.nbytes, self.stream = nbytes, stream
        self.buffer: DeviceBuffer = device.allocate(nbytes + GUARD)
        stream.fill(self.buffer.address, POISON, nbytes + GUARD)

    def read(self) -> NDArray[np.uint8]:
        """The bytes; the guard must be as it was."""
        host = np.empty(self.nbytes + GUARD, np.uint8)
        self.stream.read(host, self.buffer.address)
        assert (host[self.nbytes :] == POISON).all(), "written past the end"
        return host[: self.nbytes]


def sent(device: Device, stream: Stream, array: NDArray[np.generic]) -> DeviceBuffer:
    buffer = device.allocate(array.nbytes)
    stream.write(buffer.address, np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    return buffer


def each_shape() -> list[tuple[str, Shape]]:
    return [(name, shape) for name in NAMES for shape in trial_shapes(TYPES[name])]


@pytest.mark.parametrize("out_type", ["float", "__half"])
@pytest.mark.parametrize(("name", "shape"), each_shape())
def test_expansion_gives_rows_in_order(name: str, shape: Shape, out_type: str, device: Device, stream: Stream) -> None:
    type_ = TYPES[name]
    rows, columns = shape
    raw = random_rows(type_, rows, columns, np.random.default_rng(3))
    geometry = tile_geometry(type_.qtype, rows, columns)
    kind = np.dtype(np.float32 if out_type == "float" else np.float16)
    # all row groups but the first, as for a range of rows
    first, groups = (1, geometry.row_groups - 1) if geometry.row_groups > 1 else (0, 1)
    skipped = first * geometry.tile_rows
    tiles = sent(device, stream, stored(type_, raw, columns)[first * geometry.tiles_across * geometry.tile_bytes :])
    out = Output(device, stream, kind.itemsize * (rows - skipped) * columns)
    with tiles, out.buffer:
        kernel = load(device, name, shape, "dequantise.cu", OUT=out_type).function("dequantise")
        kernel.prepare(3, 256, [tiles, out.buffer, ctypes.c_int32(groups)])(stream)
        values = out.read().view(kind).reshape(-1, columns)
    with np.errstate(over="ignore"):
        expected = type_.dequantize(raw)[skipped:].astype(kind)
    np.testing.assert_array_max_ulp(values, expected, maxulp=1)
