"""An independent forward pass in float64, for comparison: written from the papers, one token and one head at a time.

It knows nothing of programs, operators or plans. It reads a model's weights by tensor name and takes every choice of
the family as a plain keyword, so that what a contract says and what the maths is are written down twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from attrs import define, field
from numpy.typing import NDArray

Vector = NDArray[np.float64]

ACTIVATIONS: Mapping[str, Callable[[float], float]] = {
    "silu": lambda x: x / (1.0 + math.exp(-x)),
    "gelu_erf": lambda x: 0.5 * x * (1.0 + math.erf(x / math.sqrt(2.0))),
    "gelu_tanh": lambda x: 0.5 * x * (1.0 + math.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: max(0.0, x),
    "relu_squared": lambda x: max(0.0, x) ** 2,
}


@define(kw_only=True)
class Family:
    """The choices of a family; what takes a layer number is a function of it."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm: str = "rms"
    eps: float = 1e-5
    pre_norm: bool = True
    post_norm: bool = False
    qk_norm: str = "none"
    qk_norm_type: str = "rms"
    rope: str = "none"  # adjacent, halves
    rope_dims: Callable[[int], int] = lambda layer: 0
    rope_base: Callable[[int], float] = lambda layer: 10000.0
    rope_factor: Callable[[int], float] = lambda layer: 1.0
    rope_divisors: str = "rope_freqs"  # the tensor, where a model has it
    rope_magnitude: float = 1.0
    window: Callable[[int], int] = lambda layer: 0
    temperature: Callable[[int], float] = lambda position: 1.0
    attention_scale: float | None = None
    attention_cap: float = 0.0
    gated: bool = True
    activation: str = "silu"
    parallel: bool = False
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    logit_cap: float = 0.0
    fused_qkv: bool = False
    fused_gate_up: str = ""  # the tensor that holds gate and up


@define
class NaiveModel:
    """A family with its weights, by tensor name."""

    family: Family
    weights: Mapping[str, NDArray[Any]]
    cache: list[list[tuple[Vector, Vector]]] = field(factory=list)

    def logits(self, token_ids: Sequence[int]) -> Vector:
        """Logits after each token, float64, shape (tokens, vocab_size)."""
        self.cache = [[] for _ in range(self.family.layers)]
        return np.stack([self.token(token, position) for position, token in enumerate(token_ids)])

    def get(self, name: str) -> Vector | None:
        array = self.weights.get(name)
        return None if array is None else array.astype(np.float64)

    def need(self, name: str) -> Vector:
        array = self.get(name)
        assert array is not None, name
        return array

    def token(self, token: int, position: int) -> Vector:
        f = self.family
        x = self.need("token_embd.weight")[token] * f.embedding_scale
        table = self.get("position_embd.weight")
        if table is not None:
            x = x + table[position]
        if "token_embd_norm.weight" in self.weights:
            x = self.norm(x, "token_embd_norm")
        for layer in range(f.layers):
            x = self.layer(x, f"blk.{layer}.", layer, position)
        x = self.norm(x, "output_norm")
        head = self.get("output.weight")
        logits = (self.need("token_embd.weight") if head is None else head) @ x
        bias = self.get("output.bias")
        logits = (logits if bias is None else logits + bias) * f.logit_scale
        return np.tanh(logits / f.logit_cap) * f.logit_cap if f.logit_cap else logits

    def layer(self, x: Vector, blk: str, layer: int, position: int) -> Vector:
        f = self.family
        attn_in = self.norm(x, f"{blk}attn_norm") if f.pre_norm else x
        attn = self.attention(attn_in, blk, layer, position)
        if f.post_norm:
            attn = self.norm(attn, f"{blk}post_attention_norm")
        attn = attn * f.residual_scale
        base = x if f.parallel else x + attn
        if not f.pre_norm:
            ffn_in = base
        elif f.parallel and f"{blk}ffn_norm.weight" not in self.weights:
            ffn_in = attn_in
        else:
            ffn_in = self.norm(base, f"{blk}ffn_norm")
        ffn = self.ffn(ffn_in, blk)
        if f.post_norm:
            ffn = self.norm(ffn, f"{blk}post_ffw_norm")
        ffn = ffn * f.residual_scale
        return x + attn + ffn

    def norm(self, x: Vector, name: str, kind: str | None = None) -> Vector:
        kind = kind or self.family.norm
        mean = sum(x) / len(x) if kind == "layer" else 0.0
        variance = sum((value - mean) ** 2 for value in x) / len(x)
        out = (x - mean) / math.sqrt(variance + self.family.eps) * self.need(f"{name}.weight")
        bias = self.get(f"{name}.bias")
        return out if bias is None else out + bias

    def linear(self, x: Vector, name: str, rows: slice = slice(None)) -> Vector:
        out = self.need(f"{name}.weight")[rows] @ x
        bias = self.get(f"{name}.bias")
        return out if bias is None else out + bias[rows]

    def qkv(self, x: Vector, blk: str) -> list[Vector]:
        f = self.family
        if not f.fused_qkv:
            return [self.linear(x, f"{blk}attn_{part}") for part in "qkv"]
        q, kv = f.heads * f.head_dim, f.kv_heads * f.head_dim
        parts = slice(0, q), slice(q, q + kv), slice(q + kv, q + 2 * kv)
        return [self.linear(x, f"{blk}attn_qkv", rows) for rows in parts]

    def attention(self, x: Vector, blk: str, layer: int, position: int) -> Vector:
        f = self.family
        q, k, v = self.qkv(x, blk)
        q, k = self.normed_heads(q, f"{blk}attn_q_norm"), self.normed_heads(k, f"{blk}attn_k_norm")
        queries = [self.rotate(head, layer, position) for head in q.reshape(f.heads, -1)]
        keys = np.stack([self.rotate(head, layer, position) for head in k.reshape(f.kv_heads, -1)])
        self.cache[layer].append((keys, v.reshape(f.kv_heads, -1)))
        window = f.window(layer)
        seen = self.cache[layer][-window:] if window else self.cache[layer]
        scale = f.attention_scale if f.attention_scale is not None else 1.0 / math.sqrt(f.head_dim)
        out = []
        for number, query in enumerate(queries):
            kv_head = number // (f.heads // f.kv_heads)
            sharper = f.temperature(position)
            scores = [scale * sharper * float(query @ old_keys[kv_head]) for old_keys, _ in seen]
            if f.attention_cap:
                scores = [f.attention_cap * math.tanh(score / f.attention_cap) for score in scores]
            weights = [math.exp(score - max(scores)) for score in scores]
            out.append(sum(w * values[kv_head] for w, (_, values) in zip(weights, seen, strict=True)) / sum(weights))
        return self.linear(np.concatenate(out), f"{blk}attn_output")

    def normed_heads(self, x: Vector, name: str) -> Vector:
        f = self.family
        if f.qk_norm == "none" or f"{name}.weight" not in self.weights:
            return x
        if f.qk_norm == "per_row":
            return self.norm(x, name, f.qk_norm_type)
        weight = self.need(f"{name}.weight")
        heads = x.reshape(-1, f.head_dim)
        out = []
        for number, head in enumerate(heads):
            own = weight[number] if weight.ndim == 2 else weight
            out.append(NaiveModel(f, {"n.weight": own}).norm(head, "n", f.qk_norm_type))
        return np.concatenate(out)

    def rotate(self, head: Vector, layer: int, position: int) -> Vector:
        f = self.family
        dims = f.rope_dims(layer) if f.rope != "none" else 0
        factors = self.get(f"{f.rope_divisors}.weight")
        out = head.copy()
        for pair in range(dims // 2):
            angle = position * f.rope_base(layer) ** (-2.0 * pair / dims) / f.rope_factor(layer)
            if factors is not None:
                angle /= factors[pair]
            first, second = (2 * pair, 2 * pair + 1) if f.rope == "adjacent" else (pair, pair + dims // 2)
            turned = complex(head[first], head[second]) * complex(math.cos(angle), math.sin(angle)) * f.rope_magnitude
            out[first], out[second] = turned.real, turned.imag
        return out

    def ffn(self, x: Vector, blk: str) -> Vector:
        f = self.family
        act = ACTIVATIONS[f.activation]
        if f.fused_gate_up:
            gate, up = np.split(self.linear(x, blk + f.fused_gate_up), 2)
        else:
            up = self.linear(x, f"{blk}ffn_up")
            gate = self.linear(x, f"{blk}ffn_gate") if f.gated else up
        inner = np.array([act(float(value)) for value in gate])
        return self.linear(inner * up if f.gated else inner, f"{blk}ffn_down")
