"""A block of each kernel of a step of one row leaves half of a multiprocessor's registers, so that the next kernel's is
there before its turn comes; see ``kLeastShared`` and ``register_threads`` in ``ops/common.cuh``.
"""

from __future__ import annotations

import pytest

from mortice.core.model.program import build_program
from mortice.core.model.types import DeviceInfo
from mortice.core.model.validation import validate
from mortice.core.model.weight_plan import plan_weights
from mortice.core.synth.model import synth_model
from mortice.plugins.executors.cuda.compile.build import compile_all
from mortice.plugins.executors.cuda.executor import CudaExecutor
from mortice.plugins.executors.cuda.lowering.launches import LaunchSpec
from mortice.plugins.executors.cuda.lowering.lowering import Lowering
from mortice.plugins.executors.cuda.lowering.sources import KernelSources
from tests.support.cuda import needs_nvrtc
from tests.support.tiny import CONTRACTS, QTYPES

PARTS = 4
"""Of a multiprocessor, among which the warps of a block are dealt out in turn."""
REGISTERS_OF_A_PART = 16384
REGISTERS_TOGETHER = 8
"""A thread's are rounded up to a multiple of these (CUDA Occupancy Calculator, compute capability 9.0)."""


def room_of(spec: LaunchSpec, registers: int) -> int:
    """Registers of the part of a multiprocessor that gets most warps of a block."""
    warps = -(-spec.block // 32)
    return -(-warps // PARTS) * 32 * -(-registers // REGISTERS_TOGETHER) * REGISTERS_TOGETHER


@needs_nvrtc
@pytest.mark.parametrize(
    ("shape", "recipe"),
    [("Qwen2.5-7B", "Q4_K_M"), ("Llama-3.1-8B", "Q4_K_M"), ("Qwen2.5-0.5B", "Q4_K_M"), ("SmolLM2-135M", "Q8_0")],
)
def test_two_blocks_of_any_kernels_of_a_step_of_one_row_fit_the_registers(shape: str, recipe: str) -> None:
    file = synth_model(shape, recipe, layers=4)
    model = validate(file, CONTRACTS[file.architecture]).model()
    card = DeviceInfo(kind="cuda", name="any", total_bytes=0, free_bytes=0)
    kernels = CudaExecutor().kernels(card, list(QTYPES.values()))
    traits = {name: type_.traits for name, type_ in QTYPES.items() if type_.traits is not None}
    lowering = Lowering(
        plan=plan_weights(model, build_program(model), kernels),
        sources=KernelSources(traits),
        rows=1,
        kv_type="f16",
        sm_count=132,
        bulk_copies=True,
    )
    body, _ = lowering.launches(lowering.path(1))
    specs = {spec.source: spec for spec in body if isinstance(spec, LaunchSpec) and spec.entry != "embed"}
    assert {spec.entry for spec in specs.values()} == {"gemv", "attend"}
    code = compile_all(set(specs), "sm_90").kernels
    room = {f"{source}": room_of(spec, code[source].functions[spec.entry].registers) for source, spec in specs.items()}
    too_much = {name: registers for name, registers in room.items() if 2 * registers > REGISTERS_OF_A_PART}
    assert not too_much
