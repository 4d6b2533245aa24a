"""Registries for tests: the built-ins and what a test gives, no installed package."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import Any

from mortice.arch_contracts.schema import Contract
from mortice.core.plugin.hookspecs import hookimpl
from mortice.core.plugin.interfaces import Executor, QuantizationType, UploadStrategy
from mortice.core.plugin.manager import PluginPolicy
from mortice.core.plugin.registry import Registry, make_registry

__all__ = ["plugin_of", "registry_with"]


def plugin_of(**hooks: Callable[..., Any]) -> ModuleType:
    """A plugin of functions by hook name, each marked as an implementation."""
    module = ModuleType("plugin_in_a_test")
    for name, function in hooks.items():
        setattr(module, name, hookimpl(function))
    return module


def registry_with(
    *,
    contracts: Iterable[Contract] = (),
    qtypes: Iterable[QuantizationType] = (),
    uploads: Iterable[UploadStrategy] = (),
    executors: Iterable[Executor] = (),
    plugins: Mapping[str, object] | None = None,
) -> Registry:
    """The built-ins with these laid over them: what a test gives wins over a built-in of the same name.

    Args:
        contracts: architecture contracts.
        qtypes: quantisation types.
        uploads: upload strategies.
        executors: executors.
        plugins: whole plugins, by name; they win over nothing.

    """
    given: dict[str, tuple[str, list[Any]]] = {
        "contract": ("mortice_arch_contracts", list(contracts)),
        "qtype": ("mortice_qtypes", list(qtypes)),
        "upload": ("mortice_upload_strategies", list(uploads)),
        "executor": ("mortice_executors", list(executors)),
    }
    hooks = {hook: _giving(things) for hook, things in given.values() if things}
    prefer = {f"contract:{name}": "tested" for contract in given["contract"][1] for name in contract.architectures}
    prefer |= {f"qtype:{type_.qtype.name}": "tested" for type_ in given["qtype"][1]}
    prefer |= {f"upload:{thing.name}": "tested" for thing in given["upload"][1]}
    prefer |= {f"executor:{thing.name}": "tested" for thing in given["executor"][1]}
    others = tuple((plugins or {}).items())
    tested = (("tested", plugin_of(**hooks)),) if hooks else ()
    return make_registry(PluginPolicy(entry_points=False), prefer=prefer, given=(*tested, *others))


def _giving(things: list[Any]) -> Callable[[], list[Any]]:
    return lambda: things
