"""Checks of an upload strategy, on a fake device: every byte arrives, nothing moves twice, nothing is left behind.

::

    class TestDirectStorage(UploadSuite):
        strategy = DirectStorageUpload()
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from attrs import define, evolve

from mortice.arch_contracts.schema import Contract
from mortice.core.errors import DeviceError, PluginError, UnsupportedError
from mortice.core.model.program import build_program
from mortice.core.model.residency import ResidentWeights
from mortice.core.model.types import ModelFile
from mortice.core.model.validation import validate
from mortice.core.model.weight_plan import ALIGNMENT, PlannedWeight, WeightPlan, plan_weights
from mortice.core.plugin.conformance import upload_faults
from mortice.core.plugin.events import Event, UploadProgress
from mortice.core.plugin.interfaces import UploadStrategy
from mortice.core.plugin.registry import Registry
from mortice.core.stages import open_file
from mortice.core.testing.events import EventRecorder
from mortice.core.testing.fake_device import FakeArena, FakeHostArena, OnCall, fake_kernels, stored_by_the_host
from mortice.core.testing.registries import registry_with
from mortice.core.testing.suite import Suite, each, fail, require, skip
from mortice.core.testing.tiny_models import write_tiny_model

__all__ = ["UploadSuite"]

_QTYPES = {"default": "Q8_0", "attn_v": "F16", "ffn_down": "Q4_0"}
_SIZES = {"hidden_size": 64, "ffn_size": 512, "num_layers": 3}
_CAPACITY = 8 * 1024
_SETTLE_SECONDS = 0.5
Arena = FakeArena | FakeHostArena


@cache
def _registry() -> Registry:
    return registry_with()


@cache
def _llama() -> Contract:
    return _registry().contracts["llama"].value


@cache
def _model() -> bytes:
    """A GGUF file of some types, 400 kB."""
    with TemporaryDirectory() as folder:
        path = write_tiny_model(Path(folder) / "model.gguf", _llama(), qtypes=_QTYPES, sizes=_SIZES, tied=False)
        return path.read_bytes()


@define(eq=False)
class _Setup:
    """A plan on a fake device, and what the strategy did there."""

    file: ModelFile
    plan: WeightPlan
    arena: Arena
    resident: ResidentWeights
    stores: Counter[str]


class UploadSuite(Suite):
    """Holds a strategy against a fake arena of the kind it fills.

    Attributes:
        strategy: what is checked.

    """

    strategy: UploadStrategy

    @cached_property
    def device_kind(self) -> str:
        """``cpu`` or ``cuda``."""
        return getattr(self.strategy, "device_kind", "cpu")

    @contextmanager
    def uploading(self, folder: Path, on_call: OnCall | None = None) -> Iterator[_Setup]:
        """A model in a mapped file, nothing of it resident."""
        path = folder / f"model-{len(list(folder.iterdir()))}.gguf"
        path.write_bytes(_model())
        stores: Counter[str] = Counter()

        def on_store() -> None:
            before = stores["store"]
            stores["store"] += 1
            if on_call is not None:
                on_call("store", before)

        with open_file(_registry(), path) as file:
            model = validate(file, _llama()).model()
            plan = plan_weights(model, build_program(model), fake_kernels(["Q8_0", "F16", "Q4_0", "F32"], on_store))
            arena: Arena = (
                FakeArena(plan.arena_bytes, _CAPACITY, on_call)
                if self.device_kind == "cuda"
                else FakeHostArena(plan.arena_bytes, on_call)
            )
            yield _Setup(file, plan, arena, ResidentWeights(plan=plan, arena=arena), stores)

    # what it is -------------------------------------------------------------------------------------------------

    def test_it_is_what_the_core_will_call(self) -> None:
        """Name, kind of device and method are there."""
        faults = list(upload_faults(self.strategy))
        require(not faults, "; ".join(faults))

    # bytes ------------------------------------------------------------------------------------------------------

    def test_every_byte_arrives(self, tmp_path: Path) -> None:
        """The arena is what `Layout.store` makes of the file, and every weight is marked."""
        with self.uploading(tmp_path) as it:
            written = self.strategy.upload(it.resident, EventRecorder())
            _expect_arena(it, it.plan)
            marked = {index for index, _ in it.resident.missing()}
            require(not marked, f"{len(marked)} weights are not marked as resident")
            total = sum(planned.nbytes for planned in it.plan.weights)
            require(written == total, f"upload returned {written!r}, wanted the {total} bytes it wrote")
            _expect_given_back(it)

    def test_a_second_upload_moves_nothing(self, tmp_path: Path) -> None:
        """It is idempotent: what is resident stays where it is, the device is left alone, nobody is told anything."""
        with self.uploading(tmp_path) as it:
            self.strategy.upload(it.resident, EventRecorder())
            it.stores.clear()
            it.arena.memory[:] = 0xEE
            told = EventRecorder()
            written = self.strategy.upload(it.resident, told)
            require(written == 0, f"the second upload returned {written!r}, wanted 0")
            require(not it.stores and (it.arena.memory == 0xEE).all(), "the second upload wrote to the device")
            require(not told.events, f"the second upload told {len(told.events)} events")

    def test_only_what_is_missing_is_uploaded(self, tmp_path: Path) -> None:
        """Weights that are marked already are not touched."""
        with self.uploading(tmp_path) as it:
            few = it.plan.weights[:4]
            for index in range(len(few), len(it.plan.weights)):
                it.resident.mark(index)
            written = self.strategy.upload(it.resident, EventRecorder())
            wanted = sum(planned.nbytes for planned in few)
            require(written == wanted, f"upload of {len(few)} weights returned {written!r}, wanted {wanted}")
            _expect_arena(it, evolve(it.plan, weights=few))

    def test_parts_of_a_fused_weight_find_their_places(self, tmp_path: Path) -> None:
        """A weight may be some rows of a tensor."""
        with self.uploading(tmp_path) as it:
            whole = max(it.plan.weights, key=lambda planned: planned.rows)
            third = whole.rows // 4
            parts: list[PlannedWeight] = []
            offset = 0
            for start, stop in ((0, third), (third, 2 * third), (2 * third, whole.rows)):
                weight = evolve(whole.weight, row_start=start, row_stop=stop)
                parts.append(PlannedWeight.of(weight, whole.tensor, whole.layout, offset))
                offset += -(-parts[-1].nbytes // ALIGNMENT) * ALIGNMENT
            plan = evolve(it.plan, weights=tuple(parts))
            it.resident = ResidentWeights(plan=plan, arena=it.arena)
            self.strategy.upload(it.resident, EventRecorder())
            _expect_arena(it, plan)

    # progress ---------------------------------------------------------------------------------------------------

    def test_progress_counts_the_bytes_of_the_file(self, tmp_path: Path) -> None:
        """On the calling thread, growing, and the last event says that all is done."""
        with self.uploading(tmp_path) as it:
            told = EventRecorder()
            self.strategy.upload(it.resident, told)
            progress = told.of(UploadProgress)
            require(progress, "no UploadProgress was told")
            require(
                told.threads == {threading.current_thread()}, "progress is told on another thread than the caller's"
            )
            total = it.plan.file_bytes
            totals = {event.total_bytes for event in progress}
            require(totals == {total}, f"total_bytes is {sorted(totals)}, wanted {total}, the bytes of the file")
            done = [event.done_bytes for event in progress]
            require(done == sorted(done) and done[-1] == total, f"done_bytes ends at {done[-1]} of {total}, or shrinks")
            names = {event.strategy for event in progress}
            require(
                names == {self.strategy.name}, f"events name strategy {sorted(names)}, wanted {self.strategy.name!r}"
            )

    # failures ---------------------------------------------------------------------------------------------------

    @each("point", lambda suite: _points(suite.device_kind))
    def test_a_failure_passes_on_and_leaves_nothing_behind(self, point: str, tmp_path: Path) -> None:
        """Whatever the device raises is what the caller gets, and all that was held is given back."""
        name, _, place = point.partition(" ")
        count = self._count(tmp_path, name)
        at = 0 if place == "first" else count - 1
        if not count or (place == "last" and at == 0):
            skip(f"the strategy calls {name} {'once' if count else 'never'}")

        broke: list[str] = []

        def on_call(called: str, before: int) -> None:
            if (called, before) == (name, at):
                broke.append(called)
                raise DeviceError("it broke")

        with self.uploading(tmp_path, on_call) as it:
            error = _raised(lambda: self.strategy.upload(it.resident, EventRecorder()))
            if not broke:
                skip(f"the strategy calls {name} now more often, now less")
            if not isinstance(error, DeviceError | PluginError) or "it broke" not in str(error):
                fail(f"{name} raised DeviceError('it broke'), upload {_did(error)}")
            require(list(it.resident.missing()), "every weight is marked as resident though the upload failed")
            _expect_given_back(it)

    def test_an_observer_that_raises_ends_the_upload(self, tmp_path: Path) -> None:
        """What an observer raises is passed on."""
        with self.uploading(tmp_path) as it:
            error = _raised(lambda: self.strategy.upload(it.resident, _raise_seen))
            if not isinstance(error, PluginError) or "seen enough" not in str(error):
                fail(f"the observer raised PluginError('seen enough'), upload {_did(error)}")
            _expect_given_back(it)

    def test_ctrl_c_ends_the_upload(self, tmp_path: Path) -> None:
        """An interrupt at work leaves nothing behind, and the file can be closed."""
        if threading.current_thread() is not threading.main_thread():
            skip("signals reach the main thread only")
        name = "send" if self.device_kind == "cuda" and self._count(tmp_path, "send") else "store"

        def on_call(called: str, before: int) -> None:
            if (called, before) == (name, 1):
                os.kill(os.getpid(), signal.SIGINT)

        with _default_interrupt(), self.uploading(tmp_path, on_call) as it:
            error = _raised(lambda: self.strategy.upload(it.resident, EventRecorder()))
            require(isinstance(error, KeyboardInterrupt), f"Ctrl-C was pressed, upload {_did(error)}")
            _expect_given_back(it)

    def test_memory_it_cannot_fill_is_refused(self, tmp_path: Path) -> None:
        """An arena that takes no rows is refused, not written to by chance."""
        if self.device_kind != "cuda":
            skip("host memory takes everything")
        with self.uploading(tmp_path) as it:
            arena = FakeHostArena(it.plan.arena_bytes)
            resident = ResidentWeights(plan=it.plan, arena=arena)
            error = _raised(lambda: self.strategy.upload(resident, EventRecorder()))
            require(
                isinstance(error, UnsupportedError),
                f"an arena without `receive`: upload {_did(error)}, wanted UnsupportedError",
            )

    def _count(self, folder: Path, name: str) -> int:
        """How often an undisturbed upload calls `name`."""
        with self.uploading(folder) as it:
            self.strategy.upload(it.resident, EventRecorder())
            return (it.arena.calls + it.stores)[name]


def _points(device_kind: str) -> list[str]:
    calls = ["receive", "write", "pin", "register", "send", "wait", "finish"] if device_kind == "cuda" else ["store"]
    return [f"{name} {place}" for name in calls for place in ("first", "last")]


def _expect_arena(it: _Setup, plan: WeightPlan) -> None:
    wanted = stored_by_the_host(plan)
    wrong = np.flatnonzero(it.arena.memory[: len(wanted)] != wanted)
    if not len(wrong):
        return
    place = int(wrong[0])
    within = next((planned for planned in plan.weights if 0 <= place - planned.offset < planned.nbytes), None)
    if within is None:
        fail(f"arena byte {place}, which belongs to no weight, was written")
    fail(f"{within.tensor.name}: byte {place - within.offset} of {within.nbytes} in the arena is wrong")


def _expect_given_back(it: _Setup) -> None:
    """Nothing pinned, no intake open, no misuse, and no thread at work any more."""
    arena = it.arena
    if not isinstance(arena, FakeArena):
        return
    deadline = time.monotonic() + _SETTLE_SECONDS
    while arena.held and time.monotonic() < deadline:  # a thread may be on its way out
        time.sleep(0.001)
    require(not arena.misuses, "; ".join(arena.misuses))
    require(not arena.held, f"{len(arena.held)} pieces of pinned memory were not given back")
    require(not arena.intakes_open, "an intake was left open")
    calls = arena.calls.total()
    time.sleep(0.005)
    require(arena.calls.total() == calls, "a thread of the strategy goes on after upload has ended")


def _raised(action: Callable[[], Any]) -> BaseException | None:
    try:
        action()
    except BaseException as error:  # noqa: BLE001 (an interrupt is what some checks wait for)
        return error
    return None


def _did(error: BaseException | None) -> str:
    return "returned" if error is None else f"raised {type(error).__name__}: {error}"


def _raise_seen(event: Event) -> None:
    raise PluginError(f"seen enough after {event}")


@contextmanager
def _default_interrupt() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
