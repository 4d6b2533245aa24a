"""The launches of a program and the compiled code for them: all that can be had before there are weights."""

from __future__ import annotations

from collections.abc import Mapping, Set
from types import MappingProxyType

from attrs import evolve, frozen

from mortice.plugins.executors.cuda.compile.build import Build, compile_all
from mortice.plugins.executors.cuda.compile.cache import KernelCache
from mortice.plugins.executors.cuda.compile.nvrtc import Compiled, Source
from mortice.plugins.executors.cuda.lowering.launches import Spec
from mortice.plugins.executors.cuda.lowering.lowering import Lowering
from mortice.plugins.executors.cuda.lowering.matmul import RowPath
from mortice.plugins.executors.cuda.weights.arena import repack_sources

__all__ = ["Kernels", "compile_kernels"]


class _Specs(dict[RowPath, tuple[list[Spec], list[Spec]]]):
    """The launches of a lowering by path, those of each made when a step first goes that way."""

    def __init__(self, lowering: Lowering) -> None:
        super().__init__()
        self._lowering = lowering

    def __missing__(self, path: RowPath) -> tuple[list[Spec], list[Spec]]:
        made = self[path] = self._lowering.launches(path)
        return made


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
    choose = lowering.sources.choose(lowering.plan.program.vocab_size)
    sources = {choose}.union(*map(lowering.kernel_sources, lowering.paths))
    repacks = repack_sources(lowering.plan)
    had = {**known.build.kernels, **known.repacks, **known.beside} if known is not None else {}
    build = compile_all(sources | repacks | beside, arch, cache=KernelCache(), known=had)
    code = build.kernels
    return Kernels(
        lowering=lowering,
        specs=_Specs(lowering),
        choose=choose,
        build=evolve(build, kernels={source: code[source] for source in sources}),
        repacks={source: code[source] for source in repacks},
        beside={source: code[source] for source in beside},
    )
