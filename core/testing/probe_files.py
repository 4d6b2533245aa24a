"""A tiny model in each form that the built-in loaders read, to see which loaders take it."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np

from mortice.core.testing.gguf_files import TensorData, write_gguf

__all__ = ["probe_files"]

_EMBEDDING = np.zeros((8, 32), np.float32)


def probe_files(folder: Path) -> list[Path]:
    """A GGUF file and a Hugging Face folder, written into `folder`: good enough to be opened, not to be run."""
    tensor = TensorData.f32("token_embd.weight", _EMBEDDING)
    return [write_gguf(folder / "probe.gguf", "llama", {}, [tensor]), _hugging_face(folder / "probe")]


def _hugging_face(folder: Path) -> Path:
    folder.mkdir()
    rows, columns = _EMBEDDING.shape
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": columns,
        "intermediate_size": columns,
        "max_position_embeddings": 64,
        "num_attention_heads": 1,
        "num_hidden_layers": 0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "vocab_size": rows,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    entry = {"dtype": "F32", "shape": [rows, columns], "data_offsets": [0, _EMBEDDING.nbytes]}
    header = json.dumps({"model.embed_tokens.weight": entry}).encode()
    header += b" " * (-len(header) % 8)  # the format wants data aligned
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + _EMBEDDING.tobytes())
    return folder
