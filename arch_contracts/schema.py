"""Reads contracts from TOML. The vocabulary itself is in `vocabulary`; its names are offered here too.

This package imports nothing else of mortice, so that a contract can be read and checked on its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, lru_cache
from importlib import resources
from typing import Any

import cattrs
from attrs import field, frozen

from mortice.arch_contracts.consistency import contradictions
from mortice.arch_contracts.expressions import Expression
from mortice.arch_contracts.structuring import make_converter, mistakes, parse_toml
from mortice.arch_contracts.vocabulary import (
    GLOBAL_ROLES,
    LAYER_ROLES,
    PRESENCE,
    STANDARD_HYPERPARAMETERS,
    AttentionSpec,
    Contract,
    ContractFormatError,
    EmbeddingSpec,
    FfnSpec,
    Hyperparameter,
    NormSpec,
    OutputSpec,
    ResidualSpec,
    Role,
    RopeSpec,
)

__all__ = [
    "GLOBAL_ROLES",
    "LAYER_ROLES",
    "PRESENCE",
    "STANDARD_HYPERPARAMETERS",
    "AttentionSpec",
    "Contract",
    "ContractDocument",
    "ContractFormatError",
    "ContractHead",
    "EmbeddingSpec",
    "FfnSpec",
    "Hyperparameter",
    "NormSpec",
    "OutputSpec",
    "ResidualSpec",
    "Role",
    "RoleEntry",
    "RoleTables",
    "RopeSpec",
    "builtin_contracts",
    "parse_contract",
]


@frozen(kw_only=True)
class ContractHead:
    """Who the contract is for.

    Attributes:
        name: the family's name.
        architectures: the values of ``general.architecture`` it serves.
        description: one line for listings.
        ignored: exact tensor names, ``{i}`` standing for the layer, that are known to play no part.
        ignored_keys: metadata keys without the architecture's prefix that are known to play no part.

    """

    name: str
    architectures: tuple[str, ...]
    description: str = ""
    ignored: tuple[str, ...] = ()
    ignored_keys: tuple[str, ...] = ()


@frozen(kw_only=True)
class RoleEntry:
    """A weight. A required one with the usual name may be given by its shape alone: ``attn_norm = ["hidden_size"]``.

    Attributes:
        name: tensor name in GGUF, ``{i}`` standing for the layer; made from the role when left out
            (``attn_q_bias`` of a layer is ``blk.{i}.attn_q.bias``).
        shape: extents, rows first, each an expression; a vector or a matrix.
        optional: a file may lack it.
        forbidden: a file must not have it.
        else_: the role whose tensor serves when this one is absent (tied embeddings).
        split: for a fused tensor, the roles its rows hold in order, with the rows of each.

    """

    name: str = ""
    shape: tuple[Expression, ...] = ()
    optional: bool = False
    forbidden: bool = False
    else_: str | None = None
    split: dict[str, Expression] = field(factory=dict)

    def role(self, key: str, *, layer: bool) -> Role:
        """The role that the entry at `key` describes."""
        base, suffix = (key.removesuffix("_bias"), "bias") if key.endswith("_bias") else (key, "weight")
        may_lack = self.optional or self.else_ is not None
        return Role(
            name=self.name or ("blk.{i}." if layer else "") + f"{base}.{suffix}",
            shape=self.shape,
            presence="forbidden" if self.forbidden else "optional" if may_lack else "required",
            fallback=self.else_,
            split=self.split,
        )


@frozen(kw_only=True)
class RoleTables:
    """The weights of the family; a tensor that no role names is an error.

    Attributes:
        global_: weights a model has once, by role.
        layer: weights each layer has, by role.

    """

    global_: dict[str, RoleEntry]
    layer: dict[str, RoleEntry]


@frozen(kw_only=True)
class ContractDocument:
    """The tables of a contract file.

    Attributes:
        contract: who the contract is for.
        hyperparameters: numbers read from the file besides the standard ones, or instead of them, by name.
        norm: the residual stream's norms.
        attention: the attention block.
        rope: rotary positions; without the table there are none.
        ffn: the feed-forward block.
        embedding: what enters the first layer.
        residual: how blocks add to the residual stream.
        output: how logits are made.
        roles: the weights.

    """

    contract: ContractHead
    hyperparameters: dict[str, Hyperparameter] = field(factory=dict)
    norm: NormSpec
    attention: AttentionSpec = field(factory=AttentionSpec)
    rope: RopeSpec | None = None
    ffn: FfnSpec = field(factory=FfnSpec)
    embedding: EmbeddingSpec = field(factory=EmbeddingSpec)
    residual: ResidualSpec = field(factory=ResidualSpec)
    output: OutputSpec = field(factory=OutputSpec)
    roles: RoleTables


@lru_cache(maxsize=256)  # contracts have the same few: of the 296 of those that are built in, 31 differ
def _expression(text: str) -> Expression:
    return Expression(text)


@cache  # making one takes as long as reading ten contracts
def _make_converter() -> cattrs.Converter:
    converter = make_converter()

    def expression(value: Any, _: type) -> Expression:
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise TypeError(f"wanted a number or an expression, found {value!r}")
        return _expression(value if isinstance(value, str) else repr(value))

    def role(value: Any, kind: type) -> Any:
        # the short form of a required role is its shape alone
        return structure_table({"shape": value} if isinstance(value, list) else value, kind)

    # in this order: the hook of a class is made for good when it is asked for, with those of its fields
    converter.register_structure_hook(Expression, expression)
    structure_table = converter.get_structure_hook(RoleEntry)
    converter.register_structure_hook(RoleEntry, role)
    return converter


def parse_contract(text: str, source: str) -> Contract:
    """Read a contract from TOML text.

    Args:
        text: the document.
        source: where it comes from, for messages.

    Raises:
        ContractFormatError: with every mistake found, one a line.

    """
    try:
        document = _make_converter().structure(parse_toml(text), ContractDocument)
    except cattrs.BaseValidationError as error:
        raise ContractFormatError("\n".join(f"{source}: {line}" for line in mistakes(error))) from None
    except RecursionError:
        raise ContractFormatError(f"{source}: nested too deeply") from None
    except ValueError as error:
        raise ContractFormatError(f"{source}: {error}") from None
    head = document.contract
    contract = Contract(
        name=head.name,
        architectures=head.architectures,
        description=head.description,
        hyperparameters={**STANDARD_HYPERPARAMETERS, **document.hyperparameters},
        norm=document.norm,
        attention=document.attention,
        rope=document.rope,
        ffn=document.ffn,
        embedding=document.embedding,
        residual=document.residual,
        output=document.output,
        global_roles={key: entry.role(key, layer=False) for key, entry in document.roles.global_.items()},
        layer_roles={key: entry.role(key, layer=True) for key, entry in document.roles.layer.items()},
        ignored=head.ignored,
        ignored_keys=head.ignored_keys,
    )
    found = list(contradictions(contract))
    if found:
        raise ContractFormatError("\n".join(f"{source}: {line}" for line in found))
    return contract


def builtin_contracts() -> Iterator[Contract]:
    """The contracts that come with mortice, one for each TOML file of this package."""
    for entry in sorted(resources.files(__package__).iterdir(), key=lambda item: item.name):
        if entry.name.endswith(".toml"):
            yield parse_contract(entry.read_text(encoding="utf-8"), entry.name)
