"""Every exception mortice raises on purpose.

::

    MorticeError
    ├── InputError                 something handed to mortice is refused        exit code 2
    │   ├── ConfigError            a config file, flag or environment variable
    │   ├── ModelFileError         a model file that is broken or hostile
    │   ├── ContractError          an architecture contract that does not make sense
    │   ├── UnknownArchitectureError   no contract serves `general.architecture`
    │   ├── ValidationError        the file does not fit its contract
    │   ├── UnsupportedError       the executor cannot run this program
    │   ├── DoesNotFitError        the memory needed is not there
    │   ├── TokenizerError         a tokenizer, text or token id that cannot be used
    │   └── TemplateError          a chat template that is missing, broken or hostile
    ├── PluginError                a plugin failed; its name is in the message    exit code 2
    ├── DeviceError                driver, runtime compiler or card               exit code 2
    └── ExecutionError             work that had begun failed: a step, a write    exit code 1

Anything else that is raised is a fault in mortice, or in a plugin where nobody could name it: exit code 1.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

__all__ = [
    "ConfigError",
    "ContractError",
    "DeviceError",
    "DoesNotFitError",
    "ExecutionError",
    "InputError",
    "ModelFileError",
    "MorticeError",
    "PluginError",
    "TemplateError",
    "TokenizerError",
    "UnknownArchitectureError",
    "UnsupportedError",
    "ValidationError",
]


class MorticeError(Exception):
    """Base of all errors raised on purpose; `exit_code` is what the command line returns."""

    exit_code: ClassVar[int] = 1


class InputError(MorticeError):
    """Something handed to mortice is refused."""

    exit_code: ClassVar[int] = 2


class ConfigError(InputError):
    """A config file, a flag or an environment variable is wrong."""


class ModelFileError(InputError):
    """A model file is broken or hostile.

    Args:
        path: the file at fault.
        message: what was found and what was expected, in one line.
        offset: byte offset in `path` at which it was found, where there is one.

    """

    def __init__(self, path: Path, message: str, offset: int | None = None) -> None:
        self.path = path
        self.offset = offset
        where = f"{path}: " if offset is None else f"{path}: byte {offset}: "
        super().__init__(where + message)


class ContractError(InputError):
    """An architecture contract does not make sense."""


class UnknownArchitectureError(InputError):
    """No registered contract serves the file's `general.architecture`."""


class ValidationError(InputError):
    """The file does not fit its contract; the message lists every error found."""


class UnsupportedError(InputError):
    """The executor cannot run this program; the message lists the reasons."""


class DoesNotFitError(InputError):
    """The memory needed is not there; the message says needed, free and what to change."""


class TokenizerError(InputError):
    """A tokenizer, a text or a token id cannot be used."""


class TemplateError(InputError):
    """A chat template is missing, broken or hostile."""


class PluginError(MorticeError):
    """A plugin failed, is missing or conflicts with another; the message names it."""

    exit_code: ClassVar[int] = 2


class DeviceError(MorticeError):
    """The driver, the runtime compiler or the card cannot be used."""

    exit_code: ClassVar[int] = 2


class ExecutionError(MorticeError):
    """Work that had begun failed: a step of a run, or a file that the system would not let be written."""
