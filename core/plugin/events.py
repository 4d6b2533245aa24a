"""What `mortice_on_event` observers are told."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from attrs import frozen

__all__ = [
    "Event",
    "GraphCaptured",
    "ModelOpened",
    "ModelValidated",
    "StepDone",
    "UploadProgress",
    "WaysMeasured",
    "WeightsPlanned",
]


@frozen(kw_only=True)
class Event:
    """Base of all events.

    Attributes:
        plugin: whose executor or upload strategy tells it, filled in by the registry; ``mortice`` is the core.

    """

    plugin: str = "mortice"


@frozen(kw_only=True)
class ModelOpened(Event):
    """A loader, the plugin `loader`, opened a file."""

    path: Path
    loader: str
    tensors: int
    seconds: float


@frozen(kw_only=True)
class ModelValidated(Event):
    """A file was held against a contract."""

    path: Path
    contract: str
    errors: int
    warnings: int


@frozen(kw_only=True)
class WeightsPlanned(Event):
    """Every weight has its place."""

    weights: int
    arena_bytes: int


@frozen(kw_only=True)
class UploadProgress(Event):
    """Weights became resident; bytes are those of the file. The last one has ``done_bytes == total_bytes``."""

    strategy: str
    done_bytes: int
    total_bytes: int


@frozen(kw_only=True)
class GraphCaptured(Event):
    """A decode graph was captured."""

    nodes: int
    seconds: float


@frozen(kw_only=True)
class WaysMeasured(Event):
    """An executor timed ways to compute on its device, and chose.

    Attributes:
        choices: what was chosen, as `Tuned.measured_choices` has it.
        kept: where the next start will find it; empty where it could not be kept.
        seconds: what that took.

    """

    choices: Mapping[str, str]
    kept: str
    seconds: float

    def __str__(self) -> str:
        chosen = ", ".join(f"{name} {value}" for name, value in self.choices.items())
        where = f"kept in {self.kept}" if self.kept else "not kept"
        return f"measured in {self.seconds:.2f} s: {chosen}; {where}"


@frozen(kw_only=True)
class StepDone(Event):
    """A step of the program ended."""

    tokens: int
    seconds: float
