"""Registries for tests: the real thing, with no installed plugins, or with throw-away ones written to a folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from attrs import evolve

from mortice.arch_contracts.schema import Contract, builtin_contracts
from mortice.core.model.qtypes import QType
from mortice.core.model.types import ModelFile
from mortice.core.model.weight_plan import Kernel
from mortice.core.plugin import registry
from mortice.core.plugin.interfaces import QuantizationType
from mortice.core.plugin.manager import PluginPolicy
from mortice.core.plugin.registry import Registry
from mortice.core.testing.registries import plugin_of

__all__ = [
    "SomeLayout",
    "Upload",
    "contract",
    "install",
    "kernel",
    "like_reference",
    "make_registry",
    "model_file",
    "plugin_of",
    "qtype",
    "raises",
]


def make_registry(
    plugins: Mapping[str, object] | None = None,
    *,
    prefer: Mapping[str, str] | None = None,
    block: tuple[str, ...] = (),
) -> Registry:
    """A registry of the built-ins and `plugins` (name -> plugin); installed packages are not searched."""
    policy = PluginPolicy(block=block, entry_points=False)
    return registry.make_registry(policy, prefer=prefer, given=tuple((plugins or {}).items()))


def install(folder: Path, distribution: str, entry_points: Mapping[str, str], source: str = "") -> None:
    """Put a distribution of version 1.0 into `folder` as pip would leave it.

    Args:
        folder: a folder on ``sys.path``.
        distribution: its name; the text `source` becomes a module of that name, ``-`` written ``_``.
        entry_points: in the group ``mortice``, name -> module.
        source: what that module contains.

    """
    info = folder / f"{distribution.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    lines = [f"{name} = {target}" for name, target in entry_points.items()]
    (info / "entry_points.txt").write_text("\n".join(["[mortice]", *lines, ""]))
    (folder / f"{distribution.replace('-', '_')}.py").write_text(source)


def model_file(
    path: Path, *, format_name: str = "toy", architecture: str = "toy", closed: list[str] | None = None
) -> ModelFile:
    """A model file without tensors; its format is appended to `closed` when it is closed."""
    return ModelFile(
        path=path,
        format=format_name,
        version="1",
        metadata={"general.architecture": architecture},
        tensors={},
        files=(path,),
        close=None if closed is None else lambda: closed.append(format_name),
    )


def contract(architecture: str = "toy") -> Contract:
    """A contract for `architecture`."""
    return evolve(next(builtin_contracts()), name=architecture, architectures=(architecture,))


def qtype(number: int = 900, name: str = "MINE") -> QuantizationType:
    """A type whose blocks are one float32."""
    return QuantizationType(qtype=QType(number, name, 1, 4), dequantize=lambda rows: rows.view("<f4"))


class Upload:
    """An upload strategy that does nothing."""

    name = "teleport"
    device_kind = "cpu"

    def upload(self, resident: object, emit: object) -> int:
        return 0


class SomeLayout:
    """A layout that takes no room."""

    name = "planes"

    def nbytes(self, qtype: object, rows: int, columns: int) -> int:
        return 0

    def store(self, rows: object, columns: int, out: object) -> None: ...


def kernel(operator: str = "linear", qtype: str = "MINE") -> Kernel:
    """A kernel for an operator and a type."""
    return Kernel(operator=operator, qtype=qtype, layout=SomeLayout())


def like_reference(**changes: object) -> object:
    """An executor like the built-in one, called ``mine``, with `changes`."""
    executor = make_registry().executor("reference")
    return type("Mine", (type(executor),), {"__slots__": (), **changes})("mine")


def raises(error: BaseException) -> Callable[[], Any]:
    """A function that raises `error`."""

    def function() -> None:
        raise error

    return function
