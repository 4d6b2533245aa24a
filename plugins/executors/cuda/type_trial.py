"""Tries a quantisation type's header by itself: on the CPU, compiled for any architecture, and on a card."""

from __future__ import annotations

import ctypes
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from attrs import define
from numpy.typing import NDArray

from mortice.core.errors import DeviceError
from mortice.core.plugin.interfaces import QuantizationType, TypeTrial
from mortice.plugins.executors.cuda.compile.flatten import flatten
from mortice.plugins.executors.cuda.compile.nvrtc import Source, compile_cubin
from mortice.plugins.executors.cuda.device.device import Device
from mortice.plugins.executors.cuda.device.memory import DeviceBuffer
from mortice.plugins.executors.cuda.device.module import Int
from mortice.plugins.executors.cuda.device.stream import Stream
from mortice.plugins.executors.cuda.lowering.layouts import CHUNK, TILE_ALIGNMENT, TileLayout, tile_geometry
from mortice.plugins.executors.cuda.lowering.sources import OPS
from mortice.plugins.executors.cuda.on_cpu import compile_for_cpu

__all__ = ["aligned", "compile_type", "kernel_text", "trial_defines", "trial_shapes", "try_on_card", "try_on_cpu"]

_POISON = 0xA5
_GUARD_BYTES = 256

Bytes = NDArray[np.uint8]


def trial_shapes(type_: QuantizationType) -> list[tuple[int, int]]:
    """Rows and columns that give tiles of several rows, several tiles a row, and an odd row count."""
    piece = max(CHUNK, type_.qtype.block_elements)
    return [
        (16, 8704 // piece * piece),
        (12, 3 * piece if piece == CHUNK else piece),
        (5, 512 // piece * piece or piece),
    ]


def trial_defines(type_: QuantizationType, rows: int, columns: int) -> dict[str, str | int]:
    """What the kernels want to know at compile time."""
    geometry = tile_geometry(type_.qtype, rows, columns)
    name = type_.qtype.name
    return {
        "WEIGHT": f"Tile<{name},{geometry.tile_rows},{geometry.tile_columns}>",
        "QTYPE": name,
        "COLS": columns,
        "OUT": "float",
        "MEMORY": "GlobalStream",
    }


def kernel_text(type_: QuantizationType, *names: str) -> str:
    """One source of several files of ``ops`` for a type.

    Raises:
        DeviceError: when the type has no header, or it cannot be put together.

    """
    if type_.traits is None:
        raise DeviceError(f"{type_.qtype.name}: no CUDA traits header")
    files = [OPS / name for name in names]
    return flatten(files[-1], [OPS], before=[type_.traits, *files[:-1]])


def compile_type(type_: QuantizationType, arch: str) -> list[str]:
    """See `TriesTypes.compile_type`: repacking, both expansions and every function of the header."""
    rows, columns = trial_shapes(type_)[0]
    text = kernel_text(type_, "repack.cu", "dequantise.cu", "embed.cu", "probe.cu")
    macros = trial_defines(type_, rows, columns) | {"OUT": "__half"}
    compiled = compile_cubin(Source(name=f"{type_.qtype.name}.cu", text=text, defines=macros), arch)
    missing = sorted({"repack", "dequantise", "embed", "probe"} - set(compiled.functions))
    return [f"{name}: is not in the cubin" for name in missing] + [*compiled.spills, *compiled.warnings]


def try_on_cpu(
    type_: QuantizationType, rows: Bytes, activations: NDArray[np.int8], scales: NDArray[np.float32]
) -> TypeTrial:
    """See `TriesTypes.try_type`."""
    columns = len(activations)
    geometry = tile_geometry(type_.qtype, len(rows), columns)
    raw, integers = _aligned_copy(rows), _aligned_copy(activations)
    stored = _stored(type_, rows, columns)
    repacked = aligned(len(stored))
    values = np.full((len(rows), columns), np.nan, np.float32)
    products = np.full((len(rows), columns // CHUNK), np.nan, np.float32)
    macros = trial_defines(type_, len(rows), columns) | {"MEMORY": "SharedTile"}
    with TemporaryDirectory(prefix="mortice-trial-") as folder:
        library = compile_for_cpu(Path(folder), kernel_text(type_, "repack.cu", "probe.cu"), macros)
        library.repack(_pointer(raw), _pointer(repacked), geometry.row_groups)
        inputs = [_pointer(array) for array in (stored, integers, scales, values, products)]
        library.probe(*inputs, len(rows))
    return TypeTrial(stored=stored, repacked=repacked, values=values, products=_products(products))


def try_on_card(
    device: Device, type_: QuantizationType, rows: Bytes, activations: NDArray[np.int8], scales: NDArray[np.float32]
) -> TypeTrial:
    """See `TriesTypes.try_type`."""
    columns, count = len(activations), len(rows)
    geometry = tile_geometry(type_.qtype, count, columns)
    stored = _stored(type_, rows, columns)
    text = kernel_text(type_, "repack.cu", "probe.cu")
    source = Source(name=f"{type_.qtype.name}.cu", text=text, defines=trial_defines(type_, count, columns))
    module = device.load(compile_cubin(source, device.arch).cubin)
    with ExitStack() as stack:
        stack.callback(module.close)
        stream = device.new_stream()
        stack.callback(stream.close)

        def sent(array: NDArray[np.generic]) -> DeviceBuffer:
            buffer = stack.enter_context(device.allocate(array.nbytes))
            stream.write(buffer.address, np.ascontiguousarray(array).reshape(-1).view(np.uint8))
            return buffer

        outputs = [
            _Output(device, stream, nbytes) for nbytes in (len(stored), 4 * count * columns, count * columns // 8)
        ]
        for output in outputs:
            stack.enter_context(output.buffer)
        repacked, values, products = outputs
        module.function("repack").prepare(7, 256, [sent(rows), repacked.buffer, Int(geometry.row_groups)])(stream)
        inputs = [sent(array) for array in (stored, activations, scales)]
        probe = module.function("probe")
        probe.prepare(5, 64, [*inputs, values.buffer, products.buffer, Int(count)])(stream)
        found = products.read().view(np.float32).reshape(count, -1)
        return TypeTrial(
            stored=stored,
            repacked=repacked.read(),
            values=values.read().view(np.float32).reshape(count, columns),
            products=_products(found),
        )


@define(eq=False)
class _Output:
    """Poisoned device memory with a guard behind it."""

    device: Device
    stream: Stream
    nbytes: int
    buffer: DeviceBuffer = None  # type: ignore[assignment]  # made below

    def __attrs_post_init__(self) -> None:
        self.buffer = self.device.allocate(self.nbytes + _GUARD_BYTES)
        self.stream.fill(self.buffer.address, _POISON, self.nbytes + _GUARD_BYTES)

    def read(self) -> Bytes:
        """The bytes; the guard must be as it was."""
        host = np.empty(self.nbytes + _GUARD_BYTES, np.uint8)
        self.stream.read(host, self.buffer.address)
        if (host[self.nbytes :] != _POISON).any():
            raise DeviceError("device code wrote past the end of its output")
        return host[: self.nbytes]


def _products(found: NDArray[np.float32]) -> NDArray[np.float32] | None:
    return None if np.isnan(found).all() else found


def _stored(type_: QuantizationType, rows: Bytes, columns: int) -> Bytes:
    """The tiles of rows, as NumPy writes them over poisoned bytes."""
    layout = TileLayout(type_)
    tiles = aligned(layout.nbytes(type_.qtype, len(rows), columns))
    layout.store(rows, columns, tiles)
    return tiles


def aligned(nbytes: int) -> Bytes:
    """Poisoned bytes that start at a multiple of 16."""
    space = np.full(nbytes + TILE_ALIGNMENT, _POISON, np.uint8)
    start = -space.ctypes.data % TILE_ALIGNMENT
    return space[start : start + nbytes]


def _aligned_copy(array: NDArray[np.generic]) -> Bytes:
    copy = aligned(array.nbytes)
    copy[...] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return copy


def _pointer(array: NDArray[np.generic]) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)
