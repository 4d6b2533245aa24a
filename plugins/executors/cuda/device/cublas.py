"""Products of half-precision matrices by cuBLAS, found late; without it other kernels do all."""

from __future__ import annotations

import ctypes
from functools import cache
from importlib import import_module
from typing import Any

from attrs import define, field, frozen

from mortice.core.errors import DeviceError
from mortice.plugins.executors.cuda.device.stream import Stream

__all__ = ["WORKSPACE_BYTES", "Blas", "Gemm", "cublas_version", "find_cublas"]

WORKSPACE_BYTES = 32 << 20
"""Device memory lent to cuBLAS; its manual ("cublasSetWorkspace") recommends this much for compute capability 9.0."""

_TRANSPOSED, _PLAIN = 1, 0  # cublasOperation_t
_FLOAT, _HALF = 0, 2  # cudaDataType_t
_COMPUTE_FLOAT = 68  # cublasComputeType_t, CUBLAS_COMPUTE_32F
_DEFAULT_ALGORITHM = -1

_Int, _Pointer = ctypes.c_int, ctypes.c_void_p


@cache
def find_cublas() -> Any | None:
    """The library, as installed beside CUDA's other packages or by the system; None where there is none."""
    try:
        pathfinder = import_module("cuda.pathfinder")
    except ImportError:
        return None
    try:
        path = pathfinder.load_nvidia_dynamic_lib("cublas").abs_path
    except pathfinder.DynamicLibNotFoundError:
        return None
    return ctypes.CDLL(path)


def cublas_version(library: Any) -> str:
    """The version of a library that `find_cublas` found: ``13.0.2``."""
    number, parts = _Int(), []
    for part in range(3):  # libraryPropertyType: major, minor, patch
        code = library.cublasGetProperty(_Int(part), ctypes.byref(number))
        if code:
            raise DeviceError(f"cublasGetProperty: status {code} (cublasStatus_t)")
        parts.append(str(number.value))
    return ".".join(parts)


@frozen(kw_only=True)
class Gemm:
    """out (rows, outputs) = x (rows, columns) @ weight (outputs, columns).T; halves in, float32 out, row by row.

    Attributes:
        x: device address.
        weight: device address.
        out: device address.

    """

    rows: int
    outputs: int
    columns: int
    x: int
    weight: int
    out: int


@define(eq=False)
class Blas:
    """A cuBLAS handle on a stream, with a workspace that outlives it."""

    _library: Any = field(repr=False)
    stream: Stream
    workspace: int
    _handle: Any = field(init=False, repr=False)
    _one: Any = field(factory=lambda: ctypes.c_float(1.0), init=False, repr=False)
    _zero: Any = field(factory=lambda: ctypes.c_float(0.0), init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        self._handle = _Pointer()
        self._check("cublasCreate_v2", ctypes.byref(self._handle))
        self._check("cublasSetStream_v2", self._handle, _Pointer(self.stream.handle))
        # after the stream, which would put cuBLAS's own workspace back
        self._check("cublasSetWorkspace_v2", self._handle, _Pointer(self.workspace), ctypes.c_size_t(WORKSPACE_BYTES))

    def _check(self, name: str, *args: Any) -> None:
        code = getattr(self._library, name)(*args)
        if code:
            raise DeviceError(f"{name}: status {code} (cublasStatus_t)")

    def prepare(self, gemm: Gemm) -> Any:
        """A call that queues the product on the handle's stream.

        Both matrices are read as cuBLAS reads columns: the transposed weight times x gives the transposed result.
        """
        args = (
            self._handle,
            _Int(_TRANSPOSED),
            _Int(_PLAIN),
            _Int(gemm.outputs),
            _Int(gemm.rows),
            _Int(gemm.columns),
            ctypes.byref(self._one),
            *(_Pointer(gemm.weight), _Int(_HALF), _Int(gemm.columns)),
            *(_Pointer(gemm.x), _Int(_HALF), _Int(gemm.columns)),
            ctypes.byref(self._zero),
            *(_Pointer(gemm.out), _Int(_FLOAT), _Int(gemm.outputs)),
            _Int(_COMPUTE_FLOAT),
            _Int(_DEFAULT_ALGORITHM),
        )
        function = self._library.cublasGemmEx

        def queue(stream: Stream) -> None:
            assert stream is self.stream, "a handle works on one stream"
            code = function(*args)
            if code:
                raise DeviceError(f"cublasGemmEx of {gemm}: status {code} (cublasStatus_t)")

        return queue

    def close(self) -> None:
        """Let go of the handle; calling twice is fine."""
        if self._handle:
            handle, self._handle = self._handle, None
            self._check("cublasDestroy_v2", handle)
