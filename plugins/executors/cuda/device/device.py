"""A CUDA device: its properties, its memory, and what is made on it.

The primary context is used, so that CuPy, cuBLAS and others in the same process see the same memory and streams.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from types import TracebackType
from typing import Any, Self

from attrs import define, field

from mortice.core.errors import DoesNotFitError
from mortice.core.model.types import DeviceInfo
from mortice.plugins.executors.cuda.device.driver import Driver, load_driver, result_error
from mortice.plugins.executors.cuda.device.errors import CudaError, unusable
from mortice.plugins.executors.cuda.device.memory import DeviceBuffer, HostBuffer, RegisteredHost
from mortice.plugins.executors.cuda.device.module import Module
from mortice.plugins.executors.cuda.device.properties import CudaProperties, list_devices, read_properties
from mortice.plugins.executors.cuda.device.stream import Event, Stream
from mortice.plugins.executors.cuda.device.toolkit import arch_for

__all__ = ["OLDEST_COMPUTE_CAPABILITY", "CudaProperties", "Device", "list_devices", "open_device"]

OLDEST_COMPUTE_CAPABILITY = (8, 0)
"""The kernels use asynchronous copies and bfloat16 arithmetic, which begin here."""

_OUT_OF_MEMORY = 2
_HOST_PORTABLE, _HOST_MAPPED, _HOST_WRITE_COMBINED, _REGISTER_READ_ONLY = 1, 2, 4, 8  # cuda.h, CU_MEMHOST*


def open_device(index: int = 0) -> Device:
    """Open a device and make it current on the calling thread.

    Raises:
        DeviceError: when cuda-python or the driver is missing or too old, there is no such device, or mortice has no
            kernels for it.

    """
    driver = load_driver()
    count = driver("cuDeviceGetCount")
    if not 0 <= index < count:
        raise unusable(f"CUDA device {index} does not exist: {count} visible, numbered from 0")
    properties = read_properties(driver, index)
    if properties.compute_capability < OLDEST_COMPUTE_CAPABILITY:
        found, wanted = (
            ".".join(map(str, pair)) for pair in (properties.compute_capability, OLDEST_COMPUTE_CAPABILITY)
        )
        raise unusable(f"{properties.name} has compute capability {found}, mortice needs {wanted} or newer")
    ordinal = driver("cuDeviceGet", index)
    try:
        context = driver("cuDevicePrimaryCtxRetain", ordinal)
    except CudaError as error:
        if error.code == _OUT_OF_MEMORY:
            raise unusable(f"{properties.name} has no memory free for a context: {error}") from error
        raise
    device = Device(driver, properties, ordinal, context)
    device.make_current()
    return device


@define(eq=False)
class Device:
    """An open device. Made by `open_device`; any thread may use it after `make_current`.

    Attributes:
        properties: what it is.
        allocations: calls of `allocate` so far.
        allocated_bytes: device memory that `allocate` gave and that is not yet freed.

    """

    _driver: Driver = field(repr=False)
    properties: CudaProperties
    _ordinal: Any = field(repr=False)
    _context: Any = field(repr=False)
    allocations: int = field(default=0, init=False)
    allocated_bytes: int = field(default=0, init=False)
    _sizes: dict[int, int] = field(factory=dict, init=False, repr=False)
    _held: dict[int, Callable[[], None]] = field(factory=dict, init=False, repr=False)
    _lock: Lock = field(factory=Lock, init=False, repr=False)

    @property
    def index(self) -> int:
        """Ordinal among the visible devices."""
        return self.properties.index

    @property
    def arch(self) -> str:
        """What to compile for, for instance ``sm_90``.

        Raises:
            DeviceError: when NVRTC is missing or too old for this device.

        """
        return arch_for(self.properties.compute_capability)

    def memory(self) -> tuple[int, int]:
        """(free, total) bytes of device memory, whoever uses it."""
        self.make_current()
        free, total = self._driver("cuMemGetInfo")
        return int(free), int(total)

    def info(self) -> DeviceInfo:
        """The description that crosses hooks."""
        free, total = self.memory()
        return DeviceInfo(
            kind="cuda",
            name=self.properties.name,
            index=self.index,
            total_bytes=total,
            free_bytes=free,
            compute_capability=self.properties.compute_capability,
        )

    def make_current(self) -> None:
        """Make its context current on the calling thread.

        Set each time rather than remembered for the thread: other libraries change it too, and setting costs less
        than a microsecond.
        """
        assert self._context is not None, "the device is closed"
        code = self._driver.api.cuCtxSetCurrent(self._context)[0]
        if code:
            raise result_error(self._driver.api, "cuCtxSetCurrent", code)

    def allocate(self, nbytes: int) -> DeviceBuffer:
        """Device memory, at least one byte, not cleared.

        Raises:
            DoesNotFitError: when it is not there, saying needed and free.

        """
        self.make_current()
        try:
            address = int(self._driver("cuMemAlloc", max(1, nbytes)))
        except CudaError as error:
            if error.code != _OUT_OF_MEMORY:
                raise
            raise DoesNotFitError(self._too_much(nbytes)) from error
        with self._lock:
            self.allocations += 1
            self.allocated_bytes += nbytes
            self._sizes[address] = nbytes
        return DeviceBuffer(address=address, nbytes=nbytes, free=self._free)

    def _too_much(self, nbytes: int) -> str:
        free, total = self.memory()
        return (
            f"{self.properties.name}: {nbytes:,} bytes of device memory needed, {free:,} of {total:,} are free "
            "(in one piece perhaps less): choose a shorter context, a smaller KV type or model, "
            'or executor = "reference"'
        )

    def _free(self, address: int) -> None:
        with self._lock:
            nbytes = self._sizes.pop(address, None)
            if nbytes is None:  # the device was closed, which freed it
                return
            self.allocated_bytes -= nbytes
        self.make_current()
        self._driver("cuMemFree", address)

    def allocate_host(self, nbytes: int, *, write_combined: bool = False) -> HostBuffer:
        """Pinned host memory that every device can copy from and to.

        Args:
            nbytes: at least one.
            write_combined: faster to copy from, very slow for the host to read.

        """
        assert nbytes > 0, "pinned memory has at least one byte"
        self.make_current()
        flags = _HOST_PORTABLE | _HOST_MAPPED | (_HOST_WRITE_COMBINED if write_combined else 0)
        try:
            address = int(self._driver("cuMemHostAlloc", nbytes, flags))
        except CudaError as error:
            if error.code != _OUT_OF_MEMORY:
                raise
            raise DoesNotFitError(f"{nbytes:,} bytes of pinned host memory are not there: {error}") from error
        mapped = self._hold(address, lambda: self._driver("cuMemFreeHost", address))
        return HostBuffer(address=address, nbytes=nbytes, device_address=mapped, free=self._let_go)

    def register_host(self, address: int, nbytes: int, *, read_only: bool = False) -> RegisteredHost:
        """Pin memory that is already there, until the result is closed.

        Args:
            address: of the first byte, at the start of a page.
            nbytes: whole pages.
            read_only: the memory cannot be written, as a file mapped for reading
                (see `CudaProperties.read_only_host_register`).

        Raises:
            CudaError: when the driver or the memory's kind does not allow it.

        """
        self.make_current()
        flags = _HOST_PORTABLE | _HOST_MAPPED | (_REGISTER_READ_ONLY if read_only else 0)
        self._driver("cuMemHostRegister", address, nbytes, flags)
        mapped = self._hold(address, lambda: self._driver("cuMemHostUnregister", address))
        return RegisteredHost(address=address, nbytes=nbytes, device_address=mapped, free=self._let_go)

    def _hold(self, address: int, release: Callable[[], None]) -> int:
        """Remember pinned memory; its address for kernels."""
        try:
            mapped = int(self._driver("cuMemHostGetDevicePointer", address, 0))
        except CudaError:
            release()
            raise
        with self._lock:
            self._held[address] = release
        return mapped

    def _let_go(self, address: int) -> None:
        with self._lock:
            release = self._held.pop(address, None)
        if release is not None:
            self.make_current()
            release()

    def new_stream(self, *, priority: int = 0) -> Stream:
        """A stream that does not wait for the null stream; a lower number is more urgent."""
        self.make_current()
        flags = self._driver.api.CUstream_flags.CU_STREAM_NON_BLOCKING
        return Stream(self._driver, self._driver("cuStreamCreateWithPriority", int(flags), priority))

    def new_event(self, *, timing: bool = False, blocking: bool = False) -> Event:
        """An event; those that take no time are cheaper. Waiting for a `blocking` one sleeps instead of spinning."""
        self.make_current()
        kinds = self._driver.api.CUevent_flags
        flags = int(kinds.CU_EVENT_DEFAULT if timing else kinds.CU_EVENT_DISABLE_TIMING)
        if blocking:
            flags |= int(kinds.CU_EVENT_BLOCKING_SYNC)
        return Event(self._driver, self._driver("cuEventCreate", flags))

    def load(self, cubin: bytes) -> Module:
        """Bring compiled code to the device."""
        self.make_current()
        return Module(self._driver, self._driver("cuModuleLoadData", cubin))

    def synchronize(self) -> None:
        """Wait until everything queued in the context is done."""
        self.make_current()
        self._driver("cuCtxSynchronize")

    def close(self) -> None:
        """Free the memory still held and let go of the context; calling twice is fine."""
        if self._context is None:
            return
        try:
            for address in list(self._held):
                self._let_go(address)
            for address in list(self._sizes):
                self._free(address)
        finally:  # after a fault of a kernel nothing can be freed
            self._context = None
            self._driver("cuDevicePrimaryCtxRelease", self._ordinal)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
