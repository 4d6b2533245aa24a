"""The CUDA driver through ``cuda.bindings``: found late, every return code checked."""

from __future__ import annotations

import ctypes
from importlib import import_module
from types import ModuleType
from typing import Any

from attrs import frozen

from mortice.core.errors import DeviceError
from mortice.plugins.executors.cuda.device.errors import CudaError, unusable

__all__ = ["Driver", "begin_driver", "import_bindings", "is_driver_installed", "load_driver", "result_error"]

_LIBRARY = "libcuda.so.1"
_NO_DRIVER = f"no NVIDIA driver ({_LIBRARY} was not found)"

OLDEST_DRIVER = {12: "525", 13: "580"}
"""CUDA major version to the oldest Linux driver that runs it (CUDA release notes, "minor version compatibility")."""


@frozen(eq=False)
class Driver:
    """The driver's functions by name.

    ``driver("cuMemAlloc", nbytes)`` calls it, raises `CudaError` unless it succeeds, and returns what the function
    returns besides its code: None, one value, or a tuple. Paths that run per token take the functions of `api`
    instead and hand a code that is not 0 to `result_error`.

    Attributes:
        api: the module ``cuda.bindings.driver``.
        version: the newest CUDA version the installed driver runs, (major, minor).

    """

    api: ModuleType
    version: tuple[int, int] = (0, 0)

    def __call__(self, name: str, *args: Any) -> Any:
        try:
            result = getattr(self.api, name)(*args)
        except RuntimeError as error:  # what cuda.bindings raises for a function the driver does not export
            raise CudaError(name, 0, "not in this driver", str(error)) from error
        if result[0]:
            raise result_error(self.api, name, result[0])
        if len(result) == 1:
            return None
        return result[1] if len(result) == 2 else tuple(result[1:])


def result_error(api: ModuleType, name: str, code: Any) -> CudaError:
    """The error for a CUresult that is not 0."""
    label, text = api.cuGetErrorName(code), api.cuGetErrorString(code)
    if label[0] or text[0]:  # a code this driver has no name for
        return CudaError(name, int(code), f"error {int(code)}", "unknown to this driver")
    return CudaError(name, int(code), label[1].decode(), text[1].decode())


def load_driver() -> Driver:
    """Bring the driver up (``cuInit``).

    Raises:
        DeviceError: when cuda-python, the driver or a device is missing, or the driver is too old for cuda-python.

    """
    try:
        api = import_bindings("driver")
    except DeviceError:
        if is_driver_installed():
            raise
        raise unusable(_NO_DRIVER) from None  # without one, no package would help
    unchecked = Driver(api)
    try:
        number = unchecked("cuDriverGetVersion")
    except CudaError as error:
        if error.code:
            raise
        raise unusable(_NO_DRIVER) from error
    version = (number // 1000, number % 1000 // 10)
    package = import_module("cuda.bindings").__version__
    wanted = int(package.split(".")[0])
    if version[0] < wanted:
        driver = f"or update the driver to {OLDEST_DRIVER[wanted]} or newer" if wanted in OLDEST_DRIVER else ""
        raise unusable(
            f"the NVIDIA driver runs CUDA {version[0]}.{version[1]} at most, cuda-python {package} needs {wanted}.0: "
            f"install mortice[cuda{version[0]}] {driver}".rstrip()
        )
    try:
        unchecked("cuInit", 0)
    except CudaError as error:
        raise unusable(f"CUDA cannot start: {error}") from error
    return Driver(api, version)


def is_driver_installed() -> bool:
    """Whether the driver's library can be loaded."""
    try:
        ctypes.CDLL(_LIBRARY)
    except OSError:
        return False
    return True


def begin_driver() -> None:
    """``cuInit`` without cuda-python, whose import may then go on beside it; `load_driver` says what goes wrong."""
    ctypes.CDLL(_LIBRARY).cuInit(0)


def import_bindings(name: str) -> ModuleType:
    """The module ``cuda.bindings.<name>``, or a `DeviceError` naming what to install."""
    try:
        return import_module(f"cuda.bindings.{name}")
    except ImportError as error:
        raise unusable(
            f"cuda-python cannot be imported ({error}): install mortice[cuda12] or mortice[cuda13]"
        ) from error
