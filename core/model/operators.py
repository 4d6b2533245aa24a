"""The typed operators a program is made of, and what they read and write.

A forward pass is a list of these and nothing else. Values live in buffers: named, written once, float32, one row a
token. Sizes and constants are plain numbers here, so that an executor needs neither contract nor file.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from attrs import frozen

__all__ = [
    "OPERATOR_KINDS",
    "Act",
    "Activation",
    "Add",
    "AddBias",
    "Attention",
    "Buffer",
    "Embed",
    "EmbedPositions",
    "GatedAct",
    "KvWrite",
    "Linear",
    "Norm",
    "NormType",
    "Operator",
    "PositionScale",
    "Rope",
    "RopeScaling",
    "Scale",
    "SelectRows",
    "Softcap",
    "WeightRef",
]

Activation = Literal["silu", "gelu_tanh", "gelu_erf", "relu", "relu_squared"]
NormType = Literal["rms", "layer"]


@frozen
class Buffer:
    """A value of the forward pass: float32, shape (tokens of the step, `width`)."""

    name: str
    width: int


@frozen(kw_only=True)
class WeightRef:
    """A weight, or the rows of a fused one that an operator uses.

    Attributes:
        role: the role in the contract (``attn_q``); for a fused tensor the role of the part, not of the whole.
        layer: the layer, None for a global role.
        tensor: exact tensor name in the file.
        shape: extents of the whole tensor, rows first.
        row_start: first row used (0 for a tensor of its own).
        row_stop: one past the last row used. For a vector the rows are its elements.

    """

    role: str
    layer: int | None
    tensor: str
    shape: tuple[int, ...]
    row_start: int = 0
    row_stop: int

    @property
    def rows(self) -> int:
        """Rows used."""
        return self.row_stop - self.row_start

    @property
    def columns(self) -> int:
        """Length of a row (1 for a vector)."""
        return self.shape[-1] if len(self.shape) > 1 else 1

    @property
    def is_whole(self) -> bool:
        """Whether the operator uses the whole tensor."""
        return self.row_start == 0 and self.row_stop == self.shape[0]


@frozen(kw_only=True)
class Operator:
    """Base of all operators.

    Attributes:
        layer: the layer it belongs to; None before the first and after the last.
        name: unique within the program, for tables and errors (``layers.3.attn_q``).

    """

    kind: ClassVar[str] = ""
    layer: int | None = None
    name: str = ""

    @property
    def inputs(self) -> tuple[Buffer, ...]:
        """Buffers read."""
        return ()

    @property
    def outputs(self) -> tuple[Buffer, ...]:
        """Buffers written; each buffer is written by one operator of the program."""
        return ()

    @property
    def weights(self) -> tuple[WeightRef, ...]:
        """Weights read, in a fixed order of the kind; absent ones are left out."""
        return ()


@frozen(kw_only=True)
class _Unary(Operator):
    src: Buffer
    out: Buffer

    @property
    def inputs(self) -> tuple[Buffer, ...]:
        return (self.src,)

    @property
    def outputs(self) -> tuple[Buffer, ...]:
        return (self.out,)


@frozen(kw_only=True)
class Embed(Operator):
    """``out[t] = weight[token_ids[t]]``; weight (vocab_size, hidden_size)."""

    kind: ClassVar[str] = "embed"
    out: Buffer
    weight: WeightRef

    @property
    def outputs(self) -> tuple[Buffer, ...]:
        return (self.out,)

    @property
    def weights(self) -> tuple[WeightRef, ...]:
        return (self.weight,)


@frozen(kw_only=True)
class EmbedPositions(Operator):
    """``out[t] = weight[positions[t]]``: learned positions; weight (context_length, hidden_size)."""

    kind: ClassVar[str] = "embed_positions"
    out: Buffer
    weight: WeightRef

    @property
    def outputs(self) -> tuple[Buffer, ...]:
        return (self.out,)

    @property
    def weights(self) -> tuple[WeightRef, ...]:
        return (self.weight,)


@frozen(kw_only=True)
class Norm(_Unary):
    """Normalises each of `groups` equal parts of a row by itself, then applies weight and bias.

    ``rms``: ``x / sqrt(mean(x²) + eps)`` (Zhang and Sennrich 2019); ``layer``: ``(x - mean) / sqrt(var + eps)``
    (Ba et al. 2016). The weight has one element for each of a part, or for each of the row (then parts differ).
    With one group this is a norm of the residual stream, with num_heads groups a per-head norm.
    """

    kind: ClassVar[str] = "norm"
    type: NormType
    eps: float
    groups: int = 1
    weight: WeightRef
    bias: WeightRef | None = None

    @property
    def weights(self) -> tuple[WeightRef, ...]:
        return (self.weight,) if self.bias is None else (self.weight, self.bias)


@frozen(kw_only=True)
class Linear(_Unary):
    """``out = src @ weight.T``; weight (rows = out.width, columns = src.width)."""

    kind: ClassVar[str] = "linear"
    weight: WeightRef

    @property
    def weights(self) -> tuple[WeightRef, ...]:
        return (self.weight,)


@frozen(kw_only=True)
class AddBias(_Unary):
    """``out = src + weight``; weight (width,)."""

    kind: ClassVar[str] = "add_bias"
    weight: WeightRef

    @property
    def weights(self) -> tuple[WeightRef, ...]:
        return (self.weight,)


@frozen(kw_only=True)
class RopeScaling:
    """Context extension of RoPE: ``linear`` (Chen et al. 2023) or ``yarn`` (Peng et al. 2023).

    LongRoPE (Ding et al. 2024), which has a table of divisors instead of one factor, is ``linear`` with a factor of 1
    here: its tables are weights, see `Rope`.

    Attributes:
        type: which.
        factor: how many times the original context is stretched.
        original_context: tokens the model was trained on (yarn, and the choice between two tables of divisors).
        attn_factor: multiplies sine and cosine, and so the magnitude of Q and K.
        log_multiplier: the share of YaRN's own magnitude that is taken back; 0 leaves it, 1 takes all of it.
        beta_fast: rotations above which a dimension is left as it is (yarn).
        beta_slow: rotations below which a dimension is interpolated fully (yarn).

    """

    type: Literal["linear", "yarn"]
    factor: float
    original_context: int = 0
    attn_factor: float = 1.0
    log_multiplier: float = 0.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0


@frozen(kw_only=True)
class Rope(_Unary):
    """Rotates the first `dims` elements of each head by position (Su et al. 2021).

    Pair p turns by ``position * frequency[p]``; the frequencies come from `mortice.core.model.rope`. A pair is
    (2p, 2p + 1) for ``adjacent`` and (p, p + dims / 2) for ``halves``. `factors`, shape (dims / 2,), divide the
    frequencies; `long_factors` take their place in a run whose context is longer than the scaling's original one.
    """

    kind: ClassVar[str] = "rope"
    num_heads: int
    head_dim: int
    dims: int
    style: Literal["adjacent", "halves"]
    base: float
    scaling: RopeScaling | None = None
    factors: WeightRef | None = None
    long_factors: WeightRef | None = None

    @property
    def weights(self) -> tuple[WeightRef, ...]:
        return tuple(weight for weight in (self.factors, self.long_factors) if weight is not None)

    def factors_for(self, context_length: int) -> WeightRef | None:
        """The divisors of the frequencies in a run that holds up to `context_length` tokens, None for none."""
        if self.long_factors is None or self.scaling is None or context_length <= self.scaling.original_context:
            return self.factors
        return self.long_factors


@frozen(kw_only=True)
class KvWrite(Operator):
    """Stores K and V of the step's tokens at their positions in the layer's cache."""

    kind: ClassVar[str] = "kv_write"
    k: Buffer
    v: Buffer
    num_kv_heads: int
    head_dim: int

    @property
    def inputs(self) -> tuple[Buffer, ...]:
        return (self.k, self.v)


@frozen(kw_only=True)
class Attention(_Unary):
    """Causal grouped-query attention over the layer's cache, the step's own tokens included.

    Query head h reads KV head ``h // (num_heads / num_kv_heads)``. Scores are ``scale * q . k``, then
    ``softcap * tanh(scores / softcap)`` where `softcap` > 0; a token sees itself and the ``window - 1`` tokens before
    it (all when `window` is 0).
    """

    kind: ClassVar[str] = "attention"
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    softcap: float = 0.0
    window: int = 0


@frozen(kw_only=True)
class Add(Operator):
    """``out = a + b``."""

    kind: ClassVar[str] = "add"
    a: Buffer
    b: Buffer
    out: Buffer

    @property
    def inputs(self) -> tuple[Buffer, ...]:
        return (self.a, self.b)

    @property
    def outputs(self) -> tuple[Buffer, ...]:
        return (self.out,)


@frozen(kw_only=True)
class Act(_Unary):
    """``out = activation(src)``."""

    kind: ClassVar[str] = "act"
    activation: Activation


@frozen(kw_only=True)
class GatedAct(Operator):
    """``out = activation(gate) * up``."""

    kind: ClassVar[str] = "gated_act"
    gate: Buffer
    up: Buffer
    out: Buffer
    activation: Activation

    @property
    def inputs(self) -> tuple[Buffer, ...]:
        return (self.gate, self.up)

    @property
    def outputs(self) -> tuple[Buffer, ...]:
        return (self.out,)


@frozen(kw_only=True)
class Scale(_Unary):
    """``out = factor * src``."""

    kind: ClassVar[str] = "scale"
    factor: float


@frozen(kw_only=True)
class PositionScale(_Unary):
    """``out = (1 + strength * ln(1 + floor(position / period))) * src``: 1 for the first `period` positions.

    On Q it keeps attention sharp in long contexts (Llama 4's temperature tuning, Ministral 3).
    """

    kind: ClassVar[str] = "position_scale"
    strength: float
    period: int


@frozen(kw_only=True)
class Softcap(_Unary):
    """``out = cap * tanh(src / cap)``."""

    kind: ClassVar[str] = "softcap"
    cap: float


@frozen(kw_only=True)
class SelectRows(_Unary):
    """Keeps the rows whose logits were asked for; the buffers after it have that many rows."""

    kind: ClassVar[str] = "select_rows"


OPERATOR_KINDS: dict[str, type[Operator]] = {
    cls.kind: cls
    for cls in (
        Embed,
        EmbedPositions,
        Norm,
        Linear,
        AddBias,
        Rope,
        KvWrite,
        Attention,
        Add,
        Act,
        GatedAct,
        Scale,
        PositionScale,
        Softcap,
        SelectRows,
    )
}
"""Every operator there is, by kind."""
