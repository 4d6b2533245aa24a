"""Streams, events and graphs.

Copies belong to a stream, always: the null stream is never used, so that nothing runs out of order with the kernels.
Streams do not wait for the null stream either.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from attrs import define, field
from numpy.typing import NDArray

from mortice.plugins.executors.cuda.device.driver import Driver, result_error
from mortice.plugins.executors.cuda.device.errors import CudaError

__all__ = ["Event", "Graph", "GraphExec", "Stream"]

_NOT_READY = 600


@define(eq=False)
class Event:
    """A point in a stream. Made by `Device.new_event`."""

    _driver: Driver = field(repr=False)
    cu: Any = field(repr=False)
    _record: Any = field(init=False, repr=False)
    _synchronize: Any = field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        self._record, self._synchronize = self._driver.api.cuEventRecord, self._driver.api.cuEventSynchronize

    def record(self, stream: Stream) -> None:
        """Put this point at the stream's end, as it is now."""
        code = self._record(self.cu, stream.cu)[0]
        if code:
            raise result_error(self._driver.api, "cuEventRecord", code)

    def synchronize(self) -> None:
        """Wait until the device has passed it."""
        code = self._synchronize(self.cu)[0]
        if code:
            raise result_error(self._driver.api, "cuEventSynchronize", code)

    @property
    def done(self) -> bool:
        """Whether the device has passed it."""
        return _ready(self._driver, "cuEventQuery", self.cu)

    def milliseconds_since(self, start: Event) -> float:
        """Time on the device from `start`, in ms; both events were made with ``timing=True`` and are done."""
        return float(self._driver("cuEventElapsedTime", start.cu, self.cu))

    def close(self) -> None:
        """Destroy it; calling twice is fine."""
        if self.cu is not None:
            event, self.cu = self.cu, None
            self._driver("cuEventDestroy", event)


@define(eq=False)
class Stream:
    """A queue of work, which the device does in order. Made by `Device.new_stream`.

    Attributes:
        cu: the ``CUstream``.

    """

    _driver: Driver = field(repr=False)
    cu: Any = field(repr=False)

    @property
    def handle(self) -> int:
        """The stream as a number, for other libraries (CuPy's ``ExternalStream``, cuBLAS)."""
        return int(self.cu)

    def write(self, destination: int, array: NDArray[Any]) -> None:
        """Copy a C-contiguous array to the device; the array may be changed afterwards."""
        _contiguous(array)
        self.copy_from_host(destination, array.ctypes.data, array.nbytes)
        self.synchronize()

    def read(self, array: NDArray[Any], source: int) -> None:
        """Fill a C-contiguous, writable array from the device, when all work before it is done."""
        _contiguous(array)
        if not array.flags.writeable:
            raise ValueError("read: the array is not writable")
        self.copy_to_host(array.ctypes.data, source, array.nbytes)
        self.synchronize()

    def copy_from_host(self, destination: int, host_address: int, nbytes: int) -> None:
        """Queue a copy to the device. It overlaps other work only from pinned memory, which must last until it is done.

        From pageable memory the call returns once the bytes are staged.
        """
        if nbytes:
            self._driver("cuMemcpyHtoDAsync", destination, host_address, nbytes, self.cu)

    def copy_to_host(self, host_address: int, source: int, nbytes: int) -> None:
        """Queue a copy from the device."""
        if nbytes:
            self._driver("cuMemcpyDtoHAsync", host_address, source, nbytes, self.cu)

    def copy(self, destination: int, source: int, nbytes: int) -> None:
        """Queue a copy within the device."""
        if nbytes:
            self._driver("cuMemcpyDtoDAsync", destination, source, nbytes, self.cu)

    def fill(self, destination: int, byte: int, nbytes: int) -> None:
        """Queue setting `nbytes` bytes to `byte`."""
        if nbytes:
            self._driver("cuMemsetD8Async", destination, byte, nbytes, self.cu)

    def fill32(self, destination: int, value: int, count: int) -> None:
        """Queue setting `count` 32-bit words to `value`; the destination is aligned to 4 bytes."""
        if count:
            self._driver("cuMemsetD32Async", destination, value & 0xFFFFFFFF, count, self.cu)

    def record(self, event: Event) -> None:
        """Put an event at this stream's end."""
        event.record(self)

    def wait(self, event: Event) -> None:
        """What is queued from now on waits for the event."""
        self._driver("cuStreamWaitEvent", self.cu, event.cu, 0)

    def synchronize(self) -> None:
        """Wait until all that is queued is done. Errors of kernels show here."""
        self._driver("cuStreamSynchronize", self.cu)

    @property
    def idle(self) -> bool:
        """Whether all that was queued is done."""
        return _ready(self._driver, "cuStreamQuery", self.cu)

    @contextmanager
    def capture(self) -> Iterator[Graph]:
        """Record what is queued on this stream into a graph instead of running it.

        ``with stream.capture() as graph: …``; the graph is usable after the block. Calls that capture forbids
        (allocation, loading code, synchronising) fail in this thread only. An exception in the block ends the capture
        and passes on.
        """
        mode = self._driver.api.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        graph = Graph(self._driver, None)
        self._driver("cuStreamBeginCapture", self.cu, mode)
        try:
            yield graph
        except BaseException:
            ended = self._driver.api.cuStreamEndCapture(self.cu)
            if not ended[0] and ended[1]:
                self._driver("cuGraphDestroy", ended[1])
            raise
        graph.cu = self._driver("cuStreamEndCapture", self.cu)

    def close(self) -> None:
        """Destroy it once its work is done; calling twice is fine."""
        if self.cu is not None:
            stream, self.cu = self.cu, None
            self._driver("cuStreamDestroy", stream)


@define(eq=False)
class Graph:
    """What a capture recorded."""

    _driver: Driver = field(repr=False)
    cu: Any = field(repr=False)

    @property
    def node_count(self) -> int:
        """Kernels, copies and other nodes in it."""
        return int(self._driver("cuGraphGetNodes", self.cu)[-1])

    def instantiate(self) -> GraphExec:
        """Make it ready to launch. The graph itself may be closed afterwards."""
        return GraphExec(self._driver, self._driver("cuGraphInstantiate", self.cu, 0))

    def close(self) -> None:
        """Destroy it; calling twice is fine."""
        if self.cu is not None:
            graph, self.cu = self.cu, None
            self._driver("cuGraphDestroy", graph)


@define(eq=False)
class GraphExec:
    """A graph ready to launch."""

    _driver: Driver = field(repr=False)
    cu: Any = field(repr=False)
    _launch: Any = field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        self._launch = self._driver.api.cuGraphLaunch

    def launch(self, stream: Stream) -> None:
        """Queue one run of the whole graph."""
        code = self._launch(self.cu, stream.cu)[0]
        if code:
            raise result_error(self._driver.api, "cuGraphLaunch", code)

    def upload(self, stream: Stream) -> None:
        """Bring it to the device ahead of its first launch, which is then as fast as the next."""
        self._driver("cuGraphUpload", self.cu, stream.cu)

    def update(self, graph: Graph) -> bool:
        """Take over the parameters of a graph of the same shape; False, and nothing changed, when the shape differs."""
        code = self._driver.api.cuGraphExecUpdate(self.cu, graph.cu)[0]
        if code == self._driver.api.CUresult.CUDA_ERROR_GRAPH_EXEC_UPDATE_FAILURE:
            return False
        if code:
            raise result_error(self._driver.api, "cuGraphExecUpdate", code)
        return True

    def close(self) -> None:
        """Destroy it; calling twice is fine."""
        if self.cu is not None:
            executable, self.cu = self.cu, None
            self._driver("cuGraphExecDestroy", executable)


def _ready(driver: Driver, call: str, handle: Any) -> bool:
    try:
        driver(call, handle)
    except CudaError as error:
        if error.code == _NOT_READY:
            return False
        raise
    return True


def _contiguous(array: NDArray[Any]) -> None:
    if not array.flags.c_contiguous:
        raise ValueError(f"the array of shape {array.shape} is not C-contiguous")
