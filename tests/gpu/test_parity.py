"""`mortice parity` on a card: the values traced are those of the step, and the executors agree."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

import mortice
from mortice.core.cli.main import main
from mortice.core.config import ExecutorConfig, ModelConfig, RunConfig
from mortice.core.plugin.interfaces import StepPart, Traceable
from tests.support.cuda import needs_gpu
from tests.support.tiny import IDS, tiny

pytestmark = [pytest.mark.gpu, needs_gpu]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("flags", [["--kv", "f32", "--activations", "f32"], []])
def test_the_executors_agree(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], family: str, flags: Sequence[str]
) -> None:
    path = tiny(tmp_path, family, qtypes="Q8_0")
    code = main(["parity", str(path), "--tokens", "100", "--json", *flags])
    found = json.loads(capsys.readouterr().out)
    assert code == 0, found["failures"]
    assert {"decode", "prefill", "mixed"} == {each["mode"] for each in found["operators"]}
    # every layer's attention is seen, and so is what each half of it adds
    for layer in range(2):
        names = {each["operator"] for each in found["operators"] if each["layer"] == layer}
        assert {f"layers.{layer}.{name}" for name in ("attention", "attn_residual", "ffn_residual")} <= names


@pytest.mark.parametrize("length", [1, 8, 9, 40])
def test_a_trace_gives_the_logits_of_the_step(tmp_path: Path, length: int) -> None:
    path = tiny(tmp_path, "llama", qtypes="Q8_0")
    chosen = ExecutorConfig(name="cuda", context=256)
    with mortice.load(RunConfig(model=ModelConfig(path=path), executor=chosen)) as cuda:
        runtime = cuda.runtime
        assert isinstance(runtime, Traceable)
        sequence = runtime.new_sequence()
        parts = [StepPart(sequence=sequence, token_ids=IDS[:length], logits="all")]
        logits = runtime.step(parts)
        sequence.truncate(0)
        seen: dict[str, tuple[int, ...]] = {}
        traced = runtime.trace(parts, lambda buffer, value: seen.__setitem__(buffer.name, value.shape))
        assert sequence.length == length
        assert np.array_equal(traced, logits)
        assert seen[cuda.program.logits.name] == (length, cuda.program.vocab_size)
        assert all(shape[0] == length for shape in seen.values())
        again = [StepPart(sequence=sequence, token_ids=IDS[:1])]
        assert runtime.trace(again, lambda *_: None).shape == (1, cuda.program.vocab_size)
