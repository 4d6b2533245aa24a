"""The contracts that come with mortice, given through the public hook."""

from __future__ import annotations

from collections.abc import Iterable

from mortice.arch_contracts.schema import Contract, builtin_contracts
from mortice.core.plugin.hookspecs import hookimpl


@hookimpl
def mortice_arch_contracts() -> Iterable[Contract]:
    """One contract for each TOML file of `mortice.arch_contracts`."""
    return list(builtin_contracts())
