"""What goes wrong on the way to a CUDA device, and the way back."""

from __future__ import annotations

from mortice.core.errors import DeviceError

__all__ = ["WAY_BACK", "CompileError", "CudaError", "unusable"]

WAY_BACK = 'executor = "reference" runs on the CPU'
"""Ends every message about a device that cannot be used at all."""


class CudaError(DeviceError):
    """A call of the CUDA driver failed.

    Args:
        call: the driver function, for instance ``cuMemAlloc``.
        code: its CUresult; 0 when the driver does not have the function at all.
        name: the code's name, for instance ``CUDA_ERROR_ILLEGAL_ADDRESS``.
        text: what the driver says of it.

    """

    def __init__(self, call: str, code: int, name: str, text: str) -> None:
        self.call = call
        self.code = code
        self.name = name
        hint = _HINTS.get(code)
        super().__init__(f"{call}: {name} ({text})" + (f"; {hint}" if hint else ""))


class CompileError(DeviceError):
    """CUDA source that cannot be flattened or compiled; the message names file and line."""


def unusable(message: str) -> DeviceError:
    """A `DeviceError` that says how to go on without a GPU."""
    return DeviceError(f"{message}; {WAY_BACK}")


_LOST = (
    "the context is lost and every later call fails: start a new process (compute-sanitizer finds the kernel at fault)"
)
_HINTS = {
    3: "CUDA does not survive a fork: start processes with the method 'spawn'",
    46: "another process holds the device in exclusive mode",
    100: "no device is visible: see CUDA_VISIBLE_DEVICES and nvidia-smi",
    209: "the kernel was compiled for another architecture than this device's",
    700: _LOST,
    702: _LOST,
    715: _LOST,
    716: _LOST,
    718: _LOST,
    719: _LOST,
    802: "the machine's fabric manager has not brought the GPUs up yet",
    803: "the driver's library and kernel module differ in version: reboot after a driver update",
    900: "this call is not allowed while a graph is captured: compile and warm up before",
    901: "an earlier call of this capture was not allowed in it: compile and warm up before",
    999: "after suspend or a driver fault the kernel module nvidia_uvm may need to be reloaded",
}
"""CUresult to what a person can do about it (codes of cuda.h, ``enum cudaError_enum``)."""
