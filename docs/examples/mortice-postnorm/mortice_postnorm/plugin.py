"""The family ``postnorm``; all of it is in postnorm.toml."""

from __future__ import annotations

from importlib import resources

from mortice.arch_contracts.schema import Contract, parse_contract
from mortice.core.plugin.hookspecs import hookimpl

mortice_contract_version = 1


@hookimpl
def mortice_arch_contracts() -> list[Contract]:
    """One contract."""
    text = resources.files("mortice_postnorm").joinpath("postnorm.toml").read_text(encoding="utf-8")
    return [parse_contract(text, "postnorm.toml")]
