"""mortice: a quantised model file in, a validated, resident inference pipeline out; what varies is a plugin.

>>> import mortice
>>> pipe = mortice.load("model.gguf", executor="reference")  # doctest: +SKIP
>>> for piece in pipe.generate("Once upon", max_tokens=32, temperature=0.0):  # doctest: +SKIP
...     print(piece.text, end="")
"""

from __future__ import annotations

from mortice.core.config import RunConfig
from mortice.core.errors import InputError, MorticeError
from mortice.core.pipeline import Pipeline, load, prepare
from mortice.core.pipeline import validate_file as validate

__all__ = ["InputError", "MorticeError", "Pipeline", "RunConfig", "load", "prepare", "validate"]
__version__ = "0.1.0"
