"""Compiles many kernels at once, each only if the cache does not have it."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType

from attrs import field, frozen

from mortice.plugins.executors.cuda.compile.cache import KernelCache, cache_key
from mortice.plugins.executors.cuda.compile.nvrtc import Compiled, Source, compile_cubin
from mortice.plugins.executors.cuda.device.errors import CompileError
from mortice.plugins.executors.cuda.device.toolkit import Compiler, find_compiler

__all__ = ["Build", "compile_all"]


@frozen(kw_only=True)
class Build:
    """What `compile_all` did.

    Attributes:
        kernels: the code of each source.
        compiled: how many were compiled.
        cached: how many the cache had, or who asked.
        seconds: how long it took.
        notes: what a person should know: a cache that cannot be written, headers of another version.

    """

    kernels: Mapping[Source, Compiled] = field(repr=False)
    compiled: int
    cached: int
    seconds: float
    notes: tuple[str, ...] = ()

    def hashes(self) -> dict[str, str]:
        """SHA-256 in hex of the machine code made of each file, all its variants together."""
        variants: dict[str, list[bytes]] = {}
        for source, code in self.kernels.items():
            variants.setdefault(source.name, []).append(hashlib.sha256(code.cubin).digest())
        return {name: hashlib.sha256(b"".join(sorted(found))).hexdigest() for name, found in sorted(variants.items())}


def compile_all(
    sources: Iterable[Source],
    arch: str,
    *,
    cache: KernelCache | None = None,
    known: Mapping[Source, Compiled] = MappingProxyType({}),
    workers: int | None = None,
    compiler: Compiler | None = None,
) -> Build:
    """Compile every source for one architecture; equal ones once.

    Threads do the work: NVRTC compiles different programs at the same time and ``cuda.bindings`` lets go of the
    interpreter lock meanwhile (two threads on two cores were as fast as two processes).

    Args:
        sources: what.
        arch: a real architecture, for instance ``sm_90``.
        cache: where compiled code is kept; nowhere when not given.
        known: code that is there already.
        workers: threads; as many as this process has cores when not given.
        compiler: from `find_compiler`; found when not given.

    Raises:
        CompileError: when sources are refused, with what the compiler says of each.
        DeviceError: when cuda-python, NVRTC or its headers are missing.

    """
    start = time.perf_counter()
    compiler = compiler or find_compiler()
    wanted = {source: cache_key(source, arch, compiler) for source in sources}
    kernels = {source: known[source] for source in wanted if source in known}
    if cache is not None:
        for source, key in wanted.items():
            if source not in kernels and (found := cache.get(key)) is not None:
                kernels[source] = found
    cached = len(kernels)
    missing = sorted(
        (source for source in wanted if source not in kernels),
        key=lambda source: (len(source.text), source.flags),
        reverse=True,  # what takes longest first, so that no thread is left with it at the end
    )
    if missing:

        def compile_one(source: Source) -> Compiled:
            made = compile_cubin(source, arch, compiler)
            if cache is not None:  # at once: what is good stays good when another source is refused
                cache.put(wanted[source], made)
            return made

        kernels.update(_in_threads(compile_one, missing, workers or _cores()))
        if cache is not None:
            cache.trim()
    return Build(
        kernels=kernels,
        compiled=len(missing),
        cached=cached,
        seconds=time.perf_counter() - start,
        notes=(*compiler.notes, *(cache.notes if cache is not None else ())),
    )


def _in_threads(
    compile_one: Callable[[Source], Compiled], sources: list[Source], workers: int
) -> dict[Source, Compiled]:
    with ThreadPoolExecutor(min(workers, len(sources)), thread_name_prefix="mortice-nvrtc") as pool:
        jobs = [pool.submit(compile_one, source) for source in sources]
    refusals = [error for job in jobs if isinstance(error := job.exception(), CompileError)]
    if refusals:
        raise CompileError("\n".join(map(str, refusals)))
    return {source: job.result() for source, job in zip(sources, jobs, strict=True)}


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
