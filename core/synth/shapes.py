"""The real models whose shapes can be filled with random weights."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

__all__ = ["SHAPES", "Llama3Rope", "Shape"]


@frozen(kw_only=True)
class Llama3Rope:
    """How Llama 3.1 stretches RoPE: pairs that turn slowly are slowed down by `factor`, fast ones are left alone.

    Attributes:
        factor: for wavelengths above ``original_context / low_freq_factor`` tokens.
        low_freq_factor: see `factor`; between the two wavelengths the factor is interpolated.
        high_freq_factor: wavelengths below ``original_context / high_freq_factor`` keep their frequency.
        original_context: tokens the model was first trained on.

    """

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192

    def factors(self, dims: int, base: float) -> NDArray[np.float32]:
        """What the frequency of each pair is divided by, float32, shape (dims / 2,).

        The formula is that of ``rope_type = "llama3"`` (transformers, ``modeling_rope_utils.py``); files hold its
        result as ``rope_freqs.weight``.
        """
        wavelengths = 2 * np.pi * base ** (np.arange(0, dims, 2) / dims)
        smooth = (self.original_context / wavelengths - self.low_freq_factor) / (
            self.high_freq_factor - self.low_freq_factor
        )
        blend = np.clip(smooth, 0.0, 1.0)  # 0 for slow pairs, 1 for fast ones
        return (1 / ((1 - blend) / self.factor + blend)).astype(np.float32)


@frozen(kw_only=True)
class Shape:
    """The hyperparameters of a published model, as in its ``config.json``.

    Attributes:
        architecture: ``general.architecture``.
        num_layers: blocks.
        hidden_size: width of the residual stream.
        ffn_size: width of the feed-forward block.
        num_heads: query heads.
        num_kv_heads: key and value heads.
        head_dim: elements of a head.
        vocab_size: rows of the embedding.
        context_length: tokens it was made for.
        rope_freq_base: base of RoPE's frequencies.
        norm_eps: what the norms add to the variance.
        tied: whether the embedding serves as the head.
        rope: Llama 3.1's factors, where it has them.
        pre: ``tokenizer.ggml.pre``.

    """

    architecture: str
    num_layers: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int
    rope_freq_base: float
    norm_eps: float
    tied: bool
    rope: Llama3Rope | None = None
    pre: str


def _llama3(*, layers: int, hidden: int, ffn: int, head_dim: int, tied: bool, factor: float) -> Shape:
    return Shape(
        architecture="llama",
        num_layers=layers,
        hidden_size=hidden,
        ffn_size=ffn,
        num_heads=32,
        num_kv_heads=8,
        head_dim=head_dim,
        vocab_size=128256,
        context_length=131072,
        rope_freq_base=500000.0,
        norm_eps=1e-5,
        tied=tied,
        rope=Llama3Rope(factor=factor),
        pre="llama-bpe",
    )


def _qwen(
    architecture: str,
    layers: int,
    hidden: int,
    ffn: int,
    heads: tuple[int, int],
    *,
    head_dim: int,
    tied: bool,
    vocab_size: int = 151936,
) -> Shape:
    return Shape(
        architecture=architecture,
        num_layers=layers,
        hidden_size=hidden,
        ffn_size=ffn,
        num_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=head_dim,
        vocab_size=vocab_size,
        context_length=32768 if architecture == "qwen2" else 40960,
        rope_freq_base=1e6,
        norm_eps=1e-6,
        tied=tied,
        pre="qwen2",
    )


SHAPES: Mapping[str, Shape] = MappingProxyType(
    {
        "Llama-3.1-8B": _llama3(layers=32, hidden=4096, ffn=14336, head_dim=128, tied=False, factor=8.0),
        "Llama-3.2-1B": _llama3(layers=16, hidden=2048, ffn=8192, head_dim=64, tied=True, factor=32.0),
        "Qwen2.5-0.5B": _qwen("qwen2", 24, 896, 4864, (14, 2), head_dim=64, tied=True),
        "Qwen2.5-1.5B": _qwen("qwen2", 28, 1536, 8960, (12, 2), head_dim=128, tied=True),
        "Qwen2.5-7B": _qwen("qwen2", 28, 3584, 18944, (28, 4), head_dim=128, tied=False, vocab_size=152064),
        "Qwen3-0.6B": _qwen("qwen3", 28, 1024, 3072, (16, 8), head_dim=128, tied=True),
        "Qwen3-4B": _qwen("qwen3", 36, 2560, 9728, (32, 8), head_dim=128, tied=True),
        "Qwen3-8B": _qwen("qwen3", 36, 4096, 12288, (32, 8), head_dim=128, tied=False),
        "SmolLM2-135M": Shape(
            architecture="llama",
            num_layers=30,
            hidden_size=576,
            ffn_size=1536,
            num_heads=9,
            num_kv_heads=3,
            head_dim=64,
            vocab_size=49152,
            context_length=8192,
            rope_freq_base=100000.0,
            norm_eps=1e-5,
            tied=True,
            pre="smollm",
        ),
    }
)
"""Shapes by the name that their makers gave them."""
