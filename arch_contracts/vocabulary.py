"""What an architecture contract can say: the vocabulary, as frozen data.

A contract states what a model family *is*; nothing in it is code. Numbers may be written as expressions over the
family's hyperparameters (see `expressions`), and those of a layer may differ from layer to layer through the name
``layer``. Every attribute is described under ``Attributes``; the contract reference is made from these texts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Literal

from attrs import field, fields, frozen

from mortice.arch_contracts.expressions import Expression

__all__ = [
    "GLOBAL_ROLES",
    "LAYER_ROLES",
    "PRESENCE",
    "STANDARD_HYPERPARAMETERS",
    "AttentionSpec",
    "Contract",
    "ContractFormatError",
    "EmbeddingSpec",
    "FfnSpec",
    "Hyperparameter",
    "NormSpec",
    "OutputSpec",
    "ResidualSpec",
    "Role",
    "RopeSpec",
]

ZERO, ONE = Expression("0"), Expression("1")
_HEAD_DIM, _INVERSE_ROOT = Expression("head_dim"), Expression("1 / sqrt(head_dim)")

_NO_BIAS = ("token_embd", "position_embd", "rope_freqs", "rope_factors_short", "rope_factors_long")
_BIASED = ("token_embd_norm", "output_norm", "output")
_IN_LAYER = (
    "attn_norm",
    "attn_q",
    "attn_k",
    "attn_v",
    "attn_qkv",
    "attn_q_norm",
    "attn_k_norm",
    "attn_output",
    "post_attention_norm",
    "ffn_norm",
    "ffn_gate",
    "ffn_up",
    "ffn_gate_up",
    "ffn_down",
    "post_ffw_norm",
)
GLOBAL_ROLES = (*_NO_BIAS, *_BIASED, *(f"{role}_bias" for role in _BIASED))
"""Roles of weights that a model has once."""
LAYER_ROLES = (*_IN_LAYER, *(f"{role}_bias" for role in _IN_LAYER))
"""Roles of weights that each layer has."""
PRESENCE = "has_"
"""``has_ROLE`` in an expression is 1 in a layer that has a weight for the role, else 0."""


class ContractFormatError(ValueError):
    """A contract that does not make sense; the message names the key, what was found and what is wanted."""


@frozen(kw_only=True)
class Hyperparameter:
    """Where a number of the family comes from.

    Attributes:
        key: the metadata key without the architecture's prefix (``attention.head_count``).
        default: used when the file lacks the key; without one the key is required.
        kind: how the value is read.
        per_layer: whether the file may give an array with one value a layer.
        min: the least value accepted.

    """

    key: str
    default: Expression | None = None
    kind: Literal["int", "float", "bool"] = "float"
    per_layer: bool = False
    min: float | None = None


def _count(key: str, default: str | None = None) -> Hyperparameter:
    return Hyperparameter(key=key, kind="int", min=1, default=None if default is None else Expression(default))


STANDARD_HYPERPARAMETERS: Mapping[str, Hyperparameter] = MappingProxyType(
    {
        "num_layers": _count("block_count"),
        "hidden_size": _count("embedding_length"),
        "num_heads": _count("attention.head_count"),
        "num_kv_heads": _count("attention.head_count_kv", "num_heads"),
        "head_dim": _count("attention.key_length", "hidden_size / num_heads"),
        "ffn_size": _count("feed_forward_length"),
        "context_length": _count("context_length"),
    }
)
"""Hyperparameters every contract has; ``vocab_size`` (key, else the length of the token list) and ``layer`` besides."""


@frozen(kw_only=True)
class Role:
    """A weight with a meaning.

    Attributes:
        name: tensor name in GGUF, ``{i}`` standing for the layer.
        shape: extents, rows first.
        presence: whether a file must, may or must not have it.
        fallback: the role whose tensor serves when this one is absent (tied embeddings).
        split: for a fused tensor, the roles its rows hold in order, with the rows of each.

    """

    name: str
    shape: tuple[Expression, ...] = ()
    presence: Literal["required", "optional", "forbidden"] = "required"
    fallback: str | None = None
    split: Mapping[str, Expression] = field(factory=dict)

    def tensor(self, layer: int | None) -> str:
        """The exact tensor name in `layer`."""
        return self.name.replace("{i}", str(layer))


@frozen(kw_only=True)
class NormSpec:
    """Norms of the residual stream. Whether one has a bias is said by its bias role.

    Attributes:
        type: ``rms`` or ``layer``.
        placement: before the blocks (``pre``), after them, on what they add (``post``), or ``both``.
        eps: the epsilon added to the mean square or variance.

    """

    type: Literal["rms", "layer"] = "rms"
    placement: Literal["pre", "post", "both"] = "pre"
    eps: Expression


@frozen(kw_only=True)
class AttentionSpec:
    """Scores are ``softcap(scale * q . k)``, causal, query heads sharing KV heads in groups.

    Attributes:
        qk_norm: a norm on Q and K between bias and RoPE: on each head, or over the whole row.
        qk_norm_type: its type where it is not the one of ``[norm]``.
        qk_norm_eps: its epsilon where it is not the one of ``[norm]``.
        scale: the factor on ``q . k``.
        softcap: scores become ``softcap * tanh(score / softcap)``; 0 is none.
        sliding_window: tokens a token sees, itself included; 0 is the whole context.
        temperature: Q is multiplied by ``1 + temperature * ln(1 + floor(position / temperature_period))`` after RoPE; 0
            is none.
        temperature_period: the positions after which that factor first grows.

    """

    qk_norm: Literal["none", "per_head", "per_row"] = "none"
    qk_norm_type: Literal["rms", "layer"] | None = None
    qk_norm_eps: Expression | None = None
    scale: Expression = _INVERSE_ROOT
    softcap: Expression = ZERO
    sliding_window: Expression = ZERO
    temperature: Expression = ZERO
    temperature_period: Expression = ONE


@frozen(kw_only=True)
class RopeSpec:
    """Rotary positions. A contract without ``[rope]`` has none.

    Attributes:
        style: which elements form a pair: ``adjacent`` (2i, 2i + 1) or ``halves`` (i, i + dims / 2).
        dims: elements of a head that are rotated, from its start; 0 leaves the layer without positions.
        base: the frequency base.
        scaling: the values of ``rope.scaling.type`` the family allows besides ``none``. ``longrope`` has a divisor for
            each frequency in two tables, the roles ``rope_factors_short`` and ``rope_factors_long``; a run whose
            context is longer than ``rope.scaling.original_context_length`` takes the second.
        scaled: whether the file's scaling holds for the layer; 0 is no.

    """

    style: Literal["adjacent", "halves"]
    dims: Expression = _HEAD_DIM
    base: Expression
    scaling: tuple[Literal["linear", "yarn", "longrope"], ...] = ()
    scaled: Expression = ONE


@frozen(kw_only=True)
class FfnSpec:
    """The feed-forward block: ``down(act(gate(x)) * up(x))`` when gated, ``down(act(up(x)))`` when not.

    Attributes:
        gated: which of the two.
        activation: the function ``act``.

    """

    gated: bool = True
    activation: Literal["silu", "gelu_tanh", "gelu_erf", "relu", "relu_squared"] = "silu"


@frozen(kw_only=True)
class EmbeddingSpec:
    """What enters the first layer.

    Attributes:
        scale: multiplies token embeddings.
        positions: ``learned`` adds the row of ``position_embd`` for each position.

    """

    scale: Expression = ONE
    positions: Literal["none", "learned"] = "none"


@frozen(kw_only=True)
class ResidualSpec:
    """How blocks add to the residual stream.

    Attributes:
        scale: multiplies what a block adds.
        parallel: unless 0, attention and FFN read the same input and are added together. The FFN then shares
            attention's norm where it has none of its own.

    """

    scale: Expression = ONE
    parallel: Expression = ZERO


@frozen(kw_only=True)
class OutputSpec:
    """Logits are ``softcap(scale * head(norm(x)))``.

    Attributes:
        scale: multiplies the logits.
        softcap: logits become ``softcap * tanh(logit / softcap)``; 0 is none.

    """

    scale: Expression = ONE
    softcap: Expression = ZERO


@frozen(kw_only=True)
class Contract:
    """An architecture contract.

    Attributes:
        name: the family's name.
        architectures: the values of ``general.architecture`` it serves.
        description: one line for listings.
        hyperparameters: by name; the standard ones are included.
        norm: the residual stream's norms.
        attention: the attention block.
        rope: rotary positions, None for none.
        ffn: the feed-forward block.
        embedding: what enters the first layer.
        residual: how blocks add to the residual stream.
        output: how logits are made.
        global_roles: by role name.
        layer_roles: by role name, the same for each layer.
        ignored: exact tensor names, ``{i}`` standing for the layer, that are known to play no part.
        ignored_keys: metadata keys without the architecture's prefix that are known to play no part.

    """

    name: str
    architectures: tuple[str, ...]
    description: str = ""
    hyperparameters: Mapping[str, Hyperparameter]
    norm: NormSpec
    attention: AttentionSpec
    rope: RopeSpec | None
    ffn: FfnSpec
    embedding: EmbeddingSpec
    residual: ResidualSpec
    output: OutputSpec
    global_roles: Mapping[str, Role]
    layer_roles: Mapping[str, Role]
    ignored: tuple[str, ...] = ()
    ignored_keys: tuple[str, ...] = ()

    def expressions(self) -> Iterator[tuple[str, Expression]]:
        """Every expression of the contract with the dotted key it stands at."""
        for section in ("norm", "attention", "rope", "ffn", "embedding", "residual", "output"):
            spec = getattr(self, section)
            for attribute in fields(type(spec)) if spec is not None else ():
                value = getattr(spec, attribute.name)
                if isinstance(value, Expression):
                    yield f"{section}.{attribute.name}", value
        for name, hyperparameter in self.hyperparameters.items():
            if hyperparameter.default is not None:
                yield f"hyperparameters.{name}.default", hyperparameter.default
        for scope, roles in (("global", self.global_roles), ("layer", self.layer_roles)):
            for name, role in roles.items():
                for extent in role.shape:
                    yield f"roles.{scope}.{name}.shape", extent
                for part, rows in role.split.items():
                    yield f"roles.{scope}.{name}.split.{part}", rows

    def asked_for(self) -> Iterator[str]:
        """The layer roles on whose presence an expression depends."""
        names = {name for _, expression in self.expressions() for name in expression.names}
        yield from (role for role in self.layer_roles if PRESENCE + role in names)

    def needed_layer_roles(self, *, parallel: bool) -> Iterator[tuple[str, str]]:
        """The layer roles that the settings cannot do without, each with the setting that says so."""
        for role in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_up", "ffn_down"):
            yield role, "every layer"
        if self.ffn.gated:
            yield "ffn_gate", "ffn.gated = true"
        norms = f"norm.placement = {self.norm.placement!r}"
        if self.norm.placement in ("pre", "both"):
            yield "attn_norm", norms
            if not parallel:
                yield "ffn_norm", norms
        if self.norm.placement in ("post", "both"):
            yield "post_attention_norm", norms
            yield "post_ffw_norm", norms

    def needed_global_roles(self) -> Iterator[tuple[str, str]]:
        """The global roles that the settings cannot do without, each with the setting that says so."""
        for role in ("token_embd", "output_norm", "output"):
            yield role, "every model"
        if self.embedding.positions == "learned":
            yield "position_embd", "embedding.positions = 'learned'"
