"""Which type each tensor gets: the mixes of llama-quantize, run without an importance matrix.

Facts from llama.cpp's ``src/llama-quant.cpp``: the base type of a mix, the tensors it treats better, and the types
taken instead where a row is no whole number of 256-element blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from attrs import frozen

from mortice.core.model.qtypes import GGML_TYPES, QType

__all__ = ["RECIPES", "Mix", "OneType", "Tensor"]

_BY_NAME = {qtype.name: qtype for qtype in GGML_TYPES.values()}
_UNQUANTISED = ("F32", "F16", "BF16")
_FALLBACKS = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "IQ4_XS": "IQ4_NL"}


@frozen(kw_only=True)
class Tensor:
    """What a mix looks at.

    Attributes:
        role: the role in the contract (``attn_v``).
        layer: the layer, None for a global role.
        num_layers: how many there are.
        shape: extents, rows first.
        tied: whether the model's embedding is its head.
        heads_per_kv_head: query heads that share a key and value head.

    """

    role: str
    layer: int | None
    num_layers: int
    shape: tuple[int, ...]
    tied: bool
    heads_per_kv_head: int

    @property
    def is_head(self) -> bool:
        """Whether logits are made with it."""
        return self.role == "output" or (self.tied and self.role == "token_embd")

    @property
    def gets_more_bits(self) -> bool:
        """The first and last eighth of the layers, and every third one between."""
        assert self.layer is not None
        eighth = self.num_layers // 8
        return self.layer < eighth or self.layer >= 7 * self.num_layers // 8 or (self.layer - eighth) % 3 == 2


@frozen(kw_only=True)
class Mix:
    """One of llama-quantize's mixes.

    Attributes:
        name: as it is called there.
        base: the type of every matrix that nothing else is said about.
        file_type: ``general.file_type``.

    """

    name: str
    base: str
    file_type: int

    def qtype(self, tensor: Tensor) -> QType:
        """The type of a tensor; vectors are always F32."""
        if len(tensor.shape) < 2:
            return _BY_NAME["F32"]
        columns = tensor.shape[-1]
        found = _BY_NAME[self._wanted(tensor)]
        if columns % found.block_elements and found.name in _FALLBACKS:
            found = _BY_NAME[_FALLBACKS[found.name]]
        return found if columns % found.block_elements == 0 else _BY_NAME["F16"]

    def _wanted(self, tensor: Tensor) -> str:
        if self.base in _UNQUANTISED:
            return self.base
        if tensor.is_head:
            fits = tensor.shape[-1] % _BY_NAME[self.base].block_elements == 0
            return "Q6_K" if fits and self.base != "Q8_0" else "Q8_0"
        match tensor.role:
            case "attn_v":
                return self._attn_v(tensor)
            case "ffn_down":
                return self._ffn_down(tensor)
            case "attn_output":
                return {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K"}.get(self.name, self.base)
        return self.base

    def _attn_v(self, tensor: Tensor) -> str:
        assert tensor.layer is not None
        many_share = tensor.heads_per_kv_head >= 4
        match self.name:
            case "Q2_K":
                return "Q4_K" if many_share else "Q3_K"
            case "Q3_K_M":
                return "Q5_K" if tensor.layer < 2 else "Q4_K"
            case "Q4_K_S":
                return "Q5_K" if tensor.layer < 4 else self.base
            case "Q4_K_M" | "Q5_K_M":
                return "Q6_K" if tensor.gets_more_bits else self.base
            case "IQ4_NL" | "IQ4_XS":
                return "Q5_K" if many_share else self.base
        return self.base

    def _ffn_down(self, tensor: Tensor) -> str:
        assert tensor.layer is not None
        match self.name:
            case "Q2_K":
                return "Q3_K"
            case "Q3_K_M":
                return "Q5_K" if tensor.layer < tensor.num_layers // 16 else "Q4_K"
            case "Q4_K_M" | "Q5_K_M":
                return "Q6_K" if tensor.gets_more_bits else self.base
            case "Q4_K_S" | "IQ4_NL" | "IQ4_XS":
                return "Q5_K" if tensor.layer < tensor.num_layers // 8 else self.base
        return self.base


_FILE_TYPE_NOT_TOLD = 1024
_EMBEDDING = "Q4_0"


@frozen(kw_only=True)
class OneType(Mix):
    """Every matrix of one type, the head included: no mix of llama-quantize, but what kernels are measured with.

    The table of embeddings, of which a token reads a row, is small where it is not the head.
    """

    file_type: int = _FILE_TYPE_NOT_TOLD

    def _wanted(self, tensor: Tensor) -> str:
        return self.base if tensor.role != "token_embd" or tensor.is_head else _EMBEDDING


_BASES = {"Q5_K_M": "Q5_K", "Q4_K_M": "Q4_K", "Q4_K_S": "Q4_K", "Q3_K_M": "Q3_K"}
_FILE_TYPES = {  # enum llama_ftype in include/llama.h
    "F32": 0,
    "F16": 1,
    "BF16": 32,
    "Q8_0": 7,
    "Q6_K": 18,
    "Q5_K_M": 17,
    "Q4_K_M": 15,
    "Q4_K_S": 14,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q5_0": 8,
    "Q5_1": 9,
    "Q3_K_M": 12,
    "Q2_K": 10,
    "IQ4_NL": 25,
    "IQ4_XS": 30,
}

RECIPES: Mapping[str, Mix] = MappingProxyType(
    {name: Mix(name=name, base=_BASES.get(name, name), file_type=number) for name, number in _FILE_TYPES.items()}
)
"""The mixes by name."""
