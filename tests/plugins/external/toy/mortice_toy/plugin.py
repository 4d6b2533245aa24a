"""The .toy format: a line of JSON, then tensor data. Family "toy", and T2: -1, 0 or 1 times a scale."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mortice.arch_contracts.schema import Contract, parse_contract
from mortice.core.errors import ModelFileError
from mortice.core.model.qtypes import QType
from mortice.core.model.types import LoadOptions, ModelFile, TensorView
from mortice.core.plugin.hookspecs import hookimpl
from mortice.core.plugin.interfaces import QuantizationType

mortice_contract_version = 1

T2 = QType(1001, "T2", block_elements=32, block_bytes=10)  # float16 scale, then 32 codes of two bits


@hookimpl
def mortice_open_model(path: Path, options: LoadOptions) -> ModelFile | None:
    if path.suffix != ".toy":
        return None
    types = {qtype.name: qtype for qtype in options.qtypes.values()}
    tensors = {}
    try:
        with path.open("rb") as file:
            header = json.loads(file.readline(1 << 20))
            start = file.tell()
        data = np.memmap(path, np.uint8, mode="r")
        for name, (type_name, shape, offset) in header["tensors"].items():
            qtype, first = types[type_name], start + offset
            stop = first + qtype.nbytes(tuple(shape))
            if not start <= first <= stop <= len(data):
                raise ModelFileError(path, f"{name} ends at byte {stop}, the file at {len(data)}", first)
            tensors[name] = TensorView(
                name=name, shape=tuple(shape), qtype=qtype, data=data[first:stop], offset=first, path=path
            )
        metadata = dict(header["metadata"])
    except (OSError, LookupError, TypeError, ValueError) as error:
        raise ModelFileError(path, f"broken header: {type(error).__name__}: {error}") from error
    return ModelFile(path=path, format="toy", version="1", metadata=metadata, tensors=tensors, files=(path,))


@hookimpl
def mortice_arch_contracts() -> list[Contract]:
    text = resources.files("mortice_toy").joinpath("toy.toml").read_text(encoding="utf-8")
    return [parse_contract(text, "toy.toml")]


@hookimpl
def mortice_qtypes() -> list[QuantizationType]:
    return [QuantizationType(qtype=T2, dequantize=t2_to_float32)]


def t2_to_float32(rows: NDArray[np.uint8]) -> NDArray[np.float32]:
    blocks = rows.reshape(-1, T2.block_bytes)
    scales = blocks[:, :2].copy().view("<f2").astype(np.float32)
    codes = blocks[:, 2:, None] >> np.array([0, 2, 4, 6], np.uint8) & 3
    values = scales * (codes.reshape(-1, T2.block_elements).astype(np.float32) - 1)
    return values.reshape(len(rows), rows.shape[1] // T2.block_bytes * T2.block_elements)
