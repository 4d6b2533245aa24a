"""The upload suite: the built-in strategies pass, and strategies that do one thing wrong are found out."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from mortice.core.errors import DeviceError
from mortice.core.model.residency import DeviceArena, RawRows, ResidentWeights, batches
from mortice.core.plugin.events import UploadProgress
from mortice.core.plugin.interfaces import Emit, UploadStrategy
from mortice.core.testing.upload_suite import UploadSuite
from mortice.plugins.uploads.device import mortice_upload_strategies
from mortice.plugins.uploads.host import HostUpload
from tests.kit.running import failures, run


class Plain:
    """Right: sends from ordinary memory, one weight after the other."""

    name = "plain"
    device_kind = "cuda"

    def upload(self, resident: ResidentWeights, emit: Emit) -> int:
        missing, arena = self.missing(resident), resident.arena
        if not missing:
            return 0
        if not isinstance(arena, DeviceArena):
            from mortice.core.errors import UnsupportedError

            raise UnsupportedError(f"{type(arena).__name__} takes no raw rows")
        total = sum(planned.source_bytes for _, planned in missing)
        done = 0
        with arena.receive(resident.plan) as intake:
            for index, planned in missing:
                if intake.row_step(index) is None:
                    laid_out = np.empty(planned.nbytes, np.uint8)
                    planned.layout.store(planned.source(), planned.columns, laid_out)
                    self.write(arena, planned.offset, laid_out)
                else:
                    self.bring(intake, index, planned)
                done += planned.source_bytes
                self.tell(emit, done, total)
            intake.finish()
        self.mark(resident, missing)
        return sum(planned.nbytes for _, planned in missing)

    def missing(self, resident: ResidentWeights) -> list[Any]:
        return list(resident.missing())

    def write(self, arena: Any, offset: int, data: Any) -> None:
        arena.write(offset, data)

    def bring(self, intake: Any, index: int, planned: Any) -> None:
        for batch in batches([RawRows(index=index, row_start=0, data=planned.source())], intake):
            intake.send(batch).wait()

    def tell(self, emit: Emit, done: int, total: int) -> None:
        emit(UploadProgress(strategy=self.name, done_bytes=done, total_bytes=total))

    def mark(self, resident: ResidentWeights, missing: list[Any]) -> None:
        for index, _ in missing:
            resident.mark(index)


class UploadsEverythingAgain(Plain):
    def missing(self, resident: ResidentWeights) -> list[Any]:
        return list(enumerate(resident.plan.weights))


class WritesOneByteTooFar(Plain):
    def write(self, arena: Any, offset: int, data: Any) -> None:
        arena.write(offset + 1, data)


class DropsTheLastRows(Plain):
    def bring(self, intake: Any, index: int, planned: Any) -> None:
        rows = planned.source()[: -intake.row_step(index)]
        for batch in batches([RawRows(index=index, row_start=0, data=rows)], intake):
            intake.send(batch).wait()


class LetsPinnedMemoryGoTooEarly(Plain):
    def bring(self, intake: Any, index: int, planned: Any) -> None:
        for batch in batches([RawRows(index=index, row_start=0, data=planned.source())], intake):
            for part in batch:
                buffer = intake.pin(part.data.nbytes)
                data = buffer.array[: part.data.nbytes].reshape(part.data.shape)
                data[...] = part.data
                sent = intake.send([RawRows(index=index, row_start=part.row_start, data=data)])
                buffer.close()
                sent.wait()


class KeepsPinnedMemoryOnFailure(Plain):
    def bring(self, intake: Any, index: int, planned: Any) -> None:
        buffer = intake.pin(4096)
        super().bring(intake, index, planned)
        buffer.close()


class SwallowsErrors(Plain):
    def bring(self, intake: Any, index: int, planned: Any) -> None:
        import contextlib

        with contextlib.suppress(DeviceError):
            super().bring(intake, index, planned)


class TellsOnAnotherThread(Plain):
    def tell(self, emit: Emit, done: int, total: int) -> None:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(super().tell, emit, done, total).result()


class CountsDeviceBytes(Plain):
    def tell(self, emit: Emit, done: int, total: int) -> None:
        super().tell(emit, done // 2, total // 2)


class ForgetsToMark(Plain):
    def mark(self, resident: ResidentWeights, missing: list[Any]) -> None:
        super().mark(resident, missing[:-1])


class SendsTooMuchAtOnce(Plain):
    def bring(self, intake: Any, index: int, planned: Any) -> None:
        intake.send([RawRows(index=index, row_start=0, data=planned.source())]).wait()


FAULTS: list[tuple[Callable[[], Plain], str, str]] = [
    (UploadsEverythingAgain, "a second upload moves nothing", "wanted 0"),
    (WritesOneByteTooFar, "every byte arrives", "attn_norm"),
    (DropsTheLastRows, "every byte arrives", "rows never came"),
    (LetsPinnedMemoryGoTooEarly, "every byte arrives", "while the device still reads it"),
    (KeepsPinnedMemoryOnFailure, "a failure passes on and leaves nothing behind [send first]", "pinned memory"),
    (SwallowsErrors, "a failure passes on and leaves nothing behind [send first]", "it broke"),
    (TellsOnAnotherThread, "progress counts the bytes of the file", "another thread"),
    (CountsDeviceBytes, "progress counts the bytes of the file", "the bytes of the file"),
    (ForgetsToMark, "every byte arrives", "1 weights are not marked"),
    (SendsTooMuchAtOnce, "every byte arrives", "the intake takes"),
]


@pytest.mark.parametrize(("strategy", "check", "words"), FAULTS, ids=[fault.__name__ for fault, _, _ in FAULTS])
def test_a_planted_fault_is_reported(strategy: Callable[[], Plain], check: str, words: str) -> None:
    found = failures(UploadSuite.of(strategy=strategy()), check)
    assert words in found[check]


def test_the_strategy_that_the_faults_are_planted_in_passes() -> None:
    assert failures(UploadSuite.of(strategy=Plain())) == {}


@pytest.mark.parametrize("strategy", [*mortice_upload_strategies(), HostUpload()], ids=lambda strategy: strategy.name)
def test_every_built_in_strategy_passes(strategy: UploadStrategy) -> None:
    failed, counts = run(UploadSuite.of(strategy=strategy))
    assert failed == {}
    assert counts["passed"] > 8
