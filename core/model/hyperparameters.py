"""From a contract's hyperparameters and a file's metadata to checked numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from attrs import define, field, frozen

from mortice.arch_contracts.expressions import MAX_VALUE, Expression, ExpressionError, Number
from mortice.arch_contracts.schema import Contract, Hyperparameter
from mortice.core.counts import counted
from mortice.core.model.findings import Finding
from mortice.core.model.types import ModelFile

__all__ = ["Hyperparameters", "resolve_hyperparameters"]

# Every count of a model fits 32 bits; larger ones are broken files, and would overflow later.
_MAX_COUNT = 2**31 - 1
_TYPES: Mapping[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "bool": (bool,)}

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


def resolve_hyperparameters(contract: Contract, file: ModelFile) -> tuple[Hyperparameters, list[Finding]]:
    """Read, default and check every hyperparameter of `contract`.

    Returns:
        What could be resolved, and the findings. With an error among them some names may be missing; where
        ``num_layers`` is there, a loop over the layers is bounded by the number of tensors in the file.

    """
    resolver = _Resolver(contract, file)
    # everything that may differ from layer to layer needs the number of layers first
    for name in sorted(contract.hyperparameters, key=lambda name: name != "num_layers"):
        resolver.read(name, contract.hyperparameters[name])
        if name == "num_layers":
            resolver.bound_layers()
    resolver.vocab_size()
    resolver.fill_defaults()
    resolver.heads()
    return Hyperparameters(resolver.values), resolver.findings


@define
class _Resolver:
    contract: Contract
    file: ModelFile
    values: dict[str, Value] = field(factory=dict)
    findings: list[Finding] = field(factory=list)

    def key(self, name: str) -> str:
        return f"{self.file.architecture}.{self.contract.hyperparameters[name].key}"

    def report(self, rule: str, key: str, found: str, wanted: str) -> None:
        self.findings.append(
            Finding(
                rule=f"hyperparameter.{rule}",
                severity="error",
                subject=key,
                found=found,
                wanted=wanted,
                offset=self.file.metadata_offsets.get(key),
            )
        )

    # reading ----------------------------------------------------------------------------------------------------

    def read(self, name: str, hyperparameter: Hyperparameter) -> None:
        key = self.key(name)
        raw = self.file.metadata.get(key)
        if raw is None:
            if hyperparameter.default is None:
                self.report("missing", key, "missing", f"{self.contract.name} needs it ({name})")
        elif isinstance(raw, (np.ndarray, Sequence)) and not isinstance(raw, str):
            self._read_array(name, key, hyperparameter, raw)
        else:
            value = self._scalar(key, hyperparameter, raw)
            if value is not None:
                self.values[name] = value

    def _read_array(
        self, name: str, key: str, hyperparameter: Hyperparameter, raw: np.ndarray[Any, Any] | Sequence[Any]
    ) -> None:
        layers = self.values.get("num_layers")
        if layers is None:
            if name == "num_layers":
                self.report("type", key, f"an array of {len(raw)}", "wanted int")
            return  # how many values there should be is not known, and that is reported already
        if len(raw) != layers:
            self.report("length", key, counted(len(raw), "value"), f"wanted one for each of {layers} layers")
            return
        items = raw.tolist() if isinstance(raw, np.ndarray) else list(raw)
        if not hyperparameter.per_layer:
            if any(item != items[0] for item in items):
                wanted = f"{self.contract.name} wants one {hyperparameter.kind} for all layers"
                self.report("type", key, "values that differ from layer to layer", wanted)
                return
            items = items[:1]  # an array that says the same for every layer is the scalar
        numbers = tuple(self._scalar(key, hyperparameter, item) for item in items)
        checked = tuple(number for number in numbers if number is not None)
        if len(checked) == len(numbers):
            self.values[name] = checked if hyperparameter.per_layer else checked[0]

    def _scalar(self, key: str, hyperparameter: Hyperparameter, raw: Any) -> Number | None:
        kind = hyperparameter.kind
        number: Number = raw
        if not isinstance(raw, _TYPES[kind]) or (isinstance(raw, bool) and kind != "bool"):
            self.report("type", key, f"{type(raw).__name__} {raw!r:.40}", f"wanted {kind}")
            return None
        least: float = hyperparameter.min if hyperparameter.min is not None else 0 if kind == "int" else -math.inf
        most: float = _MAX_COUNT if kind == "int" else MAX_VALUE
        # comparisons, unlike math.isfinite, hold for integers of any size, and NaN fails them
        if not max(least, -MAX_VALUE) <= number <= most:
            bounds = [f"from {least:g}"] if math.isfinite(least) else []
            bounds += [f"to {most:.0f}"] if kind == "int" else []
            self.report("range", key, f"{number!r:.40}", " ".join(["wanted a finite number", *bounds]))
            return None
        return number

    def bound_layers(self) -> None:
        """A layer has tensors, so there are no more layers than tensors: what bounds every loop over layers."""
        layers = self.values.get("num_layers", 0)
        assert isinstance(layers, int)
        if layers > len(self.file.tensors):
            wanted = f"the file has {counted(len(self.file.tensors), 'tensor')} in all"
            self.report("range", self.key("num_layers"), str(layers), wanted)
            del self.values["num_layers"]

    def vocab_size(self) -> None:
        """The key, else the length of the token list, else the rows of the embedding; the first two must agree."""
        key = f"{self.file.architecture}.vocab_size"
        stated = self.file.metadata.get(key)
        tokens = self.file.metadata.get("tokenizer.ggml.tokens")
        listed = len(tokens) if isinstance(tokens, Sequence) and not isinstance(tokens, str) else None
        if stated is not None:
            if isinstance(stated, bool) or not isinstance(stated, int) or not 0 < stated <= _MAX_COUNT:
                self.report("type", key, f"{stated!r:.40}", "wanted a positive int")
                return
            if listed is not None and stated != listed:
                self.report(
                    "vocab_size", key, str(stated), f"tokenizer.ggml.tokens has {counted(listed, 'entry', 'entries')}"
                )
                return
            self.values["vocab_size"] = stated
        elif listed is not None:
            if not listed:
                self.report("vocab_size", "tokenizer.ggml.tokens", "0 entries", "wanted at least 1")
                return
            self.values["vocab_size"] = listed
        else:
            embedding = self.file.tensors.get(self.contract.global_roles["token_embd"].name)
            if embedding is not None and embedding.shape:
                self.values["vocab_size"] = embedding.shape[0]

    # defaults ---------------------------------------------------------------------------------------------------

    def fill_defaults(self) -> None:
        """Defaults may build on one another, so they are filled until nothing moves; what is left lacks an input."""
        pending = {
            name: hyperparameter.default
            for name, hyperparameter in self.contract.hyperparameters.items()
            # a key that is there but broken is reported, never replaced by the default
            if hyperparameter.default is not None and self.key(name) not in self.file.metadata
        }
        moved = True
        while pending and moved:
            moved = False
            for name, default in list(pending.items()):
                if default.names - {"layer"} <= self.values.keys():
                    del pending[name]
                    moved = True
                    self._fill(name, default)

    def _fill(self, name: str, default: Expression) -> None:
        hyperparameter = self.contract.hyperparameters[name]
        varying = [item for item in default.names if isinstance(self.values.get(item), tuple)]
        if not varying and "layer" not in default.names:
            value = self._default(name, default, Hyperparameters(self.values).uniform())
            if value is not None:
                self.values[name] = value
        elif not hyperparameter.per_layer:
            found = f"its default {default.text!r} differs from layer to layer"
            self.report("default", self.key(name), "missing", f"{found}, and {self.contract.name} wants one value")
        elif isinstance(layers := self.values.get("num_layers"), int):
            at = Hyperparameters(self.values).at
            values = tuple(self._default(name, default, at(layer)) for layer in range(layers))
            checked = tuple(value for value in values if value is not None)
            if len(checked) == layers:
                self.values[name] = checked

    def _default(self, name: str, default: Expression, numbers: Mapping[str, Number]) -> Number | None:
        hyperparameter = self.contract.hyperparameters[name]
        try:
            value = default.evaluate(numbers)
        except ExpressionError as error:
            self.report("default", self.key(name), "missing", f"its default has no value: {error}")
            return None
        if hyperparameter.kind == "int" and value != int(value):
            wanted = f"its default {default.text} is {value}, no whole number"
            self.report("default", self.key(name), "missing", wanted)
            return None
        if hyperparameter.min is not None and value < hyperparameter.min:
            wanted = f"its default {default.text} is {value}, less than {hyperparameter.min:g}"
            self.report("default", self.key(name), "missing", wanted)
            return None
        return int(value) if hyperparameter.kind == "int" else value

    def heads(self) -> None:
        """Query heads share KV heads evenly."""
        if not {"num_layers", "num_heads", "num_kv_heads"} <= self.values.keys():
            return
        resolved = Hyperparameters(self.values)
        for layer in range(resolved.integer("num_layers")):
            values = resolved.at(layer)
            if values["num_heads"] % values["num_kv_heads"]:
                found = f"{values['num_kv_heads']} (layer {layer})"
                wanted = f"wanted a divisor of {values['num_heads']} query heads"
                self.report("heads", self.key("num_kv_heads"), found, wanted)
                return
