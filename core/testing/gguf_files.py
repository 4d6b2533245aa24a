"""Writes small model files for tests: metadata and tensors in, a GGUF file out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from mortice.core.model.qtypes import GGML_TYPES, QType
from mortice.core.model.types import MetadataValue, ModelFile, TensorView

__all__ = ["TensorData", "expand_to_f32", "write_gguf"]

F32 = GGML_TYPES[0]


@frozen(eq=False)
class TensorData:
    """A tensor to be written.

    Attributes:
        name: as in the file.
        shape: extents, rows first.
        qtype: how the rows are stored.
        data: ``uint8``, the bytes of all rows.

    """

    name: str
    shape: tuple[int, ...]
    qtype: QType
    data: NDArray[np.uint8]

    @classmethod
    def f32(cls, name: str, values: NDArray[np.float32]) -> TensorData:
        """A float32 tensor."""
        data = np.ascontiguousarray(values, np.float32).reshape(-1).view(np.uint8)
        return cls(name, values.shape, F32, data)

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return self.data.nbytes

    def view(self, path: Path) -> TensorView:
        """The tensor as a loader would show it; its offset is 0, since it has no place in a file yet."""
        data = self.data.view()
        data.flags.writeable = False
        return TensorView(name=self.name, shape=self.shape, qtype=self.qtype, data=data, offset=0, path=path)


def write_gguf(
    path: Path, architecture: str, metadata: Mapping[str, MetadataValue], tensors: Iterable[TensorData | TensorView]
) -> Path:
    """Write a little-endian GGUF v3 file, `tensors` in their order.

    Scalars are written as ``uint32``, ``int32`` (where negative), ``float32``, ``bool`` or string; arrays keep the
    type of their elements. An empty string or array is left out, as the `gguf` writer does.
    """
    from gguf import GGUFWriter

    tensors = list(tensors)
    writer = GGUFWriter(path, architecture)
    for key, value in metadata.items():
        if key != "general.architecture":
            _add_value(writer, key, value)
    for tensor in tensors:
        # told the bytes are float32 the writer takes the shape as it is, and ids it does not know pass
        writer.add_tensor_info(
            tensor.name,
            tensor.shape,
            np.dtype(np.float32),
            tensor.nbytes,
            raw_dtype=tensor.qtype.id,  # type: ignore[arg-type]  # any id; it is only written
        )
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            writer.write_tensor_data(np.ascontiguousarray(tensor.data))
    finally:
        writer.close()
    return path


def _add_value(writer: object, key: str, value: MetadataValue) -> None:
    from gguf import GGUFValueType, GGUFWriter

    assert isinstance(writer, GGUFWriter)
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            (writer.add_int32 if value < 0 else writer.add_uint32)(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case np.ndarray():
            element = GGUFValueType[{"bool": "BOOL"}.get(value.dtype.name, value.dtype.name.upper())]
            writer.add_key_value(key, value.tolist(), GGUFValueType.ARRAY, sub_type=element)
        case _:
            writer.add_array(key, list(value))


def expand_to_f32(file: ModelFile, path: Path, dequantize: Callable[[TensorView], NDArray[np.float32]]) -> Path:
    """Write `file` again with the same values as float32, for an oracle that rounds when it meets quantised weights.

    Args:
        file: the model.
        path: where to write.
        dequantize: a tensor's values, float32 of its shape.

    """
    metadata = {key: value for key, value in file.metadata.items() if key != "general.file_type"}
    tensors = (TensorData.f32(tensor.name, dequantize(tensor)) for tensor in file.tensors.values())
    return write_gguf(path, file.architecture, metadata, tensors)
