"""Memory for weights on the card, and the intake that lays them out there.

Rows arrive as the file has them in a little memory on the card; ``ops/repack.cu`` writes them to their place. There are
several lanes, each with such memory and a stream: while the rows of one are being laid out, others are on their way. A
send has a lane to itself, so that threads do not wait for each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path
from queue import SimpleQueue
from threading import Lock

import numpy as np
from attrs import define, field, frozen
from numpy.typing import NDArray

from mortice.core.errors import UnsupportedError
from mortice.core.model.residency import PinnedBuffer, RawRows
from mortice.core.model.weight_plan import ALIGNMENT, PlannedWeight, WeightPlan
from mortice.core.plugin.interfaces import QuantizationType
from mortice.plugins.executors.cuda.compile.build import compile_all
from mortice.plugins.executors.cuda.compile.cache import KernelCache
from mortice.plugins.executors.cuda.compile.flatten import flatten
from mortice.plugins.executors.cuda.compile.nvrtc import Compiled, Source
from mortice.plugins.executors.cuda.device.device import Device
from mortice.plugins.executors.cuda.device.errors import CudaError
from mortice.plugins.executors.cuda.device.memory import DeviceBuffer, RegisteredHost
from mortice.plugins.executors.cuda.device.module import Function, Int, Launch, Module, Pointer
from mortice.plugins.executors.cuda.device.stream import Event, Stream
from mortice.plugins.executors.cuda.lowering.layouts import TileGeometry, TileLayout, tile_geometry
from mortice.plugins.executors.cuda.lowering.sources import OPS
from mortice.plugins.executors.cuda.weights.staging import StagingBuffer, StagingPool

__all__ = ["CudaArena", "CudaIntake", "begin_staging", "repack_source", "repack_sources"]

_LANES = 4
_LANE_BYTES = 16 << 20
"""So many that the link always has something to do, and each long enough to hide what queueing costs."""
_THREADS = 256  # of a block, as in ops/repack.cu
_BLOCKS_PER_SM = 8
_STAGED = 6
"""Lanes whose bytes host memory is made ready for."""


@define(eq=False)
class CudaArena:
    """One allocation on the card."""

    device: Device
    buffer: DeviceBuffer
    stream: Stream
    code: Mapping[Source, Compiled] = field(factory=dict, repr=False)
    """Code for laying weights out that is compiled already."""
    staging: StagingPool | None = field(default=None, repr=False)
    """Pinned memory that was made ready for the first upload, and is let go after it."""
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
        with ExitStack() as stack:
            stack.callback(self._let_staging_go)
            yield _open_intake(self, _tiled(plan), stack)

    def _let_staging_go(self) -> None:
        if self.staging is not None:
            self.staging.close()
            self.staging = None

    def close(self) -> None:
        self.device.make_current()
        self._let_staging_go()
        self.buffer.close()
        self.stream.close()


Tiling = tuple[str, int, int, int]
"""Type, rows and columns of a tile, columns of a row: weights equal in this are laid out by the same code."""


@frozen
class _Tiled:
    """A weight that the card lays out: how, and where its tiles start in the arena."""

    type: QuantizationType
    geometry: TileGeometry
    tiling: Tiling
    tile_rows: int
    group_bytes: int
    """Bytes of a row group in the arena."""
    offset: int

    @classmethod
    def of(cls, planned: PlannedWeight) -> _Tiled | None:
        """None for a weight in another layout."""
        if not isinstance(planned.layout, TileLayout):
            return None
        geometry = tile_geometry(planned.tensor.qtype, planned.rows, planned.columns)
        type_, across = planned.layout.type, geometry.tiles_across
        tiling = type_.qtype.name, geometry.tile_rows, geometry.tile_columns, geometry.columns
        return cls(type_, geometry, tiling, geometry.tile_rows, across * geometry.tile_bytes, planned.offset)

    def place(self, row: int) -> int:
        """Where the tiles of the row group that `row` starts lie, counted from the arena's start."""
        return self.offset + row // self.tile_rows * self.group_bytes


def begin_staging(device: Device, plan: WeightPlan) -> StagingPool | None:
    """Begin to make memory ready for an upload of `plan`; None for a device that cannot pin what is there."""
    if not device.properties.host_register:
        return None
    nbytes = sum(planned.source_bytes for planned in plan.weights if planned.tensor.make is None)
    return StagingPool.begin(device, _LANE_BYTES, min(_STAGED, -(-nbytes // _LANE_BYTES)))


def _tiled(plan: WeightPlan) -> dict[int, _Tiled]:
    """The weights of a plan that the card lays out."""
    tiled = ((index, _Tiled.of(planned)) for index, planned in enumerate(plan.weights))
    return {index: weight for index, weight in tiled if weight is not None}


def repack_sources(plan: WeightPlan) -> set[Source]:
    """All that lays the weights of a plan out."""
    tilings = {weight.tiling: weight for weight in _tiled(plan).values()}
    return {repack_source(weight.type, weight.geometry) for weight in tilings.values()}


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
    kernels = _Kernels(device, {weight.tiling: weight for weight in weights.values()}, arena.code)
    stack.callback(kernels.close)
    largest = max((weight.group_bytes for weight in weights.values()), default=0)
    capacity = max(_LANE_BYTES, -(-largest // ALIGNMENT) * ALIGNMENT)
    memory = device.allocate(_LANES * capacity)
    stack.callback(memory.close)
    lanes = []
    for number in range(_LANES):
        stream = device.new_stream()
        stack.callback(stream.close)
        copied = device.new_event(blocking=True)
        stack.callback(copied.close)
        lanes.append(_Lane(memory.address + number * capacity, stream, copied, kernels))
    intake = CudaIntake(arena, weights, lanes, capacity)
    stack.callback(intake.finish)  # before anything is given back, also after an error
    return intake


@define(eq=False)
class _Kernels:
    """The kernel of each tiling, built or read from the cache while the first rows are on their way."""

    _device: Device
    _tilings: Mapping[Tiling, _Tiled]
    _code: Mapping[Source, Compiled]
    _modules: list[Module] = field(factory=list, init=False)
    _loading: Future[dict[Tiling, Function]] = field(init=False)
    _pool: ThreadPoolExecutor = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="mortice-repack")
        self._loading = self._pool.submit(self._load)

    def _load(self) -> dict[Tiling, Function]:
        sources = {tiling: repack_source(weight.type, weight.geometry) for tiling, weight in self._tilings.items()}
        code = self._code
        if missing := [source for source in sources.values() if source not in code]:
            code = {**code, **compile_all(missing, self._device.arch, cache=KernelCache()).kernels}
        for source in sources.values():
            self._modules.append(self._device.load(code[source].cubin))
        return {tiling: module.function("repack") for tiling, module in zip(sources, self._modules, strict=True)}

    def of(self, tiling: Tiling) -> Function:
        """The kernel, as soon as it is there.

        Raises:
            DeviceError: when it cannot be built or loaded.

        """
        return self._loading.result()[tiling]

    def close(self) -> None:
        """Unload all."""
        self._pool.shutdown()
        self._device.make_current()
        with ExitStack() as stack:
            for module in self._modules:
                stack.callback(module.close)


@define(eq=False)
class _Lane:
    """Room for rows on their way, and the way from there.

    Attributes:
        address: where.
        stream: brings rows here and lays them out, one send after the other.
        copied: the rows are here.

    """

    address: int
    stream: Stream
    copied: Event
    _kernels: _Kernels
    _launches: dict[Tiling, Launch] = field(factory=dict, init=False)

    def launch(self, tiling: Tiling) -> Launch:
        """The kernel of a tiling, with arguments of this lane's own."""
        launch = self._launches.get(tiling)
        if launch is None:
            arguments = Pointer(0), Pointer(0), Int(0)
            launch = self._launches[tiling] = self._kernels.of(tiling).prepare(1, _THREADS, arguments)
        return launch


@frozen(eq=False)
class _Copied:
    """Rows that have left host memory when the event has passed.

    The lane may be used again before somebody waits; the event then passes later, never earlier.
    """

    event: Event

    def wait(self) -> None:
        self.event.synchronize()


@define(eq=False)
class CudaIntake:
    """Made by `CudaArena.receive`; it fits the protocol `Intake`."""

    _arena: CudaArena
    _weights: Mapping[int, _Tiled]
    _lanes: Sequence[_Lane]
    capacity: int
    _free: SimpleQueue[_Lane] = field(factory=SimpleQueue, init=False)
    """Lanes that no thread is queueing on. What they were given before need not be done."""
    _unpinned: list[StagingBuffer] = field(factory=list, init=False)
    """Memory that nothing was sent from yet."""
    _lock: Lock = field(factory=Lock, init=False)

    def __attrs_post_init__(self) -> None:
        for lane in self._lanes:
            self._free.put(lane)

    def row_step(self, index: int) -> int | None:
        weight = self._weights.get(index)
        return None if weight is None else weight.tile_rows

    def pin(self, nbytes: int) -> PinnedBuffer:
        device = self._arena.device
        if not device.properties.host_register:
            return device.allocate_host(nbytes)
        staging = self._arena.staging
        ready = staging.take(nbytes) if staging is not None else None
        if ready is not None:
            return ready
        buffer = StagingBuffer.of(device, nbytes)
        with self._lock:
            self._unpinned.append(buffer)
        return buffer

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
        self._pin_new(rows)
        lane = self._free.get()
        try:
            places = self._copy(rows, lane)
            lane.stream.record(lane.copied)
            for part, address in zip(rows, places, strict=True):
                self._lay_out(part, address, lane)
        except BaseException:
            with suppress(CudaError):  # the caller is about to free what is being read
                lane.stream.synchronize()
            raise
        finally:
            self._free.put(lane)
        return _Copied(lane.copied)

    def _pin_new(self, rows: Sequence[RawRows]) -> None:
        """Pin what `pin` gave, when it was filled for the first time."""
        if not self._unpinned:
            return
        with self._lock:
            for buffer in list(self._unpinned):
                if any(buffer.holds(part.data.ctypes.data) for part in rows):
                    buffer.pin()
                    self._unpinned.remove(buffer)

    def _copy(self, rows: Sequence[RawRows], lane: _Lane) -> list[int]:
        """Queue copies into a lane; where each part lies there. Parts that will lie there as they do here go as one."""
        places: list[int] = []
        runs: list[tuple[int, int, int]] = []  # place, address on the host, bytes
        at = lane.address
        for part in rows:
            assert part.data.flags.c_contiguous, "rows lie one after the other"
            host, nbytes = part.data.ctypes.data, part.data.nbytes
            places.append(at)
            if runs and host - runs[-1][1] == at - runs[-1][0]:  # what lies between is on pages of theirs
                place, host, _ = runs.pop()
                nbytes += at - place
            else:
                place = at
            runs.append((place, host, nbytes))
            at += -(-part.data.nbytes // ALIGNMENT) * ALIGNMENT
        assert at - lane.address <= self.capacity, "rows beyond what one send takes"
        for place, host, nbytes in runs:
            lane.stream.copy_from_host(place, host, nbytes)
        return places

    def _lay_out(self, part: RawRows, address: int, lane: _Lane) -> None:
        weight = self._weights[part.index]
        rows = len(part.data)
        assert part.row_start % weight.tile_rows == rows % weight.tile_rows == 0, "whole row groups"
        launch = lane.launch(weight.tiling)
        raw, tiles, groups = launch.args
        raw.value = address
        tiles.value = self._arena.address + weight.place(part.row_start)
        groups.value = rows // weight.tile_rows
        chunks = rows * weight.geometry.columns // 32
        most = _BLOCKS_PER_SM * self._arena.device.properties.sm_count
        launch.resize(min(-(-chunks // _THREADS), most))
        launch(lane.stream)

    def finish(self) -> None:
        self._arena.device.make_current()
        for lane in self._lanes:
            lane.stream.synchronize()
