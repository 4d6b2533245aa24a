"""Compiled code on a device: modules, kernels and prepared launches."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from attrs import define, field

from mortice.plugins.executors.cuda.device.driver import Driver, result_error
from mortice.plugins.executors.cuda.device.stream import Stream

__all__ = ["Argument", "Extent", "Float", "Function", "Int", "Launch", "Module", "Pointer"]

Pointer = ctypes.c_uint64
Int = ctypes.c_int32
Float = ctypes.c_float

Extent = int | tuple[int, int, int]
"""A grid, block or cluster: (x, y, z), or x alone."""

_SHARED_WITHOUT_ASKING = 48 * 1024
"""Shared memory a kernel gets without raising a limit, what it declares itself included (CUDA C++ Programming Guide,
"Shared Memory")."""
_PARAMETER_INFO_SINCE = (12, 4)
_CARVEOUT_OF_LAUNCH_SINCE = (12, 8)
"""From this driver on a launch says itself how shared memory and the L1 cache are divided, before only its kernel."""


Argument = Any
"""A ctypes value (whose type gives the width: `Pointer`, `Int`, a Structure …) or something with an ``address``."""


@define(eq=False)
class Module:
    """A cubin on the device. Made by `Device.load`."""

    _driver: Driver = field(repr=False)
    cu: Any = field(repr=False)

    def function(self, name: str) -> Function:
        """The kernel of that name (``extern "C"``)."""
        return Function(self._driver, self._driver("cuModuleGetFunction", self.cu, name.encode()), name)

    def symbol(self, name: str) -> tuple[int, int]:
        """Address and bytes of a global or constant variable (``extern "C"``)."""
        address, nbytes = self._driver("cuModuleGetGlobal", self.cu, name.encode())
        return int(address), int(nbytes)

    def close(self) -> None:
        """Unload it; calling twice is fine."""
        if self.cu is not None:
            module, self.cu = self.cu, None
            self._driver("cuModuleUnload", module)


@define(eq=False)
class Function:
    """A kernel.

    Attributes:
        name: its name in the module.

    """

    _driver: Driver = field(repr=False)
    cu: Any = field(repr=False)
    name: str
    _dynamic_shared: int | None = field(default=None, init=False, repr=False)
    _parameter_sizes: list[int] | None = field(default=None, init=False, repr=False)

    def attribute(self, name: str) -> int:
        """A function attribute, for instance ``NUM_REGS``, ``LOCAL_SIZE_BYTES``, ``MAX_THREADS_PER_BLOCK``."""
        return int(self._driver("cuFuncGetAttribute", self._attribute(name), self.cu))

    def _attribute(self, name: str) -> Any:
        return getattr(self._driver.api.CUfunction_attribute, f"CU_FUNC_ATTRIBUTE_{name}")

    def set_dynamic_shared(self, nbytes: int) -> None:
        """Allow launches with this much dynamic shared memory; `prepare` does it where needed."""
        if self._dynamic_shared is None:
            self._dynamic_shared = _SHARED_WITHOUT_ASKING - self.attribute("SHARED_SIZE_BYTES")
        if nbytes > self._dynamic_shared:
            self._driver("cuFuncSetAttribute", self.cu, self._attribute("MAX_DYNAMIC_SHARED_SIZE_BYTES"), nbytes)
            self._dynamic_shared = nbytes

    def blocks_per_sm(self, threads: int, dynamic_shared: int = 0) -> int:
        """How many blocks of `threads` threads one multiprocessor holds at a time."""
        self.set_dynamic_shared(dynamic_shared)
        return int(self._driver("cuOccupancyMaxActiveBlocksPerMultiprocessor", self.cu, threads, dynamic_shared))

    def prepare(
        self,
        grid: Extent,
        block: Extent,
        args: Sequence[Argument],
        *,
        dynamic_shared: int = 0,
        pdl: bool = False,
        cooperative: bool = False,
        cluster: Extent | None = None,
        carveout: int | None = None,
    ) -> Launch:
        """A launch with everything laid out once; calling it costs about a microsecond.

        Args:
            grid: blocks.
            block: threads.
            args: one for each kernel parameter.
            dynamic_shared: bytes.
            pdl: programmatic dependent launch: the kernel may start before the one queued before it has ended, and
                waits itself (``griddepcontrol.wait``).
            cooperative: all blocks run at once, so that they may wait for each other.
            cluster: blocks of a cluster.
            carveout: percent of a multiprocessor's memory that is wanted as shared memory rather than as L1 cache, if
                the kernel needs no more; None leaves it to the driver. A multiprocessor changes that only when it is
                idle, so launches whose blocks are to be there together have to agree.

        Raises:
            TypeError: arguments whose number or sizes are not the kernel's, or whose width is not known.
            CudaError: more shared memory than the device has.

        """
        values = tuple(_as_ctypes(self.name, number, arg) for number, arg in enumerate(args))
        self._check_sizes(values)
        self.set_dynamic_shared(dynamic_shared)
        if carveout is not None and self._driver.version < _CARVEOUT_OF_LAUNCH_SINCE:
            self._driver("cuFuncSetAttribute", self.cu, self._attribute("PREFERRED_SHARED_MEMORY_CARVEOUT"), carveout)
            carveout = None
        api = self._driver.api
        config = api.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = _extent(grid)
        config.blockDimX, config.blockDimY, config.blockDimZ = _extent(block)
        config.sharedMemBytes = dynamic_shared
        attributes = _launch_attributes(api, pdl=pdl, cooperative=cooperative, cluster=cluster, carveout=carveout)
        config.attrs, config.numAttrs = attributes, len(attributes)
        return Launch(self.name, api, self.cu, config, values)

    def _check_sizes(self, values: Sequence[Any]) -> None:
        if self._driver.version < _PARAMETER_INFO_SINCE:
            return
        if self._parameter_sizes is None:
            self._parameter_sizes = self._ask_sizes()
        given = [ctypes.sizeof(value) for value in values]
        if given != self._parameter_sizes:
            raise TypeError(
                f"{self.name}: arguments of {given} bytes given, the kernel's parameters have {self._parameter_sizes}"
            )

    def _ask_sizes(self) -> list[int]:
        get = self._driver.api.cuFuncGetParamInfo
        sizes: list[int] = []
        while not (info := get(self.cu, len(sizes)))[0]:
            sizes.append(int(info[2]))
        if info[0] != self._driver.api.CUresult.CUDA_ERROR_INVALID_VALUE:  # which says: no parameter of this index
            raise result_error(self._driver.api, "cuFuncGetParamInfo", info[0])
        return sizes


@define(eq=False)
class Launch:
    """A kernel with its shape and arguments, ready to be queued. Not for two threads at once.

    Attributes:
        name: the kernel's.
        config: the ``CUlaunchConfig``.
        args: the ctypes values, read at each launch: change ``.value`` and launch again.

    """

    name: str
    _api: ModuleType = field(repr=False)
    _function: Any = field(repr=False)
    config: Any = field(repr=False)
    args: tuple[Any, ...]
    _pointers: Any = field(init=False, repr=False)
    _pointers_address: int = field(init=False, repr=False)
    _launch: Any = field(init=False, repr=False)
    _stream: Stream | None = field(default=None, init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        self._pointers = (ctypes.c_void_p * max(1, len(self.args)))(*map(ctypes.addressof, self.args))
        self._pointers_address = ctypes.addressof(self._pointers)
        self._launch = self._api.cuLaunchKernelEx

    def __call__(self, stream: Stream) -> None:
        """Queue it."""
        if stream is not self._stream:
            self.config.hStream = stream.cu
            self._stream = stream
        code = self._launch(self.config, self._function, self._pointers_address, 0)[0]
        if code:
            raise result_error(self._api, f"cuLaunchKernelEx of {self.name}", code)

    def resize(self, grid: Extent) -> None:
        """Launch with another grid from now on."""
        self.config.gridDimX, self.config.gridDimY, self.config.gridDimZ = _extent(grid)


def _extent(extent: Extent) -> tuple[int, int, int]:
    return (extent, 1, 1) if isinstance(extent, int) else extent


def _as_ctypes(kernel: str, number: int, arg: Argument) -> Any:
    try:
        ctypes.addressof(arg)
    except TypeError:
        address = getattr(arg, "address", None)
        if isinstance(address, int):
            return Pointer(address)
        raise TypeError(f"{kernel}: argument {number} is {arg!r}; give a ctypes value, whose width is known") from None
    return arg


def _launch_attributes(
    api: Any, *, pdl: bool, cooperative: bool, cluster: Extent | None, carveout: int | None
) -> list[Any]:
    attributes = []

    def add(name: str) -> Any:
        attribute = api.CUlaunchAttribute()
        attribute.id = getattr(api.CUlaunchAttributeID, f"CU_LAUNCH_ATTRIBUTE_{name}")
        attributes.append(attribute)
        return attribute.value

    if pdl:
        add("PROGRAMMATIC_STREAM_SERIALIZATION").programmaticStreamSerializationAllowed = 1
    if cooperative:
        add("COOPERATIVE").cooperative = 1
    if cluster is not None:
        shape = add("CLUSTER_DIMENSION").clusterDim
        shape.x, shape.y, shape.z = _extent(cluster)
    if carveout is not None:
        add("PREFERRED_SHARED_MEMORY_CARVEOUT").sharedMemCarveout = carveout
    return attributes
