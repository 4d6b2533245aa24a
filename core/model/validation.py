"""Contract x file: every violation, not only the first. Only what passes here can be planned, uploaded and run.

No tensor data is read. A contract is taken literally: a tensor it does not name is an error, because a weight left out
silently gives wrong results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from attrs import define, field, frozen

from mortice.arch_contracts.expressions import Expression, ExpressionError, Number
from mortice.arch_contracts.schema import PRESENCE, Contract, Role
from mortice.core.counts import counted
from mortice.core.errors import ValidationError
from mortice.core.model.findings import Finding, Findings, Severity, join_findings
from mortice.core.model.hyperparameters import Hyperparameters, resolve_hyperparameters
from mortice.core.model.known_keys import unread_keys
from mortice.core.model.operators import RopeScaling, WeightRef
from mortice.core.model.rope_scaling import resolve_rope_scaling
from mortice.core.model.text_check import tokenizer_findings
from mortice.core.model.types import ModelFile, TensorView

__all__ = ["RoleKey", "ValidatedModel", "ValidationReport", "validate"]

_TOGETHER = (("attn_q_norm", "attn_k_norm"), ("rope_factors_short", "rope_factors_long"))
_INTEGERS = frozenset({"I8", "I16", "I32", "I64"})

Values = Mapping[str, Number]

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

    def layer_values(self, layer: int) -> Values:
        """What expressions of a layer may read: its numbers, and which roles have a weight there."""
        return _with_presence(self.hyperparameters.at(layer), self.contract, self.weights, layer)

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
            ValidationError: listing every error, those that differ in the layer only as one.

        """
        if self._model is None:
            errors = self.findings.errors
            lines = "\n".join(f"  {finding}" for finding in join_findings(errors))
            count = counted(len(errors), "error")
            raise ValidationError(f"{self.file.path}: {count} against contract {self.contract.name}\n{lines}")
        return self._model


def validate(file: ModelFile, contract: Contract, extra: Iterable[Finding] = ()) -> ValidationReport:
    """Check `file` against `contract`; `extra` are findings of plugins, which count like our own.

    What one mistake leaves undecided (a shape whose hyperparameter is missing) is skipped; all else is checked.
    """
    hyperparameters, findings = resolve_hyperparameters(contract, file)
    scaling, found = resolve_rope_scaling(contract, file)
    findings += found
    findings += unread_keys(file, contract, hyperparameters.uniform())
    findings += _architecture_findings(file, contract)
    findings += extra
    check = _Check(file=file, contract=contract, hyperparameters=hyperparameters, findings=findings)
    check.layers = int(hyperparameters.values.get("num_layers", 0))  # type: ignore[arg-type]  # one number, never a tuple
    check.roles()
    check.uneven()
    check.unclaimed()
    check.numbers(scaling)
    findings += tokenizer_findings(file)
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


def _architecture_findings(file: ModelFile, contract: Contract) -> Iterator[Finding]:
    """A contract that was asked for may be another family's: shapes can fit where the maths differs."""
    if file.architecture not in contract.architectures:
        made_for = ", ".join(contract.architectures)
        yield Finding(
            rule="contract.architecture",
            severity="warning",
            subject="general.architecture",
            found=repr(file.architecture) if file.architecture else "missing",
            wanted=f"contract {contract.name} was made for {made_for}; results are right only if both compute the same",
        )


@define(kw_only=True)
class _Check:
    file: ModelFile
    contract: Contract
    hyperparameters: Hyperparameters
    findings: list[Finding]
    layers: int = 0
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

    def report_tensor(self, rule: str, tensor: TensorView, found: str, wanted: str) -> None:
        self.report(rule, tensor.name, found, wanted, offset=tensor.offset)

    def evaluate(self, where: str, expression: Expression, values: Values) -> Number | None:
        """The value, or None with the reason reported; a name that is missing has been reported already."""
        if not expression.names <= values.keys():
            return None
        try:
            return expression.evaluate(values)
        except ExpressionError as error:
            self.report("contract.expression", where, f"no value: {error}", "the contract must give one")
            return None

    # roles ------------------------------------------------------------------------------------------------------

    def roles(self) -> None:
        self._scope(None, self.contract.global_roles, self.hyperparameters.uniform())
        for layer in range(self.layers):
            self._scope(layer, self.contract.layer_roles, self.hyperparameters.at(layer))

    def _scope(self, layer: int | None, roles: Mapping[str, Role], values: Values) -> None:
        broken: set[str] = set()
        for key, role in roles.items():
            if not self._own_tensor(key, role, layer, values):
                broken |= {key, *role.split}
        for key, role in roles.items():
            if (
                role.fallback is not None
                and (key, layer) not in self.weights
                and (role.fallback, layer) in self.weights
            ):
                self.weights[key, layer] = self.weights[role.fallback, layer]
        # a fallback that is there but broken has been reported itself
        broken |= {key for key, role in roles.items() if role.fallback in broken}
        told: set[str] = set()
        for key, why in self._needed(layer, roles, values):
            name = self._where(key, layer, roles)
            if (key, layer) not in self.weights and key not in broken and name not in told:
                told.add(name)  # a fused tensor lacks all its parts at once
                self.report("role.missing", name, "missing", f"{self.contract.name} requires {key}{why}")
        for pair in _TOGETHER:
            if len([key for key in pair if (key, layer) in self.weights]) == 1:
                where = "file" if layer is None else f"layer {layer}"
                self.report("role.missing", where, f"only one of {' and '.join(pair)}", "wanted both or none")

    def uneven(self) -> None:
        """A layer that lacks what the others have is a broken file, not a family of another shape."""
        for role in self.contract.asked_for():
            without = [layer for layer in range(self.layers) if (role, layer) not in self.weights]
            if 0 < len(without) < self.layers:
                name = self.contract.layer_roles[role].tensor(without[0])
                self.report("role.uneven", name, "missing", "other layers have it; wanted in all layers or in none")

    def _needed(self, layer: int | None, roles: Mapping[str, Role], values: Values) -> Iterator[tuple[str, str]]:
        """Roles that must have a weight: what the contract calls required, and what its settings cannot do without."""
        required = [key for key, role in roles.items() if role.presence == "required"]
        yield from ((key, "") for key in required)
        if layer is None:
            needed = self.contract.needed_global_roles()
        else:
            seen = _with_presence(values, self.contract, self.weights, layer)
            parallel = self.evaluate("residual.parallel", self.contract.residual.parallel, seen)
            needed = self.contract.needed_layer_roles(parallel=parallel != 0)
        yield from ((key, f" ({why})") for key, why in needed if key not in required)

    def _where(self, key: str, layer: int | None, roles: Mapping[str, Role]) -> str:
        """The tensor that would hold a role: its own, or else the fused one."""
        role = roles.get(key) or next(role for role in roles.values() if key in role.split)
        return role.tensor(layer)

    def _own_tensor(self, key: str, role: Role, layer: int | None, values: Values) -> bool:
        """Bind a role to the tensor of its name where there is one; False when that tensor is broken."""
        tensor = self.file.tensors.get(role.tensor(layer))
        if tensor is None:
            return True
        self.claimed.add(tensor.name)
        family = self.contract.name
        if role.presence == "forbidden":
            self.report_tensor("role.forbidden", tensor, "present", f"{family} has no {key}")
            return False
        if tensor.qtype.name in _INTEGERS:
            self.report_tensor("role.type", tensor, f"type {tensor.qtype.name}", "weights are no integers")
            return False
        extents = [self._extent(tensor.name, extent, values) for extent in role.shape]
        shape = tuple(extent for extent in extents if extent is not None)
        if len(shape) != len(extents):
            return False
        if tensor.shape != shape:
            self.report_tensor("role.shape", tensor, f"shape {_text(tensor.shape)}", f"{family} wants {_text(shape)}")
            return False
        whole = WeightRef(role=key, layer=layer, tensor=tensor.name, shape=shape, row_stop=shape[0])
        self.weights[key, layer] = whole
        return self._split(tensor, role, whole, values)

    def _split(self, tensor: TensorView, role: Role, whole: WeightRef, values: Values) -> bool:
        start = 0
        for part, rows in role.split.items():
            extent = self._extent(tensor.name, rows, values)
            if extent is None:
                return False
            stop = start + extent
            if len(whole.shape) == 1 and stop % tensor.qtype.block_elements:
                found = f"{part} ends at element {stop}"
                wanted = f"{tensor.qtype.name} blocks have {tensor.qtype.block_elements}"
                self.report_tensor("role.split", tensor, found, wanted)
                return False
            other = self.weights.get((part, whole.layer))
            if other is not None and other.tensor != tensor.name:
                self.report_tensor("role.repeated", tensor, f"holds {part}", f"{other.tensor} holds it too")
                return False
            self.weights[part, whole.layer] = WeightRef(
                role=part,
                layer=whole.layer,
                tensor=tensor.name,
                shape=whole.shape,
                row_start=start,
                row_stop=stop,
            )
            start = stop
        if role.split and start != whole.shape[0]:
            self.report_tensor("role.split", tensor, counted(whole.shape[0], "row"), f"its parts have {start}")
            return False
        return True

    def _extent(self, subject: str, expression: Expression, values: Values) -> int | None:
        value = self.evaluate(subject, expression, values)
        if value is None:
            return None
        if value != int(value) or value < 1:
            found = f"{expression.text} is {value}"
            self.report("contract.expression", subject, found, "wanted a whole, positive extent")
            return None
        return int(value)

    def unclaimed(self) -> None:
        """Tensors without a role; of layers that do not exist, too. Not asked when the layers are not known."""
        if not self.layers:
            return
        ignored = {name.replace("{i}", str(layer)) for name in self.contract.ignored for layer in range(self.layers)}
        for name, tensor in self.file.tensors.items():
            if name in ignored:
                self.report("tensor.ignored", name, "present", "known to play no part", "note", tensor.offset)
            elif name not in self.claimed:
                found = f"no role in contract {self.contract.name}"
                self.report_tensor("tensor.unclaimed", tensor, found, "a weight left out would change the result")

    # numbers ----------------------------------------------------------------------------------------------------

    def numbers(self, scaling: RopeScaling | None) -> None:
        """Every number of the contract within its range, in every layer; one finding for each number."""
        told: set[str] = set()
        for layer in range(self.layers):
            values = _with_presence(self.hyperparameters.at(layer), self.contract, self.weights, layer)
            for where, expression, good, wanted in _ranges(self.contract, scaling):
                if where in told:
                    continue
                before = len(self.findings)
                value = self.evaluate(where, expression, values)
                if value is not None and not good(value, values):
                    self._out_of_range(where, expression, value, layer, wanted(values))
                if len(self.findings) > before:
                    told.add(where)

    def _out_of_range(self, where: str, expression: Expression, value: Number, layer: int, wanted: str) -> None:
        """Named after the file's key where the number is just that."""
        hyperparameter = self.contract.hyperparameters.get(expression.text.strip())
        key = f"{self.file.architecture}.{hyperparameter.key}" if hyperparameter is not None else ""
        offset = self.file.metadata_offsets.get(key)
        subject = key if key in self.file.metadata else where
        found = str(value) if subject == key else f"{expression.text} = {value}"
        self.report(f"{where}.range", subject, f"{found} (layer {layer})", wanted, offset=offset)


_Good = Callable[[Number, Values], bool]
_Wanted = Callable[[Values], str]


def _ranges(contract: Contract, scaling: RopeScaling | None) -> Iterator[tuple[str, Expression, _Good, _Wanted]]:
    """Every number of a contract that has a range: where it stands, and when it is good."""
    attention, norm, rope = contract.attention, contract.norm, contract.rope
    yield "norm.eps", norm.eps, lambda value, _: value >= 0, lambda _: "wanted 0 or more"
    if attention.qk_norm_eps is not None:
        yield "attention.qk_norm_eps", attention.qk_norm_eps, lambda value, _: value >= 0, lambda _: "wanted 0 or more"
    for where, cap in (("attention.softcap", attention.softcap), ("output.softcap", contract.output.softcap)):
        yield where, cap, lambda value, _: value >= 0, lambda _: "wanted 0 (none) or more"
    yield (
        "attention.sliding_window",
        attention.sliding_window,
        lambda value, _: value >= 0 and value == int(value),
        lambda _: "wanted a whole number of tokens, or 0 (none)",
    )
    yield (
        "attention.temperature",
        attention.temperature,
        lambda value, _: value >= 0,
        lambda _: "wanted 0 (none) or more",
    )
    yield (
        "attention.temperature_period",
        attention.temperature_period,
        lambda value, _: value >= 1 and value == int(value),
        lambda _: "wanted a whole number of tokens, at least 1",
    )
    for where, scale in (
        ("attention.scale", attention.scale),
        ("embedding.scale", contract.embedding.scale),
        ("residual.scale", contract.residual.scale),
        ("output.scale", contract.output.scale),
    ):
        yield where, scale, lambda value, _: value > 0, lambda _: "wanted a positive number"
    if rope is not None:
        # YaRN divides by log(base)
        least = 1 if scaling is not None and scaling.type == "yarn" else 0
        yield "rope.base", rope.base, lambda value, _: value > least, lambda _: f"wanted more than {least}"
        yield (
            "rope.dims",
            rope.dims,
            lambda value, values: value in range(0, int(values.get("head_dim", value)) + 1, 2),
            lambda values: f"wanted an even number, at most head_dim = {values.get('head_dim')}",
        )


def _with_presence(
    values: Values, contract: Contract, weights: Mapping[RoleKey, WeightRef], layer: int | None
) -> Values:
    return {**values, **{PRESENCE + role: int((role, layer) in weights) for role in contract.layer_roles}}


def _text(shape: tuple[int, ...]) -> str:
    return f"({', '.join(map(str, shape))})"
