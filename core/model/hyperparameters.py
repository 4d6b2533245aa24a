"""From a contract's hyperparameters and a file's metadata to checked numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from attrs import define, field, frozen

from mortice.arch_contracts.expressions import Expression, ExpressionError, Number
from mortice.arch_contracts.schema import Contract, Hyperparameter
from mortice.core.model.findings import Finding
from mortice.core.model.types import ModelFile

__all__ = ["Hyperparameters", "resolve_hyperparameters"]

_MAX_COUNT = 2**31 - 1  # every count of a model fits 32 bits; larger ones are broken files, and would overflow later

Value = Number | tuple[Number, ...]


@frozen
class Hyperparameters:
    """Checked numbers of a model by name. Some may differ from layer to layer; those are tuples."""

    values: Mapping[str, Value]

    def __getitem__(self, name: str) -> Number:
        """The value of a hyperparameter that is the same for all layers."""
        value = self.values[name]
        if isinstance(value, tuple):
            raise TypeError(f"{name} differs from layer to layer; ask at(layer)")
        return value

    def integer(self, name: str) -> int:
        """A count that is the same for all layers."""
        return int(self[name])

    def at(self, layer: int) -> dict[str, Number]:
        """All values as layer `layer` sees them, ``layer`` included."""
        numbers = {name: value[layer] if isinstance(value, tuple) else value for name, value in self.values.items()}
        return {**numbers, "layer": layer}

    def uniform(self) -> dict[str, Number]:
        """The values that are the same for all layers."""
        return {name: value for name, value in self.values.items() if not isinstance(value, tuple)}


@define
class _Resolver:
    contract: Contract
    file: ModelFile
    values: dict[str, Value] = field(factory=dict)
    findings: list[Finding] = field(factory=list)

    def key(self, hyperparameter: Hyperparameter) -> str:
        return f"{self.file.architecture}.{hyperparameter.key}"

    def report(self, rule: str, key: str, found: str, wanted: str) -> None:
        offset = self.file.metadata_offsets.get(key)
        self.findings.append(
            Finding(
                rule=f"hyperparameter.{rule}",
                severity="error",
                subject=key,
                found=found,
                wanted=wanted,
                offset=offset,
            )
        )

    def read(self, name: str, hyperparameter: Hyperparameter) -> None:
        key = self.key(hyperparameter)
        raw = self.file.metadata.get(key)
        if raw is None:
            if hyperparameter.default is None:
                self.report("missing", key, "missing", f"{self.contract.name} needs it ({name})")
            return
        if isinstance(raw, (np.ndarray, Sequence)) and not isinstance(raw, str):
            self._read_array(name, key, hyperparameter, raw)
            return
        value = self._scalar(key, hyperparameter, raw)
        if value is not None:
            self.values[name] = value

    def _read_array(self, name: str, key: str, hyperparameter: Hyperparameter, raw: Sequence[Any]) -> None:
        layers = self.values.get("num_layers")
        if not hyperparameter.per_layer:
            distinct = np.unique(raw) if isinstance(raw, np.ndarray) and len(raw) else []
            if len(distinct) != 1:
                self.report(
                    "type",
                    key,
                    f"an array of {len(raw)}",
                    f"{self.contract.name} wants one {hyperparameter.kind}",
                )
                return
            raw = [raw[0]]  # an array that says the same for every layer is the scalar
        elif len(raw) != layers:
            self.report("length", key, f"{len(raw)} values", f"wanted one for each of {layers} layers")
            return
        numbers = [self._scalar(key, hyperparameter, item.item() if hasattr(item, "item") else item) for item in raw]
        checked = tuple(number for number in numbers if number is not None)
        if len(checked) == len(numbers):
            self.values[name] = checked if hyperparameter.per_layer else checked[0]

    def _scalar(self, key: str, hyperparameter: Hyperparameter, raw: Any) -> Number | None:
        wanted_types = {"int": (int,), "float": (int, float), "bool": (bool,)}[hyperparameter.kind]
        if not isinstance(raw, wanted_types) or (isinstance(raw, bool) and hyperparameter.kind != "bool"):
            self.report("type", key, f"{type(raw).__name__} {raw!r:.40}", f"wanted {hyperparameter.kind}")
            return None
        if not math.isfinite(raw):
            self.report("range", key, repr(raw), "wanted a finite number")
            return None
        if hyperparameter.kind == "int" and not 0 <= raw <= _MAX_COUNT:
            self.report("range", key, repr(raw), f"wanted 0 to {_MAX_COUNT}")
            return None
        return raw  # type: ignore[no-any-return]  # narrowed by wanted_types, which mypy cannot follow

    def fill_defaults(self) -> None:
        """Defaults may build on one another, so they are filled until nothing moves."""
        pending = {
            name: hyperparameter
            for name, hyperparameter in self.contract.hyperparameters.items()
            if name not in self.values
            and hyperparameter.default is not None
            # a key that is there but broken is reported, never replaced by the default
            and self.key(hyperparameter) not in self.file.metadata
        }
        moved = True
        while pending and moved:
            moved = False
            for name, hyperparameter in list(pending.items()):
                assert hyperparameter.default is not None
                if hyperparameter.default.names <= self.values.keys():
                    del pending[name]
                    moved = True
                    self._fill(name, hyperparameter, hyperparameter.default)

    def _fill(self, name: str, hyperparameter: Hyperparameter, default: Expression) -> None:
        numbers = {key: value for key, value in self.values.items() if not isinstance(value, tuple)}
        try:
            value = default.evaluate(numbers)
        except ExpressionError as error:
            self.report("default", self.key(hyperparameter), "missing", f"its default has no value: {error}")
            return
        if hyperparameter.kind == "int" and value != int(value):
            self.report(
                "default",
                self.key(hyperparameter),
                "missing",
                f"its default {default.text} is {value}, no whole number",
            )
            return
        self.values[name] = int(value) if hyperparameter.kind == "int" else value


def resolve_hyperparameters(contract: Contract, file: ModelFile) -> tuple[Hyperparameters, list[Finding]]:
    """Read, default and check every hyperparameter of `contract`.

    Returns:
        What could be resolved, and the findings; with an error among them some names may be missing.

    """
    resolver = _Resolver(contract, file)
    ordered = sorted(contract.hyperparameters.items(), key=lambda item: item[0] != "num_layers")
    for name, hyperparameter in ordered:
        resolver.read(name, hyperparameter)
    _vocab_size(resolver)
    resolver.fill_defaults()
    if not resolver.findings:
        _check_ranges(resolver)
    return Hyperparameters(resolver.values), resolver.findings


def _vocab_size(resolver: _Resolver) -> None:
    """The key, else the length of the token list, else the rows of the embedding; the first two must agree."""
    key = f"{resolver.file.architecture}.vocab_size"
    stated = resolver.file.metadata.get(key)
    tokens = resolver.file.metadata.get("tokenizer.ggml.tokens")
    listed = len(tokens) if isinstance(tokens, Sequence) and not isinstance(tokens, str) else None
    if stated is not None and (isinstance(stated, bool) or not isinstance(stated, int) or not 0 < stated <= _MAX_COUNT):
        resolver.report("type", key, repr(stated), "wanted a positive int")
    elif stated is not None and listed is not None and stated != listed:
        resolver.report("vocab_size", key, str(stated), f"tokenizer.ggml.tokens has {listed} entries")
    elif stated is not None:
        resolver.values["vocab_size"] = stated
    elif listed is not None:
        resolver.values["vocab_size"] = listed
    else:
        embedding = resolver.file.tensors.get(resolver.contract.global_roles["token_embd"].name)
        if embedding is not None:
            resolver.values["vocab_size"] = embedding.shape[0]


def _check_ranges(resolver: _Resolver) -> None:
    contract = resolver.contract

    def numbers(name: str) -> tuple[Number, ...]:
        value = resolver.values.get(name, ())
        return value if isinstance(value, tuple) else (value,)

    for name in (
        "num_layers",
        "hidden_size",
        "num_heads",
        "num_kv_heads",
        "head_dim",
        "ffn_size",
        "context_length",
    ):
        if any(number < 1 for number in numbers(name)):
            resolver.report("range", resolver.key(contract.hyperparameters[name]), "0", "wanted at least 1")
            return
    layers = resolver.values["num_layers"]
    assert isinstance(layers, int)
    if layers > len(resolver.file.tensors):  # also what bounds every loop over layers from here on
        key = resolver.key(contract.hyperparameters["num_layers"])
        resolver.report("range", key, str(layers), f"the file has {len(resolver.file.tensors)} tensors in all")
        return
    at = Hyperparameters(resolver.values).at
    for layer in range(layers):
        values = at(layer)
        if values["num_heads"] % values["num_kv_heads"]:
            key = resolver.key(contract.hyperparameters["num_kv_heads"])
            found = f"{values['num_kv_heads']} (layer {layer})"
            resolver.report("heads", key, found, f"wanted a divisor of {values['num_heads']} query heads")
            return
