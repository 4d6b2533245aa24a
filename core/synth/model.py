"""Models with the shapes of published ones and random weights: for speed, where what a model says does not matter.

Rows are made when they are wanted, of a few thousand random valid blocks of each type, so that a model takes next to no
memory and no time until it is written or uploaded.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import numpy as np
from attrs import define, evolve, field, frozen
from numpy.typing import NDArray

from mortice.arch_contracts.schema import Contract, Role, builtin_contracts
from mortice.core.errors import ConfigError
from mortice.core.model.qtypes import QType
from mortice.core.model.types import MetadataValue, ModelFile, TensorView
from mortice.core.synth.recipes import RECIPES, Mix, Tensor
from mortice.core.synth.shapes import SHAPES, Shape
from mortice.core.testing.blocks import encode
from mortice.core.testing.gguf_files import TensorData, write_gguf
from mortice.core.testing.vocabulary import tiny_vocabulary

__all__ = ["is_shape_and_recipe", "synth_model", "write_model"]

_POOL_ELEMENTS = 1 << 20
"""Random values made for each type and scale; all rows are their blocks in random order."""
_RUN_BYTES = 512
"""Blocks are drawn in runs of about so many bytes, which is faster than one by one."""

_LEARNED_TOKENS = 512
_MAX_LAYERS = 1024
_CONTROL = 3


def is_shape_and_recipe(text: str) -> bool:
    """Whether a text has the form SHAPE:RECIPE, such as ``Llama-3.2-1B:Q4_K_M``, and is no file."""
    return ":" in text and not Path(text).exists()


def synth_model(
    shape: str, recipe: str | Mix, *, seed: int = 0, layers: int | None = None, stored: bool = False
) -> ModelFile:
    """A model of a known shape, its weights random.

    Activations stay finite: weights have a standard deviation of ``1 / sqrt(columns)``, norms are near 1.

    Args:
        shape: one of `SHAPES`; upper or lower case does not matter.
        recipe: one of `RECIPES`, the same; or a mix that is not in the list.
        seed: the same arguments give the same bytes.
        layers: how many layers instead of the shape's own; the mix is that of a model with so many.
        stored: whether the weights lie in memory, as those of a file do; otherwise they are made when they are wanted.

    Raises:
        ConfigError: for an unknown shape or recipe, naming the nearest, or layers below 1 or above 1024.

    """
    shape = _known("shape", shape, SHAPES)
    mix = recipe if isinstance(recipe, Mix) else RECIPES[_known("recipe", recipe, RECIPES)]
    chosen = SHAPES[shape]
    if layers is not None:
        if not 1 <= layers <= _MAX_LAYERS:
            raise ConfigError(f"layers: found {layers}, wanted 1 to {_MAX_LAYERS}")
        chosen = evolve(chosen, num_layers=layers)
    draft = _Draft(name=shape, shape=chosen, mix=mix, seed=seed)
    path = Path(f"{shape}:{mix.name}")
    metadata = draft.metadata()
    tensors = {tensor.name: _stored(tensor) if stored else tensor for tensor in draft.tensors(path)}
    return ModelFile(
        path=path, format="synth", version="1", metadata=metadata, tensors=tensors, files=(), loader="synth"
    )


def write_model(file: ModelFile, path: Path) -> Path:
    """Write a model as a GGUF file."""
    return write_gguf(path, file.architecture, file.metadata, file.tensors.values())


def _stored(tensor: TensorView) -> TensorView:
    return TensorData(tensor.name, tensor.shape, tensor.qtype, tensor.data).view(tensor.path)


def _known(what: str, name: str, names: Collection[str]) -> str:
    """The name as it is spelt in `names`."""
    spelling = {known.lower(): known for known in names}
    found = spelling.get(name.lower())
    if found is None:
        near = difflib.get_close_matches(name.lower(), spelling, 1)
        hint = f", did you mean {spelling[near[0]]!r}?" if near else ";"
        raise ConfigError(f"{what}: unknown {name!r}{hint} have {', '.join(names)}")
    return found


@frozen
class _Slot:
    name: str
    tensor: Tensor
    qtype: QType


@define(eq=False, kw_only=True)
class _Draft:
    name: str
    shape: Shape
    mix: Mix
    seed: int
    _rng: np.random.Generator = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._rng = np.random.default_rng(self.seed)

    # metadata ---------------------------------------------------------------------------------------------------

    def metadata(self) -> dict[str, MetadataValue]:
        shape, prefix = self.shape, self.shape.architecture
        own_head_dim = shape.head_dim * shape.num_heads != shape.hidden_size
        return {
            "general.architecture": prefix,
            "general.name": f"{self.name} {self.mix.name} with random weights (mortice synth, seed {self.seed})",
            "general.file_type": self.mix.file_type,
            "general.quantization_version": 2,
            f"{prefix}.block_count": shape.num_layers,
            f"{prefix}.context_length": shape.context_length,
            f"{prefix}.embedding_length": shape.hidden_size,
            f"{prefix}.feed_forward_length": shape.ffn_size,
            f"{prefix}.attention.head_count": shape.num_heads,
            f"{prefix}.attention.head_count_kv": shape.num_kv_heads,
            **{
                f"{prefix}.attention.{key}_length": shape.head_dim for key in (("key", "value") if own_head_dim else ())
            },
            f"{prefix}.attention.layer_norm_rms_epsilon": shape.norm_eps,
            f"{prefix}.rope.freq_base": shape.rope_freq_base,
            f"{prefix}.rope.dimension_count": shape.head_dim,
            f"{prefix}.vocab_size": shape.vocab_size,
            **self._vocabulary(),
        }

    def _vocabulary(self) -> dict[str, MetadataValue]:
        """A small vocabulary that any text can be written with, filled up to the size with tokens no text gives."""
        small = tiny_vocabulary(_LEARNED_TOKENS, pre=self.shape.pre)
        tokens, types = small["tokenizer.ggml.tokens"], small["tokenizer.ggml.token_type"]
        assert isinstance(tokens, list)
        assert isinstance(types, np.ndarray)
        first_control = int(np.flatnonzero(types == _CONTROL)[0])
        fill = self.shape.vocab_size - len(tokens)
        moved = {
            key: value + fill for key, value in small.items() if key.endswith("_token_id") and isinstance(value, int)
        }
        return {
            **small,
            **moved,
            "tokenizer.ggml.tokens": [
                *tokens[:first_control],
                *(f"<{number}>" for number in range(fill)),
                *tokens[first_control:],
            ],
            "tokenizer.ggml.token_type": np.concatenate(
                (types[:first_control], np.ones(fill, types.dtype), types[first_control:])
            ),
        }

    # tensors ----------------------------------------------------------------------------------------------------

    def tensors(self, path: Path) -> Iterator[TensorView]:
        blocks: dict[tuple[QType, float], NDArray[np.uint8]] = {}
        for slot in self._slots():
            tensor, qtype = slot.tensor, slot.qtype
            if len(tensor.shape) == 1:
                yield TensorData.f32(slot.name, self._vector(slot)).view(path)
                continue
            columns = tensor.shape[-1]
            key = qtype, 1 / math.sqrt(columns)
            if key not in blocks:
                blocks[key] = _random_blocks(*key, self._rng)
            make = _RandomRows.of(qtype, columns, blocks[key], int(self._rng.integers(1 << 62)))
            yield TensorView(name=slot.name, shape=tensor.shape, qtype=qtype, make=make, offset=0, path=path)

    def _slots(self) -> Iterator[_Slot]:
        contract = _contract(self.shape.architecture)
        yield from self._slots_of(contract.global_roles, None)
        for layer in range(self.shape.num_layers):
            yield from self._slots_of(contract.layer_roles, layer)

    def _slots_of(self, roles: Mapping[str, Role], layer: int | None) -> Iterator[_Slot]:
        shape = self.shape
        numbers = {
            "hidden_size": shape.hidden_size,
            "ffn_size": shape.ffn_size,
            "num_heads": shape.num_heads,
            "num_kv_heads": shape.num_kv_heads,
            "head_dim": shape.head_dim,
            "vocab_size": shape.vocab_size,
            "rope_dim": shape.head_dim,
        }
        optional = {"output": not shape.tied, "rope_freqs": shape.rope is not None}
        for key, role in roles.items():
            if role.presence == "required" or (role.presence == "optional" and optional.get(key, False)):
                tensor = Tensor(
                    role=key,
                    layer=layer,
                    num_layers=shape.num_layers,
                    shape=tuple(int(extent.evaluate(numbers)) for extent in role.shape),
                    tied=shape.tied,
                    heads_per_kv_head=shape.num_heads // shape.num_kv_heads,
                )
                yield _Slot(role.name.replace("{i}", str(layer)), tensor, self.mix.qtype(tensor))

    def _vector(self, slot: _Slot) -> NDArray[np.float32]:
        if slot.tensor.role == "rope_freqs":
            assert self.shape.rope is not None
            return self.shape.rope.factors(self.shape.head_dim, self.shape.rope_freq_base)
        noise = np.float32(0.1) * self._rng.standard_normal(slot.tensor.shape, np.float32)
        return noise if slot.tensor.role.endswith("_bias") else 1 + noise


def _contract(architecture: str) -> Contract:
    return next(contract for contract in builtin_contracts() if architecture in contract.architectures)


def _random_blocks(qtype: QType, deviation: float, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Blocks of a type, shape (blocks, bytes), `deviation` the standard deviation of their values."""
    values = rng.standard_normal(_POOL_ELEMENTS, np.float32).reshape(-1, max(256, qtype.block_elements))
    return encode(values * np.float32(deviation), qtype, rng).reshape(-1, qtype.block_bytes)


@frozen(eq=False)
class _RandomRows:
    """Makes the rows of a matrix: each is runs of blocks, drawn from a few by the place where they stand."""

    runs: NDArray[np.uint8]
    runs_a_row: int
    seed: int

    @classmethod
    def of(cls, qtype: QType, columns: int, blocks: NDArray[np.uint8], seed: int) -> _RandomRows:
        """Runs as long as copying likes them, of which a row is a whole number."""
        row_blocks = columns // qtype.block_elements
        most = max(1, _RUN_BYTES // qtype.block_bytes)
        length = max(count for count in range(1, min(most, row_blocks) + 1) if row_blocks % count == 0)
        runs = blocks[: len(blocks) // length * length].reshape(-1, length * qtype.block_bytes)
        return cls(runs, row_blocks // length, seed)

    def __call__(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Rows [start, stop), see `MakeRows`."""
        places = np.arange(start * self.runs_a_row, stop * self.runs_a_row, dtype=np.uint64)
        drawn = (_mixed(places + np.uint64(self.seed)) % np.uint64(len(self.runs))).astype(np.intp)
        return np.take(self.runs, drawn, axis=0).reshape(stop - start, -1)


def _mixed(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Neighbouring numbers to numbers that look random: the finaliser of SplitMix64 (Steele et al., 2014)."""
    mixed = numbers * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
