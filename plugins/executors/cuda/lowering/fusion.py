"""Groups a program's operators into what one kernel does. Knows operators, not models: any contract gets what applies.

A group is a linear map or several of one input, with the norm before them and what follows each. Everything else stays
by itself. Groups come out in an order in which each reads only what earlier ones wrote.
"""

from __future__ import annotations

from collections.abc import Sequence

from attrs import define, field, frozen

from mortice.core.model.operators import (
    Act,
    Add,
    AddBias,
    Attention,
    Buffer,
    GatedAct,
    KvWrite,
    Linear,
    Norm,
    Operator,
    Rope,
)

__all__ = ["Group", "LinearGroup", "PlaceGroup", "SingleGroup", "fuse", "name_of"]

MAX_SEGMENTS = 4
"""Linear maps of one launch; as in ``ops/gemv.cu``."""


@frozen(kw_only=True)
class SingleGroup:
    """An operator by itself."""

    operator: Operator

    @property
    def outputs(self) -> tuple[Buffer, ...]:
        """The buffers written."""
        return self.operator.outputs

    @property
    def operators(self) -> tuple[Operator, ...]:
        """The operators done here."""
        return (self.operator,)


@frozen(kw_only=True)
class LinearGroup:
    """Linear maps of one input.

    Attributes:
        norm: the norm of the input, if it is done here.
        linears: the maps.
        biases: for each map the bias added to it, or None.
        gated: the gated activation of the first two maps, if it is done here.
        act: the activation of the only map, if it is done here.
        residual: the addition the only map ends in, if it is done here.
        attention: the attention whose result the maps, and nothing else, read as it is; or None.

    """

    norm: Norm | None
    linears: tuple[Linear, ...]
    biases: tuple[AddBias | None, ...]
    gated: GatedAct | None = None
    act: Act | None = None
    residual: Add | None = None
    attention: Attention | None = None

    @property
    def source(self) -> Buffer:
        """The buffer read: what the norm reads where it is done here."""
        return self.norm.src if self.norm is not None else self.linears[0].src

    @property
    def outputs(self) -> tuple[Buffer, ...]:
        """The buffers written, one for each map, or one in all."""
        if self.gated is not None:
            return (self.gated.out,)
        if self.residual is not None:
            return (self.residual.out,)
        if self.act is not None:
            return (self.act.out,)
        return tuple(bias.out if bias else linear.out for linear, bias in zip(self.linears, self.biases, strict=True))

    @property
    def activation(self) -> str | None:
        """The activation done here, gated or not."""
        part = self.gated or self.act
        return part.activation if part is not None else None

    @property
    def added(self) -> Buffer | None:
        """The other side of the residual addition."""
        if self.residual is None:
            return None
        own = self.biases[0].out if self.biases[0] else self.linears[0].out
        return self.residual.b if self.residual.a == own else self.residual.a

    @property
    def operators(self) -> tuple[Operator, ...]:
        """The operators done here."""
        parts = (self.norm, *self.linears, *self.biases, self.gated, self.act, self.residual)
        return tuple(part for part in parts if part is not None)


@frozen(kw_only=True)
class PlaceGroup:
    """What brings Q, K and V into their places before attention: per-head norms, RoPE, the write to the cache.

    Attributes:
        q_norm: the norm of Q's heads, or None.
        k_norm: the norm of K's heads, or None; both or neither.
        q_rope: RoPE of Q, or None.
        k_rope: RoPE of K, or None; both or neither, of the same constants.
        write: the write to the cache.
        attention: what reads Q.

    """

    q_norm: Norm | None
    k_norm: Norm | None
    q_rope: Rope | None
    k_rope: Rope | None
    write: KvWrite
    attention: Attention

    @property
    def sources(self) -> tuple[Buffer, Buffer, Buffer]:
        """Q, K and V as the linear maps left them."""
        q = self.q_norm or self.q_rope
        k = self.k_norm or self.k_rope
        return (q.src if q else self.attention.src, k.src if k else self.write.k, self.write.v)

    @property
    def outputs(self) -> tuple[Buffer, ...]:
        """Q as attention reads it."""
        return (self.attention.src,)

    @property
    def operators(self) -> tuple[Operator, ...]:
        """The operators done here."""
        parts = (self.q_norm, self.q_rope, self.k_norm, self.k_rope, self.write)
        return tuple(part for part in parts if part is not None)


Group = SingleGroup | LinearGroup | PlaceGroup


def name_of(operators: Sequence[Operator]) -> str:
    """What a launch that does all of them is called, in tables and errors."""
    return "+".join(operator.name for operator in operators)


def fuse(operators: Sequence[Operator], result: Buffer) -> list[Group]:
    """Group `operators`; `result` is read from outside and so is always written."""
    return _Fusion(operators, result).run()


@define(eq=False)
class _Fusion:
    operators: Sequence[Operator]
    result: Buffer
    readers: dict[Buffer, list[Operator]] = field(factory=dict, init=False)
    written_at: dict[Buffer, int] = field(factory=dict, init=False)
    place_groups: dict[int, PlaceGroup] = field(factory=dict, init=False)
    placed: set[int] = field(factory=set, init=False)

    def __attrs_post_init__(self) -> None:
        for place, operator in enumerate(self.operators):
            for buffer in operator.inputs:
                self.readers.setdefault(buffer, []).append(operator)
            for buffer in operator.outputs:
                self.written_at[buffer] = place
        self._find_place_groups()

    def run(self) -> list[Group]:
        groups: list[Group] = []
        done: set[int] = set()
        for place, operator in enumerate(self.operators):
            if id(operator) in done or id(operator) in self.placed or self._waits_for_linears(operator):
                continue
            group: Group = SingleGroup(operator=operator)
            if isinstance(operator, Linear):
                group = self._linear_group(operator, place)
            elif isinstance(operator, KvWrite) and id(operator) in self.place_groups:
                group = self.place_groups[id(operator)]
            groups.append(group)
            done.update(id(part) for part in group.operators)
        return groups

    def _find_place_groups(self) -> None:
        """Finds them first: their norms and RoPEs stand before the write that carries the group."""
        for operator in self.operators:
            if isinstance(operator, KvWrite):
                group = self._place_group(operator)
                if group is not None:
                    self.place_groups[id(operator)] = group
                    self.placed.update(id(part) for part in group.operators if part is not operator)

    def _place_group(self, write: KvWrite) -> PlaceGroup | None:
        attention = next((o for o in self.operators if isinstance(o, Attention) and o.layer == write.layer), None)
        if attention is None:
            return None
        q_norm, q_rope, q = self._head_chain(attention.src)
        k_norm, k_rope, k = self._head_chain(write.k)
        group = PlaceGroup(q_norm=q_norm, k_norm=k_norm, q_rope=q_rope, k_rope=k_rope, write=write, attention=attention)
        same_rope = (q_rope is None) == (k_rope is None) and (
            q_rope is None
            or k_rope is None
            or (q_rope.dims, q_rope.style, q_rope.base, q_rope.scaling, q_rope.factors)
            == (k_rope.dims, k_rope.style, k_rope.base, k_rope.scaling, k_rope.factors)
        )
        same_norm = (q_norm is None) == (k_norm is None) and (
            q_norm is None or k_norm is None or q_norm.type == k_norm.type
        )
        if not group.operators[:-1] or not same_rope or not same_norm or q == k:
            return None
        return group

    def _head_chain(self, end: Buffer) -> tuple[Norm | None, Rope | None, Buffer]:
        """The per-head norm and the RoPE that lead to `end`, each read by nothing else, and what they begin with."""
        norm = rope = None
        producer = self._producer(end)
        if isinstance(producer, Rope) and self._only_reader(end) is not None:
            rope, end = producer, producer.src
            producer = self._producer(end)
        heads = rope.num_heads if rope is not None else 0
        if (
            isinstance(producer, Norm)
            and producer.groups > 1
            and producer.groups in (heads, heads or producer.groups)
            and producer.bias is None
            and producer.weight.rows == producer.src.width // producer.groups
            and len(producer.weight.shape) == 1
            and self._only_reader(end) is not None
        ):
            norm, end = producer, producer.src
        return norm, rope, end

    def _producer(self, buffer: Buffer) -> Operator | None:
        return self.operators[self.written_at[buffer]] if buffer in self.written_at else None

    def _waits_for_linears(self, operator: Operator) -> bool:
        """Whether a norm is done in the group of the linear maps that read it, and nowhere else."""
        if not isinstance(operator, Norm) or operator.groups != 1 or operator.out == self.result:
            return False
        readers = self.readers.get(operator.out, [])
        return 0 < len(readers) <= MAX_SEGMENTS and all(isinstance(reader, Linear) for reader in readers)

    def _only_reader(self, buffer: Buffer) -> Operator | None:
        readers = self.readers.get(buffer, [])
        return readers[0] if len(readers) == 1 and buffer != self.result else None

    def _linear_group(self, first: Linear, place: int) -> LinearGroup:
        siblings = [reader for reader in self.readers[first.src] if isinstance(reader, Linear)]
        linears = tuple(siblings if len(siblings) <= MAX_SEGMENTS else [first])
        producer = self._producer(first.src)
        norm = producer if isinstance(producer, Norm) and self._waits_for_linears(producer) else None
        biases = tuple(self._bias(linear) for linear in linears)
        ends = [bias.out if bias else linear.out for linear, bias in zip(linears, biases, strict=True)]
        gated = act = residual = None
        if len(linears) == 2:
            reader = self._only_reader(ends[0])
            if isinstance(reader, GatedAct) and reader is self._only_reader(ends[1]):
                gated = reader
                if reader.gate != ends[0]:  # the kernel takes the gate first
                    linears, biases = linears[::-1], biases[::-1]
        elif len(linears) == 1:
            reader = self._only_reader(ends[0])
            if isinstance(reader, Act):
                act = reader
            elif isinstance(reader, Add) and reader.a != reader.b:
                other = reader.b if reader.a == ends[0] else reader.a
                residual = reader if self.written_at[other] < place else None
        attention = producer if isinstance(producer, Attention) and self._reads_alone(linears, first.src) else None
        return LinearGroup(
            norm=norm, linears=linears, biases=biases, gated=gated, act=act, residual=residual, attention=attention
        )

    def _reads_alone(self, linears: tuple[Linear, ...], buffer: Buffer) -> bool:
        return len(self.readers[buffer]) == len(linears) and buffer != self.result

    def _bias(self, linear: Linear) -> AddBias | None:
        reader = self._only_reader(linear.out)
        return reader if isinstance(reader, AddBias) else None
