"""What is compiled is told by one group of each kind; it has to be what all launches of the program run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from attrs import evolve, frozen

from mortice.arch_contracts.schema import Contract
from mortice.core.model.program import build_program
from mortice.core.model.types import ModelFile
from mortice.core.model.validation import validate
from mortice.core.model.weight_plan import plan_weights
from mortice.core.stages import open_file
from mortice.core.synth.model import synth_model
from mortice.core.synth.recipes import OneType, Tensor
from mortice.core.testing.tiny_models import write_tiny_model
from mortice.plugins.executors.cuda.compile.nvrtc import Source
from mortice.plugins.executors.cuda.executor import CudaExecutor
from mortice.plugins.executors.cuda.lowering.launches import LaunchSpec
from mortice.plugins.executors.cuda.lowering.lowering import Lowering
from mortice.plugins.executors.cuda.lowering.sources import KernelSources
from mortice.plugins.executors.cuda.run import tuning
from mortice.plugins.executors.cuda.run.tuning import Sample, plan_trial
from tests.plugins.cuda.test_matmul import CARD
from tests.plugins.qtypes.blocks import TYPES
from tests.support.tiny import CONTRACTS, QTYPES, REGISTRY

NEW: Mapping[str, Any] = MappingProxyType({"sm_count": 132, "bulk_copies": True, "cublas": True})
CARDS: Mapping[str, Mapping[str, Any]] = {
    "new": NEW,
    "new, float32": {**NEW, "quantize_activations": False, "kv_type": "f32"},
    "old": {"sm_count": 108},
}


def lowering(file: ModelFile, contract: Contract | None = None, **options: Any) -> Lowering:
    model = validate(file, contract or REGISTRY.contract_for(file)).model()
    kernels = CudaExecutor().kernels(CARD, list(QTYPES.values()))
    traits = {name: type_.traits for name, type_ in TYPES.items() if type_.traits is not None}
    plan = plan_weights(model, build_program(model), kernels)
    return Lowering(plan=plan, sources=KernelSources(traits), **{"rows": 600, "kv_type": "f16", **options})


def sources(*parts: list[Any]) -> set[Source]:
    return {spec.source for part in parts for spec in part if isinstance(spec, LaunchSpec)}


def check(of: Lowering) -> None:
    for path in of.paths:
        assert of.kernel_sources(path) == sources(*of.launches(path))


@frozen(kw_only=True)
class ExactOutput(OneType):
    """`attn_output` is float32: products are finished with another input only from one layer to the next."""

    def _wanted(self, tensor: Tensor) -> str:
        return "F32" if tensor.role == "attn_output" else self.base


@pytest.fixture(scope="module")
def mixed() -> ModelFile:
    """Twelve layers, some of which have matrices of a larger type."""
    return synth_model("SmolLM2-135M", "Q4_K_M", layers=12)


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("family", CONTRACTS)
def test_one_group_of_each_kind_tells_what_a_family_needs(family: str, card: str, tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "model.gguf", CONTRACTS[family], qtypes="Q8_0", sizes={"num_layers": 5})
    with open_file(REGISTRY, path) as file:
        check(lowering(file, **CARDS[card]))


@pytest.mark.parametrize("card", CARDS)
def test_layers_of_other_types_are_other_kinds(card: str, mixed: ModelFile) -> None:
    of = lowering(mixed, **CARDS[card])
    types = {of.plan.model.tensor(planned.weight).qtype.name for planned in of.plan.weights if planned.rows > 1}
    assert len(types) > 2
    check(of)


def test_groups_with_other_neighbours_are_other_kinds() -> None:
    of = lowering(synth_model("SmolLM2-135M", ExactOutput(name="exact output", base="Q8_0"), layers=4), **NEW)
    inputs = [spec for spec in of.launches(of.path(20))[0] if "attn_q" in spec.name and "input" in spec.label]
    assert [spec.label for spec in inputs] == ["matmul input", *["matmul finish, input"] * 3]
    check(of)


def test_layers_of_other_shapes_are_other_kinds(tmp_path: Path) -> None:
    llama = CONTRACTS["llama"]
    ffn_size = evolve(llama.hyperparameters["ffn_size"], per_layer=True)
    contract = evolve(llama, hyperparameters={**llama.hyperparameters, "ffn_size": ffn_size})
    sizes: Mapping[str, Any] = {"num_layers": 5, "ffn_size": [64, 128, 64, 64, 96]}
    with open_file(REGISTRY, write_tiny_model(tmp_path / "model.gguf", contract, qtypes="Q8_0", sizes=sizes)) as file:
        check(lowering(file, contract, **NEW))


def test_more_layers_of_the_same_kinds_are_not_lowered(mixed: ModelFile) -> None:
    of = lowering(mixed, **NEW)
    assert len(of._each_kind) < len(of.groups) / 2
    longer = lowering(synth_model("SmolLM2-135M", "Q8_0", layers=30), **NEW)
    assert len(longer._each_kind) == len(lowering(synth_model("SmolLM2-135M", "Q8_0", layers=6), **NEW)._each_kind)


def test_a_trial_compiles_all_that_it_launches(mixed: ModelFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_LEAST_BYTES", 0)
    trial = plan_trial(lowering(mixed, **NEW))
    assert trial is not None
    samples: list[Sample] = [sample for point in trial.points for sample in point.ways.values()]
    assert all(sample.sources == sources(sample.body, sample.head) for sample in samples)
    assert any(sample.head for sample in samples)
