"""Hugging Face folders on a real card: every way up, rows that are made, and a run that is repeated."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from mortice.core.cli.main import main
from mortice.core.config import ExecutorConfig, ModelConfig, RunConfig, UploadConfig
from mortice.core.pipeline import prepare
from mortice.core.record import read_record
from mortice.core.stages import open_file
from mortice.plugins.uploads.device import mortice_upload_strategies
from tests.support.cuda import needs_gpu, needs_nvrtc
from tests.support.hf_folders import quantized_gguf, write_folder
from tests.support.tiny import IDS, REGISTRY, tiny

pytestmark = [pytest.mark.gpu, needs_gpu, needs_nvrtc]

SIZES = {"hidden_size": 256, "ffn_size": 512, "num_layers": 2}
STRATEGIES = [strategy.name for strategy in mortice_upload_strategies()]


def logits(path: Path, *, upload: str = "auto", quantize: str = "none") -> NDArray[np.float32]:
    config = RunConfig(
        model=ModelConfig(path=path, quantize=quantize),
        executor=ExecutorConfig(name="cuda", activations="f32"),
        upload=UploadConfig(strategy=upload),
    )
    with prepare(config, REGISTRY) as pipeline:
        return pipeline.logits(IDS)


@pytest.mark.parametrize("upload", STRATEGIES)
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_a_folder_gives_the_logits_of_the_gguf_file(name: str, upload: str, tmp_path: Path) -> None:
    gguf = tiny(tmp_path, name, tied=False, sizes=SIZES)
    with open_file(REGISTRY, gguf) as file:
        folder = write_folder(tmp_path / "hf", file, shards=2)
    assert np.abs(logits(folder, upload=upload) - logits(gguf)).max() < 1e-4


@pytest.mark.parametrize("qtype", ["Q8_0", "Q4_0"])
def test_quantised_at_load_it_gives_the_logits_of_a_quantised_gguf_file(qtype: str, tmp_path: Path) -> None:
    with open_file(REGISTRY, tiny(tmp_path, tied=False, sizes=SIZES)) as file:
        folder = write_folder(tmp_path / "hf", file, "BF16")
    wanted = logits(quantized_gguf(folder, qtype, tmp_path / "q.gguf"))
    assert np.abs(logits(folder, quantize=qtype) - wanted).max() < 1e-4


def test_a_recorded_run_is_repeated_on_the_same_card(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, record = tiny(tmp_path, sizes=SIZES), tmp_path / "run.json"
    asked = ["-p", "The joint is cut", "-n", "24", "-t", "0.9", "--executor", "cuda", "--record", str(record)]
    assert main(["run", "-m", str(model), *asked]) == 0
    assert main(["replay", str(record), "--quiet"]) == 0
    assert "24 of the answer" in capsys.readouterr().out
    assert any("gemv" in name for name in read_record(record).environment.code)
