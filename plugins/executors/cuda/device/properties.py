"""What a CUDA device is, as its driver tells."""

from __future__ import annotations

import uuid

from attrs import frozen

from mortice.plugins.executors.cuda.device.driver import Driver, load_driver

__all__ = ["CudaProperties", "list_devices", "read_properties"]


@frozen(kw_only=True)
class CudaProperties:
    """What a device is, whatever runs on it.

    Attributes:
        index: ordinal among the visible devices.
        name: for instance ``NVIDIA H100 80GB HBM3``.
        uuid: of the card.
        compute_capability: (major, minor).
        total_bytes: device memory.
        sm_count: multiprocessors.
        l2_bytes: L2 cache.
        max_persisting_l2_bytes: of it, what can be set aside for chosen data.
        shared_bytes_per_block: the most a block can ask for.
        shared_bytes_per_sm: shared memory of a multiprocessor.
        registers_per_sm: 32-bit registers.
        max_threads_per_sm: threads.
        max_blocks_per_sm: blocks.
        clock_hz: peak clock of the multiprocessors.
        memory_clock_hz: peak clock of the memory.
        memory_bus_bits: width of its bus.
        copy_engines: copies that overlap with kernels and each other.
        cooperative_launch: whether all blocks of a grid can wait for each other.
        host_register: whether host memory of others can be pinned.
        read_only_host_register: whether read-only host memory, such as a mapped file, can be.
        pageable_memory_access: whether kernels can read any host memory.
        integrated: whether device and host share one memory.
        driver_version: the newest CUDA version the driver runs, (major, minor).

    """

    index: int
    name: str
    uuid: str
    compute_capability: tuple[int, int]
    total_bytes: int
    sm_count: int
    l2_bytes: int
    max_persisting_l2_bytes: int
    shared_bytes_per_block: int
    shared_bytes_per_sm: int
    registers_per_sm: int
    max_threads_per_sm: int
    max_blocks_per_sm: int
    clock_hz: int
    memory_clock_hz: int
    memory_bus_bits: int
    copy_engines: int
    cooperative_launch: bool
    host_register: bool
    read_only_host_register: bool
    pageable_memory_access: bool
    integrated: bool
    driver_version: tuple[int, int]

    @property
    def memory_bandwidth(self) -> float:
        """Peak bytes/s by clock and bus width (two transfers a clock); 0 where the driver does not tell."""
        return 2.0 * self.memory_clock_hz * self.memory_bus_bits / 8


def list_devices() -> tuple[CudaProperties, ...]:
    """The visible devices. Makes no context and takes no device memory.

    Raises:
        DeviceError: when cuda-python, the driver or every device is missing.

    """
    driver = load_driver()
    return tuple(read_properties(driver, index) for index in range(driver("cuDeviceGetCount")))


def read_properties(driver: Driver, index: int) -> CudaProperties:
    """Ask the driver what a device is; it must exist."""
    ordinal = driver("cuDeviceGet", index)
    kinds = driver.api.CUdevice_attribute

    def get(name: str) -> int:
        return int(driver("cuDeviceGetAttribute", getattr(kinds, f"CU_DEVICE_ATTRIBUTE_{name}"), ordinal))

    return CudaProperties(
        index=index,
        name=driver("cuDeviceGetName", 256, ordinal).split(b"\0")[0].decode(),
        uuid=str(uuid.UUID(bytes=bytes(driver("cuDeviceGetUuid", ordinal).bytes))),
        compute_capability=(get("COMPUTE_CAPABILITY_MAJOR"), get("COMPUTE_CAPABILITY_MINOR")),
        total_bytes=int(driver("cuDeviceTotalMem", ordinal)),
        sm_count=get("MULTIPROCESSOR_COUNT"),
        l2_bytes=get("L2_CACHE_SIZE"),
        max_persisting_l2_bytes=get("MAX_PERSISTING_L2_CACHE_SIZE"),
        shared_bytes_per_block=get("MAX_SHARED_MEMORY_PER_BLOCK_OPTIN"),
        shared_bytes_per_sm=get("MAX_SHARED_MEMORY_PER_MULTIPROCESSOR"),
        registers_per_sm=get("MAX_REGISTERS_PER_MULTIPROCESSOR"),
        max_threads_per_sm=get("MAX_THREADS_PER_MULTIPROCESSOR"),
        max_blocks_per_sm=get("MAX_BLOCKS_PER_MULTIPROCESSOR"),
        clock_hz=get("CLOCK_RATE") * 1000,
        memory_clock_hz=get("MEMORY_CLOCK_RATE") * 1000,
        memory_bus_bits=get("GLOBAL_MEMORY_BUS_WIDTH"),
        copy_engines=get("ASYNC_ENGINE_COUNT"),
        cooperative_launch=bool(get("COOPERATIVE_LAUNCH")),
        host_register=bool(get("HOST_REGISTER_SUPPORTED")),
        read_only_host_register=bool(get("READ_ONLY_HOST_REGISTER_SUPPORTED")),
        pageable_memory_access=bool(get("PAGEABLE_MEMORY_ACCESS")),
        integrated=bool(get("INTEGRATED")),
        driver_version=driver.version,
    )
