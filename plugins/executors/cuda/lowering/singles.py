"""Lowers operators that no group takes along: one launch each."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from typing import Any

from attrs import field, frozen

from mortice.core.errors import ExecutionError
from mortice.core.model import operators as op
from mortice.core.model.operators import Buffer, Operator, WeightRef
from mortice.core.model.weight_plan import PlannedWeight
from mortice.plugins.executors.cuda.lowering.launches import Addresses, LaunchSpec, rope_key
from mortice.plugins.executors.cuda.lowering.sources import KernelSources

__all__ = ["SingleLowering"]

_ACT_KINDS = {"silu": 1, "gelu_tanh": 2, "gelu_erf": 3, "relu": 4, "relu_squared": 5}

Pointer, Int, Float = ctypes.c_uint64, ctypes.c_int32, ctypes.c_float


@frozen(eq=False, kw_only=True)
class SingleLowering:
    """The launches of single operators.

    Attributes:
        sources: makes kernel sources.
        planned: the weights.
        kv_type: element type of the cache.
        buffer: where a buffer lies.

    """

    sources: KernelSources
    planned: Mapping[WeightRef, PlannedWeight] = field(repr=False)
    kv_type: str
    buffer: Callable[[Addresses, Buffer], int] = field(repr=False)

    def launch(self, o: Operator) -> LaunchSpec:  # noqa: C901 (one case an operator)
        """The launch of an operator.

        Raises:
            ExecutionError: when there is no kernel for its kind.

        """
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
            case op.PositionScale():
                return self._elementwise(
                    o,
                    o.out,
                    lambda at: (
                        self._p(at, o.src),
                        Pointer(at.rows.positions),
                        self._p(at, o.out),
                        Float(o.strength),
                        Int(o.period),
                    ),
                )
            case op.Softcap():
                return self._elementwise(o, o.out, lambda at: (self._p(at, o.src), self._p(at, o.out), Float(o.cap)))
            case op.SelectRows():
                return self._elementwise(
                    o, o.out, lambda at: (self._p(at, o.src), Pointer(at.selected), self._p(at, o.out))
                )
        raise ExecutionError(f"{o.name}: the CUDA executor has no {o.kind!r}")

    def _p(self, at: Addresses, buffer: Buffer) -> ctypes.c_uint64:
        return Pointer(self.buffer(at, buffer))

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
            source=self.sources.embed(self.planned[weight]),
            entry="embed",
            block=128,
            grid=lambda rows, _: (rows, 1, 1),
            args=lambda at, _: (Pointer(at.weights[weight]), Pointer(getattr(at.rows, ids)), self._p(at, out)),
        )

    def _norm(self, o: op.Norm) -> LaunchSpec:
        width = o.src.width // o.groups
        per_row = o.weight.rows * o.weight.columns != width

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
