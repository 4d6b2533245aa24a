"""What was measured on a card, on disk: one file for a card and a model's shapes, shared by all processes of a user.

A file is JSON: what it was measured for, what was chosen, and the times. What it was measured for decides its name as
well, so that another card, driver, compiler, kernel or shape has another file. What cannot be read or does not say what
it should counts as absent, with a warning; a folder that cannot be written costs the time to measure again.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import cattrs
from attrs import asdict, field, frozen

from mortice.arch_contracts.structuring import make_converter, mistakes
from mortice.core.version import __version__
from mortice.plugins.executors.cuda.compile.cache import cache_folder, write_whole
from mortice.plugins.executors.cuda.compile.nvrtc import Source
from mortice.plugins.executors.cuda.device.properties import CudaProperties
from mortice.plugins.executors.cuda.device.toolkit import Compiler
from mortice.plugins.executors.cuda.lowering.crossovers import GEMM_CANDIDATES, RING_CANDIDATES, RowCrossovers, Timing

__all__ = ["TunedFile", "tuned_for"]

_LOG = logging.getLogger("mortice.cuda")

_FORMAT = 1
_MOST_BYTES = 64 << 10


@frozen(kw_only=True)
class _Content:
    """What a file says; `measured_for` as `tuned_for` gives it."""

    format: int
    measured_for: Mapping[str, str]
    crossovers: RowCrossovers
    timings: Sequence[Timing]


def tuned_for(
    properties: CudaProperties, compiler: Compiler, arch: str, cublas: str, sources: Iterable[Source]
) -> dict[str, str]:
    """All that decides times: the card, what made the code that runs there, and that code, with the shapes in it.

    Args:
        properties: of the card.
        compiler: what compiles.
        arch: for which architecture.
        cublas: version of cuBLAS; empty without.
        sources: of the kernels timed; their constants have the shapes and types of the weights.

    """
    wanted = list(sources)
    digests = {text: hashlib.sha256(text.encode()).hexdigest() for text in {source.text for source in wanted}}
    kernels = sorted([source.name, digests[source.text], *source.flags] for source in wanted)
    return {
        "mortice": __version__,
        "card": properties.name,
        "compute capability": ".".join(map(str, properties.compute_capability)),
        "multiprocessors": str(properties.sm_count),
        "driver": ".".join(map(str, properties.driver_version)),
        "compiler": compiler.identity,
        "cuBLAS": cublas,
        "kernels": hashlib.sha256(json.dumps([arch, kernels]).encode()).hexdigest(),
    }


@frozen(kw_only=True)
class TunedFile:
    """The file of what was measured for one card and the shapes of one model.

    Attributes:
        measured_for: what `tuned_for` said.
        folder: where such files lie; made when first needed.

    """

    measured_for: Mapping[str, str]
    folder: Path = field(factory=lambda: cache_folder() / "tuning")

    @property
    def path(self) -> Path:
        """Where it is."""
        text = json.dumps([_FORMAT, sorted(self.measured_for.items())])
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"

    def read(self) -> RowCrossovers | None:
        """What was chosen; None where nothing is, with a warning where that is not good."""
        try:
            with self.path.open("rb") as file:
                text = file.read(_MOST_BYTES + 1)
        except FileNotFoundError:
            return None
        except OSError as error:
            _LOG.warning("%s: cannot be read: %s; it is ignored", self.path, error.strerror or error)
            return None
        try:
            return self._checked(text)
        except ValueError as error:
            _LOG.warning("%s: %s; it is ignored", self.path, error)
            return None

    def _checked(self, text: bytes) -> RowCrossovers:
        if len(text) > _MOST_BYTES:
            raise ValueError(f"more than {_MOST_BYTES} bytes")
        try:
            document = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"not JSON: {error}") from None
        try:
            content = make_converter().structure(document, _Content)
        except (cattrs.BaseValidationError, TypeError, ValueError) as error:
            raise ValueError("; ".join(mistakes(error, "tuning"))) from None
        if content.format != _FORMAT:
            raise ValueError(f"format: found {content.format}, wanted {_FORMAT}")
        for name, wanted in self.measured_for.items():
            found = content.measured_for.get(name)
            if found != wanted:
                raise ValueError(f"measured_for: {name}: found {found!r}, wanted {wanted!r}")
        chosen = content.crossovers
        for name, value, candidates in (
            ("ring_rows", chosen.ring_rows, RING_CANDIDATES),
            ("gemm_from_rows", chosen.gemm_from_rows, GEMM_CANDIDATES),
        ):
            if value not in candidates:
                raise ValueError(f"crossovers.{name}: found {value}, wanted one of {', '.join(map(str, candidates))}")
        return chosen

    def write(self, crossovers: RowCrossovers, timings: Sequence[Timing]) -> str:
        """Keep what was chosen; the file's name, or nothing where it cannot be kept."""
        content = _Content(
            format=_FORMAT, measured_for=dict(self.measured_for), crossovers=crossovers, timings=list(timings)
        )
        try:
            write_whole(self.path, json.dumps(asdict(content), indent=1).encode() + b"\n")
        except OSError as error:
            reason = error.strerror or error
            _LOG.warning("%s: cannot be written: %s; the next start measures again", self.path, reason)
            return ""
        return str(self.path)
