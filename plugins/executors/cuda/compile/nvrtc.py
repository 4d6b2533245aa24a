"""Compiles CUDA C++ to cubin with NVRTC, and tells what each kernel costs. Needs no driver and no GPU."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from attrs import field, frozen

from mortice.plugins.executors.cuda.device.errors import CompileError
from mortice.plugins.executors.cuda.device.toolkit import Compiler, arch_for, check_nvrtc, find_compiler

__all__ = ["Compiled", "KernelResources", "Source", "arch_for", "compile_cubin"]

Define = str | int | float
Defines = tuple[tuple[str, Define], ...]

_ARCH = re.compile(r"sm_\d+[af]?")
_IDENTIFIER = re.compile(r"[A-Za-z_]\w*")
_FRONT_END = re.compile(r"(.+)\((\d+)\): (?:catastrophic )?(error|warning)(?: #[^:]+)?: (.*)")
_ASSEMBLER = re.compile(r"ptxas.*\b(error|warning|fatal)\b.*", re.IGNORECASE)
_LINES_SHOWN = 12

_ENTRY = re.compile(r"Compiling entry function '([^']+)'")
_PROPERTIES = re.compile(r"Function properties for (\S+)")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers(?:, used (\d+) barriers)?(.*)")
_SHARED = re.compile(r"(\d+)(?:\+\d+)? bytes smem")


def _sorted_defines(given: Mapping[str, Define] | Defines) -> Defines:
    items = tuple(sorted(dict(given).items()))
    for name, value in items:
        if not _IDENTIFIER.fullmatch(name) or "\n" in str(value):
            raise CompileError(f"-D{name}={value}: not a name and a value of one line")
    return items


def _tuple(given: Iterable[str]) -> tuple[str, ...]:
    return tuple(given)


@frozen(kw_only=True)
class Source:
    """One thing to compile. Equal sources make equal code, so that it can be a key.

    Attributes:
        name: what the compiler calls it, for instance ``ops/gemv.cu``.
        text: flattened CUDA C++.
        defines: preprocessor macros, sorted; given as a mapping. True is 1.
        options: further options of NVRTC, for instance ``-lineinfo`` or ``-use_fast_math``.

    """

    name: str
    text: str = field(repr=False)
    defines: Defines = field(default=(), converter=_sorted_defines)
    options: tuple[str, ...] = field(default=(), converter=_tuple)

    @property
    def flags(self) -> tuple[str, ...]:
        """Macros and options as the compiler is given them."""
        defines = (f"-D{name}={int(value) if isinstance(value, bool) else value}" for name, value in self.defines)
        return (*defines, *self.options)

    def __str__(self) -> str:
        return " ".join((self.name, *self.flags))


@frozen(kw_only=True)
class KernelResources:
    """What one compiled function uses, as the assembler (ptxas) reports it.

    Attributes:
        registers: for each thread; 0 for a function that is no kernel.
        stack_bytes: local memory of a thread: arrays indexed at run time, and spilled registers.
        spill_store_bytes: written to local memory for want of registers.
        spill_load_bytes: read back.
        shared_bytes: static shared memory of a block.
        barriers: named barriers of a block.

    """

    registers: int = 0
    stack_bytes: int = 0
    spill_store_bytes: int = 0
    spill_load_bytes: int = 0
    shared_bytes: int = 0
    barriers: int = 0

    @property
    def uses_local_memory(self) -> bool:
        """Whether threads touch local memory, which a hot kernel should not."""
        return bool(self.stack_bytes or self.spill_store_bytes or self.spill_load_bytes)


def _read_only(given: Mapping[str, KernelResources]) -> Mapping[str, KernelResources]:
    return MappingProxyType(dict(given))


@frozen(kw_only=True)
class Compiled:
    """Machine code.

    Attributes:
        cubin: an ELF image for one architecture.
        functions: what each kernel uses, and each device function that was not inlined, by name in the cubin.
        warnings: of compiler and assembler, one line each.

    """

    cubin: bytes = field(repr=False)
    functions: Mapping[str, KernelResources] = field(converter=_read_only)
    warnings: tuple[str, ...] = ()

    @property
    def spills(self) -> tuple[str, ...]:
        """Functions that use local memory, with how much, one line each."""
        return tuple(
            f"{name}: {used.stack_bytes} bytes of stack, {used.spill_store_bytes} stored and "
            f"{used.spill_load_bytes} loaded in spills"
            for name, used in self.functions.items()
            if used.uses_local_memory
        )


def compile_cubin(source: Source, arch: str, compiler: Compiler | None = None) -> Compiled:
    """Compile for one architecture.

    Headers that can be included with angles are those of the CUDA runtime's package: ``cuda_fp16.h``,
    ``cuda_bf16.h``, ``cuda_fp8.h`` and their like, but none of ``mma.h``, ``cooperative_groups.h``, ``cuda/…``.

    Args:
        source: what.
        arch: a real architecture, for instance ``sm_90`` or ``sm_90a``.
        compiler: from `find_compiler`; found when not given.

    Raises:
        CompileError: what the compiler says, each line with file and line.
        DeviceError: when cuda-python, NVRTC or its headers are missing.

    """
    compiler = compiler or find_compiler()
    if not _ARCH.fullmatch(arch):
        raise CompileError(f"{source.name}: architecture {arch!r} is not one such as sm_90")
    options = [option.encode() for option in compile_options(source, arch, compiler)]
    api = compiler.api
    made = api.nvrtcCreateProgram(source.text.encode(), source.name.encode(), 0, None, None)
    program = check_nvrtc(api, "nvrtcCreateProgram", made)
    try:
        code = api.nvrtcCompileProgram(program, len(options), options)[0]
        log = _text(api, "nvrtcGetProgramLog", program)
        if code:
            reason = api.nvrtcGetErrorString(code)[1].decode()
            raise CompileError(_refusal(source, arch, compiler, log, reason))
        cubin = _bytes(api, "nvrtcGetCUBIN", program)
    finally:
        api.nvrtcDestroyProgram(program)
    return Compiled(cubin=cubin, functions=read_resources(log), warnings=_warnings(log))


def compile_options(source: Source, arch: str, compiler: Compiler) -> tuple[str, ...]:
    """All options of a compilation. Only the include folder depends on the machine."""
    return (
        f"-arch={arch}",
        "--std=c++17",
        "-default-device",
        "-Xptxas",
        "-v",  # the log then holds what each function uses
        f"-I{compiler.headers}",
        *source.flags,
    )


def read_resources(log: str) -> dict[str, KernelResources]:
    """What ``ptxas -v`` reports of each function, by name."""
    found: dict[str, dict[str, int]] = {}
    kernel = function = ""
    for line in log.splitlines():
        if entry := _ENTRY.search(line):
            kernel = entry[1]
        elif properties := _PROPERTIES.search(line):
            function = properties[1]
        elif stack := _STACK.search(line):
            keys = ("stack_bytes", "spill_store_bytes", "spill_load_bytes")
            found.setdefault(function, {}).update(zip(keys, map(int, stack.groups()), strict=True))
        elif used := _USED.search(line):
            shared = _SHARED.search(used[3])
            counts = {"registers": used[1], "barriers": used[2] or 0, "shared_bytes": shared[1] if shared else 0}
            found.setdefault(kernel, {}).update({key: int(count) for key, count in counts.items()})
    return {name: KernelResources(**used) for name, used in found.items()}


def _refusal(source: Source, arch: str, compiler: Compiler, log: str, reason: str) -> str:
    """What the compiler objects to, without the source lines it quotes."""
    version = ".".join(map(str, compiler.version))
    lines = _messages(log, {"error", "fatal"})
    more = [f"… and {len(lines) - _LINES_SHOWN} more"] if len(lines) > _LINES_SHOWN else []
    shown = [*lines[:_LINES_SHOWN], *more] or [log.strip() or reason]
    return "\n".join([f"NVRTC {version} refuses {source} for {arch}:", *shown])


def _warnings(log: str) -> tuple[str, ...]:
    return tuple(_messages(log, {"warning"}))


def _messages(log: str, kinds: set[str]) -> list[str]:
    messages = []
    for line in log.splitlines():
        front_end, assembler = _FRONT_END.match(line), _ASSEMBLER.match(line)
        if front_end and front_end[3] in kinds:
            messages.append(f"{front_end[1]}:{front_end[2]}: {front_end[4]}")
        elif assembler and assembler[1].lower() in kinds:
            messages.append(line.strip())
    return list(dict.fromkeys(messages))


def _text(api: Any, call: str, program: Any) -> str:
    return _bytes(api, call, program).rstrip(b"\0").decode(errors="replace")


def _bytes(api: Any, call: str, program: Any) -> bytes:
    """What ``nvrtcGetX`` copies out; ``nvrtcGetXSize`` tells how long it is."""
    size = check_nvrtc(api, f"{call}Size", getattr(api, f"{call}Size")(program))
    buffer = bytearray(size)
    check_nvrtc(api, call, getattr(api, call)(program, buffer))
    return bytes(buffer)
