"""The benchmark of several sequences at once."""

from __future__ import annotations

import csv
import io
import re
import types
from collections.abc import Sequence
from typing import Any

import pytest

from mortice.core.bench.measure import bench
from mortice.core.bench.results import BenchSettings
from mortice.core.cli.main import main
from mortice.core.errors import ConfigError, ExecutionError
from mortice.core.plugin.interfaces import StepPart
from mortice.core.plugin.token_choice import ChoicePart
from mortice.core.text.sampling import Sampled
from mortice.plugins.executors.reference.runtime import ReferenceRuntime
from tests.unit.test_bench import opener, row, silent


@pytest.fixture(autouse=True)
def no_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bandwidth takes half a gigabyte and a second; here a number will do."""
    monkeypatch.setattr(ReferenceRuntime, "measure_read_bandwidth", lambda _: 2e9)


def test_the_speed_of_several_sequences_is_that_of_all_of_them() -> None:
    assert row(sequences=4).speeds == (40.0, 20.0, 8.0)
    assert row(sequences=4, token_bytes=8.0).bytes_per_second == 160.0
    assert row(sequences=4, host_seconds=(0.2,)).host_seconds_per_token == pytest.approx(0.005)


def test_several_sequences_are_fed_and_generate_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[list[tuple[int, int]]] = []
    step = ReferenceRuntime.step

    def recorded(self: ReferenceRuntime, parts: Sequence[Any]) -> Any:
        steps.append([(part.sequence.length, len(part.token_ids)) for part in parts])
        return step(self, parts)

    monkeypatch.setattr(ReferenceRuntime, "step", recorded)
    settings = BenchSettings(prompt_tokens=(5,), generated_tokens=(2,), depths=(4,), batch=(1, 3), repeats=1)
    found = bench(opener(step_tokens=7, kv_tokens=3 * 64), settings, silent)
    assert [(row.test, row.sequences) for row in found.rows] == [
        ("prefill", 1),
        ("decode", 1),
        ("prefill", 3),
        ("decode", 3),
    ]
    filled = [[(0, 4), (0, 3)], [(3, 1), (0, 4)]]  # as many tokens in a step as it takes
    prompts = [[(4, 5), (4, 2)], [(6, 3), (4, 4)], [(8, 1)]]
    decodes = [[(length, 1)] * 3 for length in (4, 5, 6)]
    assert steps[-13 - 1 :] == filled + prompts * 2 + decodes * 2
    assert found.rows[3].token_bytes < found.rows[1].token_bytes  # type: ignore[operator]  # decode rows have them


def test_a_runtime_that_chooses_tokens_does_it_for_several_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[list[int], int, bool]] = []

    def choose_step(self: ReferenceRuntime, parts: Sequence[ChoicePart], *, ahead: bool) -> list[Any]:
        calls.append(([part.sequence.length for part in parts], parts[0].index, ahead))
        logits = self.step([StepPart(sequence=part.sequence, token_ids=part.token_ids) for part in parts])
        if broken:
            return [ExecutionError("the logits hold NaN")] * len(parts)
        return [Sampled(id=int(row.argmax()), logprob=0.0) for row in logits]

    broken = False
    monkeypatch.setattr(ReferenceRuntime, "choose_step", choose_step, raising=False)
    monkeypatch.setattr(ReferenceRuntime, "token_choice", lambda *_: types.SimpleNamespace(), raising=False)
    settings = BenchSettings(prompt_tokens=(), generated_tokens=(2,), depths=(4,), batch=(3,), repeats=1)
    (found,) = bench(opener(kv_tokens=3 * 64), settings, silent).rows
    assert found.sequences == 3
    assert calls == [([4 + index] * 3, index, True) for index in range(3)] * 2  # once to warm up
    broken = True
    with pytest.raises(ExecutionError, match="NaN"):
        bench(opener(kv_tokens=3 * 64), settings, silent)


def test_a_batch_is_profiled_too() -> None:
    settings = BenchSettings(prompt_tokens=(), generated_tokens=(1,), batch=(1, 3), repeats=1, profile=True)
    found = bench(opener(kv_tokens=3 * 64), settings, silent)
    assert {(row.test, row.tokens, row.sequences) for row in found.profile} == {("decode", 1, 1), ("decode", 1, 3)}


def test_a_cache_too_small_for_all_sequences_is_refused_before_anything_is_uploaded() -> None:
    settings = BenchSettings(prompt_tokens=(10,), generated_tokens=(), batch=(2, 3), repeats=1)
    message = "bench: 3 sequences of 10 tokens need a KV cache of 192, found 128 (executor.kv_tokens)"
    with pytest.raises(ConfigError, match=re.escape(message)):
        bench(opener(kv_tokens=128), settings, silent)


def test_bench_makes_the_cache_large_enough_for_the_batch(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["bench", "SmolLM2-135M:Q8_0", "--executor", "reference", "-p", "0", "-n", "2", "-r", "1", "-o", "csv"]
    assert main([*command, "-b", "1,2"]) == 0
    captured = capsys.readouterr()
    assert [line["sequences"] for line in csv.DictReader(io.StringIO(captured.out))] == ["1", "2"]
    assert "decoding of 2 tokens at depth 0 measured, 2 sequences" in captured.err
    assert main([*command, "-b", "2", "--kv-tokens", "64"]) == 2
    assert "2 sequences of 3 tokens need a KV cache of 128, found 64" in capsys.readouterr().err
