"""Host memory that uploads copy from: pinned, of huge pages, and made ready before it is needed."""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from mmap import MADV_HUGEPAGE, MAP_ANONYMOUS, MAP_PRIVATE, PAGESIZE, mmap
from threading import Event, Thread

import numpy as np
from attrs import define, field
from numpy.typing import NDArray

from mortice.core.errors import DoesNotFitError
from mortice.plugins.executors.cuda.device.device import Device
from mortice.plugins.executors.cuda.device.errors import CudaError
from mortice.plugins.executors.cuda.device.memory import RegisteredHost

__all__ = ["StagingBuffer", "StagingPool"]

_HUGE_PAGE = 2 << 20


@define(eq=False)
class StagingBuffer:
    """Host memory to fill and to copy to the device from, of huge pages where the system has some.

    It is pinned after it was filled for the first time: the threads that fill it fault its pages in, side by side, and
    the driver finds them there. What `cuMemHostAlloc` gives is faulted in and pinned by small pages, which takes half a
    second a gigabyte, and two threads that ask for it wait for each other.

    Attributes:
        array: the bytes, one dimension, writable; empty after `close`.

    """

    array: NDArray[np.uint8] = field(repr=False)
    _device: Device = field(repr=False)
    _registered: RegisteredHost | None = field(default=None, init=False, repr=False)

    @classmethod
    def of(cls, device: Device, nbytes: int) -> StagingBuffer:
        """At least `nbytes` bytes, for a device that can register host memory.

        Raises:
            DoesNotFitError: when they are not there.

        """
        nbytes = -(-nbytes // PAGESIZE) * PAGESIZE
        try:
            memory = mmap(-1, nbytes + _HUGE_PAGE, flags=MAP_PRIVATE | MAP_ANONYMOUS)  # shared, it has no huge pages
        except OSError as error:
            raise DoesNotFitError(f"{nbytes:,} bytes of host memory are not there: {error}") from error
        with suppress(OSError):  # a kernel without huge pages
            memory.madvise(MADV_HUGEPAGE)
        whole = np.frombuffer(memory, np.uint8)
        start = -whole.ctypes.data % _HUGE_PAGE
        return cls(whole[start : start + nbytes], device)

    def holds(self, address: int) -> bool:
        """Whether the byte at `address` is one of it."""
        start: int = self.array.ctypes.data
        return start <= address < start + self.array.nbytes

    @property
    def pinned(self) -> bool:
        """Whether the driver has it."""
        return self._registered is not None

    def pin(self) -> None:
        """Pin it, once.

        Raises:
            DoesNotFitError: when it cannot be.

        """
        nbytes = self.array.nbytes
        try:
            self._registered = self._device.register_host(self.array.ctypes.data, nbytes)
        except CudaError as error:
            raise DoesNotFitError(f"{nbytes:,} bytes of pinned host memory are not there: {error}") from error

    def close(self) -> None:
        """Give the memory back; calling twice is fine."""
        if self._registered is not None:
            self._registered.close()
        self.array = self.array[:0].copy()


@define(eq=False)
class StagingPool:
    """Buffers that a thread pins one after the other, until there are enough or nobody wants them any more.

    Sixteen megabytes take three milliseconds, in which an upload would wait: so this begins while kernels are compiled.
    """

    _device: Device
    _nbytes: int
    _ready: deque[StagingBuffer] = field(factory=deque, init=False)
    _closed: Event = field(factory=Event, init=False)
    _thread: Thread = field(init=False)

    @classmethod
    def begin(cls, device: Device, nbytes: int, count: int) -> StagingPool:
        """Begin to make `count` buffers of `nbytes` bytes ready."""
        pool = cls(device, nbytes)
        pool._thread = Thread(target=pool._fill, args=(count,), name="mortice-staging")
        pool._thread.start()
        return pool

    def _fill(self, count: int) -> None:
        with suppress(DoesNotFitError):  # an upload that needs pinned memory asks for it itself, and is told
            for _ in range(count):
                if self._closed.is_set():
                    return
                buffer = StagingBuffer.of(self._device, self._nbytes)
                buffer.array[::PAGESIZE] = 0
                buffer.pin()
                self._ready.append(buffer)

    def take(self, nbytes: int) -> StagingBuffer | None:
        """A buffer of at least `nbytes` bytes that is ready; the caller closes it."""
        if nbytes > self._nbytes:
            return None
        with suppress(IndexError):
            return self._ready.popleft()
        return None

    def close(self) -> None:
        """Give back what nobody took; calling twice is fine."""
        self._closed.set()
        self._thread.join()
        while (buffer := self.take(0)) is not None:
            buffer.close()
