"""Contract x file: every violation, not only the first. Only what passes here can be planned, uploaded and run.

No tensor data is read. A contract is taken literally: a tensor it does not name is an error, because a weight left out
silently gives wrong results.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from attrs import define, field, frozen

from mortice.arch_contracts.expressions import Expression, ExpressionError, Number
from mortice.arch_contracts.schema import Contract, Role
from mortice.core.errors import ValidationError
from mortice.core.model.findings import Finding, Findings, Severity
from mortice.core.model.hyperparameters import Hyperparameters, resolve_hyperparameters
from mortice.core.model.operators import RopeScaling, WeightRef
from mortice.core.model.rope_scaling import resolve_rope_scaling
from mortice.core.model.types import ModelFile, TensorView

__all__ = ["RoleKey", "ValidatedModel", "ValidationReport", "validate"]

RoleKey = tuple[str, int | None]
"""A role and its layer; None for a global role."""


@frozen(eq=False, kw_only=True)
class ValidatedModel:
    """A file that fits its contract. Made by `ValidationReport.model` only.

    Attributes:
        file: the opened file.
        contract: the contract it fits.
        hyperparameters: its numbers.
        rope_scaling: the context extension the file asks for.
        weights: every weight present, by role and layer; fused parts and fallbacks are resolved.
        findings: the warnings and notes.

    """

    file: ModelFile
    contract: Contract
    hyperparameters: Hyperparameters
    rope_scaling: RopeScaling | None
    weights: Mapping[RoleKey, WeightRef] = field(repr=False)
    findings: Findings

    def tensor(self, weight: WeightRef) -> TensorView:
        """The tensor a weight lies in."""
        return self.file.tensors[weight.tensor]


@frozen(eq=False, kw_only=True)
class ValidationReport:
    """What validation found; `model` is there when nothing is an error."""

    file: ModelFile
    contract: Contract
    findings: Findings
    _model: ValidatedModel | None

    @property
    def ok(self) -> bool:
        """Whether the model can go on."""
        return self._model is not None

    def model(self) -> ValidatedModel:
        """The validated model.

        Raises:
            ValidationError: listing every error.

        """
        if self._model is None:
            errors = self.findings.errors
            lines = "\n".join(f"  {finding.subject}: {finding.found}; {finding.wanted}" for finding in errors)
            count = f"{len(errors)} error" + ("s" if len(errors) > 1 else "")
            raise ValidationError(f"{self.file.path}: {count} against contract {self.contract.name}\n{lines}")
        return self._model


def validate(file: ModelFile, contract: Contract, extra: Iterable[Finding] = ()) -> ValidationReport:
    """Check `file` against `contract`; `extra` are findings of plugins, which count like our own."""
    hyperparameters, findings = resolve_hyperparameters(contract, file)
    findings += extra
    check = _Check(file=file, contract=contract, hyperparameters=hyperparameters, findings=findings)
    scaling = None
    if not any(finding.rule.startswith("hyperparameter.") for finding in findings):
        check.roles()
        check.unclaimed()
        check.numbers()
        scaling, found = resolve_rope_scaling(contract, file)
        findings += found
    check.tokenizer()
    result = Findings(findings)
    model = None
    if result.ok:
        model = ValidatedModel(
            file=file,
            contract=contract,
            hyperparameters=hyperparameters,
            rope_scaling=scaling,
            weights=check.weights,
            findings=result,
        )
    return ValidationReport(file=file, contract=contract, findings=result, model=model)


@define(kw_only=True)
class _Check:
    file: ModelFile
    contract: Contract
    hyperparameters: Hyperparameters
    findings: list[Finding]
    weights: dict[RoleKey, WeightRef] = field(factory=dict)
    claimed: set[str] = field(factory=set)

    def report(
        self,
        rule: str,
        subject: str,
        found: str,
        wanted: str,
        severity: Severity = "error",
        offset: int | None = None,
    ) -> None:
        self.findings.append(
            Finding(rule=rule, severity=severity, subject=subject, found=found, wanted=wanted, offset=offset)
        )

    # roles ------------------------------------------------------------------------------------------------------

    def scopes(self) -> Iterator[tuple[int | None, Mapping[str, Role], dict[str, Number]]]:
        yield None, self.contract.global_roles, self.hyperparameters.uniform()
        for layer in range(self.hyperparameters.integer("num_layers")):
            yield layer, self.contract.layer_roles, self.hyperparameters.at(layer)

    def roles(self) -> None:
        for layer, roles, values in self.scopes():
            for key, role in roles.items():
                self._own_tensor(key, role, layer, values)
            for key, role in roles.items():
                self._missing(key, role, layer, roles)

    def _own_tensor(self, key: str, role: Role, layer: int | None, values: dict[str, Number]) -> None:
        name = role.name.replace("{i}", str(layer))
        tensor = self.file.tensors.get(name)
        if tensor is None:
            return
        self.claimed.add(name)
        if role.presence == "forbidden":
            self.report("role.forbidden", name, "present", f"{self.contract.name} has no {key}", offset=tensor.offset)
            return
        shape = self._shape(name, role.shape, values)
        if shape is None:
            return
        if tensor.shape != shape:
            wanted = f"{self.contract.name} wants {_text(shape)}"
            self.report("role.shape", name, f"shape {_text(tensor.shape)}", wanted, offset=tensor.offset)
            return
        whole = WeightRef(role=key, layer=layer, tensor=name, shape=shape, row_stop=shape[0])
        self.weights[key, layer] = whole
        self._split(name, role, whole, values)

    def _split(self, name: str, role: Role, whole: WeightRef, values: dict[str, Number]) -> None:
        start = 0
        for part, rows in role.split.items():
            extent = self._shape(name, (rows,), values)
            if extent is None:
                return
            stop = start + extent[0]
            if (part, whole.layer) in self.weights and self.weights[part, whole.layer].tensor != name:
                self.report("role.repeated", name, f"holds {part} again", f"{part} has a tensor of its own")
            self.weights[part, whole.layer] = WeightRef(
                role=part, layer=whole.layer, tensor=name, shape=whole.shape, row_start=start, row_stop=stop
            )
            start = stop
        if role.split and start != whole.shape[0]:
            self.report("role.split", name, f"{whole.shape[0]} rows", f"the declared parts have {start}")

    def _missing(self, key: str, role: Role, layer: int | None, roles: Mapping[str, Role]) -> None:
        if (key, layer) in self.weights or role.presence == "forbidden":
            return
        name = role.name.replace("{i}", str(layer))
        if role.fallback is not None:
            fallback = self.weights.get((role.fallback, layer))
            if fallback is not None:
                self.weights[key, layer] = fallback
        elif role.presence == "required" and name not in self.claimed:
            # a part of a fused tensor that is there but broken is reported with that tensor
            fused = [other for other in roles.values() if key in other.split]
            if not any(other.name.replace("{i}", str(layer)) in self.claimed for other in fused):
                self.report("role.missing", name, "missing", f"{self.contract.name} requires {key}")

    def _shape(self, subject: str, extents: Sequence[Expression], values: dict[str, Number]) -> tuple[int, ...] | None:
        shape = []
        for extent in extents:
            try:
                value = extent.evaluate(values)
            except ExpressionError as error:
                self.report("contract.expression", subject, f"no shape: {error}", "the contract must give one")
                return None
            if value != int(value) or value < 1:
                found = f"{extent.text} is {value}"
                self.report("contract.expression", subject, found, "wanted a whole, positive extent")
                return None
            shape.append(int(value))
        return tuple(shape)

    def unclaimed(self) -> None:
        layers = self.hyperparameters.integer("num_layers")
        ignored = {name.replace("{i}", str(layer)) for name in self.contract.ignored for layer in range(layers)}
        for name, tensor in self.file.tensors.items():
            if name in ignored:
                self.report("tensor.ignored", name, "present", "known to play no part", "note", tensor.offset)
            elif name not in self.claimed:
                found = f"no role in contract {self.contract.name}"
                self.report(
                    "tensor.unclaimed",
                    name,
                    found,
                    "a weight left out would change the result",
                    offset=tensor.offset,
                )

    # numbers ----------------------------------------------------------------------------------------------------

    def numbers(self) -> None:
        for layer in range(self.hyperparameters.integer("num_layers")):
            values = self.hyperparameters.at(layer)
            before = len(self.findings)
            for where, expression, low, wanted in self._bounds():
                value = self._number(where, expression, values)
                if value is not None and not low(value):
                    self.report(f"{where}.range", where, f"{value} (layer {layer})", wanted)
            self._rope_dims(values, layer)
            if len(self.findings) > before:
                return  # one layer tells it; the others would repeat it

    def _bounds(self) -> Iterator[tuple[str, Expression, Callable[[Number], bool], str]]:
        contract = self.contract
        yield "norm.eps", contract.norm.eps, _not_negative, "wanted a finite number, not negative"
        yield "attention.scale", contract.attention.scale, _positive, "wanted a positive number"
        yield "attention.softcap", contract.attention.softcap, _not_negative, "wanted 0 (none) or more"
        yield (
            "attention.sliding_window",
            contract.attention.sliding_window,
            _not_negative,
            "wanted 0 (none) or more",
        )
        yield "output.softcap", contract.output.softcap, _not_negative, "wanted 0 (none) or more"
        for where, scale in (
            ("embedding", contract.embedding),
            ("residual", contract.residual),
            ("output", contract.output),
        ):
            yield f"{where}.scale", scale.scale, _positive, "wanted a positive number"
        if contract.rope is not None:
            yield "rope.base", contract.rope.base, _positive, "wanted a positive number"

    def _number(self, where: str, expression: Expression, values: dict[str, Number]) -> Number | None:
        try:
            return expression.evaluate(values)
        except ExpressionError as error:
            self.report("contract.expression", where, str(error), "wanted a number")
            return None

    def _rope_dims(self, values: dict[str, Number], layer: int) -> None:
        if self.contract.rope is None:
            return
        dims = self._number("rope.dims", self.contract.rope.dims, values)
        if dims is not None and (dims != int(dims) or dims % 2 or not 0 <= dims <= values["head_dim"]):
            wanted = f"wanted an even number, at most head_dim = {values['head_dim']}"
            self.report("rope.dims.range", "rope.dims", f"{dims} (layer {layer})", wanted)

    # tokenizer --------------------------------------------------------------------------------------------------

    def tokenizer(self) -> None:
        metadata, offsets = self.file.metadata, self.file.metadata_offsets
        tokens = metadata.get("tokenizer.ggml.tokens")
        if tokens is None:
            subject = "tokenizer.ggml.tokens"
            self.report("tokenizer.missing", subject, "missing", "only token ids can be used, no text", "warning")
            return
        count = len(tokens) if isinstance(tokens, Sequence) and not isinstance(tokens, str) else None
        if count is None:
            self.report("tokenizer.type", "tokenizer.ggml.tokens", type(tokens).__name__, "wanted an array of strings")
            return
        for name in ("token_type", "scores"):
            key = f"tokenizer.ggml.{name}"
            values = metadata.get(key)
            if values is not None and (not hasattr(values, "__len__") or len(values) != count):
                found = f"{len(values)} entries" if hasattr(values, "__len__") else type(values).__name__
                self.report("tokenizer.length", key, found, f"wanted {count}, one a token", offset=offsets.get(key))
        for name in ("bos", "eos", "eot", "eom", "unknown", "padding"):
            key = f"tokenizer.ggml.{name}_token_id"
            value = metadata.get(key)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < count):
                self.report(
                    "tokenizer.id",
                    key,
                    repr(value),
                    f"wanted a token id below {count}",
                    offset=offsets.get(key),
                )


def _positive(value: Number) -> bool:
    return math.isfinite(value) and value > 0


def _not_negative(value: Number) -> bool:
    return math.isfinite(value) and value >= 0


def _text(shape: tuple[int, ...]) -> str:
    return f"({', '.join(map(str, shape))})"
