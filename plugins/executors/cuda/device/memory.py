"""Blocks of device memory and of pinned host memory, each freed by `close` or at the end of a ``with``."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from types import TracebackType
from typing import Self

import numpy as np
from attrs import define, field
from numpy.typing import NDArray

__all__ = ["DeviceBuffer", "HostBuffer", "RegisteredHost"]


@define(eq=False, kw_only=True)
class _Block:
    address: int
    nbytes: int
    _free: Callable[[int], None] = field(repr=False)
    _closed: bool = field(default=False, init=False, repr=False)

    def close(self) -> None:
        """Give the memory back; calling twice is fine."""
        if not self._closed:
            self._closed = True
            self._free(self.address)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@define(eq=False, kw_only=True)
class DeviceBuffer(_Block):
    """Device memory, aligned to 256 bytes; it fits the protocol `Arena`.

    Attributes:
        address: of the first byte, in the device's address space.
        nbytes: bytes.

    """

    @property
    def kind(self) -> str:
        """``cuda``."""
        return "cuda"

    def host_view(self) -> NDArray[np.uint8] | None:
        """None: the host cannot write device memory."""
        return None


@define(eq=False, kw_only=True)
class HostBuffer(_Block):
    """Pinned (page-locked) host memory, which copies read and write at the full speed of the link.

    Attributes:
        address: of the first byte, for the host.
        nbytes: bytes.
        device_address: of the first byte, for kernels.

    """

    device_address: int

    @property
    def array(self) -> NDArray[np.uint8]:
        """The bytes, shape (nbytes,), writable. Not to be used after `close`."""
        return np.frombuffer(memoryview((ctypes.c_uint8 * self.nbytes).from_address(self.address)), np.uint8)


@define(eq=False, kw_only=True)
class RegisteredHost(_Block):
    """Host memory of somebody else, pinned until `close`. It must outlive this object.

    Attributes:
        address: of the first byte, for the host.
        nbytes: bytes.
        device_address: of the first byte, for kernels.

    """

    device_address: int
