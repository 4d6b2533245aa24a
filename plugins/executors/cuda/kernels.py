"""The launches of a program and the compiled code for them: all that can be had before there are weights."""

from __future__ import annotations

from collections.abc import Mapping, Set
from types import MappingProxyType

from attrs import evolve, frozen

from mortice.plugins.executors.cuda.arena import repack_sources
from mortice.plugins.executors.cuda.build import Build, compile_all
from mortice.plugins.executors.cuda.cache import KernelCache
from mortice.plugins.executors.cuda.launches import LaunchSpec, Spec
from mortice.plugins.executors.cuda.lowering import Lowering
from mortice.plugins.executors.cuda.matmul import RowPath
from mortice.plugins.executors.cuda.nvrtc import Compiled, Source

__all__ = ["Kernels", "compile_kernels"]


@frozen(eq=False, kw_only=True)
class Kernels:
    """What a runtime is opened with.

    Attributes:
        lowering: of the program.
        specs: the launches of body and head, by the way a step goes.
        choose: what chooses tokens.
        build: the code of every source.
        repacks: the code that lays the weights out.
        beside: code of other sources that was asked for.

    """

    lowering: Lowering
    specs: Mapping[RowPath, tuple[list[Spec], list[Spec]]]
    choose: Source
    build: Build
    repacks: Mapping[Source, Compiled]
    beside: Mapping[Source, Compiled] = MappingProxyType({})

    @property
    def launches(self) -> list[LaunchSpec]:
        """Those of kernels of our own."""
        return _own(self.specs)


def compile_kernels(
    lowering: Lowering, arch: str, *, beside: Set[Source] = frozenset(), known: Kernels | None = None
) -> Kernels:
    """Compile everything that runs a program, in parallel, as far as the cache on disk does not have it.

    Args:
        lowering: of the program.
        arch: a real architecture, for instance ``sm_90``.
        beside: sources that are wanted as well.
        known: kernels of another lowering, whose code need not be made again.

    Raises:
        CompileError: as `compile_all` does.
        DeviceError: as `compile_all` does.

    """
    specs = {path: lowering.launches(path) for path in lowering.paths}
    choose = lowering.sources.choose(lowering.plan.program.vocab_size)
    sources = {spec.source for spec in _own(specs)} | {choose}
    repacks = repack_sources(lowering.plan)
    had = {**known.build.kernels, **known.repacks, **known.beside} if known is not None else {}
    build = compile_all(sources | repacks | beside, arch, cache=KernelCache(), known=had)
    code = build.kernels
    return Kernels(
        lowering=lowering,
        specs=specs,
        choose=choose,
        build=evolve(build, kernels={source: code[source] for source in sources}),
        repacks={source: code[source] for source in repacks},
        beside={source: code[source] for source in beside},
    )


def _own(specs: Mapping[RowPath, tuple[list[Spec], list[Spec]]]) -> list[LaunchSpec]:
    every = (spec for body, head in specs.values() for spec in (*body, *head))
    return [spec for spec in every if isinstance(spec, LaunchSpec)]
