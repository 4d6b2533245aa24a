"""Where the CUDA executor puts the buffers of a program."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from mortice.core.model import operators as op
from mortice.core.model.operators import Buffer, Operator
from mortice.core.model.program import Program, build_program
from mortice.core.model.validation import validate
from mortice.plugins.executors.cuda.lowering import placing
from mortice.plugins.executors.cuda.lowering.fusion import Group, fuse
from mortice.plugins.executors.cuda.lowering.placing import LOGIT_ROWS, matmul_bytes, place_program
from tests.support.in_memory import model_file
from tests.unit.model.test_families import CASES, build

ROWS = 512


def program_of(name: str) -> Program:
    contract, metadata, arrays = build(CASES[name])
    return build_program(validate(model_file(metadata, arrays), contract).model())


@pytest.mark.parametrize("name", CASES)
def test_the_head_can_run_again_over_what_the_body_left(name: str) -> None:
    """Its rows are taken a few at a time, so nothing it writes may lie where it reads the body's rows."""
    program = program_of(name)
    _, workspace = place_program(program, ROWS)

    def place(buffer: Buffer, rows: int) -> range:
        return range(workspace.offsets[buffer], workspace.offsets[buffer] + 4 * rows * buffer.width)

    start = next(i for i, operator in enumerate(program.operators) if isinstance(operator, op.SelectRows))
    head = program.operators[start:]
    written = {buffer for operator in head for buffer in operator.outputs}
    read = {buffer for operator in head for buffer in operator.inputs} - written
    assert read
    for source in read:
        for buffer in written & workspace.offsets.keys():
            there, here = place(source, ROWS), place(buffer, LOGIT_ROWS)
            assert here.stop <= there.start or there.stop <= here.start, f"{buffer.name} lies in {source.name}"


def test_a_program_is_fused_once_however_often_its_bytes_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    fused: list[int] = []

    def counted(operators: Sequence[Operator], logits: Buffer) -> list[Group]:
        fused.append(len(operators))
        return fuse(operators, logits)

    monkeypatch.setattr(placing, "fuse", counted)
    program = program_of("llama")
    for _ in range(3):
        place_program(program, ROWS)
        matmul_bytes(program, 132, ROWS, exact=False, cublas=True)
    assert fused == [len(program.operators)]


def test_whoever_changes_the_groups_changes_only_their_own() -> None:
    program = program_of("llama")
    groups, _ = place_program(program, ROWS)
    groups.clear()
    assert place_program(program, ROWS)[0]
