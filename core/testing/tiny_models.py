"""Writes small model files with random weights for any contract, built-in or a plugin's.

Every shape comes from the contract, so that a family needs no code here. Weights are scaled so that activations stay
near 1 and logits have a spread of a few units: there is a clear best token, and a mistake anywhere shows in it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from attrs import define, field, frozen
from numpy.typing import NDArray

from mortice.arch_contracts.schema import Contract, Role
from mortice.core.contracts import sized
from mortice.core.errors import ValidationError
from mortice.core.model.findings import Finding
from mortice.core.model.hyperparameters import Hyperparameters, resolve_hyperparameters
from mortice.core.model.qtypes import GGML_TYPES, QType
from mortice.core.model.types import MetadataValue, ModelFile, TensorView
from mortice.core.model.validation import validate
from mortice.core.testing.blocks import Encoder, encode
from mortice.core.testing.gguf_files import TensorData, write_gguf
from mortice.core.testing.vocabulary import tiny_vocabulary

__all__ = ["DEFAULT_SIZES", "write_tiny_model"]

DEFAULT_SIZES: Mapping[str, float] = {
    name: size for name, size in sized.DEFAULT_SIZES.items() if name not in ("vocab_size", "rope_dim")
}
"""Hyperparameters that are written when neither the caller nor the contract's default says otherwise."""

# Standard deviation of a linear's outputs for inputs of 1. Sharper attention makes a wrong position show; the spread
# of logits comes from the head, or from the embedding where it serves as the head.
_GAINS = {"attn_q": 1.5, "attn_k": 1.5, "attn_qkv": 1.5, "token_embd": 3.0, "output": 3.0}

# They grow from 1 to these: as Llama 3.1's, and so that the two tables of LongRoPE differ.
_ROPE_FACTORS = {"rope_freqs": 8.0, "rope_factors_short": 1.5, "rope_factors_long": 8.0}

Number = bool | int | float
_BY_NAME = {qtype.name: qtype for qtype in GGML_TYPES.values()}


def write_tiny_model(
    path: Path,
    contract: Contract,
    *,
    sizes: Mapping[str, Number | Sequence[Number]] | None = None,
    qtypes: str | QType | Mapping[str, str | QType] = "F32",
    encoders: Mapping[str, Encoder] | None = None,
    tied: bool = True,
    include: Collection[str] = (),
    gains: Mapping[str, float] | None = None,
    metadata: Mapping[str, MetadataValue] | None = None,
    tokenizer: Mapping[str, MetadataValue] | None = None,
    architecture: str | None = None,
    seed: int = 0,
) -> Path:
    """Write a model that fits `contract`, and check that it does.

    Args:
        path: the GGUF file to write.
        contract: what the model is; its required roles are written.
        sizes: hyperparameters by name (``hidden_size``, ``num_layers``, those of the contract …); one value, or one
            for each layer. They are laid over `DEFAULT_SIZES`.
        qtypes: the type of every matrix, or types by role with ``default`` for matrices not named; vectors are F32
            unless named.
        encoders: for types that are not GGML's, by type name: from values to bytes.
        tied: leave out roles that another one can serve (``output`` falls back on ``token_embd``).
        include: optional roles to write. A fused tensor takes the place of its parts.
        gains: factors on a role's values, for instance ``{"attn_k_bias": 50}``.
        metadata: further keys as they are in the file, architecture prefix included.
        tokenizer: ``tokenizer.ggml.*`` keys instead of those of `tiny_vocabulary`.
        architecture: ``general.architecture``; the contract's first by default.
        seed: the same seed and arguments give the same file, and a tensor of the same name, shape and type is the same
            whatever else the file holds.

    Returns:
        `path`.

    Raises:
        ValidationError: when what the arguments ask for does not fit the contract.
        ValueError: for a role the contract does not have, or a type whose blocks do not divide a row.

    """
    draft = _Draft(
        path=path,
        contract=contract,
        architecture=architecture or contract.architectures[0],
        tied=tied,
        include=frozenset(include),
        qtypes=qtypes if isinstance(qtypes, Mapping) else {"default": qtypes},
        encoders=encoders or {},
        gains=gains or {},
        seed=seed,
    )
    draft.check_names()
    draft.metadata = {
        "general.architecture": draft.architecture,
        "general.name": f"tiny {contract.name}",
        **draft.hyperparameter_keys({**DEFAULT_SIZES, **(sizes or {})}, set(sizes or ())),
        **(tiny_vocabulary() if tokenizer is None else tokenizer),
        **(metadata or {}),
    }
    tensors = list(draft.tensors())
    views = {tensor.name: tensor.view(path) for tensor in tensors}
    validate(draft.file(views), contract).model()
    return write_gguf(path, draft.architecture, draft.metadata, tensors)


@frozen
class _Slot:
    key: str
    role: Role
    layer: int | None
    shape: tuple[int, ...]


@define(kw_only=True, eq=False)
class _Draft:
    path: Path
    contract: Contract
    architecture: str
    tied: bool
    include: frozenset[str]
    qtypes: Mapping[str, str | QType]
    encoders: Mapping[str, Encoder]
    gains: Mapping[str, float]
    seed: int
    metadata: dict[str, MetadataValue] = field(factory=dict)

    def check_names(self) -> None:
        roles = {*self.contract.global_roles, *self.contract.layer_roles}
        for argument, names in (
            ("include", self.include),
            ("gains", self.gains.keys()),
            ("qtypes", self.qtypes.keys() - {"default"}),
        ):
            unknown = sorted(names - roles)
            if unknown:
                raise ValueError(f"{argument}: contract {self.contract.name} has no role {', '.join(unknown)}")

    def hyperparameter_keys(
        self, sizes: Mapping[str, Number | Sequence[Number]], asked: set[str]
    ) -> dict[str, MetadataValue]:
        known = self.contract.hyperparameters
        unknown = sorted(asked - known.keys())
        if unknown:
            raise ValueError(f"sizes: contract {self.contract.name} has no {', '.join(unknown)}")
        keys: dict[str, MetadataValue] = {}
        for name, value in sizes.items():
            if name not in known:
                continue
            kind = {"int": int, "float": float, "bool": bool}[known[name].kind]
            element = {"int": np.uint32, "float": np.float32, "bool": np.bool_}[known[name].kind]
            keys[f"{self.architecture}.{known[name].key}"] = (
                np.array(value, element) if isinstance(value, Sequence) else kind(value)
            )
        return keys

    def file(self, tensors: Mapping[str, TensorView]) -> ModelFile:
        return ModelFile(
            path=self.path,
            format="gguf",
            version="3",
            metadata=self.metadata,
            tensors=tensors,
            files=(self.path,),
        )

    def tensors(self) -> Iterator[TensorData]:
        for slot in self.slots():
            name = slot.role.name.replace("{i}", str(slot.layer))
            qtype = self.qtype(slot)
            rng = np.random.default_rng([self.seed, *name.encode()])
            encoder = self.encoders.get(qtype.name)
            rows = self.values(slot, rng).reshape(-1, slot.shape[-1])
            try:
                data = encode(rows, qtype, rng) if encoder is None else encoder(rows, rng)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            yield TensorData(name, slot.shape, qtype, np.ascontiguousarray(data).reshape(-1))

    def slots(self) -> Iterator[_Slot]:
        numbers = self.hyperparameters()
        scopes: list[tuple[int | None, Mapping[str, Role], Mapping[str, float]]]
        scopes = [(None, self.contract.global_roles, numbers.uniform())]
        scopes += [
            (layer, self.contract.layer_roles, numbers.at(layer)) for layer in range(numbers.integer("num_layers"))
        ]
        for layer, roles, values in scopes:
            written = {key for key, role in roles.items() if self.is_written(key, role)}
            fused = {part for key in written for part in roles[key].split}
            for key, role in roles.items():
                if key in written - fused:
                    shape = tuple(int(extent.evaluate(values)) for extent in role.shape)
                    yield _Slot(key, role, layer, shape)

    def is_written(self, key: str, role: Role) -> bool:
        if role.presence == "optional":
            return key in self.include or (role.fallback is not None and not self.tied)
        return role.presence == "required"

    def hyperparameters(self) -> Hyperparameters:
        # the number of layers is checked against that of tensors, which do not exist yet
        stand_in = TensorData.f32("stand-in", np.zeros(1, np.float32)).view(self.path)
        layers = self.metadata.get(f"{self.architecture}.{self.contract.hyperparameters['num_layers'].key}")
        count = layers if isinstance(layers, int) else 1
        numbers, findings = resolve_hyperparameters(
            self.contract, self.file({f"stand-in {number}": stand_in for number in range(count)})
        )
        if findings:
            raise ValidationError(f"{self.path}: the sizes do not fit\n" + _lines(findings))
        return numbers

    def qtype(self, slot: _Slot) -> QType:
        is_matrix = len(slot.shape) > 1 and not slot.key.endswith("_norm")
        default = self.qtypes.get("default", "F32") if is_matrix else "F32"
        found = self.qtypes.get(slot.key, default)
        if isinstance(found, QType):
            return found
        if found not in _BY_NAME:
            raise ValueError(f"qtypes: {found!r} is not one of GGML's; pass a QType and an encoder")
        return _BY_NAME[found]

    def values(self, slot: _Slot, rng: np.random.Generator) -> NDArray[np.float32]:
        gain = self.gains.get(slot.key, 1.0)
        noise = rng.standard_normal(slot.shape, np.float32)
        if slot.key in _ROPE_FACTORS:
            last = _ROPE_FACTORS[slot.key]
            values = np.linspace(1.0, last, math.prod(slot.shape), dtype=np.float32).reshape(slot.shape)
        elif slot.key.endswith("_bias"):
            values = np.float32(0.1) * noise
        elif slot.key.endswith("_norm"):
            values = np.clip(1 + np.float32(0.25) * noise, 0.25, 2.0)
        else:
            values = noise * np.float32(_GAINS.get(slot.key, 1.0) / math.sqrt(slot.shape[-1]))
        return (values * np.float32(gain)).astype(np.float32)


def _lines(findings: Sequence[Finding]) -> str:
    return "\n".join(f"  {finding}" for finding in findings)
