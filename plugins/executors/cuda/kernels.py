"""The launches of a program and the compiled code for them: all that can be had before there are weights."""

from __future__ import annotations

from collections.abc import Mapping

from attrs import frozen

from mortice.plugins.executors.cuda.build import Build, compile_all
from mortice.plugins.executors.cuda.cache import KernelCache
from mortice.plugins.executors.cuda.launches import LaunchSpec, Spec
from mortice.plugins.executors.cuda.lowering import Lowering
from mortice.plugins.executors.cuda.matmul import RowPath
from mortice.plugins.executors.cuda.nvrtc import Source

__all__ = ["Kernels", "compile_kernels"]


@frozen(eq=False, kw_only=True)
class Kernels:
    """What a runtime is opened with.

    Attributes:
        lowering: of the program.
        specs: the launches of body and head, by the way a step goes.
        choose: what chooses tokens.
        build: the code of every source.

    """

    lowering: Lowering
    specs: Mapping[RowPath, tuple[list[Spec], list[Spec]]]
    choose: Source
    build: Build

    @property
    def launches(self) -> list[LaunchSpec]:
        """Those of kernels of our own."""
        return _own(self.specs)


def compile_kernels(lowering: Lowering, arch: str) -> Kernels:
    """Compile everything that runs a program, in parallel, as far as the cache on disk does not have it.

    Raises:
        CompileError: as `compile_all` does.
        DeviceError: as `compile_all` does.

    """
    specs = {path: lowering.launches(path) for path in lowering.paths}
    choose = lowering.sources.choose(lowering.plan.program.vocab_size, lowering.sm_count)
    sources = {spec.source for spec in _own(specs)} | {choose}
    return Kernels(lowering=lowering, specs=specs, choose=choose, build=compile_all(sources, arch, cache=KernelCache()))


def _own(specs: Mapping[RowPath, tuple[list[Spec], list[Spec]]]) -> list[LaunchSpec]:
    every = (spec for body, head in specs.values() for spec in (*body, *head))
    return [spec for spec in every if isinstance(spec, LaunchSpec)]
