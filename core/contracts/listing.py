"""A program as lines a person can read, alike layers once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from attrs import frozen

from mortice.core.counts import counted
from mortice.core.model.findings import join_numbers
from mortice.core.model.operators import (
    Act,
    Add,
    AddBias,
    Attention,
    Buffer,
    Embed,
    EmbedPositions,
    GatedAct,
    KvWrite,
    Linear,
    Norm,
    Operator,
    PositionScale,
    Rope,
    Scale,
    SelectRows,
    Softcap,
    WeightRef,
)
from mortice.core.model.program import Program

__all__ = ["Line", "Part", "parts_of", "program_listing"]

STREAM = "x"
"""What enters a layer and leaves it."""


@frozen
class Line:
    """An operator in words.

    Attributes:
        out: the buffer written, empty for none; of the layer's own without its name before it.
        inputs: the buffers read, likewise; `STREAM` for what comes from before the layer.
        kind: the operator's kind.
        text: the formula.
        width: elements of the result.

    """

    out: str
    inputs: tuple[str, ...]
    kind: str
    text: str
    width: int


@frozen
class Part:
    """Operators outside the layers, or those that some layers share.

    Attributes:
        layers: which; empty outside.
        lines: one for each operator.

    """

    layers: tuple[int, ...]
    lines: tuple[Line, ...]

    @property
    def title(self) -> str:
        """``layers {0..29}, each``; empty outside the layers."""
        if not self.layers:
            return ""
        return f"layer {self.layers[0]}" if len(self.layers) == 1 else f"layers {join_numbers(self.layers)}, each"


def parts_of(program: Program) -> list[Part]:
    """The parts of a program in order; neighbouring layers that say the same are one part."""
    groups: list[tuple[int | None, list[Operator]]] = []
    for operator in program.operators:
        if not groups or groups[-1][0] != operator.layer:
            groups.append((operator.layer, []))
        groups[-1][1].append(operator)
    parts: list[Part] = []
    for layer, operators in groups:
        lines = tuple(_lines(layer, operators))
        if layer is not None and parts and parts[-1].layers and parts[-1].lines == lines:
            parts[-1] = Part((*parts[-1].layers, layer), lines)
        else:
            parts.append(Part(() if layer is None else (layer,), lines))
    return parts


def program_listing(program: Program) -> str:
    """The listing: a header, then for each part its lines; ``[n]`` is the width of a result."""
    sizes = f"hidden size {program.hidden_size}, vocabulary {program.vocab_size}, context {program.context_length}"
    blocks = [f"{program.architecture}: {counted(program.num_layers, 'layer')}, {sizes}"]
    for part in parts_of(program):
        named = [(f"{line.out} [{line.width}]" if line.out else "", line.text) for line in part.lines]
        column = max(len(name) for name, _ in named)
        indent = "  " if part.title else ""
        lines = [f"{indent}{name:<{column}} {'=' if name else ' '} {text}" for name, text in named]
        blocks.append("\n".join([f"{part.title}:", *lines] if part.title else lines))
    return "\n\n".join(blocks)


def _lines(layer: int | None, operators: Sequence[Operator]) -> Iterator[Line]:
    own = {buffer for operator in operators for buffer in operator.outputs}
    prefix = "" if layer is None else f"layers.{layer}."
    last = operators[-1].outputs if layer is not None else ()

    def name(buffer: Buffer) -> str:
        if buffer not in own or buffer in last:
            return STREAM
        return buffer.name.removeprefix(prefix).removesuffix(".out")

    for operator in operators:
        out = operator.outputs
        inputs = tuple(map(name, operator.inputs))
        yield Line(
            out=name(out[0]) if out else "",
            inputs=inputs,
            kind=operator.kind,
            text=_formula(operator, inputs),
            width=out[0].width if out else 0,
        )


def _formula(operator: Operator, inputs: Sequence[str]) -> str:  # noqa: C901 (one case for each kind)
    match operator:
        case Embed(weight=weight):
            return f"rows of {_weight(weight)} at the token ids"
        case EmbedPositions(weight=weight):
            return f"rows of {_weight(weight)} at the positions"
        case Norm(type=kind, eps=eps, groups=groups, weight=weight, bias=bias):
            each = f" of each of {groups} parts" if groups > 1 else ""
            shift = f" + {_weight(bias)}" if bias is not None else ""
            return f"{kind}_norm({inputs[0]}, eps {eps:g}){each} * {_weight(weight)}{shift}"
        case Linear(weight=weight):
            return f"{inputs[0]} @ {_weight(weight)}ᵀ"
        case AddBias(weight=weight):
            return f"{inputs[0]} + {_weight(weight)}"
        case Rope():
            return _rope(operator, inputs[0])
        case KvWrite(num_kv_heads=heads, head_dim=size):
            return f"cache K = {inputs[0]}, V = {inputs[1]} ({counted(heads, 'head')} of {size})"
        case Attention():
            return _attention(operator, inputs[0])
        case Add():
            return f"{inputs[0]} + {inputs[1]}"
        case Act(activation=activation):
            return f"{activation}({inputs[0]})"
        case GatedAct(activation=activation):
            return f"{activation}({inputs[0]}) * {inputs[1]}"
        case Scale(factor=factor):
            return f"{factor:g} * {inputs[0]}"
        case PositionScale(strength=strength, period=period):
            return f"(1 + {strength:g} * ln(1 + position // {period})) * {inputs[0]}"
        case Softcap(cap=cap):
            return f"{cap:g} * tanh({inputs[0]} / {cap:g})"
        case SelectRows():
            return f"the rows of {inputs[0]} whose logits are wanted"
    return f"{operator.kind}({', '.join(inputs)})"


def _rope(rope: Rope, src: str) -> str:
    part = f"{rope.dims} of {rope.head_dim}" if rope.dims != rope.head_dim else f"{rope.head_dim}"
    pairs = "adjacent pairs" if rope.style == "adjacent" else "split halves"
    scaling = f", {rope.scaling.type} x {rope.scaling.factor:g}" if rope.scaling is not None else ""
    factors = f", frequencies / {_weight(rope.factors)}" if rope.factors is not None else ""
    if rope.long_factors is not None and rope.scaling is not None:
        factors += f" (beyond a context of {rope.scaling.original_context}, / {_weight(rope.long_factors)})"
    return f"rope({src}: {counted(rope.num_heads, 'head')} of {part}, {pairs}, base {rope.base:g}{scaling}{factors})"


def _attention(attention: Attention, query: str) -> str:
    window = f", the last {attention.window} tokens" if attention.window else ""
    cap = f", softcap {attention.softcap:g}" if attention.softcap else ""
    return (
        f"attention({query}: {counted(attention.num_heads, 'head')} of {attention.head_dim} "
        f"on {counted(attention.num_kv_heads, 'KV head')}, "
        f"scale {attention.scale:g}{cap}{window})"
    )


def _weight(weight: WeightRef) -> str:
    """The weight's role, its extents, and which rows where it is a part."""
    rows = "" if weight.is_whole else f" rows {weight.row_start}..{weight.row_stop - 1}"
    return f"{weight.role}[{' x '.join(map(str, weight.shape))}{rows}]"
