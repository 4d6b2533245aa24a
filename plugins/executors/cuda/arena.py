"""Memory for weights on the card, and the intake that lays them out there.

Rows arrive as the file has them in a slot of a small ring on the card; ``ops/repack.cu`` writes them to their place.
Copies and kernels are on streams of their own: while a slot is being laid out, the next is being filled.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from itertools import cycle
from pathlib import Path
from threading import Lock

import numpy as np
from attrs import define, field, frozen
from numpy.typing import NDArray

from mortice.core.errors import UnsupportedError
from mortice.core.model.residency import RawRows
from mortice.core.model.weight_plan import ALIGNMENT, PlannedWeight, WeightPlan
from mortice.core.plugin.interfaces import QuantizationType
from mortice.plugins.executors.cuda.build import compile_all
from mortice.plugins.executors.cuda.cache import KernelCache
from mortice.plugins.executors.cuda.device import Device
from mortice.plugins.executors.cuda.errors import CudaError
from mortice.plugins.executors.cuda.flatten import flatten
from mortice.plugins.executors.cuda.layouts import TileGeometry, TileLayout, tile_geometry
from mortice.plugins.executors.cuda.memory import DeviceBuffer, HostBuffer, RegisteredHost
from mortice.plugins.executors.cuda.module import Int, Launch, Pointer
from mortice.plugins.executors.cuda.nvrtc import Source
from mortice.plugins.executors.cuda.sources import OPS
from mortice.plugins.executors.cuda.stream import Event, Stream

__all__ = ["CudaArena", "CudaIntake", "repack_source"]

_SLOTS = 8
_SLOT_BYTES = 8 << 20
"""So many that laying out and copying never wait for each other, and each long enough to hide what queueing costs."""
_THREADS = 256  # of a block, as in ops/repack.cu
_BLOCKS_PER_SM = 8


@define(eq=False)
class CudaArena:
    """One allocation on the card."""

    device: Device
    buffer: DeviceBuffer
    stream: Stream
    kind: str = "cuda"

    @property
    def address(self) -> int:
        return self.buffer.address

    @property
    def nbytes(self) -> int:
        return self.buffer.nbytes

    def host_view(self) -> NDArray[np.uint8] | None:
        return None

    def write(self, offset: int, data: NDArray[np.uint8]) -> None:
        self.device.make_current()
        self.stream.write(self.address + offset, data)

    @contextmanager
    def receive(self, plan: WeightPlan) -> Iterator[CudaIntake]:
        tiled = {index: _Tiled.of(planned) for index, planned in enumerate(plan.weights)}
        weights = {index: weight for index, weight in tiled.items() if weight is not None}
        with ExitStack() as stack:
            yield _open_intake(self, weights, stack)

    def close(self) -> None:
        self.device.make_current()
        self.buffer.close()
        self.stream.close()


@frozen
class _Tiled:
    """A weight that the card lays out: how, and where its tiles start in the arena."""

    type: QuantizationType
    geometry: TileGeometry
    offset: int

    @classmethod
    def of(cls, planned: PlannedWeight) -> _Tiled | None:
        """None for a weight in another layout."""
        if not isinstance(planned.layout, TileLayout):
            return None
        geometry = tile_geometry(planned.tensor.qtype, planned.rows, planned.columns)
        return cls(planned.layout.type, geometry, planned.offset)

    @property
    def tiling(self) -> tuple[str, int, int, int]:
        """Weights equal in this are laid out by the same code."""
        geometry = self.geometry
        return self.type.qtype.name, geometry.tile_rows, geometry.tile_columns, geometry.columns

    @property
    def group_bytes(self) -> int:
        """Bytes of a row group in the file."""
        return self.geometry.tiles_across * self.geometry.used_bytes

    def place(self, row: int) -> int:
        """Where the tiles of the row group that `row` starts lie, counted from the arena's start."""
        geometry = self.geometry
        return self.offset + row // geometry.tile_rows * geometry.tiles_across * geometry.tile_bytes


def repack_source(type_: QuantizationType, geometry: TileGeometry) -> Source:
    """What brings rows of a type into tiles, see ``ops/repack.cu``."""
    assert type_.traits is not None, f"{type_.qtype.name} lies in tiles and has no traits"
    name = type_.qtype.name
    defines: dict[str, str | int] = {
        "WEIGHT": f"Tile<{name},{geometry.tile_rows},{geometry.tile_columns}>",
        "QTYPE": name,
        "COLS": geometry.columns,
    }
    return Source(name="repack", text=_repack_text(type_.traits), defines=defines)


@cache
def _repack_text(traits: Path) -> str:
    """One for each type: reading it takes as long as sending some hundred megabytes."""
    return flatten(OPS / "repack.cu", [OPS], before=[traits])


def _open_intake(arena: CudaArena, weights: Mapping[int, _Tiled], stack: ExitStack) -> CudaIntake:
    """An intake whose parts are given back by `stack`."""
    device = arena.device
    device.make_current()
    launches = _load_repacks(device, weights.values(), stack)
    largest = max((weight.group_bytes for weight in weights.values()), default=0)
    capacity = max(_SLOT_BYTES, -(-largest // ALIGNMENT) * ALIGNMENT)
    ring = device.allocate(_SLOTS * capacity)
    stack.callback(ring.close)
    copying, laying = device.new_stream(), device.new_stream()
    stack.callback(copying.close)
    stack.callback(laying.close)
    slots = []
    for number in range(_SLOTS):
        slot = _Slot(ring.address + number * capacity, device.new_event(blocking=True), device.new_event())
        stack.callback(slot.copied.close)
        stack.callback(slot.free.close)
        slots.append(slot)
    # before anything is given back, also after an error; the first of these is called last
    stack.callback(laying.synchronize)
    stack.callback(copying.synchronize)
    stack.callback(device.make_current)
    return CudaIntake(arena, weights, launches, slots, capacity, copying, laying)


def _load_repacks(
    device: Device, weights: Iterable[_Tiled], stack: ExitStack
) -> dict[tuple[str, int, int, int], Launch]:
    """The kernel of each tiling, ready to launch; unloaded by `stack`."""
    tilings = {weight.tiling: weight for weight in weights}
    sources = {tiling: repack_source(weight.type, weight.geometry) for tiling, weight in tilings.items()}
    build = compile_all(sources.values(), device.arch, cache=KernelCache())
    launches = {}
    for tiling, source in sources.items():
        module = device.load(build.kernels[source].cubin)
        stack.callback(module.close)
        launches[tiling] = module.function("repack").prepare(1, _THREADS, [Pointer(0), Pointer(0), Int(0)])
    return launches


@frozen(eq=False)
class _Slot:
    """Room for rows on their way.

    Attributes:
        address: where.
        copied: the rows are here.
        free: they are laid out; passed from the start.

    """

    address: int
    copied: Event
    free: Event


@frozen(eq=False)
class _Copied:
    """Rows that have left host memory when the event has passed.

    The slot may be used again before somebody waits; the event then passes later, never earlier.
    """

    device: Device
    event: Event

    def wait(self) -> None:
        self.device.make_current()
        self.event.synchronize()


@define(eq=False)
class CudaIntake:
    """Made by `CudaArena.receive`; it fits the protocol `Intake`."""

    _arena: CudaArena
    _weights: Mapping[int, _Tiled]
    _launches: Mapping[tuple[str, int, int, int], Launch]
    _slots: Sequence[_Slot]
    capacity: int
    _copying: Stream
    _laying: Stream
    _ring: Iterator[_Slot] = field(init=False)
    _lock: Lock = field(factory=Lock, init=False)

    def __attrs_post_init__(self) -> None:
        self._ring = cycle(self._slots)

    def row_step(self, index: int) -> int | None:
        weight = self._weights.get(index)
        return None if weight is None else weight.geometry.tile_rows

    def pin(self, nbytes: int) -> HostBuffer:
        return self._arena.device.allocate_host(nbytes)

    def register(self, address: int, nbytes: int, *, read_only: bool) -> RegisteredHost:
        device = self._arena.device
        properties = device.properties
        if not properties.host_register or (read_only and not properties.read_only_host_register):
            memory = "read-only memory, such as a mapped file" if properties.host_register else "memory"
            raise UnsupportedError(
                f'{properties.name} with this driver cannot register {memory}; upload.strategy = "pinned" can be used'
            )
        try:
            return device.register_host(address, nbytes, read_only=read_only)
        except CudaError as error:
            raise UnsupportedError(f"{nbytes:,} bytes of host memory cannot be registered: {error}") from error

    def send(self, rows: Sequence[RawRows]) -> _Copied:
        self._arena.device.make_current()
        with self._lock:
            slot = next(self._ring)
            try:
                self._copying.wait(slot.free)
                places = self._copy(rows, slot)
                self._copying.record(slot.copied)
                self._laying.wait(slot.copied)
                for part, address in zip(rows, places, strict=True):
                    self._lay_out(part, address)
                self._laying.record(slot.free)
            except BaseException:
                with suppress(CudaError):  # the caller is about to free what is being read
                    self._copying.synchronize()
                raise
        return _Copied(self._arena.device, slot.copied)

    def _copy(self, rows: Sequence[RawRows], slot: _Slot) -> list[int]:
        """Queue copies into a slot; where each part lies there."""
        places, at = [], 0
        for part in rows:
            assert part.data.flags.c_contiguous, "rows lie one after the other"
            assert at + part.data.nbytes <= self.capacity, "rows beyond what one send takes"
            places.append(slot.address + at)
            self._copying.copy_from_host(places[-1], part.data.ctypes.data, part.data.nbytes)
            at += -(-part.data.nbytes // ALIGNMENT) * ALIGNMENT
        return places

    def _lay_out(self, part: RawRows, address: int) -> None:
        weight = self._weights[part.index]
        geometry = weight.geometry
        assert part.row_start % geometry.tile_rows == len(part.data) % geometry.tile_rows == 0, "whole row groups"
        launch = self._launches[weight.tiling]
        raw, tiles, groups = launch.args
        raw.value = address
        tiles.value = self._arena.address + weight.place(part.row_start)
        groups.value = len(part.data) // geometry.tile_rows
        chunks = len(part.data) * geometry.columns // 32
        most = _BLOCKS_PER_SM * self._arena.device.properties.sm_count
        launch.resize(min(-(-chunks // _THREADS), most))
        launch(self._laying)

    def finish(self) -> None:
        self._arena.device.make_current()
        self._copying.synchronize()
        self._laying.synchronize()
