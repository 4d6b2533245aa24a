"""A step replayed as a graph against the same launches one by one, buffer by buffer, in memory that was poisoned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from mortice.core.model.operators import Buffer
from mortice.core.pipeline import Pipeline
from mortice.core.plugin.interfaces import StepPart
from mortice.core.testing.tiny_models import write_tiny_model
from mortice.plugins.executors.cuda.run.runtime import CudaRuntime
from tests.gpu.test_executor import FAMILIES, load, prompt
from tests.support.cuda import needs_gpu
from tests.support.tiny import CONTRACTS

pytestmark = [pytest.mark.gpu, needs_gpu]

BEFORE = (0, 5, 63, 64, 7, 1, 2, 128, 3, 12, 255, 130, 0, 62, 127, 129)
"""Tokens that the sequences of a step hold: pages begin, end and are crossed."""

_NAN_BYTE = 0xFF

Seen = list[tuple[Buffer, NDArray[np.float32]]]


@pytest.fixture(params=FAMILIES)
def cuda(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Pipeline]:
    family, qtype, sizes = FAMILIES[request.param]
    path = write_tiny_model(tmp_path / "model.gguf", CONTRACTS[family], qtypes=qtype, sizes=sizes)
    with load(path, "cuda", exact=False, kv_tokens=2048) as pipeline:
        yield pipeline


def poisoned(runtime: CudaRuntime) -> None:
    """Make what a step works in no numbers."""
    lowering, addresses = runtime.lowering, runtime.memory.addresses
    runtime.stream.fill(addresses.workspace, _NAN_BYTE, lowering.workspace.nbytes)
    runtime.stream.fill(addresses.matmul, _NAN_BYTE, lowering.scratch.nbytes)


def eager(runtime: CudaRuntime, parts: Sequence[StepPart]) -> Seen:
    """What each launch of a step wrote, launch by launch."""
    seen: Seen = []
    poisoned(runtime)
    runtime.trace(parts, lambda buffer, value: seen.append((buffer, value)))
    return seen


def replayed(runtime: CudaRuntime, parts: Sequence[StepPart]) -> Seen:
    """The same by graphs: of the first launch, of the first two … until all are in one."""
    launches = [*runtime.launches("body", len(parts), alone=True), *runtime.launches("head", len(parts))]
    seen: Seen = []
    for count, (spec, _) in enumerate(launches, 1):
        if not spec.outputs:
            continue
        lengths = [part.sequence.length for part in parts]
        runtime.rows.send(runtime.begin(parts), runtime.stream)
        with runtime.stream.capture() as captured:
            for _, launch in launches[:count]:
                launch(runtime.stream)
        graph = captured.instantiate()
        poisoned(runtime)
        graph.launch(runtime.stream)
        seen += ((buffer, runtime.read_buffer(buffer, len(parts))) for buffer in spec.outputs)
        graph.close()
        captured.close()
        runtime.end(parts)
        truncate(parts, lengths)
    return seen


def truncate(parts: Sequence[StepPart], lengths: Sequence[int]) -> None:
    for part, length in zip(parts, lengths, strict=True):
        part.sequence.truncate(length)


@pytest.mark.parametrize("rows", [1, 2, 8, 9, 12, 16])
def test_a_replayed_graph_leaves_in_each_buffer_what_launches_one_by_one_leave(cuda: Pipeline, rows: int) -> None:
    runtime = cuda.runtime
    assert isinstance(runtime, CudaRuntime)
    ids = prompt(cuda, max(BEFORE) + 1)
    sequences = [runtime.new_sequence() for _ in range(rows)]
    lengths = BEFORE[-rows:] if rows < 3 else BEFORE[:rows]
    for sequence, length in zip(sequences, lengths, strict=True):
        if length:
            runtime.step([StepPart(sequence=sequence, token_ids=ids[:length])])
    parts = [
        StepPart(sequence=sequence, token_ids=ids[length : length + 1], logits="all")
        for sequence, length in zip(sequences, lengths, strict=True)
    ]
    wanted = eager(runtime, parts)
    truncate(parts, lengths)
    found = replayed(runtime, parts)
    assert [buffer for buffer, _ in found] == [buffer for buffer, _ in wanted]
    for (buffer, value), (_, expected) in zip(found, wanted, strict=True):
        assert np.isfinite(expected).all(), buffer.name
        np.testing.assert_array_equal(value, expected, err_msg=buffer.name)
    assert found[-1][0] == cuda.program.logits
    np.testing.assert_array_equal(runtime.step(parts), wanted[-1][1])  # the graph that steps are
    for sequence in sequences:
        sequence.close()
