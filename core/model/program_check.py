"""Every operator's inputs, outputs and weights must fit together: what an executor may take for granted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mortice.core.errors import ContractError
from mortice.core.model import operators as op

__all__ = ["check_operators"]


def check_operators(architecture: str, operators: Sequence[op.Operator]) -> None:
    """Check order and shapes of a list of operators.

    Raises:
        ContractError: naming the first operator that reads what is not written, writes what is written already, or
            whose widths do not fit; a contract whose shapes contradict its settings is the cause.

    """
    written: set[op.Buffer] = set()
    names: set[str] = set()
    for operator in operators:
        problem = next(_problems(operator), None)
        if not written.issuperset(operator.inputs):
            problem = "reads a buffer that nothing wrote"
        elif not written.isdisjoint(operator.outputs):
            problem = "writes a buffer again"
        elif operator.name in names:
            problem = "has the name of another operator"
        if problem is not None:
            raise ContractError(f"contract {architecture}: {operator.name}: {problem}")
        written.update(operator.outputs)
        names.add(operator.name)


def _problems(operator: op.Operator) -> Iterator[str]:
    match operator:
        case op.Embed(out=out, weight=weight) | op.EmbedPositions(out=out, weight=weight):
            yield from _differ("row of the table", weight.columns, out.width)
        case op.Linear(src=src, out=out, weight=weight):
            yield from _differ("columns of the weight", weight.columns, src.width)
            yield from _differ("rows of the weight", weight.rows, out.width)
        case op.Norm():
            yield from _norm(operator)
        case op.AddBias(src=src, weight=weight):
            yield from _differ("bias", _elements(weight), src.width)
        case op.Rope(src=src, num_heads=heads, head_dim=head_dim, dims=dims, weights=tables):
            yield from _differ("heads", heads * head_dim, src.width)
            for factors in tables:
                yield from _differ("RoPE factors", _elements(factors), dims // 2)
        case op.KvWrite(k=k, v=v, num_kv_heads=heads, head_dim=head_dim):
            yield from _differ("heads of K", heads * head_dim, k.width)
            yield from _differ("heads of V", heads * head_dim, v.width)
        case op.Attention(src=src, num_heads=heads, head_dim=head_dim):
            yield from _differ("heads of Q", heads * head_dim, src.width)
        case op.Add(a=a, b=b) | op.GatedAct(gate=a, up=b):
            yield from _differ("the two inputs", a.width, b.width)
    if not isinstance(operator, (op.Linear, op.Embed, op.EmbedPositions, op.KvWrite)):
        for out in operator.outputs:
            yield from _differ("output", out.width, operator.inputs[0].width)


def _norm(norm: op.Norm) -> Iterator[str]:
    part = norm.src.width // norm.groups
    yield from _differ("groups of a row", norm.groups * part, norm.src.width)
    for weight in norm.weights:
        elements = _elements(weight)
        if elements not in (part, norm.src.width):
            yield f"weight of {elements} elements for rows of {norm.src.width} in {norm.groups} parts"


def _differ(what: str, found: int, wanted: int) -> Iterator[str]:
    if found != wanted:
        yield f"{what}: {found} and {wanted} do not fit"


def _elements(weight: op.WeightRef) -> int:
    return weight.rows * weight.columns
