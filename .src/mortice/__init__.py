"""mortice: a quantised model file in, a validated, resident inference pipeline out; what varies is a plugin.

>>> import mortice
>>> pipe = mortice.load("model.gguf", executor="reference")  # doctest: +SKIP
>>> for piece in pipe.generate("Once upon", max_tokens=32, temperature=0.0):  # doctest: +SKIP
...     print(piece.text, end="")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mortice.core.version import __version__

if TYPE_CHECKING:
    from mortice.core.config import RunConfig
    from mortice.core.config_layers import read_config
    from mortice.core.errors import InputError, MorticeError
    from mortice.core.pipeline import Pipeline, load, prepare
    from mortice.core.stages import validate_file as validate

__all__ = [
    "InputError",
    "MorticeError",
    "Pipeline",
    "RunConfig",
    "__version__",
    "load",
    "prepare",
    "read_config",
    "validate",
]

_HOMES = {
    "InputError": "mortice.core.errors:InputError",
    "MorticeError": "mortice.core.errors:MorticeError",
    "Pipeline": "mortice.core.pipeline:Pipeline",
    "RunConfig": "mortice.core.config:RunConfig",
    "load": "mortice.core.pipeline:load",
    "prepare": "mortice.core.pipeline:prepare",
    "read_config": "mortice.core.config_layers:read_config",
    "validate": "mortice.core.stages:validate_file",
}


def __getattr__(name: str) -> Any:
    # names are imported when first used, so that `mortice --help` need not wait for NumPy
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _HOMES[name].partition(":")
    value = globals()[name] = getattr(import_module(module), attribute)
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
