"""Tensor names of Hugging Face's Llama, Qwen2 and Qwen3 classes, and the GGUF names they are shown under."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

__all__ = ["gguf_name", "is_computed", "rotated_heads"]

_GLOBAL: Mapping[str, str] = MappingProxyType(
    {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
)
_LAYER: Mapping[str, str] = MappingProxyType(
    {
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
)
_IN_LAYER = re.compile(r"model\.layers\.(?P<layer>0|[1-9][0-9]{0,5})\.(?P<module>.+)\.(?P<kind>weight|bias)")
_OUTSIDE = re.compile(r"(?P<module>.+)\.(?P<kind>weight|bias)")
_COMPUTED = re.compile(r".*\.rotary_emb\.inv_freq")


def gguf_name(name: str) -> str:
    """The GGUF name; one that no role has is left as it is, for validation to name."""
    inside = _IN_LAYER.fullmatch(name)
    if inside is not None and inside["module"] in _LAYER:
        return f"blk.{inside['layer']}.{_LAYER[inside['module']]}.{inside['kind']}"
    outside = _OUTSIDE.fullmatch(name)
    if outside is not None and outside["module"] in _GLOBAL:
        return f"{_GLOBAL[outside['module']]}.{outside['kind']}"
    return name


def is_computed(name: str) -> bool:
    """Whether a tensor is a table that follows from the config, stored by old versions of transformers."""
    return _COMPUTED.fullmatch(name) is not None


def rotated_heads(name: str, num_heads: int, num_kv_heads: int) -> int:
    """How many heads RoPE turns in the output of a tensor, by its GGUF name; 0 when it is not Q or K."""
    role = name.split(".")[2:3]
    return {"attn_q": num_heads, "attn_k": num_kv_heads}.get(role[0], 0) if role else 0
