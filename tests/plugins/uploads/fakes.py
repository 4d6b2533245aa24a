"""A device of ordinary memory that takes rows as slowly as a real one: a buffer is read when it is waited for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from mortice.core.model.program import build_program
from mortice.core.model.residency import RawRows, ResidentWeights
from mortice.core.model.types import LoadOptions, ModelFile
from mortice.core.model.validation import validate
from mortice.core.model.weight_plan import WeightPlan, plan_weights
from mortice.core.testing.tiny_models import write_tiny_model
from mortice.plugins.executors.cuda.executor import CudaExecutor
from mortice.plugins.executors.cuda.layouts import TileLayout, tile_geometry
from mortice.plugins.loaders.gguf.loader import open_gguf
from mortice.plugins.qtypes import mortice_qtypes
from tests.support.tiny import CONTRACTS

__all__ = ["FakeArena", "FakeIntake", "Held", "open_model", "plan_for_cuda", "resident_of", "stored_by_the_host"]

QTYPES = {"default": "Q4_K", "attn_v": "Q6_K", "ffn_down": "Q8_0", "output": "F16"}
SIZES = {"hidden_size": 256, "ffn_size": 1024, "num_layers": 3}

OnCall = Callable[[str, int], None]
"""Told before each call of the device, with its name and how many there were before; it may raise."""


def open_model(folder: Path) -> ModelFile:
    """A llama of several types in a file, some 2 MB."""
    path = write_tiny_model(folder / "model.gguf", CONTRACTS["llama"], qtypes=QTYPES, sizes=SIZES, tied=False)
    file = open_gguf(path, LoadOptions())
    assert file is not None
    return file


def plan_for_cuda(file: ModelFile) -> WeightPlan:
    """The plan that the CUDA executor's layouts give; no card is needed for it."""
    model = validate(file, CONTRACTS["llama"]).model()
    info = None
    kernels = CudaExecutor().kernels(info, list(mortice_qtypes()))  # type: ignore[arg-type]
    return plan_weights(model, build_program(model), kernels)


def stored_by_the_host(plan: WeightPlan) -> NDArray[np.uint8]:
    """The arena as `Layout.store` fills it; zeros between the weights."""
    arena = np.zeros(plan.arena_bytes, np.uint8)
    for planned in plan.weights:
        planned.layout.store(planned.source(), planned.columns, arena[planned.offset : planned.offset + planned.nbytes])
    return arena


class Held:
    """Something that has to be closed, after the device has read it."""

    def __init__(self, arena: FakeArena, nbytes: int, address: int = 0) -> None:
        self.arena, self.closed = arena, False
        self.array = np.zeros(nbytes if not address else 0, np.uint8)
        self.start = address or self.array.ctypes.data
        self.stop = self.start + nbytes
        with arena.lock:
            arena.held.append(self)

    def close(self) -> None:
        assert not any(self.has(rows) for sent in self.arena.under_way for rows in sent.rows), "still being read"
        self.closed = True
        self.arena.held.remove(self)

    def has(self, rows: RawRows) -> bool:
        start = rows.data.ctypes.data
        return self.start <= start and start + rows.data.nbytes <= self.stop


class _Sent:
    def __init__(self, intake: FakeIntake, rows: Sequence[RawRows]) -> None:
        self.intake, self.rows = intake, rows

    def wait(self) -> None:
        with self.intake.arena.lock:
            if self in self.intake.arena.under_way:
                self.intake.arena.under_way.remove(self)
                for part in self.rows:
                    weight = self.intake.raw[part.index]
                    weight[part.row_start : part.row_start + len(part.data)] = part.data
                    self.intake.times[part.index][part.row_start : part.row_start + len(part.data)] += 1
        self.intake.arena.called("wait")


class FakeIntake:
    """Keeps rows until all are there, then lets the host lay them out."""

    def __init__(self, arena: FakeArena, plan: WeightPlan, capacity: int) -> None:
        self.arena, self.plan, self.capacity = arena, plan, capacity
        self.raw = [np.zeros(planned.source().shape, np.uint8) for planned in plan.weights]
        self.times = [np.zeros(len(rows), np.int64) for rows in self.raw]

    def row_step(self, index: int) -> int | None:
        planned = self.plan.weights[index]
        if not isinstance(planned.layout, TileLayout):
            return None
        return tile_geometry(planned.tensor.qtype, planned.rows, planned.columns).tile_rows

    def pin(self, nbytes: int) -> Held:
        self.arena.called("pin")
        return Held(self.arena, nbytes)

    def register(self, address: int, nbytes: int, *, read_only: bool) -> Held:
        self.arena.called("register")
        assert address % 4096 == nbytes % 4096 == 0, "whole pages"
        assert read_only, "a file is mapped for reading"
        with self.arena.lock:
            overlapping = [held for held in self.arena.held if address < held.stop and held.start < address + nbytes]
            assert not overlapping, "a page is registered twice"
        return Held(self.arena, nbytes, address)

    def send(self, rows: Sequence[RawRows]) -> _Sent:
        self.arena.called("send")
        assert sum(-(-part.data.nbytes // 256) * 256 for part in rows) <= self.capacity
        sent = _Sent(self, list(rows))
        for part in rows:
            step = self.row_step(part.index)
            assert step is not None
            assert part.row_start % step == len(part.data) % step == 0, "whole row groups"
            with self.arena.lock:
                inside = [held for held in self.arena.held if held.has(part)]
            self.arena.sources["pinned" if inside else "ordinary"] += part.data.nbytes
            across = [held for held in self.arena.held if not held.has(part) and _touch(held, part)]
            assert not across, "a copy reaches over the end of a registration"
        with self.arena.lock:
            self.arena.under_way.append(sent)
        return sent

    def finish(self) -> None:
        self.arena.called("finish")
        while self.arena.under_way:
            self.arena.under_way[0].wait()
        for index, planned in enumerate(self.plan.weights):
            if self.row_step(index) is not None and self.times[index].any():
                assert self.times[index].all(), f"{planned.tensor.name} is not complete"
                out = self.arena.memory[planned.offset : planned.offset + planned.nbytes]
                planned.layout.store(self.raw[index], planned.columns, out)


def _touch(held: Held, part: RawRows) -> bool:
    start = part.data.ctypes.data
    return start < held.stop and held.start < start + part.data.nbytes


class FakeArena:
    """Fits `DeviceArena`. `calls` counts; `held` and `under_way` are empty when all was given back."""

    kind = "cuda"
    address = 1 << 40

    def __init__(self, nbytes: int, capacity: int = 64 * 1024, on_call: OnCall | None = None) -> None:
        self.nbytes, self.capacity, self.on_call = nbytes, capacity, on_call
        self.memory = np.zeros(nbytes, np.uint8)
        self.calls: Counter[str] = Counter()
        self.sources: Counter[str] = Counter()
        self.held: list[Held] = []
        self.under_way: list[_Sent] = []
        self.intakes_open = 0
        self.lock = Lock()

    def called(self, name: str) -> None:
        with self.lock:
            before = self.calls[name]
            self.calls[name] += 1
        if self.on_call is not None:
            self.on_call(name, before)

    def host_view(self) -> None:
        return None

    def write(self, offset: int, data: NDArray[np.uint8]) -> None:
        self.called("write")
        self.memory[offset : offset + len(data)] = data

    @contextmanager
    def receive(self, plan: WeightPlan) -> Iterator[FakeIntake]:
        self.called("receive")
        self.intakes_open += 1
        try:
            yield FakeIntake(self, plan, self.capacity)
        finally:
            self.intakes_open -= 1
            assert not self.held, "given back before the intake is closed"

    def close(self) -> None:
        self.called("close")


def resident_of(plan: WeightPlan, on_call: OnCall | None = None, capacity: int = 64 * 1024) -> ResidentWeights:
    """Nothing resident yet, on a fake device."""
    return ResidentWeights(plan=plan, arena=FakeArena(plan.arena_bytes, capacity, on_call))
