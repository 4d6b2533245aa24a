"""What an architecture contract can say: the vocabulary, as frozen data read from TOML.

A contract states what a model family *is*; nothing in it is code. Numbers may be written as expressions over the
family's hyperparameters (see `expressions`), and most may differ from layer to layer through the name ``layer``.
This package imports nothing else of mortice, so that a contract can be read and checked on its own.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from importlib import resources
from types import MappingProxyType
from typing import Any, Literal

import cattrs
from attrs import field, fields, frozen

from mortice.arch_contracts.expressions import Expression
from mortice.arch_contracts.structuring import make_converter, mistakes, unknown_key

__all__ = [
    "GLOBAL_ROLES",
    "LAYER_ROLES",
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
    "builtin_contracts",
    "parse_contract",
]

RopeScalingName = Literal["linear", "yarn"]

ZERO, ONE = Expression("0"), Expression("1")

GLOBAL_ROLES = (
    "token_embd",
    "token_embd_norm",
    "position_embd",
    "rope_freqs",
    "output_norm",
    "output",
)
LAYER_ROLES = (
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
_NO_BIAS = {"token_embd", "position_embd", "rope_freqs"}
_GLOBAL = frozenset(GLOBAL_ROLES) | {f"{role}_bias" for role in GLOBAL_ROLES if role not in _NO_BIAS}
_LAYER = frozenset(LAYER_ROLES) | {f"{role}_bias" for role in LAYER_ROLES}


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

    """

    key: str
    default: Expression | None = None
    kind: Literal["int", "float", "bool"] = "float"
    per_layer: bool = False


STANDARD_HYPERPARAMETERS: Mapping[str, Hyperparameter] = MappingProxyType(
    {
        "num_layers": Hyperparameter(key="block_count", kind="int"),
        "hidden_size": Hyperparameter(key="embedding_length", kind="int"),
        "num_heads": Hyperparameter(key="attention.head_count", kind="int"),
        "num_kv_heads": Hyperparameter(key="attention.head_count_kv", kind="int", default=Expression("num_heads")),
        "head_dim": Hyperparameter(
            key="attention.key_length", kind="int", default=Expression("hidden_size / num_heads")
        ),
        "ffn_size": Hyperparameter(key="feed_forward_length", kind="int"),
        "context_length": Hyperparameter(key="context_length", kind="int"),
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


@frozen(kw_only=True)
class NormSpec:
    """Norms of the residual stream: before the blocks, after them (on their output), or both."""

    type: Literal["rms", "layer"] = "rms"
    placement: Literal["pre", "post", "both"] = "pre"
    eps: Expression


@frozen(kw_only=True)
class AttentionSpec:
    """Scores are ``softcap(scale * q . k)``; ``sliding_window`` is in tokens, 0 meaning the whole context.

    Attributes:
        qk_norm: a norm on Q and K between bias and RoPE: for each head, or over the whole row.
        qk_norm_type: its type where it is not the one of ``[norm]``.
        qk_norm_eps: its epsilon where it is not the one of ``[norm]``.

    """

    qk_norm: Literal["none", "per_head", "per_row"] = "none"
    qk_norm_type: Literal["rms", "layer"] | None = None
    qk_norm_eps: Expression | None = None
    scale: Expression = Expression("1 / sqrt(head_dim)")
    softcap: Expression = ZERO
    sliding_window: Expression = ZERO


@frozen(kw_only=True)
class RopeSpec:
    """Rotary positions. A contract without ``[rope]`` has none.

    Attributes:
        style: which elements form a pair: ``adjacent`` (2i, 2i + 1) or ``halves`` (i, i + dims / 2).
        dims: elements of a head that are rotated; 0 leaves the layer without positions.
        base: the frequency base.
        scaling: the values of ``rope.scaling.type`` the family allows besides ``none``.

    """

    style: Literal["adjacent", "halves"]
    dims: Expression = Expression("head_dim")
    base: Expression
    scaling: tuple[RopeScalingName, ...] = ()


@frozen(kw_only=True)
class FfnSpec:
    """The feed-forward block: ``down(act(gate(x)) * up(x))`` when gated, ``down(act(up(x)))`` when not."""

    gated: bool = True
    activation: Literal["silu", "gelu_tanh", "gelu_erf", "relu", "relu_squared"] = "silu"


@frozen(kw_only=True)
class EmbeddingSpec:
    """``scale`` multiplies token embeddings; ``positions`` says whether a learned table is added."""

    scale: Expression = ONE
    positions: Literal["none", "learned"] = "none"


@frozen(kw_only=True)
class ResidualSpec:
    """``scale`` multiplies what a block adds; ``parallel`` (non-zero) feeds attention and FFN the same input."""

    scale: Expression = ONE
    parallel: Expression = ZERO


@frozen(kw_only=True)
class OutputSpec:
    """Logits are ``softcap(scale * head(norm(x)))``; a softcap of 0 is none."""

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
        global_roles: by role name.
        layer_roles: by role name, the same for each layer.
        ignored: exact tensor names, ``{i}`` standing for the layer, that are known to play no part.

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

    def expressions(self) -> Iterator[tuple[str, Expression]]:
        """Every expression of the contract with the dotted key it stands at."""
        for section in ("norm", "attention", "rope", "ffn", "embedding", "residual", "output"):
            spec = getattr(self, section)
            if spec is not None:
                for attribute in fields(type(spec)):
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


@frozen(kw_only=True)
class _Head:
    name: str
    architectures: tuple[str, ...]
    description: str = ""
    ignored: tuple[str, ...] = ()


@frozen(kw_only=True)
class _RoleEntry:
    name: str = ""
    shape: tuple[Expression, ...] = ()
    optional: bool = False
    forbidden: bool = False
    else_: str | None = None
    split: dict[str, Expression] = field(factory=dict)


@frozen(kw_only=True)
class _Roles:
    global_: dict[str, _RoleEntry]
    layer: dict[str, _RoleEntry]


@frozen(kw_only=True)
class _Document:
    contract: _Head
    hyperparameters: dict[str, Hyperparameter] = field(factory=dict)
    norm: NormSpec
    attention: AttentionSpec = AttentionSpec()
    rope: RopeSpec | None = None
    ffn: FfnSpec = FfnSpec()
    embedding: EmbeddingSpec = EmbeddingSpec()
    residual: ResidualSpec = ResidualSpec()
    output: OutputSpec = OutputSpec()
    roles: _Roles


def _make_converter() -> cattrs.Converter:
    converter = make_converter()
    structure_table = converter.get_structure_hook(_RoleEntry)

    def expression(value: Any, _: type) -> Expression:
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise TypeError(f"wanted a number or an expression, found {value!r}")
        return Expression(value if isinstance(value, str) else repr(value))

    def role(value: Any, kind: type) -> Any:
        # the short form of a required role is its shape alone
        return structure_table({"shape": value} if isinstance(value, list) else value, kind)

    converter.register_structure_hook(Expression, expression)
    converter.register_structure_hook(_RoleEntry, role)
    return converter


def _role(key: str, entry: _RoleEntry, *, layer: bool) -> Role:
    base, suffix = (key.removesuffix("_bias"), "bias") if key.endswith("_bias") else (key, "weight")
    return Role(
        name=entry.name or ("blk.{i}." if layer else "") + f"{base}.{suffix}",
        shape=entry.shape,
        presence="forbidden" if entry.forbidden else "optional" if entry.optional or entry.else_ else "required",
        fallback=entry.else_,
        split=entry.split,
    )


def parse_contract(text: str, source: str) -> Contract:
    """Read a contract from TOML text.

    Args:
        text: the document.
        source: where it comes from, for messages.

    Raises:
        ContractFormatError: with every mistake found, one a line.

    """
    try:
        document = _make_converter().structure(tomllib.loads(text), _Document)
    except tomllib.TOMLDecodeError as error:
        raise ContractFormatError(f"{source}: not TOML: {error}") from None
    except (cattrs.BaseValidationError, TypeError) as error:
        raise ContractFormatError("\n".join(f"{source}: {line}" for line in mistakes(error))) from None
    contract = Contract(
        name=document.contract.name,
        architectures=document.contract.architectures,
        description=document.contract.description,
        hyperparameters={**STANDARD_HYPERPARAMETERS, **document.hyperparameters},
        norm=document.norm,
        attention=document.attention,
        rope=document.rope,
        ffn=document.ffn,
        embedding=document.embedding,
        residual=document.residual,
        output=document.output,
        global_roles={key: _role(key, entry, layer=False) for key, entry in document.roles.global_.items()},
        layer_roles={key: _role(key, entry, layer=True) for key, entry in document.roles.layer.items()},
        ignored=document.contract.ignored,
    )
    found = list(_contradictions(contract))
    if found:
        raise ContractFormatError("\n".join(f"{source}: {line}" for line in found))
    return contract


def _contradictions(contract: Contract) -> Iterator[str]:
    """What the types cannot say: names that must exist elsewhere in the same document."""
    if not contract.architectures:
        yield "contract.architectures: at least one is needed"
    for scope, roles, known in (
        ("global", contract.global_roles, _GLOBAL),
        ("layer", contract.layer_roles, _LAYER),
    ):
        for key, role in roles.items():
            where = f"roles.{scope}.{key}"
            if key not in known:
                yield f"{where}: {unknown_key(key, sorted(known))}"
            if role.presence != "forbidden" and not role.shape:
                yield f"{where}.shape: required, but not there"
            if scope == "layer" and "{i}" not in role.name:
                yield f"{where}.name: {role.name!r} lacks {{i}}, the layer"
            if role.fallback is not None and role.fallback not in roles:
                yield f"{where}.else: no role {role.fallback!r} in this contract"
            for part in role.split:
                if part not in roles:
                    yield f"{where}.split: no role {part!r} in this contract"
    known_names = set(contract.hyperparameters) | {"layer", "vocab_size"}
    for where, expression in contract.expressions():
        for name in sorted(expression.names - known_names):
            yield f"{where}: {expression.text!r}: {unknown_key(name, sorted(known_names))}"


def builtin_contracts() -> Iterator[Contract]:
    """The contracts that come with mortice, one for each TOML file of this package."""
    for entry in sorted(resources.files(__package__).iterdir(), key=lambda item: item.name):
        if entry.name.endswith(".toml"):
            yield parse_contract(entry.read_text(encoding="utf-8"), entry.name)
