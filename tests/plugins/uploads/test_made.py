"""Weights that no file holds as they are wanted: made in pieces, sent by every strategy, never all at once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from threading import Lock
from typing import cast

import numpy as np
import pytest
from attrs import evolve

from mortice.core.errors import ModelFileError
from mortice.core.model.types import ModelFile, TensorView
from mortice.core.model.weight_plan import WeightPlan
from mortice.core.plugin.events import Event, UploadProgress
from mortice.core.stages import open_file, quantize_opened
from mortice.plugins.uploads.device import mortice_upload_strategies
from tests.plugins.uploads.fakes import FakeArena, plan_for_cuda, resident_of, stored_by_the_host
from tests.support.hf_folders import write_folder
from tests.support.tiny import REGISTRY, tiny

STRATEGIES = {strategy.name: strategy for strategy in mortice_upload_strategies()}
every_strategy = pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=list(STRATEGIES))
CAPACITY = 64 * 1024


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama in BF16: Q and K change the order of their rows, vectors become F32."""
    path = tmp_path_factory.mktemp("made")
    sizes = {"hidden_size": 256, "ffn_size": 1024}
    with open_file(REGISTRY, tiny(path, "llama", tied=False, sizes=sizes)) as file:
        return write_folder(path / "hf", file, "BF16")


@pytest.fixture(scope="module", params=["none", "Q8_0"])
def file(request: pytest.FixtureRequest, folder: Path) -> Iterator[ModelFile]:
    with quantize_opened(REGISTRY, open_file(REGISTRY, folder), request.param) as opened:
        yield opened


def silent(event: Event) -> None:
    """An observer that does nothing."""


def watched(file: ModelFile, asked: list[int]) -> ModelFile:
    """The file with the bytes of every matrix that is made noted in `asked`."""
    lock = Lock()

    def watch(tensor: TensorView) -> TensorView:
        make = tensor.make
        if make is None or len(tensor.shape) == 1:
            return tensor

        def noted(start: int, stop: int) -> np.ndarray:
            rows = make(start, stop)
            with lock:
                asked.append(rows.nbytes)
            return rows

        return evolve(tensor, make=noted)

    return evolve(file, tensors={name: watch(tensor) for name, tensor in file.tensors.items()}, close=None)


@every_strategy
def test_what_arrives_is_what_the_host_would_store(strategy: object, file: ModelFile) -> None:
    plan = plan_for_cuda(file)
    resident = resident_of(plan, capacity=CAPACITY)
    moved = strategy.upload(resident, silent)  # type: ignore[attr-defined]
    assert moved == sum(planned.nbytes for planned in plan.weights)
    assert np.array_equal(cast(FakeArena, resident.arena).memory, stored_by_the_host(plan))


@every_strategy
def test_a_piece_is_no_larger_than_what_is_sent_at_once(strategy: object, file: ModelFile) -> None:
    asked: list[int] = []
    plan = plan_for_cuda(watched(file, asked))
    largest = max(planned.source_bytes for planned in plan.weights if planned.tensor.make is not None)
    strategy.upload(resident_of(plan, capacity=CAPACITY), silent)  # type: ignore[attr-defined]
    assert largest > CAPACITY, "or the test shows nothing"
    assert max(asked) <= CAPACITY
    assert sum(asked) == _made_matrices(plan), "each row is made once"


def _made_matrices(plan: WeightPlan) -> int:
    return sum(
        planned.source_bytes
        for planned in plan.weights
        if planned.tensor.make is not None and len(planned.weight.shape) > 1
    )


@every_strategy
def test_progress_ends_at_all_bytes(strategy: object, file: ModelFile) -> None:
    events: list[Event] = []
    plan = plan_for_cuda(file)
    strategy.upload(resident_of(plan, capacity=CAPACITY), events.append)  # type: ignore[attr-defined]
    last = events[-1]
    assert isinstance(last, UploadProgress)
    assert last.done_bytes == last.total_bytes == plan.file_bytes


@every_strategy
def test_what_goes_wrong_while_rows_are_made_ends_the_upload(strategy: object, file: ModelFile) -> None:
    def broken(start: int, stop: int) -> np.ndarray:
        raise ModelFileError(Path("m"), f"rows {start} to {stop}")

    tensors = dict(file.tensors)
    tensors["blk.0.attn_q.weight"] = evolve(tensors["blk.0.attn_q.weight"], make=broken)
    plan = plan_for_cuda(evolve(file, tensors=tensors, close=None))
    resident = resident_of(plan, capacity=CAPACITY)
    with pytest.raises(ModelFileError, match=r"^m: rows 0 to"):
        strategy.upload(resident, silent)  # type: ignore[attr-defined]
    assert not resident.complete
    assert not cast(FakeArena, resident.arena).held
