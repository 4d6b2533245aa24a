"""The CUDA compiler that is installed (NVRTC) and the headers that belong to it."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from attrs import field, frozen

from mortice.core.errors import DeviceError
from mortice.plugins.executors.cuda.device.driver import import_bindings
from mortice.plugins.executors.cuda.device.errors import unusable

__all__ = ["Compiler", "arch_for", "check_nvrtc", "find_compiler", "look_for_compiler"]

_VERSION = re.compile(rb"#define\s+CUDART_VERSION\s+(\d+)")
_VERSION_WITHIN = 64 * 1024


@frozen(eq=False, kw_only=True)
class Compiler:
    """NVRTC and its headers.

    Attributes:
        api: the module ``cuda.bindings.nvrtc``.
        version: of NVRTC, (major, minor).
        build: version of the package NVRTC comes from; empty when it comes from elsewhere.
        archs: what it compiles for: 90 is ``sm_90``.
        headers: the folder of ``cuda_fp16.h``.
        header_version: their CUDA version, (major, minor).

    """

    api: ModuleType = field(repr=False)
    version: tuple[int, int]
    build: str
    archs: tuple[int, ...]
    headers: Path
    header_version: tuple[int, int]

    @property
    def identity(self) -> str:
        """What of it changes the code it makes: part of every cache key."""
        return f"nvrtc {_dotted(self.version)} ({self.build}), headers {_dotted(self.header_version)}"

    @property
    def notes(self) -> tuple[str, ...]:
        """What a person should know about this pair."""
        if self.header_version == self.version:
            return ()
        return (
            f"NVRTC {_dotted(self.version)} compiles with CUDA headers {_dotted(self.header_version)} ({self.headers})",
        )

    def arch_for(self, compute_capability: tuple[int, int]) -> str:
        """The newest architecture it knows whose code a device runs, for instance ``sm_90``.

        Code for X.y runs on devices X.z with z >= y, and on no other major version (CUDA C++ Programming Guide,
        "Binary Compatibility").

        Raises:
            DeviceError: when it knows none.

        """
        major, minor = compute_capability
        fitting = [arch for arch in self.archs if arch // 10 == major and arch % 10 <= minor]
        if not fitting:
            raise unusable(
                f"NVRTC {_dotted(self.version)} cannot compile for compute capability {major}.{minor}: "
                f"install a newer {_packages(self.version[0])[0]}"
            )
        return f"sm_{max(fitting)}"


def arch_for(compute_capability: tuple[int, int]) -> str:
    """`Compiler.arch_for` of the installed NVRTC."""
    return find_compiler().arch_for(compute_capability)


@cache
def find_compiler() -> Compiler:
    """The installed NVRTC and the headers that fit it best, looked for once. Needs no driver and no GPU.

    Raises:
        DeviceError: as `look_for_compiler` does.

    """
    return look_for_compiler(os.environ)


def look_for_compiler(environ: Mapping[str, str]) -> Compiler:
    """`find_compiler` where the environment is this.

    Headers are looked for in the installed ``nvidia`` packages, in ``$CUDA_PATH`` and ``$CUDA_HOME``, beside a conda
    Python and in ``/usr/local/cuda``. The first of NVRTC's own version is taken, else the first of its major version.

    Raises:
        DeviceError: naming what to install, when cuda-python, NVRTC or the headers are missing.

    """
    api = import_bindings("nvrtc")
    try:
        major, minor = check_nvrtc(api, "nvrtcVersion", api.nvrtcVersion())
    except RuntimeError as error:  # what cuda.bindings raises when it cannot load the library
        major = int(import_module("cuda.bindings").__version__.split(".")[0])
        raise unusable(
            f"NVRTC {major}, which compiles the kernels, was not found: install mortice[cuda{major}] "
            f"(it brings {_packages(major)[0]})"
        ) from error
    found = [(folder, header_version(folder)) for folder in _header_folders(major, environ)]
    fitting = [(folder, number) for folder, number in found if number is not None and number[0] == major]
    fitting.sort(key=lambda pair: pair[1] != (major, minor))  # stable: the order of the search otherwise
    if not fitting:
        others = ", ".join(f"{folder} ({_dotted(number)})" for folder, number in found if number is not None)
        raise unusable(
            f"the CUDA headers of NVRTC {major}.{minor} (cuda_fp16.h) were not found: "
            f"install {_packages(major)[1]}=={major}.{minor}.*" + (f"; other versions: {others}" if others else "")
        )
    return Compiler(
        api=api,
        version=(major, minor),
        build=_build(major),
        archs=tuple(check_nvrtc(api, "nvrtcGetSupportedArchs", api.nvrtcGetSupportedArchs())),
        headers=fitting[0][0],
        header_version=fitting[0][1],
    )


def check_nvrtc(api: ModuleType, call: str, result: tuple[Any, ...]) -> Any:
    """What an NVRTC function returned besides its code.

    Raises:
        DeviceError: when the code is not 0.

    """
    if result[0]:
        text = api.nvrtcGetErrorString(result[0])[1].decode()
        raise DeviceError(f"{call}: {text}")
    if len(result) == 1:
        return None
    return result[1] if len(result) == 2 else tuple(result[1:])


def header_version(folder: Path) -> tuple[int, int] | None:
    """The CUDA version of a folder of headers; None when it does not hold them."""
    try:
        with (folder / "cuda_runtime_api.h").open("rb") as file:
            found = _VERSION.search(file.read(_VERSION_WITHIN))
    except OSError:
        return None
    if found is None or not (folder / "cuda_fp16.h").is_file():
        return None
    number = int(found[1])
    return number // 1000, number % 1000 // 10


def _header_folders(major: int, environ: Mapping[str, str]) -> Iterator[Path]:
    spec = find_spec("nvidia")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        yield Path(place) / f"cu{major}" / "include"  # packages of CUDA 13 and later
        yield Path(place) / "cuda_runtime" / "include"  # of CUDA 12
    for key in ("CUDA_PATH", "CUDA_HOME"):
        if environ.get(key):
            yield Path(environ[key]) / "include"
    yield Path(sys.prefix) / "targets" / "x86_64-linux" / "include"  # conda
    yield Path("/usr/local/cuda/include")


def _packages(major: int) -> tuple[str, str]:
    """The packages of NVRTC and of the headers."""
    suffix = "" if major >= 13 else f"-cu{major}"
    return f"nvidia-cuda-nvrtc{suffix}", f"nvidia-cuda-runtime{suffix}"


def _build(major: int) -> str:
    try:
        return version(_packages(major)[0])
    except PackageNotFoundError:
        return ""


def _dotted(number: tuple[int, int]) -> str:
    return f"{number[0]}.{number[1]}"
