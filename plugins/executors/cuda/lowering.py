"""Lowers a program to kernel launches: the same lowering for one token and for many.

A launch is described by what it runs and where its arguments lie; nothing here depends on a token, a position or a
length. Those are read by the kernels from the step's rows on the device.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from attrs import define, evolve, field, frozen

from mortice.core.errors import ExecutionError
from mortice.core.model import operators as op
from mortice.core.model.operators import Buffer, Operator, WeightRef
from mortice.core.model.program import Program
from mortice.core.model.weight_plan import WeightPlan
from mortice.plugins.executors.cuda.fusion import Group, LinearGroup, PlaceGroup, fuse
from mortice.plugins.executors.cuda.layouts import tile_geometry
from mortice.plugins.executors.cuda.nvrtc import Source
from mortice.plugins.executors.cuda.sources import GEMV_THREADS, KernelSources
from mortice.plugins.executors.cuda.workspace import Workspace, place_buffers

__all__ = [
    "LOGIT_ROWS",
    "TOKEN_TILES",
    "Addresses",
    "LaunchSpec",
    "Lowering",
    "StepRows",
    "place_program",
    "rope_key",
    "scratch_bytes",
]

TOKEN_TILES = (1, 8)
"""Tokens one pass over the weights serves; a step takes the smallest that holds its rows, or several passes."""

_ACT_KINDS = {"silu": 1, "gelu_tanh": 2, "gelu_erf": 3, "relu": 4, "relu_squared": 5}
LOGIT_ROWS = 8
"""Rows the head runs over at once; the logits of more are taken in several runs."""

_PARTIAL_ROWS = 8
"""Rows whose attention may be split along the context; steps of more rows fill the card without."""

Pointer, Int, Float = ctypes.c_uint64, ctypes.c_int32, ctypes.c_float


class StepRows(ctypes.Structure):
    """Mirror of ``StepRows`` in ``ops/kv_cache.cuh``."""

    _fields_ = [(name, Pointer) for name in ("token_ids", "positions", "tables", "pages")]


class _SegmentArgs(ctypes.Structure):
    _fields_ = [(name, Pointer) for name in ("weight", "bias", "residual", "out")]


class _GemvArgs(ctypes.Structure):
    _fields_ = [
        ("x", Pointer),
        ("norm_weight", Pointer),
        ("norm_bias", Pointer),
        ("norm_eps", Float),
        ("segments", _SegmentArgs * 4),
    ]


class _AttentionArgs(ctypes.Structure):
    _fields_ = [
        *((name, Pointer) for name in ("q", "keys", "values", "out", "partial", "arrivals")),
        ("rows", StepRows),
        ("scale", Float),
        ("softcap", Float),
        ("window", Int),
        ("splits", Int),
    ]


class _PlaceArgs(ctypes.Structure):
    _fields_ = [
        *((name, Pointer) for name in ("q", "k", "v", "q_out", "keys", "values", "q_norm", "k_norm", "frequencies")),
        ("rows", StepRows),
        *((name, Float) for name in ("q_eps", "k_eps", "magnitude")),
    ]


@frozen(eq=False, kw_only=True)
class Addresses:
    """Where things lie on the device.

    Attributes:
        weights: address of each planned weight, by its reference.
        workspace: start of the workspace.
        keys: start of each layer's K pages.
        values: start of each layer's V pages.
        rows: the step's rows.
        selected: row numbers for `SelectRows`.
        partial: scratch of split attention.
        arrivals: counters of split attention.
        frequencies: RoPE's tables by (operator's constants).

    """

    weights: Mapping[WeightRef, int]
    workspace: int
    keys: Sequence[int]
    values: Sequence[int]
    rows: StepRows
    selected: int
    partial: int
    arrivals: int
    frequencies: Mapping[object, tuple[int, float]]


@frozen(eq=False, kw_only=True)
class LaunchSpec:
    """One kernel launch: source and entry, and what it needs at a number of rows.

    Attributes:
        name: the operators done, for tables and errors.
        label: what kind of work it is, to add up equal ones.
        source: what is compiled.
        entry: the kernel's name.
        block: threads.
        shared_symbol: the constant of the source that says how much dynamic shared memory it wants; none without.
        grid: blocks for (rows, blocks the card runs at once).
        args: arguments for (addresses, rows).
        outputs: the buffers that are complete when it is done.

    """

    name: str
    label: str
    source: Source
    entry: str
    block: int
    shared_symbol: str = ""
    grid: Callable[[int, int], tuple[int, int, int]]
    args: Callable[[Addresses, int], tuple[Any, ...]]
    outputs: tuple[Buffer, ...] = ()


def place_program(program: Program, rows: int) -> tuple[list[Group], Workspace]:
    """The groups of a program, and where their buffers lie for `rows` tokens.

    What the head writes has room for `LOGIT_ROWS` only: the logits of a whole prompt would dwarf everything else.
    """
    groups = fuse(program.operators, program.logits)
    uses: list[tuple[Sequence[Buffer], Sequence[Buffer]]] = []
    few: set[Buffer] = set()
    in_head = False
    for group in groups:
        if isinstance(group, LinearGroup):
            added = (group.added,) if group.added is not None else ()
            uses.append(((group.source, *added), group.outputs))
        elif isinstance(group, PlaceGroup):
            uses.append((group.sources, group.outputs))
        else:
            in_head = in_head or isinstance(group.operator, op.SelectRows)
            uses.append((group.operator.inputs, group.operator.outputs))
        if in_head:
            few.update(uses[-1][1])
    padded = -(-rows // TOKEN_TILES[-1]) * TOKEN_TILES[-1]
    return groups, place_buffers(uses, lambda buffer: LOGIT_ROWS if buffer in few else padded, [program.logits])


def attention_splits(program: Program, sm_count: int) -> int:
    """Parts the context of one row is attended in at most: enough to give every multiprocessor two blocks."""
    kv_heads = min(shape.num_kv_heads for shape in program.kv)
    return max(1, min(64, -(-2 * sm_count // kv_heads)))


def scratch_bytes(program: Program, sm_count: int, rows: int) -> tuple[int, int]:
    """Bytes of split attention's partial sums, and of its counters."""
    attentions = [o for o in program.operators if isinstance(o, op.Attention)]
    widest = max((o.num_heads * (o.head_dim + 2) for o in attentions), default=1)
    heads = max((o.num_kv_heads for o in attentions), default=1)
    return 4 * _PARTIAL_ROWS * attention_splits(program, sm_count) * widest, 4 * rows * heads


@define(eq=False)
class Lowering:
    """The launches of a program.

    Attributes:
        plan: the weights.
        sources: makes kernel sources.
        rows: most rows of a step.
        kv_type: element type of the cache.
        sm_count: multiprocessors of the card.
        quantize_activations: whether products with quantised weights take int8 activations.

    """

    plan: WeightPlan
    sources: KernelSources
    rows: int
    kv_type: str
    sm_count: int
    quantize_activations: bool = True
    groups: list[Group] = field(init=False, repr=False)
    workspace: Workspace = field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        self.groups, self.workspace = place_program(self.plan.program, self.rows)
        self._planned = {planned.weight: planned for planned in self.plan.weights}

    _planned: dict[WeightRef, Any] = field(init=False, repr=False)

    @property
    def splits(self) -> int:
        """Parts a row's context is attended in at most."""
        return attention_splits(self.plan.program, self.sm_count)

    def launches(self, tokens: int) -> tuple[list[LaunchSpec], list[LaunchSpec]]:
        """The launches of the body and of the head, for steps of up to `tokens` rows a pass (of `TOKEN_TILES`)."""
        body: list[LaunchSpec] = []
        head: list[LaunchSpec] = []
        target = body
        for group in self.groups:
            if isinstance(group, LinearGroup):
                specs, outputs = self._linear(group, tokens), group.outputs
            elif isinstance(group, PlaceGroup):
                specs, outputs = [self._place(group)], group.outputs
            else:
                if isinstance(group.operator, op.SelectRows):
                    target = head
                specs, outputs = [self._single(group.operator)], group.operator.outputs
            target += (*specs[:-1], evolve(specs[-1], outputs=outputs))
        return body, head

    # linear maps ------------------------------------------------------------------------------------------------

    def _linear(self, group: LinearGroup, tokens: int) -> list[LaunchSpec]:
        weights = [self._planned[linear.weight] for linear in group.linears]
        columns = weights[0].columns
        source = self.sources.gemv(
            weights,
            columns=columns,
            tokens=tokens,
            norm=group.norm,
            gated=group.gated is not None,
            activation=group.gated.activation if group.gated else group.act.activation if group.act else None,
            quantize_activations=self.quantize_activations,
        )
        units = sum(tile_geometry(w.tensor.qtype, w.rows, w.columns).row_groups for w in weights)
        units = units // 2 if group.gated else units

        def args(at: Addresses, _: int) -> tuple[Any, ...]:
            return (self._gemv_args(group, at),)

        return [
            LaunchSpec(
                name="+".join(operator.name for operator in group.operators),
                label=f"linear {'+'.join(dict.fromkeys(weight.tensor.qtype.name for weight in weights))}",
                source=source,
                entry="gemv",
                block=GEMV_THREADS,
                shared_symbol="shared_bytes",
                grid=lambda rows, at_once: (min(at_once, -(-units // (GEMV_THREADS // 32))), -(-rows // tokens), 1),
                args=args,
            )
        ]

    def _gemv_args(self, group: LinearGroup, at: Addresses) -> _GemvArgs:
        args = _GemvArgs(x=self._buffer(at, group.source))
        if group.norm is not None:
            args.norm_weight = at.weights[group.norm.weight]
            args.norm_bias = at.weights[group.norm.bias] if group.norm.bias is not None else 0
            args.norm_eps = group.norm.eps
        outputs = group.outputs if len(group.outputs) == len(group.linears) else group.outputs * len(group.linears)
        for segment, linear, bias, out in zip(args.segments, group.linears, group.biases, outputs, strict=False):
            segment.weight = at.weights[linear.weight]
            segment.bias = at.weights[bias.weight] if bias is not None else 0
            segment.residual = self._buffer(at, group.added) if group.added is not None else 0
            segment.out = self._buffer(at, out)
        return args

    def _buffer(self, at: Addresses, buffer: Buffer) -> int:
        return at.workspace + self.workspace.offsets[buffer]

    # everything else --------------------------------------------------------------------------------------------

    def _single(self, o: Operator) -> LaunchSpec:  # noqa: C901 (one case an operator)
        match o:
            case op.Embed():
                return self._embed(o, o.weight, o.out, "token_ids")
            case op.EmbedPositions():
                return self._embed(o, o.weight, o.out, "positions")
            case op.Norm():
                return self._norm(o)
            case op.Linear():
                raise AssertionError("linear maps are always in a group")
            case op.AddBias():
                return self._elementwise(
                    o, o.out, lambda at: (self._p(at, o.src), Pointer(at.weights[o.weight]), self._p(at, o.out))
                )
            case op.Rope():
                return self._rope(o)
            case op.KvWrite():
                return self._kv_write(o)
            case op.Attention():
                return self._attention(o)
            case op.Add():
                return self._elementwise(o, o.out, lambda at: (self._p(at, o.a), self._p(at, o.b), self._p(at, o.out)))
            case op.Act():
                kind = Int(_ACT_KINDS[o.activation])
                return self._elementwise(o, o.out, lambda at: (self._p(at, o.src), self._p(at, o.out), kind))
            case op.GatedAct():
                kind = Int(_ACT_KINDS[o.activation])
                return self._elementwise(
                    o, o.out, lambda at: (self._p(at, o.gate), self._p(at, o.up), self._p(at, o.out), kind)
                )
            case op.Scale():
                return self._elementwise(o, o.out, lambda at: (self._p(at, o.src), self._p(at, o.out), Float(o.factor)))
            case op.Softcap():
                return self._elementwise(o, o.out, lambda at: (self._p(at, o.src), self._p(at, o.out), Float(o.cap)))
            case op.SelectRows():
                return self._elementwise(
                    o, o.out, lambda at: (self._p(at, o.src), Pointer(at.selected), self._p(at, o.out))
                )
        raise ExecutionError(f"{o.name}: the CUDA executor has no {o.kind!r}")

    def _p(self, at: Addresses, buffer: Buffer) -> ctypes.c_uint64:
        return Pointer(self._buffer(at, buffer))

    def _elementwise(self, o: Operator, out: Buffer, args: Callable[[Addresses], tuple[Any, ...]]) -> LaunchSpec:
        return LaunchSpec(
            name=o.name,
            label=o.kind,
            source=self.sources.plain(),
            entry=f"op_{o.kind}",
            block=256,
            grid=lambda rows, _: (-(-out.width // 256), rows, 1),
            args=lambda at, _: (*args(at), Int(out.width)),
        )

    def _embed(self, o: Operator, weight: WeightRef, out: Buffer, ids: str) -> LaunchSpec:
        return LaunchSpec(
            name=o.name,
            label=o.kind,
            source=self.sources.embed(self._planned[weight]),
            entry="embed",
            block=128,
            grid=lambda rows, _: (rows, 1, 1),
            args=lambda at, _: (Pointer(at.weights[weight]), Pointer(getattr(at.rows, ids)), self._p(at, out)),
        )

    def _norm(self, o: op.Norm) -> LaunchSpec:
        width = o.src.width // o.groups
        per_row = o.weight.rows != width

        def args(at: Addresses, _: int) -> tuple[Any, ...]:
            bias = Pointer(at.weights[o.bias] if o.bias is not None else 0)
            head = (self._p(at, o.src), Pointer(at.weights[o.weight]), bias, self._p(at, o.out))
            return (*head, Float(o.eps), Int(width), Int(o.type == "layer"), Int(per_row))

        return LaunchSpec(
            name=o.name,
            label=o.kind,
            source=self.sources.plain(),
            entry="op_norm",
            block=256,
            grid=lambda rows, _: (o.groups, rows, 1),
            args=args,
        )

    def _rope(self, o: op.Rope) -> LaunchSpec:
        def args(at: Addresses, _: int) -> tuple[Any, ...]:
            table, magnitude = at.frequencies[rope_key(o)]
            pointers = (self._p(at, o.src), Pointer(table), Pointer(at.rows.positions), self._p(at, o.out))
            return (*pointers, Float(magnitude), Int(o.head_dim), Int(o.dims), Int(o.style == "halves"))

        return LaunchSpec(
            name=o.name,
            label=o.kind,
            source=self.sources.plain(),
            entry="op_rope",
            block=64,
            grid=lambda rows, _: (o.num_heads, rows, 1),
            args=args,
        )

    def _kv_write(self, o: op.KvWrite) -> LaunchSpec:
        assert o.layer is not None
        layer = o.layer
        return LaunchSpec(
            name=o.name,
            label=o.kind,
            source=self.sources.kv_write(self.kv_type),
            entry="kv_write",
            block=128,
            grid=lambda rows, _: (o.num_kv_heads, rows, 1),
            args=lambda at, _: (
                self._p(at, o.k),
                self._p(at, o.v),
                Pointer(at.keys[layer]),
                Pointer(at.values[layer]),
                at.rows,
                Int(o.head_dim),
            ),
        )

    def _place(self, group: PlaceGroup) -> LaunchSpec:
        write = group.write
        assert write.layer is not None
        layer = write.layer

        def args(at: Addresses, _: int) -> tuple[Any, ...]:
            q, k, v = group.sources
            filled = _PlaceArgs(
                q=self._buffer(at, q),
                k=self._buffer(at, k),
                v=self._buffer(at, v),
                q_out=self._buffer(at, group.outputs[0]),
                keys=at.keys[layer],
                values=at.values[layer],
                rows=at.rows,
            )
            if group.q_norm is not None and group.k_norm is not None:
                filled.q_norm, filled.q_eps = at.weights[group.q_norm.weight], group.q_norm.eps
                filled.k_norm, filled.k_eps = at.weights[group.k_norm.weight], group.k_norm.eps
            if group.q_rope is not None:
                filled.frequencies, filled.magnitude = at.frequencies[rope_key(group.q_rope)]
            return (filled,)

        return LaunchSpec(
            name="+".join(operator.name for operator in group.operators),
            label="place",
            source=self.sources.place(group, self.kv_type),
            entry="place",
            block=64,
            grid=lambda rows, _: (group.attention.num_heads + write.num_kv_heads, rows, 1),
            args=args,
        )

    def _attention(self, o: op.Attention) -> LaunchSpec:
        assert o.layer is not None
        layer = o.layer

        def splits(rows: int) -> int:
            return max(1, self.splits // rows) if rows <= _PARTIAL_ROWS else 1

        def args(at: Addresses, rows: int) -> tuple[Any, ...]:
            filled = _AttentionArgs(
                q=self._buffer(at, o.src),
                keys=at.keys[layer],
                values=at.values[layer],
                out=self._buffer(at, o.out),
                partial=at.partial,
                arrivals=at.arrivals,
                rows=at.rows,
                scale=o.scale,
                softcap=o.softcap,
                window=o.window,
                splits=splits(rows),
            )
            return (filled,)

        return LaunchSpec(
            name=o.name,
            label=o.kind,
            source=self.sources.attention(o, self.kv_type, self.splits),
            entry="attention",
            block=128,
            grid=lambda rows, _: (splits(rows), o.num_kv_heads, rows),
            args=args,
        )


def rope_key(o: op.Rope) -> object:
    """What a RoPE table depends on."""
    return (o.dims, o.base, o.scaling, o.factors)
