"""Hugging Face folders for tests, written from GGUF files: the same weights and vocabulary in the other form.

What is written here follows transformers (names, order of rows, JSON), not the loader that reads it.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mortice.core.model.types import ModelFile
from mortice.core.stages import open_file
from mortice.core.testing.gguf_files import TensorData, write_gguf
from tests.support.tiny import QTYPES, REGISTRY

__all__ = ["quantized_gguf", "safetensors_bytes", "tokenizer_json", "write_folder", "write_json"]

CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
MODULES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
PRE_TOKENIZERS: Mapping[str, list[dict[str, Any]]] = {
    "gpt-2": [{"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}],
    "smollm": [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    ],
    "qwen2": [
        {
            "type": "Split",
            "pattern": {
                "Regex": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                r"|\s*[\r\n]+|\s+(?!\S)|\s+"
            },
            "behavior": "Isolated",
            "invert": False,
        },
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
    ],
    "llama-bpe": [
        {
            "type": "Split",
            "pattern": {
                "Regex": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                r"|\s*[\r\n]+|\s+(?!\S)|\s+"
            },
            "behavior": "Isolated",
            "invert": False,
        },
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    ],
}
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5


def write_json(path: Path, value: Any) -> Path:
    """A JSON file."""
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    return path


def safetensors_bytes(tensors: Mapping[str, tuple[str, Sequence[int], bytes]]) -> bytes:
    """A safetensors file of tensors given as dtype, shape and bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(data for _, _, data in tensors.values())


def write_folder(
    folder: Path, file: ModelFile, dtype: str = "F32", *, shards: int = 1, config: Mapping[str, Any] | None = None
) -> Path:
    """Write the model of a GGUF file as transformers would save it.

    Args:
        folder: where; made.
        file: an opened GGUF file of llama, qwen2 or qwen3; its weights are dequantised.
        dtype: F32, F16 or BF16, of all tensors.
        shards: how many safetensors files.
        config: keys of ``config.json`` to add or change; None takes one away.

    """
    folder.mkdir(parents=True, exist_ok=True)
    numbers: dict[str, Any] = {key.partition(".")[2]: value for key, value in file.metadata.items()}
    tensors = {}
    for tensor in file.tensors.values():
        values = QTYPES[tensor.qtype.name].dequantize(tensor.row_bytes(0, tensor.rows)).reshape(tensor.shape)
        role, kind = tensor.name.removeprefix("blk.").split(".")[-2:]
        if file.architecture == "llama" and role in ("attn_q", "attn_k"):
            values = _halves(values, numbers["attention.head_count" + ("" if role == "attn_q" else "_kv")])
        layer = f"model.layers.{tensor.name.split('.')[1]}." if tensor.name.startswith("blk.") else ""
        tensors[f"{layer}{MODULES[role]}.{kind}"] = (dtype, values.shape, _encoded(values, dtype))
    _write_weights(folder, tensors, shards)
    write_json(folder / "config.json", _without_none({**_config(file, numbers), **(config or {})}))
    tokens = file.metadata["tokenizer.ggml.tokens"]
    ends = {
        f"{theirs}_token": tokens[file.metadata[f"tokenizer.ggml.{name}_token_id"]]  # type: ignore[index]
        for name, theirs in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad"))
        if f"tokenizer.ggml.{name}_token_id" in file.metadata
    }
    write_json(
        folder / "tokenizer_config.json",
        {
            **ends,
            "add_bos_token": file.metadata.get("tokenizer.ggml.add_bos_token", False),
            "chat_template": file.metadata.get("tokenizer.chat_template"),
        },
    )
    write_json(folder / "tokenizer.json", tokenizer_json(file.metadata))
    return folder


def quantized_gguf(folder: Path, qtype: str, path: Path) -> Path:
    """What a GGUF file of the folder's weights, quantised offline, has."""
    quantize = QTYPES[qtype].quantize
    assert quantize is not None
    tensors = []
    with open_file(REGISTRY, folder) as file:
        for tensor in file.tensors.values():
            values = QTYPES[tensor.qtype.name].dequantize(tensor.row_bytes(0, tensor.rows))
            if len(tensor.shape) > 1:
                tensors.append(TensorData(tensor.name, tensor.shape, QTYPES[qtype].qtype, quantize(values).reshape(-1)))
            else:
                tensors.append(TensorData.f32(tensor.name, values.reshape(tensor.shape)))
        return write_gguf(path, file.architecture, file.metadata, tensors)


def tokenizer_json(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The ``tokenizer.json`` of a byte-level vocabulary; merges as pairs, as newer versions write them."""
    tokens, types = list(metadata["tokenizer.ggml.tokens"]), list(metadata["tokenizer.ggml.token_type"])
    added = [
        {"id": token, "content": text, "special": bool(kind == _CONTROL), "normalized": False, "lstrip": False}
        for token, (text, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    pre = metadata["tokenizer.ggml.pre"]
    last = max(token for token, kind in enumerate(types) if kind == _NORMAL)
    return {
        "version": "1.0",
        "added_tokens": [{**entry, "rstrip": False, "single_word": False} for entry in added],
        "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": PRE_TOKENIZERS[pre]},
        "post_processor": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "ignore_merges": pre == "llama-bpe",
            "vocab": {
                text: token
                for token, (text, kind) in enumerate(zip(tokens, types, strict=True))
                if kind != _UNUSED and (kind == _NORMAL or token < last)
            },
            "merges": [
                [merge[: merge.index(" ", 1)], merge[merge.index(" ", 1) + 1 :]]
                for merge in metadata["tokenizer.ggml.merges"]
            ],
        },
    }


def _config(file: ModelFile, numbers: Mapping[str, Any]) -> dict[str, Any]:
    heads = numbers["attention.head_count"]
    return {
        "architectures": [CLASSES[file.architecture]],
        "model_type": file.architecture,
        "hidden_act": "silu",
        "num_hidden_layers": numbers["block_count"],
        "max_position_embeddings": numbers["context_length"],
        "hidden_size": numbers["embedding_length"],
        "intermediate_size": numbers["feed_forward_length"],
        "num_attention_heads": heads,
        "num_key_value_heads": numbers["attention.head_count_kv"],
        "head_dim": numbers.get("attention.key_length", numbers["embedding_length"] // heads),
        "rms_norm_eps": numbers["attention.layer_norm_rms_epsilon"],
        "rope_theta": numbers.get("rope.freq_base", 10000.0),
        "vocab_size": len(file.metadata["tokenizer.ggml.tokens"]),  # type: ignore[arg-type]
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "torch_dtype": "float32",
    }


def _without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _halves(values: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rows of a head with the first of all pairs before the second of all pairs."""
    rows = values.reshape(heads, values.shape[0] // heads // 2, 2, -1)
    return rows.swapaxes(1, 2).reshape(values.shape)


def _encoded(values: NDArray[np.float32], dtype: str) -> bytes:
    if dtype == "BF16":
        return (np.ascontiguousarray(values).view("<u4") >> 16).astype("<u2").tobytes()
    return values.astype({"F32": "<f4", "F16": "<f2"}[dtype]).tobytes()


def _write_weights(folder: Path, tensors: Mapping[str, Any], shards: int) -> None:
    if shards == 1:
        (folder / "model.safetensors").write_bytes(safetensors_bytes(tensors))
        return
    names = list(tensors)
    size = -(-len(names) // shards)
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        own = names[shard * size : (shard + 1) * size]
        (folder / file).write_bytes(safetensors_bytes({name: tensors[name] for name in own}))
        weight_map |= dict.fromkeys(own, file)
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": 1}, "weight_map": weight_map})
