"""What the types of the vocabulary cannot say: a contract's parts have to agree with one another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from itertools import chain

from mortice.arch_contracts.expressions import FUNCTIONS
from mortice.arch_contracts.structuring import unknown_key
from mortice.arch_contracts.vocabulary import (
    GLOBAL_ROLES,
    LAYER_ROLES,
    PRESENCE,
    STANDARD_HYPERPARAMETERS,
    Contract,
    Role,
)

__all__ = ["contradictions"]

_GIVEN = frozenset({"layer", "vocab_size"})
"""Names that exist without a hyperparameter."""


def contradictions(contract: Contract) -> Iterator[str]:
    """Every contradiction in a contract, one line each, beginning with the dotted key."""
    yield from _head(contract)
    yield from _hyperparameters(contract)
    yield from _names(contract)
    for scope, roles, known in (
        ("global", contract.global_roles, GLOBAL_ROLES),
        ("layer", contract.layer_roles, LAYER_ROLES),
    ):
        for key, role in roles.items():
            yield from _role(f"roles.{scope}.{key}", key, role, roles, known)
        yield from _repeated(scope, roles)
    yield from _against_settings(contract)


def _head(contract: Contract) -> Iterator[str]:
    if not contract.name:
        yield "contract.name: wanted a name, found an empty string"
    if not contract.architectures:
        yield "contract.architectures: at least one is needed"
    for architecture, count in Counter(contract.architectures).items():
        if count > 1:
            yield f"contract.architectures: {architecture!r} stands there {count} times"


def _hyperparameters(contract: Contract) -> Iterator[str]:
    for name, hyperparameter in contract.hyperparameters.items():
        where = f"hyperparameters.{name}"
        reserved = name in _GIVEN or name in FUNCTIONS or name.startswith(PRESENCE)
        if reserved or not (name.isidentifier() and name.isascii()):
            yield f"{where}: {name!r} cannot name a hyperparameter"
        if not hyperparameter.key:
            yield f"{where}.key: wanted a metadata key, found an empty string"
        standard = STANDARD_HYPERPARAMETERS.get(name)
        if standard is not None and hyperparameter.kind != standard.kind:
            yield f"{where}.kind: {name} is always {standard.kind!r}, found {hyperparameter.kind!r}"
        if name in ("num_layers", "hidden_size", "context_length") and hyperparameter.per_layer:
            yield f"{where}.per_layer: {name} is one number for the whole model"
    graph = {
        name: hyperparameter.default.names - {"layer", name}
        for name, hyperparameter in contract.hyperparameters.items()
        if hyperparameter.default is not None
    }
    for name, hyperparameter in contract.hyperparameters.items():
        if hyperparameter.default is not None and name in hyperparameter.default.names:
            yield f"hyperparameters.{name}.default: {hyperparameter.default.text!r} builds on itself"
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        yield f"hyperparameters: defaults build on one another in a circle: {' -> '.join(error.args[1])}"


def _names(contract: Contract) -> Iterator[str]:
    """Every name in an expression must exist; where there is no layer, nothing of a layer may be read."""
    known = frozenset(contract.hyperparameters) | _GIVEN
    of_layer = {name for name, item in contract.hyperparameters.items() if item.per_layer} | {"layer"}
    presence = {PRESENCE + role for role in contract.layer_roles}
    for where, expression in contract.expressions():
        # which weights are there is known once shapes and hyperparameters are, so those cannot ask
        allowed = known | presence if where.startswith(("attention.", "rope.", "residual.")) else known
        for name in sorted(expression.names - allowed):
            yield f"{where}: {expression.text!r}: {unknown_key(name, sorted(allowed))}"
        if _is_global(contract, where):
            for name in sorted(expression.names & of_layer):
                yield f"{where}: {expression.text!r}: {name!r} has no value here, outside the layers"


def _is_global(contract: Contract, where: str) -> bool:
    head, _, rest = where.partition(".")
    if head == "hyperparameters":
        return not contract.hyperparameters[rest.partition(".")[0]].per_layer
    return head in ("embedding", "output", "norm") or where.startswith("roles.global.")


def _role(where: str, key: str, role: Role, roles: Mapping[str, Role], known: tuple[str, ...]) -> Iterator[str]:
    if key not in known:
        yield f"{where}: {unknown_key(key, sorted(known))}"
        return
    if role.presence != "forbidden" and not role.shape:
        yield f"{where}.shape: required, but not there"
    if len(role.shape) > 2:
        yield f"{where}.shape: {len(role.shape)} extents, wanted a vector or a matrix"
    if where.startswith("roles.layer.") != ("{i}" in role.name):
        yield f"{where}.name: {role.name!r}: wanted {{i}}, the layer, in layer roles and only there"
    if role.fallback is not None:
        yield from _fallback(where, role, roles)
    fused = key.removesuffix("_bias") in ("attn_qkv", "ffn_gate_up")
    if fused and role.presence != "forbidden" and not role.split:
        yield f"{where}.split: required, but not there"
    for part in role.split:
        if part not in known:
            yield f"{where}.split: {unknown_key(part, sorted(known))}"
        elif not fused or part.endswith("_bias") != key.endswith("_bias"):
            yield f"{where}.split: {key} cannot hold {part}"


def _fallback(where: str, role: Role, roles: Mapping[str, Role]) -> Iterator[str]:
    other = roles.get(role.fallback or "")
    if other is None or (other.presence == "forbidden" and other.fallback is None):
        yield f"{where}.else: no role {role.fallback!r} in this contract"
    elif other.fallback is not None:
        yield f"{where}.else: {role.fallback!r} has an else of its own; name the last role of the chain"
    elif role.shape and role.shape != other.shape:
        yield f"{where}.else: {role.fallback!r} has another shape"


def _repeated(scope: str, roles: Mapping[str, Role]) -> Iterator[str]:
    names = Counter(role.name for role in roles.values())
    parts = Counter(chain.from_iterable(role.split for role in roles.values()))
    for key, role in roles.items():
        if names[role.name] > 1:
            yield f"roles.{scope}.{key}.name: {role.name!r} is the tensor of another role too"
        for part in role.split:
            if parts[part] > 1:
                yield f"roles.{scope}.{key}.split: {part!r} is a part of another role too"


def _rope_tables(contract: Contract) -> set[str]:
    if contract.rope is None:
        return set()
    tables = {"rope_factors_short", "rope_factors_long"} if "longrope" in contract.rope.scaling else set()
    return {"rope_freqs"} | tables


def _against_settings(contract: Contract) -> Iterator[str]:
    may_be_parallel = not contract.residual.parallel.is_zero
    optional_ffn_norm = {"ffn_norm"} if may_be_parallel and contract.norm.placement != "post" else set()
    qk_norms = {"attn_q_norm", "attn_k_norm"} if contract.attention.qk_norm != "none" else set()
    for scope, roles, needed, useful in (
        (
            "global",
            contract.global_roles,
            dict(contract.needed_global_roles()),
            {"token_embd_norm"} | _rope_tables(contract),
        ),
        (
            "layer",
            contract.layer_roles,
            dict(contract.needed_layer_roles(parallel=may_be_parallel)),
            {"attn_qkv", *({"ffn_gate_up"} if contract.ffn.gated else set())} | optional_ffn_norm | qk_norms,
        ),
    ):
        given = {key for key, role in roles.items() if role.presence != "forbidden" or role.fallback}
        given |= set(chain.from_iterable(role.split for role in roles.values()))
        for key, why in {**needed, **dict.fromkeys(sorted(qk_norms if scope == "layer" else ()), "")}.items():
            if key not in given:
                why = why or f"attention.qk_norm = {contract.attention.qk_norm!r}"
                yield f"roles.{scope}.{key}: {why} needs it, but it is not there"
        for key in sorted(given & set(GLOBAL_ROLES + LAYER_ROLES)):
            if key.removesuffix("_bias") not in needed.keys() | useful:
                yield f"roles.{scope}.{key}: the contract's settings give it no use"
