"""Marks for tests that need parts of CUDA, and a driver that only pretends."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from mortice.core.errors import DeviceError
from mortice.plugins.executors.cuda.device.properties import list_devices
from mortice.plugins.executors.cuda.device.toolkit import find_compiler

__all__ = ["FakeDriverApi", "needs_gpu", "needs_nvrtc"]


def _missing(find: Callable[[], object]) -> str:
    """Why something cannot be used; empty when it can."""
    try:
        find()
    except DeviceError as error:
        return str(error)
    return ""


_NO_COMPILER = _missing(find_compiler)
_NO_DEVICE = _missing(list_devices)

needs_nvrtc = pytest.mark.skipif(bool(_NO_COMPILER), reason=_NO_COMPILER or "NVRTC is there")
needs_gpu = pytest.mark.skipif(bool(_NO_DEVICE), reason=_NO_DEVICE or "a GPU is there")


class _Type:
    """An enum, whose members are 0 except the results that code compares with, or a structure."""

    def __call__(self) -> SimpleNamespace:
        return SimpleNamespace()

    def __getattr__(self, name: str) -> int:
        return {"CUDA_ERROR_INVALID_VALUE": 1, "CUDA_ERROR_GRAPH_EXEC_UPDATE_FAILURE": 910}.get(name, 0)


class FakeDriverApi:
    """Stands for ``cuda.bindings.driver``: one device with 1000 bytes, whose driver runs CUDA 13.0.

    `calls` lists the functions called, with their arguments. `answers` overrides what a function returns besides its
    code; `failures` gives the code of functions that fail.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.failures: dict[str, int] = {}
        self.next_address = 4096
        self.answers: dict[str, tuple[Any, ...]] = {
            "cuDriverGetVersion": (13000,),
            "cuDeviceGetCount": (1,),
            "cuDeviceGet": (0,),
            "cuDeviceGetName": (b"Pretence\0\0",),
            "cuDeviceGetUuid": (type("Uuid", (), {"bytes": bytes(16)}),),
            "cuDeviceGetAttribute": (9,),
            "cuFuncGetAttribute": (0,),
            "cuDeviceTotalMem": (1000,),
            "cuDevicePrimaryCtxRetain": ("context",),
            "cuMemGetInfo": (600, 1000),
            "cuMemHostGetDevicePointer": (1 << 20,),
            "cuStreamCreateWithPriority": (7,),
            "cuStreamEndCapture": (8,),
            "cuOccupancyMaxActiveBlocksPerMultiprocessor": (2,),
            "cuGetErrorName": (b"CUDA_ERROR_MADE_UP",),
            "cuGetErrorString": (b"made up",),
        }

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu"):
            return _Type()

        def call(*args: Any) -> tuple[Any, ...]:
            self.calls.append((name, *args))
            if name in self.failures:
                return (self.failures[name], None)
            if name in {"cuMemAlloc", "cuMemHostAlloc"}:
                self.next_address += 4096
                return (0, self.next_address)
            return (0, *self.answers.get(name, ()))

        return call

    def called(self, name: str) -> list[list[Any]]:
        """The arguments of each call of a function."""
        return [arguments for called, *arguments in self.calls if called == name]
