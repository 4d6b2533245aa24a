"""Runs with mortice and this package installed; llama.cpp, which has the type, is the oracle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from attrs import evolve
from mortice_q1.plugin import Q1_0, dequantize, mortice_qtypes, quantize

import mortice
from mortice.arch_contracts.schema import builtin_contracts
from mortice.core.config import ExecutorConfig, ModelConfig
from mortice.core.errors import DeviceError
from mortice.core.model.types import TensorView
from mortice.core.plugin.registry import make_registry
from mortice.core.testing.gguf_files import expand_to_f32
from mortice.core.testing.llamacpp import difference_from_llamacpp
from mortice.core.testing.qtype_suite import QTypeSuite
from mortice.core.testing.tiny_models import write_tiny_model

LLAMA = next(contract for contract in builtin_contracts() if contract.name == "llama")
IDS = [7, 301, 12, 12, 450, 3, 77, 128] * 8


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_model(
        tmp_path / "model.gguf",
        LLAMA,
        qtypes={"default": Q1_0, "token_embd": "F16"},
        encoders={"Q1_0": lambda rows, _: quantize(rows)},
        sizes={"hidden_size": 256, "ffn_size": 512},
    )


def expanded(path: Path) -> Path:
    """A copy of the model with the same values as float32."""
    registry = make_registry()  # with the installed plugins

    def values(tensor: TensorView) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        rows = tensor.row_bytes(0, tensor.rows)
        return registry.qtypes[tensor.qtype.name].value.dequantize(rows).reshape(tensor.shape)

    with registry.open_model(path) as file:
        return expand_to_f32(file, path.with_suffix(".f32.gguf"), values)


class TestConformance(QTypeSuite):
    """Reference, planes and header held against each other: on the CPU, and on a GPU where there is one."""

    type = mortice_qtypes()[0]


def test_values_by_hand() -> None:
    block = np.zeros((1, 18), np.uint8)
    block[0, :2] = np.array([1.5], "<f2").view(np.uint8)
    block[0, 2:4] = 0b00000101, 0b10000000
    values = dequantize(block)[0]
    assert values.shape == (128,)
    assert np.flatnonzero(values == 1.5).tolist() == [0, 2, 15]
    assert np.count_nonzero(values == -1.5) == 125


def test_log_probabilities_are_those_of_llamacpp(model: Path) -> None:
    exact = difference_from_llamacpp(model, IDS, expanded(model))
    assert exact.mean <= 1e-3
    assert exact.worst <= 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize(("activations", "bound"), [("f32", 1e-9), ("auto", 2e-3)])
def test_the_cuda_executor_agrees_with_the_reference(model: Path, activations: str, bound: float) -> None:
    chosen = {"context": 256, "activations": activations, "kv": "f32"}
    config = mortice.RunConfig(model=ModelConfig(path=model))
    try:
        cuda = mortice.load(evolve(config, executor=ExecutorConfig(name="cuda", **chosen)))
    except DeviceError as error:
        pytest.skip(str(error))
    with cuda, mortice.load(evolve(config, executor=ExecutorConfig(name="reference", **chosen))) as reference:
        found, wanted = cuda.logits(IDS), reference.logits(IDS)
    assert np.square(found - wanted).sum() / np.square(wanted).sum() < bound


def test_llamacpp_reads_the_same_values_from_the_same_bytes(model: Path) -> None:
    """It rounds activations to 8 bits, so this is near; another order of the bits would be far."""
    assert difference_from_llamacpp(model, IDS).mean <= 0.3
