"""Compiled code on the card, and launches made of it: what runs a lowered program, or parts of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing

import numpy as np
from attrs import define, field

from mortice.plugins.executors.cuda.compile.nvrtc import Compiled, Source
from mortice.plugins.executors.cuda.device.cublas import Blas, find_cublas
from mortice.plugins.executors.cuda.device.device import Device
from mortice.plugins.executors.cuda.device.module import Function, Module
from mortice.plugins.executors.cuda.device.stream import Stream
from mortice.plugins.executors.cuda.lowering.launches import Addresses, GemmSpec, LaunchSpec, Queued, Spec

__all__ = ["LoadedKernels"]

_WANT_L1 = frozenset({"matmul", "matmul_wgmma"})
"""Kernels whose weights come through the L1 cache."""
_MOST_L1, _MOST_SHARED = 30, 100
"""Carveouts: for steps with such kernels, where each still gets what it needs, and for short ones without."""
_SHORT_ROWS = 16


@define(eq=False)
class LoadedKernels:
    """Code that was brought to a card.

    Attributes:
        device: the card.
        stream: what products by cuBLAS run on.
        code: of each source.
        blas_workspace: device address of what cuBLAS works in; nothing is there before it is needed.
        modules: the code on the card.

    """

    device: Device
    stream: Stream
    code: Mapping[Source, Compiled] = field(repr=False)
    blas_workspace: int
    modules: dict[Source, Module] = field(factory=dict, init=False, repr=False)
    _asked: dict[tuple[Source, str, int], tuple[Function, int, int]] = field(factory=dict, init=False, repr=False)
    _blas: Blas | None = field(default=None, init=False, repr=False)
    _undo: ExitStack = field(factory=ExitStack, init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        try:
            for source, compiled in self.code.items():
                self.modules[source] = self._undo.enter_context(closing(self.device.load(compiled.cubin)))
        except BaseException:
            self._undo.close()
            raise

    def queue(self, specs: Sequence[Spec], rows: int, addresses: Addresses) -> list[Queued]:
        """Launches of a step of that many rows, ready to run."""
        pdl = self.device.properties.compute_capability >= (9, 0)
        carveout = _carveout(specs, rows) if pdl else None
        launches: list[Queued] = []
        for spec in specs:
            if isinstance(spec, GemmSpec):
                launches.append(self._opened_blas().prepare(spec.gemm(addresses, rows)))
                continue
            function, shared, at_once = self._kernel(spec)
            launches.append(
                function.prepare(
                    spec.grid(rows, at_once),
                    spec.block,
                    spec.args(addresses, rows),
                    dynamic_shared=shared,
                    pdl=pdl,
                    carveout=carveout,
                )
            )
        return launches

    def _opened_blas(self) -> Blas:
        """cuBLAS, brought up when the first step needs it."""
        if self._blas is None:
            library = find_cublas()
            assert library is not None, "the lowering has products by cuBLAS only where there is one"
            self._blas = Blas(library, self.stream, self.blas_workspace)
            self._undo.callback(self._blas.close)
        return self._blas

    def _kernel(self, spec: LaunchSpec) -> tuple[Function, int, int]:
        """A kernel, the dynamic shared memory it wants, and the blocks that the card runs at once."""
        key = spec.source, spec.entry, spec.block
        found = self._asked.get(key)
        if found is None:
            function, shared = self.modules[spec.source].function(spec.entry), self._shared_bytes(spec)
            at_once = self.device.properties.sm_count * max(1, function.blocks_per_sm(spec.block, shared))
            found = self._asked[key] = function, shared, at_once
        return found

    def _shared_bytes(self, spec: LaunchSpec) -> int:
        if not spec.shared_symbol:
            return 0
        number = np.empty(1, np.int32)
        address, _ = self.modules[spec.source].symbol(spec.shared_symbol)
        self.stream.read(number, address)
        return int(number[0])

    def close(self) -> None:
        """Let go of all of it; the stream has to be idle. Calling twice is fine."""
        self._undo.close()


def _carveout(specs: Sequence[Spec], rows: int) -> int | None:
    """How the launches of a step want a multiprocessor's memory divided, all of them alike."""
    if any(isinstance(spec, LaunchSpec) and spec.entry in _WANT_L1 for spec in specs):
        return _MOST_L1
    return _MOST_SHARED if rows <= _SHORT_ROWS else None
