"""Flags that are given several times, each a pair of a name and a value: what they stand for as a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from mortice.core.errors import ConfigError
from mortice.core.text.template_variables import variable_value

__all__ = ["PAIRS"]


def _biases(values: Sequence[str]) -> dict[str, float]:
    biases = {}
    for text in values:
        token, _, bias = text.partition("=")
        try:
            biases[token] = float(bias)
        except ValueError:
            raise ConfigError(f"--logit-bias: found {text!r}, wanted ID=BIAS") from None
    return biases


def _preferences(values: Sequence[str]) -> dict[str, str]:
    chosen = {}
    for text in values:
        key, equals, plugin = text.rpartition("=")
        if not equals:
            raise ConfigError(f"--prefer: found {text!r}, wanted KIND:KEY=PLUGIN")
        chosen[key] = plugin
    return chosen


def _variables(values: Sequence[str]) -> dict[str, Any]:
    given = {}
    for text in values:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--chat-variable: found {text!r}, wanted NAME=VALUE")
        try:
            given[name] = variable_value(value)
        except ValueError as error:
            raise ConfigError(f"--chat-variable: {name}: {error}") from None
    return given


PAIRS: Mapping[str, Callable[[Sequence[str]], dict[str, Any]]] = MappingProxyType(
    {
        "sampling.logit_bias": _biases,
        "plugins.prefer": _preferences,
        "prompt.chat_variables": _variables,
    }
)
"""What makes a table of the texts of a flag, by config key; raises `ConfigError` for a text that is no pair."""
