"""Metadata keys that change the maths of some family: none may be left unread where its value matters.

A contract reads the keys of its hyperparameters and, through `rope_scaling`, those of RoPE scaling. Any other key under
the architecture's prefix is looked up here. The names are those of the GGUF specification and of the ``gguf`` package.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
from attrs import frozen

from mortice.arch_contracts.expressions import Number
from mortice.arch_contracts.schema import Contract
from mortice.core.model.findings import Finding, Severity
from mortice.core.model.types import ModelFile

__all__ = ["unread_keys"]

Values = Mapping[str, Number]
"""Hyperparameters that are the same for all layers."""


@frozen
class _Known:
    """Keys matching `pattern` (``*`` is anything) mean `what`; the value is harmless where `neutral` says so."""

    pattern: str
    what: str
    neutral: Callable[[Any, Contract, Values], bool]


def _among(*harmless: object) -> Callable[[Any, Contract, Values], bool]:
    return lambda value, _contract, _values: value in harmless


def _equals(name: str) -> Callable[[Any, Contract, Values], bool]:
    return lambda value, _contract, values: value == values.get(name, value)


def _whatever(value: Any, contract: Contract, values: Values) -> bool:  # noqa: ARG001 (one signature for all)
    return True


def _whole_context(value: Any, _contract: Contract, values: Values) -> bool:
    return value == 0 or (_is_number(value) and value >= values.get("context_length", math.inf))


def _usual_scale(value: Any, _contract: Contract, values: Values) -> bool:
    usual = 1 / math.sqrt(values["head_dim"]) if "head_dim" in values else value
    return value == 0 or (_is_number(value) and math.isclose(value, usual, rel_tol=1e-5))


def _same_as_parallel(value: Any, contract: Contract, _values: Values) -> bool:
    return bool(value) != contract.residual.parallel.is_zero


def _no_rope(_value: Any, contract: Contract, _values: Values) -> bool:
    return contract.rope is None


def _rope_dims(value: Any, contract: Contract, values: Values) -> bool:
    return contract.rope is None or value == values.get("head_dim", value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


_KNOWN = (  # the first that matches counts
    # part of no formula
    _Known("vocab_size", "the size of the vocabulary, checked apart", _whatever),
    _Known("tensor_data_layout", "how an old converter ordered rows", _among("", "reference")),
    _Known("rope.scaling.*", "read with RoPE scaling", _whatever),
    _Known("rope.scale_linear", "read with RoPE scaling", _whatever),
    _Known("attention.*norm*epsilon", "the epsilon of a norm this contract does not have", _whatever),
    _Known("attention.group_norm_groups", "groups of a norm this contract does not have", _whatever),
    # sizes that usually follow from others
    _Known("attention.value_length", "the size of a head of V", _equals("head_dim")),
    _Known("attention.*_length_swa", "the size of a head in layers with a window", _equals("head_dim")),
    _Known("embedding_length_out", "the width of the output", _equals("hidden_size")),
    _Known("rope.dimension_count*", "how much of a head RoPE rotates", _rope_dims),
    _Known("rope.freq_base*", "the base of RoPE", _no_rope),
    _Known("rope.dimension_sections", "RoPE in sections", _among(0)),
    # factors, caps and shapes of the forward pass
    _Known("attention.causal", "attention to later tokens", _among(True)),
    _Known("attention.scale", "the scale of attention scores", _usual_scale),
    _Known("attention.sliding_window", "attention to the last tokens only", _whole_context),
    _Known("attention.sliding_window_pattern", "which layers have a window", _among(0)),
    _Known("attention.max_alibi_bias", "ALiBi", _among(0)),
    _Known("attention.clamp_kqv", "a clamp on Q, K and V", _among(0)),
    _Known("attention.output_scale", "the scale of attention's output", _among(0, 1)),
    _Known("attention.temperature_*", "a scale that grows with the position", _among(0)),
    _Known("attention.shared_kv_layers", "layers that share a KV cache", _among(0)),
    _Known("attention.*lora_rank", "low-rank projections", _among(0)),
    _Known("attention.*_mla", "latent attention", _among(0)),
    _Known("attention.indexer.*", "sparse attention", _among(0)),
    _Known("attention.relative_buckets_count", "relative positions", _among(0)),
    _Known("attn_logit_softcapping", "a cap on attention scores", _among(0)),
    _Known("final_logit_softcapping", "a cap on logits", _among(0)),
    _Known("router_logit_softcapping", "a cap on expert scores", _among(0)),
    _Known("logit_scale", "the scale of logits", _among(0, 1)),
    _Known("embedding_scale", "the scale of embeddings", _among(0, 1)),
    _Known("residual_scale", "the scale of residuals", _among(0, 1)),
    _Known("use_parallel_residual", "attention and FFN side by side", _same_as_parallel),
    _Known("swin_norm", "norms after the blocks", _among(False)),
    _Known("swiglu_clamp*", "a clamp in the FFN", _among(0)),
    _Known("activation_sparsity_scale", "sparse activations", _among(0)),
    _Known("rescale_every_n_layers", "rescaling between layers", _among(0)),
    _Known("expert*", "a mixture of experts", _among(0, False)),
    _Known("moe_*", "a mixture of experts", _among(0)),
    _Known("leading_dense_block_count", "a mixture of experts", _among(0)),
    _Known("interleave_moe_layer_step", "a mixture of experts", _among(0)),
    _Known("nextn_predict_layers", "layers that predict further tokens", _among(0)),
    _Known("n_deepstack_layers", "image layers", _among(0)),
    _Known("full_attention_interval", "layers without attention", _among(0, 1)),
    _Known("embedding_length_per_layer_input", "embeddings for each layer", _among(0)),
    _Known("pooling_type", "pooled embeddings instead of logits", _among(0)),
    _Known("ssm.*", "state space layers", _among(0)),
    _Known("altup.*", "alternating updates", _among(0)),
)


def unread_keys(file: ModelFile, contract: Contract, values: Values) -> Iterator[Finding]:
    """Findings on keys under the architecture's prefix that the contract does not read.

    A known key whose value would change the result is an error, an unknown key a warning, a harmless one a note.
    """
    prefix = f"{file.architecture}."
    read = {item.key for item in contract.hyperparameters.values()} | set(contract.ignored_keys)
    for key, value in file.metadata.items():
        name = key.removeprefix(prefix)
        if name == key or name in read:
            continue
        severity, wanted = _judge(name, value, contract, values)
        if severity is not None:
            yield Finding(
                rule="key.unread",
                severity=severity,
                subject=key,
                found=f"{_short(value)}, not read by contract {contract.name}",
                wanted=wanted,
                offset=file.metadata_offsets.get(key),
            )


def _judge(name: str, value: Any, contract: Contract, values: Values) -> tuple[Severity | None, str]:
    known = next((known for known in _KNOWN if fnmatchcase(name, known.pattern)), None)
    if known is None:
        return "warning", "mortice does not know this key; should it change the maths, results will differ"
    if known.neutral is _whatever:
        return (None if name.startswith(("rope.", "vocab")) else "note"), f"{known.what}; harmless"
    if all(known.neutral(item, contract, values) for item in _items(value)):
        return "note", f"{known.what}; this value changes nothing"
    return "error", f"{known.what}; leaving it out would change the result"


def _items(value: Any) -> Iterable[Any]:
    """A scalar as it is; of an array its distinct values."""
    if isinstance(value, np.ndarray):
        return list(np.unique(value).tolist())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return value
    return (value,)


def _short(value: Any) -> str:
    return f"an array of {len(value)}" if hasattr(value, "__len__") and not isinstance(value, str) else f"{value!r:.40}"
