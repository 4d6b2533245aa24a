"""Models that together use every operator, in every way an operator has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from attrs import field, frozen

from mortice.arch_contracts.schema import Contract, parse_contract
from mortice.core.plugin.registry import Registry

__all__ = ["OperatorCase", "operator_cases"]


@frozen(eq=False)
class OperatorCase:
    """A tiny model.

    Attributes:
        label: what it shows.
        contract: its family.
        arguments: for `write_tiny_model`.

    """

    label: str
    contract: Contract
    arguments: Mapping[str, Any] = field(factory=dict)


_UNUSUAL = """
[contract]
name = "unusual"
architectures = ["unusual"]
description = "what families at hand do not do: learned positions, caps, windows, temperature, scales, a shared norm"

[hyperparameters]
norm_eps = { key = "attention.layer_norm_epsilon" }

[norm]
type = "layer"
placement = "pre"
eps = "norm_eps"

[attention]
softcap = 20.0
sliding_window = "6 * ((layer + 1) % 2)"
temperature = 0.5
temperature_period = 3
scale = "0.2"

[embedding]
positions = "learned"
scale = "2.0"

[residual]
parallel = 1
scale = "0.5"

[output]
scale = "0.75"
softcap = 30.0

[ffn]
gated = false
activation = "relu_squared"

[roles.global]
token_embd = ["vocab_size", "hidden_size"]
position_embd = ["context_length", "hidden_size"]
output_norm = ["hidden_size"]
output_norm_bias = ["hidden_size"]
output = { shape = ["vocab_size", "hidden_size"], else = "token_embd" }

[roles.layer]
attn_norm = ["hidden_size"]
attn_norm_bias = ["hidden_size"]
attn_q = ["num_heads * head_dim", "hidden_size"]
attn_k = ["num_kv_heads * head_dim", "hidden_size"]
attn_v = ["num_kv_heads * head_dim", "hidden_size"]
attn_output = ["hidden_size", "num_heads * head_dim"]
attn_output_bias = ["hidden_size"]
ffn_up = ["ffn_size", "hidden_size"]
ffn_up_bias = ["ffn_size"]
ffn_down = ["hidden_size", "ffn_size"]
ffn_down_bias = ["hidden_size"]
"""
_ACTIVATIONS = ("gelu_tanh", "gelu_erf", "relu")
_LONG = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 128}


def operator_cases(registry: Registry) -> Iterator[OperatorCase]:
    """One case for each contract of the registry's plugins, and those that no family covers."""
    contracts = {provided.value.name: provided.value for provided in registry.contracts.values()}
    for name, contract in sorted(contracts.items()):
        yield OperatorCase(name, contract)
    unusual = parse_contract(_UNUSUAL, "unusual.toml")
    yield OperatorCase("learned positions, soft caps, window, parallel block", unusual)
    for activation in _ACTIVATIONS:
        text = _UNUSUAL.replace('"relu_squared"', f'"{activation}"')
        yield OperatorCase(f"activation {activation}", parse_contract(text, "unusual.toml"))
    if "llama" in contracts:
        llama = contracts["llama"]
        yield OperatorCase("rope factors, untied head", llama, {"include": ["rope_freqs"], "tied": False})
        yield OperatorCase("one KV head", llama, {"sizes": {"num_kv_heads": 1}})
        yield OperatorCase("weights in Q8_0", llama, {"qtypes": "Q8_0"})
        yield OperatorCase("weights in Q4_0, Q6_K and F16", llama, _MIXED)
    if "qwen3" in contracts:
        yarn = {f"qwen3.{key}": value for key, value in _LONG.items()}
        yield OperatorCase("heads of their own size", contracts["qwen3"], {"sizes": {"head_dim": 32}})
        yield OperatorCase("YaRN", contracts["qwen3"], {"metadata": yarn})


_MIXED = {
    "qtypes": {"default": "Q4_0", "token_embd": "Q6_K", "attn_v": "F16", "ffn_down": "Q6_K"},
    "sizes": {"hidden_size": 256, "ffn_size": 256},
}
