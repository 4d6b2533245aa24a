"""From a file of an unknown architecture to the draft of a contract.

Metadata and tensor names and shapes say most of what a contract says; no tensor data are read. What they cannot say is
left open, never guessed: a wrong style of RoPE or a wrong activation gives fluent nonsense that no check can find.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np
from attrs import Factory, define, evolve, field, frozen

from mortice.arch_contracts.consistency import contradictions
from mortice.arch_contracts.expressions import Expression, Number
from mortice.arch_contracts.schema import RoleEntry
from mortice.arch_contracts.vocabulary import (
    GLOBAL_ROLES,
    LAYER_ROLES,
    STANDARD_HYPERPARAMETERS,
    AttentionSpec,
    Contract,
    EmbeddingSpec,
    FfnSpec,
    Hyperparameter,
    NormSpec,
    OutputSpec,
    ResidualSpec,
    Role,
    RopeSpec,
)
from mortice.arch_contracts.writing import contract_text
from mortice.core.contracts.role_tensors import RoleTensors
from mortice.core.contracts.shapes import FUSED, fitting_shape, usual_shapes
from mortice.core.errors import UnsupportedError
from mortice.core.model.findings import join_layers
from mortice.core.model.hyperparameters import resolve_hyperparameters
from mortice.core.model.types import ModelFile, TensorView
from mortice.core.model.validation import validate

__all__ = ["Draft", "derive_contract"]

_KINDS: Mapping[type, Literal["int", "float", "bool"]] = {int: "int", float: "float", bool: "bool"}
_RMS, _PLAIN = "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"
_MAY_DIFFER = frozenset(
    {
        *("num_heads", "num_kv_heads", "head_dim", "ffn_size", "rope_dim", "rope_freq_base"),
        *("attention_scale", "attention_softcap", "sliding_window", "residual_scale", "parallel_residual"),
    }
)
"""Numbers that a file may give for each layer."""
_NOT_IN_A_FILE = "a file does not say"


@frozen(kw_only=True)
class Draft:
    """A contract as far as a file tells.

    Attributes:
        contract: with stand-ins for what is unknown; not to be run while anything is.
        unknown: dotted keys that have to be filled in, with the reason.
        notes: dotted keys that were concluded or taken from elsewhere, with how.
        remarks: what else to look at, about no key of the contract.

    """

    contract: Contract
    unknown: Mapping[str, str]
    notes: Mapping[str, str]
    remarks: tuple[str, ...]

    def text(self, source: str) -> str:
        """The draft as TOML; while something is unknown no reader takes it, and says the keys."""
        remarks = (f"Derived from {source}. Hold it against the published description of the family.", *self.remarks)
        return contract_text(self.contract, unknown=self.unknown, notes=self.notes, remarks=remarks)


def derive_contract(file: ModelFile, *, name: str | None = None, like: Contract | None = None) -> Draft:
    """Draft the contract of a file.

    Args:
        file: the opened model.
        name: of the contract; by default the file's architecture.
        like: a contract of a family known to be alike; what the file does not say is taken from it, with a note.

    Raises:
        UnsupportedError: when the file has no architecture, or lacks what every contract needs.

    """
    if not file.architecture:
        raise UnsupportedError(f"{file.path}: general.architecture is missing, so no contract can serve it")
    drafting = _Drafting(file=file, like=like)
    drafting.hyperparameters()
    drafting.roles()
    contract = drafting.contract(name or file.architecture)
    gaps = list(contradictions(contract))
    left_over = [f"unknown: {gap}" for gap in gaps] or list(_left_over(file, contract))
    return Draft(
        contract=contract,
        unknown={**{key: reason for key, _, reason in (gap.partition(": ") for gap in gaps)}, **drafting.unknown},
        notes=drafting.notes,
        remarks=(*drafting.remarks, *left_over),
    )


def _left_over(file: ModelFile, contract: Contract) -> Iterator[str]:
    """What validation against the draft still finds: the rest that a person has to decide."""
    groups: dict[tuple[str, str], list[str]] = {}
    for finding in validate(file, contract).findings.items:
        if finding.severity != "note" and not finding.rule.startswith("tokenizer."):
            groups.setdefault((finding.found, finding.wanted), []).append(finding.subject)
    for (found, wanted), subjects in groups.items():
        yield f"unknown: {', '.join(join_layers(subjects))}: {found}; {wanted}"


@define(kw_only=True, eq=False)
class _Drafting:
    file: ModelFile
    like: Contract | None
    unknown: dict[str, str] = field(factory=dict)
    notes: dict[str, str] = field(factory=dict)
    remarks: list[str] = field(factory=list)
    numbers: dict[str, Hyperparameter] = field(factory=lambda: dict(STANDARD_HYPERPARAMETERS))
    global_roles: dict[str, Role] = field(factory=dict)
    layer_roles: dict[str, Role] = field(factory=dict)
    tensors: RoleTensors = field(default=Factory(lambda self: RoleTensors.of(self.file), takes_self=True))

    # what the file has ------------------------------------------------------------------------------------------

    def value(self, key: str) -> Any:
        return self.file.metadata.get(f"{self.file.architecture}.{key}")

    def number(self, name: str, key: str, default: str | None = None) -> Expression | None:
        """A hyperparameter for a key that the file has, or that has a usual default; the expression that reads it."""
        value = self.value(key)
        if value is None and default is None:
            return None
        scalar = value.reshape(-1)[0].item() if isinstance(value, np.ndarray) and value.size else value
        kind = _KINDS.get(type(scalar), "float")
        self.numbers[name] = Hyperparameter(
            key=key,
            kind="int" if name == "rope_dim" else kind,
            default=None if default is None else Expression(default),
            per_layer=isinstance(value, np.ndarray) and name in _MAY_DIFFER,
        )
        return Expression(name)

    def leave_open(self, key: str, reason: str, stand_in: Any) -> Any:
        """A value the file does not give: from the contract that is alike, else unknown, with a stand-in."""
        section, _, attribute = key.partition(".")
        spec = getattr(self.like, section, None)
        known = getattr(spec, attribute, None)
        if known is not None and not (isinstance(known, Expression) and known.names):
            assert self.like is not None
            self.notes[key] = f"{reason}; as in contract {self.like.name}"
            return known
        self.unknown[key] = reason
        return stand_in

    # numbers ----------------------------------------------------------------------------------------------------

    def hyperparameters(self) -> None:
        if "token_embd" not in self.tensors.by_role:
            raise UnsupportedError(f"{self.file.path}: token_embd.weight is missing, which every contract needs")
        for name, standard in STANDARD_HYPERPARAMETERS.items():
            value = self.value(standard.key)
            if isinstance(value, np.ndarray) and name in _MAY_DIFFER:
                self.numbers[name] = evolve(standard, per_layer=True)
            elif value is None and standard.default is None:
                self.conclude(name, standard)
        self.number("rope_dim", "rope.dimension_count", "head_dim")
        self.number("rope_freq_base", "rope.freq_base", "10000.0")
        self.own_head_dim()
        differing = {name for name, item in self.numbers.items() if item.per_layer}
        for name in ("num_kv_heads", "head_dim", "rope_dim"):  # in this order, defaults build on one another
            default = self.numbers[name].default
            if default is not None and default.names & differing:
                self.numbers[name] = evolve(self.numbers[name], per_layer=True)
                differing.add(name)

    def conclude(self, name: str, standard: Hyperparameter) -> None:
        """A number whose key is missing: from shapes where they have it."""
        found = {
            "num_layers": 1 + max((layer for layer in self.tensors.layers() if layer is not None), default=-1),
            "hidden_size": self.tensors.extent("token_embd", 1),
            "ffn_size": self.tensors.extent("ffn_down", 1),
        }.get(name)
        dotted, missing = f"hyperparameters.{name}", f"the file has no {self.file.architecture}.{standard.key}"
        self.numbers[name] = evolve(standard, default=Expression(str(found or 1)))
        if found:
            self.notes[dotted] = f"{missing}; {found} follows from the tensors of this file"
        else:
            self.unknown[dotted] = missing

    def own_head_dim(self) -> None:
        """A head size that neither a key nor the usual quotient gives, but the shape of Q does."""
        rows, heads = self.tensors.extent("attn_q", 0), self.value("attention.head_count")
        hidden = self.value("embedding_length")
        if self.value("attention.key_length") is not None or not rows or not isinstance(heads, int) or heads < 1:
            return
        if isinstance(hidden, int) and rows != hidden and rows % heads == 0:
            self.numbers["head_dim"] = evolve(self.numbers["head_dim"], default=Expression(str(rows // heads)))
            self.notes["hyperparameters.head_dim"] = f"{rows} rows of attn_q / {heads} heads of this file"

    # weights ----------------------------------------------------------------------------------------------------

    def roles(self) -> None:
        self.tensors.name_fused()
        stub = Contract(
            name="draft",
            architectures=(self.file.architecture,),
            hyperparameters=self.numbers,
            norm=NormSpec(eps=Expression("0")),
            attention=AttentionSpec(),
            rope=None,
            ffn=FfnSpec(),
            embedding=EmbeddingSpec(),
            residual=ResidualSpec(),
            output=OutputSpec(),
            global_roles={"token_embd": RoleEntry().role("token_embd", layer=False)},
            layer_roles={},
        )
        resolved, _ = resolve_hyperparameters(stub, self.file)
        count = resolved.values.get("num_layers", 0)
        assert isinstance(count, int), "never one a layer"
        for known, roles in ((GLOBAL_ROLES, self.global_roles), (LAYER_ROLES, self.layer_roles)):
            for key in known:
                found = {
                    layer: tensor
                    for layer, tensor in self.tensors.of_role(key).items()
                    if layer is None or layer < count
                }
                values = {layer: resolved.uniform() if layer is None else resolved.at(layer) for layer in found}
                if found:
                    roles[key] = self.role(key, found, values, count)
        if "output" not in self.global_roles:
            shape = self.global_roles["token_embd"].shape
            self.global_roles["output"] = RoleEntry(shape=shape, else_="token_embd").role("output", layer=False)

    def role(
        self,
        key: str,
        found: Mapping[int | None, TensorView],
        values: Mapping[int | None, Mapping[str, Number]],
        layers: int,
    ) -> Role:
        in_layers = key in LAYER_ROLES
        dotted = f"roles.{'layer' if in_layers else 'global'}.{key}"
        shapes = [(tensor.shape, values[layer]) for layer, tensor in found.items()]
        shape, usual = fitting_shape(usual_shapes(key), shapes)
        if shape is None:
            first = shapes[0][0]
            shape = tuple(Expression(str(extent)) for extent in first)
            self.notes[dotted] = "unknown: no hyperparameter gives these extents; they are those of this file"
        elif not usual:
            self.notes[dotted] = "unknown: not the usual shape; concluded from the extents of this file"
        split = {part: Expression(rows) for part, rows in FUSED.get(key.removesuffix("_bias"), {}).items()}
        if key.endswith("_bias"):
            split = {f"{part}_bias": rows for part, rows in split.items()}
        if split:
            self.notes[dotted] = f"unknown: the order of the parts; {', '.join(split)} is usual"
        if in_layers and len(found) < layers:
            self.notes[dotted] = f"unknown: {len(found)} of {layers} layers have it"
        role = RoleEntry(shape=shape, split=split, optional=in_layers and len(found) < layers).role(
            key, layer=in_layers
        )
        actual = next(iter(found.items()))
        name = actual[1].name if actual[0] is None else actual[1].name.replace(f".{actual[0]}.", ".{i}.", 1)
        return evolve(role, name=name)

    # settings ---------------------------------------------------------------------------------------------------

    def contract(self, name: str) -> Contract:
        norm, attention, rope, ffn = self.norm(), self.attention(), self.rope(), self.ffn()
        embedding, residual, output = self.embedding(), self.residual(), self.output()
        contract = Contract(
            name=name,
            architectures=(self.file.architecture,),
            hyperparameters=self.numbers,
            norm=norm,
            attention=attention,
            rope=rope,
            ffn=ffn,
            embedding=embedding,
            residual=residual,
            output=output,
            global_roles=self.global_roles,
            layer_roles=self.layer_roles,
        )
        used = {name for _, expression in contract.expressions() for name in expression.names}
        numbers = {key: item for key, item in self.numbers.items() if key in used | STANDARD_HYPERPARAMETERS.keys()}
        return evolve(contract, hyperparameters=numbers)

    def norm(self) -> NormSpec:
        kind: Literal["rms", "layer"] = (
            "layer" if self.value(_RMS) is None and self.value(_PLAIN) is not None else "rms"
        )
        self.notes["norm.type"] = "concluded: from the key of the epsilon"
        eps = self.number("norm_eps", _RMS if kind == "rms" else _PLAIN)
        if eps is None:
            eps = self.leave_open("norm.eps", "the file has no epsilon", Expression("1e-05"))
            kind = self.leave_open("norm.type", "the file has no epsilon, whose key would name it", kind)
        before = "attn_norm" in self.layer_roles
        after = "post_attention_norm" in self.layer_roles
        if not before and not after:
            placement = self.leave_open("norm.placement", "neither attn_norm nor post_attention_norm is there", "pre")
        else:
            placement = "both" if before and after else "pre" if before else "post"
            self.notes["norm.placement"] = "concluded: from the norms that are there"
        return NormSpec(type=kind, placement=placement, eps=eps)

    def attention(self) -> AttentionSpec:
        scale = self.number("attention_scale", "attention.scale")
        softcap = self.number("attention_softcap", "attn_logit_softcapping")
        window = self.number("sliding_window", "attention.sliding_window")
        if window is not None and self.value("attention.sliding_window_pattern") is None:
            self.notes["attention.sliding_window"] = "unknown: which layers have the window; here all have"
        plain = AttentionSpec()
        return AttentionSpec(
            qk_norm=self.qk_norm(),
            scale=scale or plain.scale,
            softcap=softcap or plain.softcap,
            sliding_window=window or plain.sliding_window,
        )

    def qk_norm(self) -> Literal["none", "per_head", "per_row"]:
        role = self.layer_roles.get("attn_q_norm")
        if role is None:
            return "none"
        usual = usual_shapes("attn_q_norm")
        if role.shape == usual[1]:
            self.notes["attention.qk_norm"] = "unknown: or each head with weights of its own (per_head)"
            return "per_row"
        return "per_head"

    def rope(self) -> RopeSpec | None:
        keys = [key for key in self.file.metadata if key.startswith(f"{self.file.architecture}.rope.")]
        if not keys and "position_embd" in self.global_roles:
            return None
        if not keys and self.like is not None and self.like.rope is None:
            return None
        if not keys and self.like is None:
            self.remarks.append("unknown: no key speaks of RoPE; without rotary positions, leave out the table [rope]")
        style = self.leave_open("rope.style", f'{_NOT_IN_A_FILE}: "adjacent" or "halves"', "halves")
        scaling: tuple[Literal["linear", "yarn", "longrope"], ...] = ("linear", "yarn")
        if str(self.value("rope.scaling.type")) == "longrope":
            scaling = ("longrope",)
        return RopeSpec(style=style, dims=Expression("rope_dim"), base=Expression("rope_freq_base"), scaling=scaling)

    def ffn(self) -> FfnSpec:
        gated = not {"ffn_gate", "ffn_gate_up"}.isdisjoint(self.layer_roles)
        self.notes["ffn.gated"] = f"concluded: a gate is {'there' if gated else 'not there'}"
        activation = self.leave_open("ffn.activation", f'{_NOT_IN_A_FILE}: "silu", "gelu_tanh" …', "silu")
        return FfnSpec(gated=gated, activation=activation)

    def embedding(self) -> EmbeddingSpec:
        scale = self.number("embedding_scale", "embedding_scale")
        learned = "position_embd" in self.global_roles
        return EmbeddingSpec(scale=scale or EmbeddingSpec().scale, positions="learned" if learned else "none")

    def residual(self) -> ResidualSpec:
        plain = ResidualSpec()
        parallel = self.number("parallel_residual", "use_parallel_residual") or plain.parallel
        placement = {"attn_norm", "ffn_norm"} & self.layer_roles.keys()
        if parallel.is_zero and placement == {"attn_norm"} and "post_attention_norm" not in self.layer_roles:
            parallel = Expression("1")
            self.notes["residual.parallel"] = "concluded: there is no ffn_norm"
        return ResidualSpec(scale=self.number("residual_scale", "residual_scale") or plain.scale, parallel=parallel)

    def output(self) -> OutputSpec:
        plain = OutputSpec()
        scale = plain.scale
        if self.value("logit_scale") is not None:
            scale = self.leave_open("output.scale", 'multiply or divide by "logit_scale"? families differ', plain.scale)
            self.number("logit_scale", "logit_scale")
        softcap = self.number("output_softcap", "final_logit_softcapping")
        return OutputSpec(scale=scale, softcap=softcap or plain.softcap)
