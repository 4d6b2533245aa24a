"""Tiny models for tests: made, changed, expanded and run in a line each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mortice.arch_contracts.schema import Contract, builtin_contracts, parse_contract
from mortice.core.config import ExecutorConfig, ModelConfig, RunConfig
from mortice.core.model.program import Program, build_program
from mortice.core.model.types import TensorView
from mortice.core.model.validation import validate
from mortice.core.pipeline import prepare
from mortice.core.stages import open_file
from mortice.core.testing.gguf_files import TensorData, expand_to_f32, write_gguf
from mortice.core.testing.tiny_models import write_tiny_model
from tests.support.registry import make_registry, plugin_of

CONTRACTS: Mapping[str, Contract] = {contract.name: contract for contract in builtin_contracts()}

FUSED_WITH_BIAS_AND_NORM = parse_contract(
    """
[contract]
name = "fused"
architectures = ["fused"]
[hyperparameters]
norm_eps = { key = "attention.layer_norm_rms_epsilon" }
[norm]
eps = "norm_eps"
[attention]
qk_norm = "per_head"
[rope]
style = "halves"
base = 10000.0
[roles.global]
token_embd = ["vocab_size", "hidden_size"]
output_norm = ["hidden_size"]
output = { shape = ["vocab_size", "hidden_size"], else = "token_embd" }
[roles.layer]
attn_norm = ["hidden_size"]
attn_q = { shape = ["num_heads * head_dim", "hidden_size"], optional = true }
attn_k = { shape = ["num_kv_heads * head_dim", "hidden_size"], optional = true }
attn_v = { shape = ["num_kv_heads * head_dim", "hidden_size"], optional = true }
attn_q_bias = { shape = ["num_heads * head_dim"], optional = true }
attn_k_bias = { shape = ["num_kv_heads * head_dim"], optional = true }
attn_v_bias = { shape = ["num_kv_heads * head_dim"], optional = true }
attn_q_norm = ["head_dim"]
attn_k_norm = ["head_dim"]
attn_output = ["hidden_size", "num_heads * head_dim"]
ffn_norm = ["hidden_size"]
ffn_gate = ["ffn_size", "hidden_size"]
ffn_up = ["ffn_size", "hidden_size"]
ffn_down = ["hidden_size", "ffn_size"]
[roles.layer.attn_qkv]
shape = ["(num_heads + 2 * num_kv_heads) * head_dim", "hidden_size"]
optional = true
split = { attn_q = "num_heads * head_dim", attn_k = "num_kv_heads * head_dim", attn_v = "num_kv_heads * head_dim" }
[roles.layer.attn_qkv_bias]
shape = ["(num_heads + 2 * num_kv_heads) * head_dim"]
optional = true
[roles.layer.attn_qkv_bias.split]
attn_q_bias = "num_heads * head_dim"
attn_k_bias = "num_kv_heads * head_dim"
attn_v_bias = "num_kv_heads * head_dim"
""",
    "fused.toml",
)
"""A family that no built-in contract covers: Q, K and V in one tensor, a bias, and a norm on each head of Q and K."""

REGISTRY = make_registry()
QTYPES = {name: provided.value for name, provided in REGISTRY.qtypes.items()}
IDS: Sequence[int] = np.random.default_rng(3).integers(0, 500, 40).tolist()


def tiny(folder: Path, contract: str | Contract = "llama", **arguments: Any) -> Path:
    """A new tiny model in `folder`; a contract's name is that of a built-in one."""
    chosen = CONTRACTS[contract] if isinstance(contract, str) else contract
    return write_tiny_model(folder / f"model-{len(list(folder.iterdir()))}.gguf", chosen, **arguments)


def logits(path: Path, contract: Contract | None = None, ids: Sequence[int] = IDS) -> NDArray[np.float32]:
    """The reference executor's logits after each of `ids`; a contract that is not built in comes from a plugin."""
    given = {} if contract is None else {"test": plugin_of(mortice_arch_contracts=lambda: [contract])}
    config = RunConfig(model=ModelConfig(path=path), executor=ExecutorConfig(name="reference"))
    with prepare(config, make_registry(given)) as pipeline:
        return pipeline.logits(ids)


def program_of(path: Path, contract: Contract) -> Program:
    """The program of a file."""
    with open_file(REGISTRY, path) as file:
        return build_program(validate(file, contract).model())


def expanded(path: Path, copy: Path | None = None) -> Path:
    """A `copy` (by default beside it) with the same values as F32, as mortice reads them."""

    def values(tensor: TensorView) -> NDArray[np.float32]:
        return QTYPES[tensor.qtype.name].dequantize(tensor.row_bytes(0, tensor.rows)).reshape(tensor.shape)

    with open_file(REGISTRY, path) as file:
        return expand_to_f32(file, copy or path.with_suffix(".f32.gguf"), values)


def rewritten(path: Path, change: Callable[[TensorData], Sequence[TensorData]]) -> Path:
    """A copy in which each tensor is replaced by what `change` makes of it."""
    with open_file(REGISTRY, path) as file:
        tensors = [
            kept
            for tensor in file.tensors.values()
            for kept in change(TensorData(tensor.name, tensor.shape, tensor.qtype, tensor.data.copy()))
        ]
        return write_gguf(path.with_suffix(".changed.gguf"), file.architecture, file.metadata, tensors)


def without(path: Path, name: str) -> Path:
    """A copy that lacks a tensor."""
    return rewritten(path, lambda tensor: [] if tensor.name == name else [tensor])
