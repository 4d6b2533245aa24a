"""The kit's fake device with the CUDA executor's layouts, and a model to bring to it."""

from __future__ import annotations

from pathlib import Path

from mortice.core.model.program import build_program
from mortice.core.model.residency import ResidentWeights
from mortice.core.model.types import LoadOptions, ModelFile
from mortice.core.model.validation import validate
from mortice.core.model.weight_plan import PlannedWeight, WeightPlan, plan_weights
from mortice.core.testing import fake_device
from mortice.core.testing.fake_device import FakeIntake, OnCall, stored_by_the_host
from mortice.core.testing.tiny_models import write_tiny_model
from mortice.plugins.executors.cuda.executor import CudaExecutor
from mortice.plugins.executors.cuda.lowering.layouts import TileLayout, tile_geometry
from mortice.plugins.loaders.gguf.loader import open_gguf
from mortice.plugins.qtypes import mortice_qtypes
from tests.support.tiny import CONTRACTS

__all__ = ["FakeArena", "FakeIntake", "OnCall", "open_model", "plan_for_cuda", "resident_of", "stored_by_the_host"]

QTYPES = {"default": "Q4_K", "attn_v": "Q6_K", "ffn_down": "Q8_0", "output": "F16"}
SIZES = {"hidden_size": 256, "ffn_size": 1024, "num_layers": 3}


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


def _row_step(planned: PlannedWeight) -> int | None:
    if not isinstance(planned.layout, TileLayout):
        return None
    return tile_geometry(planned.tensor.qtype, planned.rows, planned.columns).tile_rows


class FakeArena(fake_device.FakeArena):
    """The kit's fake device, which lays weights out in the CUDA executor's tiles."""

    def __init__(self, nbytes: int, capacity: int = 64 * 1024, on_call: OnCall | None = None) -> None:
        super().__init__(nbytes, capacity, on_call, _row_step)


def resident_of(plan: WeightPlan, on_call: OnCall | None = None, capacity: int = 64 * 1024) -> ResidentWeights:
    """Nothing resident yet, on a fake device."""
    return ResidentWeights(plan=plan, arena=FakeArena(plan.arena_bytes, capacity, on_call))
