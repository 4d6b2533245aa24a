"""``config.json`` as the keys a GGUF file of the same model would have.

Key names and defaults on this side are those of the classes ``LlamaConfig``, ``Qwen2Config`` and ``Qwen3Config`` of
transformers (both the ``rope_theta`` / ``rope_scaling`` of version 4 and the ``rope_parameters`` of version 5); on the
other side those of the GGUF specification.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
from attrs import field, frozen
from numpy.typing import NDArray

from mortice.core.errors import ModelFileError
from mortice.core.model.types import MetadataValue
from mortice.plugins.loaders.safetensors.files import Json, quoted

__all__ = ["FAMILIES", "Family", "Hyperparameters", "read_config"]


@frozen(kw_only=True)
class Family:
    """A model class of transformers.

    Attributes:
        architecture: its ``general.architecture``.
        adjacent_rope: GGUF files of it have the rows of Q and K in the order that suits RoPE on adjacent pairs.
        head_dim: the class's own default; None divides the hidden size by the heads.
        bias_keys: the keys of ``config.json`` that give modules a bias; a class that always has some needs none.

    """

    architecture: str
    adjacent_rope: bool = False
    head_dim: int | None = None
    bias_keys: tuple[str, ...] = ()


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "LlamaForCausalLM": Family(architecture="llama", adjacent_rope=True, bias_keys=("attention_bias", "mlp_bias")),
        "Qwen2ForCausalLM": Family(architecture="qwen2"),
        "Qwen3ForCausalLM": Family(architecture="qwen3", head_dim=128, bias_keys=("attention_bias",)),
    }
)
"""By the name in ``architectures``."""

MAX_VOCABULARY = 1 << 21
_MAX_HEAD_DIM = 1 << 16  # Llama 3's factors are computed for each pair of elements; real heads have up to 512

_BIASED: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "attention_bias": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
        "mlp_bias": ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    }
)
"""The modules of a layer that have a bias where a key is true."""


@frozen(eq=False, kw_only=True)
class Hyperparameters:
    """What ``config.json`` says.

    Attributes:
        family: the model class.
        keys: GGUF's keys, ``general.architecture`` first.
        num_layers: layers of the model.
        num_heads: of Q.
        num_kv_heads: of K and V.
        vocab_size: rows of the embedding.
        tied: the head is the embedding; None where the file does not say.
        rope_freqs: factors on RoPE's wavelengths, float32, which a GGUF file has as a tensor; None for none.
        biased: by the key that says so, the modules that have to have a bias in each layer.

    """

    family: Family
    keys: Mapping[str, MetadataValue] = field(repr=False)
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    tied: bool | None
    rope_freqs: NDArray[np.float32] | None
    biased: Mapping[str, tuple[str, ...]]


def read_config(config: Json) -> Hyperparameters:
    """Translate a ``config.json``.

    Raises:
        ModelFileError: for a model class that is not in `FAMILIES`, a key that is missing or of the wrong type, and
            settings that no GGUF key could say.

    """
    family = _family(config)
    _refuse_what_cannot_be_said(config)
    heads, hidden = config.integer("num_attention_heads"), config.integer("hidden_size")
    usual = hidden // heads if heads else 0
    head_dim = config.integer("head_dim", family.head_dim or usual)
    if head_dim > _MAX_HEAD_DIM:
        raise config.error("head_dim", f"found {head_dim}", f"at most {_MAX_HEAD_DIM}")
    vocab_size = config.integer("vocab_size")
    if vocab_size > MAX_VOCABULARY:
        raise config.error("vocab_size", f"found {vocab_size}", f"at most {MAX_VOCABULARY}")
    values: dict[str, MetadataValue] = {
        "block_count": config.integer("num_hidden_layers"),
        "context_length": config.integer("max_position_embeddings"),
        "embedding_length": hidden,
        "feed_forward_length": config.integer("intermediate_size"),
        "attention.head_count": heads,
        "attention.head_count_kv": config.integer("num_key_value_heads", heads),
        "attention.key_length": head_dim,
        "attention.layer_norm_rms_epsilon": _float32(config.number("rms_norm_eps", 1e-6)),
        "rope.dimension_count": head_dim,
        "vocab_size": vocab_size,
    }
    if config.boolean("use_sliding_window", default=False) and config.has("sliding_window"):
        values["attention.sliding_window"] = config.integer("sliding_window")
    scaling, rope_freqs = _rope(config, head_dim)
    prefix = f"{family.architecture}."
    keys: dict[str, MetadataValue] = {"general.architecture": family.architecture}
    keys |= {prefix + name: value for name, value in (values | scaling).items()}
    return Hyperparameters(
        family=family,
        keys=keys,
        num_layers=config.integer("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=config.integer("num_key_value_heads", heads),
        vocab_size=vocab_size,
        tied=config.boolean("tie_word_embeddings", default=False) if config.has("tie_word_embeddings") else None,
        rope_freqs=rope_freqs,
        biased={key: _BIASED[key] for key in family.bias_keys if config.boolean(key, default=False)},
    )


def _family(config: Json) -> Family:
    known = ", ".join(FAMILIES)
    names = config.sequence("architectures", ())
    if len(names) != 1 or not isinstance(names[0], str):
        raise config.error("architectures", f"found {quoted(list(names))}", f"one of {known}")
    if names[0] not in FAMILIES:
        raise config.error(
            "architectures",
            f"found {quoted(names[0])}",
            f"one of {known}; other models can be run from a GGUF file",
        )
    return FAMILIES[names[0]]


def _refuse_what_cannot_be_said(config: Json) -> None:
    activation = config.string("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise config.error("hidden_act", f"found {quoted(activation)}", "'silu', the one these families have")
    rotated = config.number("partial_rotary_factor", 1.0)
    if rotated != 1:
        raise config.error("partial_rotary_factor", f"found {rotated:g}", "1: RoPE on whole heads")
    quantized = config.object("quantization_config")
    if quantized is not None:
        method = quoted(quantized.values.get("quant_method"))
        message = f"quantization_config: found method {method}, wanted weights of F32, F16 or BF16"
        raise ModelFileError(config.path, f"{message}; model.quantize makes smaller ones of these")


def _rope(config: Json, head_dim: int) -> tuple[dict[str, MetadataValue], NDArray[np.float32] | None]:
    """The keys of RoPE's base and scaling, and Llama 3's factors, which are a tensor in GGUF."""
    parameters = _rope_parameters(config)
    base = _rope_base(config, parameters)
    values: dict[str, MetadataValue] = {"rope.freq_base": _float32(base)}
    if parameters is None:
        return values, None
    kind = parameters.string("rope_type", parameters.string("type", "default"))
    if kind == "default":
        return values, None
    if kind == "llama3":
        return values, _llama3_factors(parameters, base, head_dim)
    # a type that the contract does not allow is refused by validation, which knows what it allows
    values["rope.scaling.type"] = kind
    values["rope.scaling.factor"] = _float32(parameters.number("factor", 1.0))
    if kind == "yarn":
        for name in ("attention_factor", "mscale", "mscale_all_dim"):
            if parameters.has(name):
                raise parameters.error(name, f"found {quoted(parameters.values[name])}", "none: it is not implemented")
        trained = parameters.integer("original_max_position_embeddings", config.integer("max_position_embeddings"))
        values["rope.scaling.original_context_length"] = trained
        values["rope.scaling.yarn_beta_fast"] = parameters.number("beta_fast", 32.0)
        values["rope.scaling.yarn_beta_slow"] = parameters.number("beta_slow", 1.0)
    return values, None


def _rope_base(config: Json, parameters: Json | None) -> float:
    """It stands beside the parameters or among them; in both places only if it is the same."""
    inner = parameters if parameters is not None else Json(config.path, {})
    base = config.number("rope_theta", inner.number("rope_theta", 10000.0))
    if inner.number("rope_theta", base) != base:
        found = f"found {quoted(config.values['rope_theta'])}, and {quoted(inner.values['rope_theta'])}"
        raise config.error("rope_theta", f"{found} in {inner.place.removesuffix('.')}", "one base")
    return base


def _rope_parameters(config: Json) -> Json | None:
    """RoPE's parameters; where they are given for each type of layer, those that all types share."""
    name, older = "rope_parameters", "rope_scaling"
    parameters, scaling = config.object(name), config.object(older)
    if parameters is not None and scaling is not None and parameters.values != scaling.values:
        found = f"found {quoted(scaling.values)}, and {quoted(parameters.values)} in {name}"
        raise config.error(older, found, "one of the two")
    if parameters is None:
        name, parameters = older, scaling
    if parameters is None:
        return None
    given = {kind: value for kind, value in parameters.values.items() if value is not None}
    if not any(isinstance(value, dict) for value in given.values()):
        return parameters
    first, *others = given
    for kind in others:
        if given[kind] != given[first]:
            found = f"found {quoted(given[first])} for {quoted(first)}, {quoted(given[kind])} for {quoted(kind)}"
            raise config.error(name, found, "the same for all types of layers")
    return parameters.object(first)


def _float32(value: float) -> float:
    """The number as a GGUF file has it."""
    return float(np.float32(value))


def _llama3_factors(parameters: Json, base: float, head_dim: int) -> NDArray[np.float32]:
    """What each wavelength of RoPE is stretched by, shape (head_dim / 2,).

    Short wavelengths stay, long ones are stretched by the factor, and those between in between. Source:
    ``_compute_llama3_parameters`` of transformers; llama.cpp's converter stores the same as ``rope_freqs.weight``.
    """
    factor = parameters.number("factor")
    low, high = parameters.number("low_freq_factor"), parameters.number("high_freq_factor")
    trained = parameters.integer("original_max_position_embeddings")
    if not (factor > 0 and 0 < low < high and trained > 0 and base > 0 and head_dim > 1):
        found = (
            f"found factor {factor:g}, low_freq_factor {low:g}, high_freq_factor {high:g}, {trained} positions, "
            f"base {base:g}, heads of {head_dim}"
        )
        wanted = "positive numbers, low_freq_factor below high_freq_factor, heads of 2 or more"
        raise parameters.error("factor", found, wanted)
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    wavelengths = 2 * math.pi * np.power(base, exponents.astype(np.float64))
    smooth = (trained / wavelengths - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    factors = np.where(wavelengths < trained / high, 1.0, np.where(wavelengths > trained / low, factor, between))
    return factors.astype(np.float32)
