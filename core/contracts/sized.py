"""A model file that has a contract's shapes and no data: enough to build its program."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from mortice.arch_contracts.expressions import ExpressionError, Number
from mortice.arch_contracts.vocabulary import STANDARD_HYPERPARAMETERS, Contract, Role
from mortice.core.errors import ConfigError, ContractError, ValidationError
from mortice.core.model.hyperparameters import Hyperparameters, resolve_hyperparameters
from mortice.core.model.program import Program, build_program
from mortice.core.model.qtypes import GGML_TYPES
from mortice.core.model.types import MetadataValue, ModelFile, TensorView
from mortice.core.model.validation import validate

__all__ = ["DEFAULT_SIZES", "program_of_sizes"]

DEFAULT_SIZES: Mapping[str, float] = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_heads": 4,
    "num_kv_heads": 2,
    "ffn_size": 128,
    "context_length": 512,
    "vocab_size": 512,
    "rope_dim": 16,
    "norm_eps": 1e-5,
}
"""Sizes where neither the caller nor a default of the contract gives one; any other such number is 1."""

_F32 = GGML_TYPES[0]
_MOST_LAYERS = 1024
_MOST_ELEMENTS = 2**60


def program_of_sizes(contract: Contract, sizes: Mapping[str, float]) -> Program:
    """The program that a contract builds for a file of these sizes, with the weights it requires.

    Args:
        contract: the contract.
        sizes: hyperparameters by name, laid over `DEFAULT_SIZES`.

    Raises:
        ConfigError: for a name the contract does not have, or too many layers.
        ValidationError: when the sizes do not fit the contract.
        ContractError: when the contract's parts do not fit together, or a weight has no shape.

    """
    kinds = {"vocab_size": "int", **{name: item.kind for name, item in contract.hyperparameters.items()}}
    for name, value in sizes.items():
        if name not in kinds:
            raise ConfigError(f"--sizes: contract {contract.name} has no {name!r}; have {', '.join(sorted(kinds))}")
        if not math.isfinite(value) or (kinds[name] == "int" and value != int(value)):
            raise ConfigError(f"--sizes: {name}: found {value:g}, wanted a finite {kinds[name]}")
    if sizes.get("num_layers", 0) > _MOST_LAYERS:
        raise ConfigError(f"--sizes: num_layers: found {sizes['num_layers']:g}, wanted at most {_MOST_LAYERS}")
    metadata = _metadata(contract, sizes)
    # a layer has tensors, and these are not known before the numbers are
    layers = metadata.get(f"{contract.architectures[0]}.{contract.hyperparameters['num_layers'].key}", 1)
    assert isinstance(layers, int)
    stand_ins = {str(number): _tensor(str(number), (1,)) for number in range(layers)}
    numbers, findings = resolve_hyperparameters(contract, _file(metadata, stand_ins))
    if findings:
        lines = "\n".join(f"  {finding}" for finding in findings)
        raise ValidationError(f"contract {contract.name}: the sizes do not fit it\n{lines}")
    file = _file(metadata, {tensor.name: tensor for tensor in _tensors(contract, numbers)})
    return build_program(validate(file, contract).model())


def _metadata(contract: Contract, sizes: Mapping[str, float]) -> dict[str, MetadataValue]:
    architecture = contract.architectures[0]
    given = {**DEFAULT_SIZES, **sizes}
    metadata: dict[str, MetadataValue] = {"general.architecture": architecture}
    metadata[f"{architecture}.vocab_size"] = int(given["vocab_size"])
    for name, item in contract.hyperparameters.items():
        # a default of the contract stands, but not those of the standard sizes
        if name in sizes or item.default is None or (name in STANDARD_HYPERPARAMETERS and name in DEFAULT_SIZES):
            kind = {"int": int, "float": float, "bool": bool}[item.kind]
            metadata[f"{architecture}.{item.key}"] = kind(given.get(name, 1))
    return metadata


def _tensors(contract: Contract, numbers: Hyperparameters) -> Iterator[TensorView]:
    scopes: list[tuple[int | None, Mapping[str, Role]]] = [(None, contract.global_roles)]
    scopes += [(layer, contract.layer_roles) for layer in range(numbers.integer("num_layers"))]
    for layer, roles in scopes:
        values = numbers.uniform() if layer is None else numbers.at(layer)
        for role in roles.values():
            # an optional fused weight is shown where its parts may be missing
            fused = role.presence == "optional" and any(_may_lack(roles, part) for part in role.split)
            if role.presence == "required" or fused:
                yield _tensor(role.tensor(layer), _shape(contract, role, values))


def _shape(contract: Contract, role: Role, values: Mapping[str, Number]) -> tuple[int, ...]:
    try:
        shape = tuple(int(extent.evaluate(values)) for extent in role.shape)
    except ExpressionError as error:
        raise ContractError(f"contract {contract.name}: {role.name}: {error}") from None
    if min(shape, default=1) < 1 or math.prod(shape) > _MOST_ELEMENTS:
        found = " x ".join(map(str, shape))
        raise ContractError(
            f"contract {contract.name}: {role.name}: found {found}, wanted 1 to {_MOST_ELEMENTS} elements in all"
        )
    return shape


def _may_lack(roles: Mapping[str, Role], part: str) -> bool:
    return part not in roles or roles[part].presence != "required"


def _tensor(name: str, shape: tuple[int, ...]) -> TensorView:
    data = np.broadcast_to(np.zeros(1, np.uint8), (_F32.nbytes(shape),))  # no memory, however large the shape
    return TensorView(name=name, shape=shape, qtype=_F32, data=data, offset=0, path=Path("sizes"))


def _file(metadata: Mapping[str, MetadataValue], tensors: Mapping[str, TensorView]) -> ModelFile:
    return ModelFile(
        path=Path("sizes"), format="sizes", version="1", metadata=metadata, tensors=tensors, files=(Path("sizes"),)
    )
