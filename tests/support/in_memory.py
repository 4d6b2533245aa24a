"""Model files that exist in memory only: arrays, metadata and a contract, with no loader and no disk."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mortice.arch_contracts.schema import Contract
from mortice.core.model.hyperparameters import resolve_hyperparameters
from mortice.core.model.program import build_program
from mortice.core.model.qtypes import GGML_TYPES, QType
from mortice.core.model.residency import ResidentWeights, bind
from mortice.core.model.types import ModelFile, TensorView
from mortice.core.model.validation import validate
from mortice.core.model.weight_plan import WeightPlan, plan_weights
from mortice.core.plugin.interfaces import RuntimeSettings
from mortice.core.plugin.kv_pages import PAGE_TOKENS, page_count
from mortice.plugins.executors.reference.executor import ReferenceExecutor
from mortice.plugins.executors.reference.runtime import ReferenceRuntime
from mortice.plugins.qtypes import mortice_qtypes
from mortice.plugins.uploads.host import HostUpload

QTYPES = {qtype.name: qtype for qtype in GGML_TYPES.values()}
PATH = Path("memory.gguf")
SIZES: Mapping[str, Any] = {
    "block_count": 2,
    "embedding_length": 32,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "feed_forward_length": 48,
    "context_length": 64,
    "vocab_size": 40,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "attention.layer_norm_epsilon": 1e-5,
}


def view(name: str, values: NDArray[Any], offset: int = 0) -> TensorView:
    """A float32 tensor, or an int32 one."""
    values = np.ascontiguousarray(values)
    qtype = QTYPES["I32" if values.dtype == np.int32 else "F32"]
    data = values.astype(values.dtype if qtype.name == "I32" else np.float32).view(np.uint8).reshape(-1)
    return TensorView(name=name, shape=values.shape, qtype=qtype, data=data, offset=offset, path=PATH)


def raw_view(name: str, shape: tuple[int, ...], qtype: QType, offset: int = 0) -> TensorView:
    """A tensor of zero bytes of any type."""
    data = np.zeros(qtype.nbytes(shape), np.uint8)
    return TensorView(name=name, shape=shape, qtype=qtype, data=data, offset=offset, path=PATH)


def model_file(metadata: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> ModelFile:
    """A file of these; keys and tensors get made-up offsets, each its own."""
    return ModelFile(
        path=PATH,
        format="memory",
        version="1",
        metadata=dict(metadata),
        metadata_offsets={key: 24 + 10 * place for place, key in enumerate(metadata)},
        tensors={name: view(name, array, 4096 + 64 * place) for place, (name, array) in enumerate(arrays.items())},
        files=(PATH,),
    )


def metadata_for(contract: Contract, sizes: Mapping[str, Any] = SIZES, **changes: Any) -> dict[str, Any]:
    """Metadata of a tiny model: `sizes`, changed by `changes` (dots written as ``__``); None takes a key away.

    Keys of `sizes` that the contract does not read are left out.
    """
    read = {item.key for item in contract.hyperparameters.values()} | {"vocab_size"}
    values = {key: value for key, value in sizes.items() if key in read}
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    architecture = contract.architectures[0]
    return {"general.architecture": architecture} | {
        f"{architecture}.{key}": value for key, value in values.items() if value is not None
    }


def arrays_for(
    contract: Contract, metadata: Mapping[str, Any], *, seed: int = 1, leave_out: tuple[str, ...] = ()
) -> dict[str, NDArray[np.float32]]:
    """Random weights for every role that is not forbidden, optional ones included, but for the roles `leave_out`."""
    random = np.random.default_rng(seed)
    # one empty tensor a layer keeps the number of layers plausible before there are any weights
    layers = metadata[f"{contract.architectures[0]}.block_count"]
    stand_ins = {f"{number}": np.zeros(1, np.float32) for number in range(layers)}
    hyperparameters, findings = resolve_hyperparameters(contract, model_file(metadata, stand_ins))
    assert not findings, "\n".join(map(str, findings))
    arrays = {}
    scopes: list[tuple[int | None, Any, dict[str, Any]]] = [(None, contract.global_roles, hyperparameters.uniform())]
    scopes += [(layer, contract.layer_roles, hyperparameters.at(layer)) for layer in range(layers)]
    for layer, roles, values in scopes:
        for key, role in roles.items():
            if role.presence == "forbidden" or key in leave_out:
                continue
            shape = tuple(int(extent.evaluate(values)) for extent in role.shape)
            arrays[role.tensor(layer)] = _weight(key, shape, random)
    return arrays


def _weight(key: str, shape: tuple[int, ...], random: np.random.Generator) -> NDArray[np.float32]:
    if key in ("rope_freqs", "rope_factors_short", "rope_factors_long"):
        values = random.uniform(1.0, 8.0, shape)
    elif "norm" in key and not key.endswith("_bias"):
        values = random.uniform(0.5, 1.5, shape)
    elif key in ("token_embd", "position_embd"):
        values = random.normal(size=shape)
    else:
        values = random.normal(size=shape) * (1.5 / math.sqrt(shape[-1]) if len(shape) > 1 else 0.3)
    return values.astype(np.float32)


def plan_of(file: ModelFile, contract: Contract, layout: str = "fastest") -> WeightPlan:
    """Validate, build and plan for the reference executor."""
    model = validate(file, contract).model()
    executor = ReferenceExecutor()
    kernels = executor.kernels(executor.device(), list(mortice_qtypes()))
    return plan_weights(model, build_program(model), kernels, prefer=layout)


def runtime_of(
    file: ModelFile,
    contract: Contract,
    *,
    layout: str = "fastest",
    context_length: int | None = None,
    kv_type: str = "auto",
) -> ReferenceRuntime:
    """The whole way from a file to a runtime of the reference executor, with a KV cache for 16 full sequences."""
    plan = plan_of(file, contract, layout)
    executor = ReferenceExecutor()
    resident = ResidentWeights(plan=plan, arena=executor.allocate(plan.arena_bytes))
    HostUpload().upload(resident, lambda event: None)
    context = context_length or plan.program.context_length
    room = 16 * page_count(context) * PAGE_TOKENS  # for tests with many sequences, not all of which they close
    settings = RuntimeSettings(context_length=context, kv_type=kv_type, kv_tokens=room)
    return executor.open(bind(resident), settings, lambda event: None)
