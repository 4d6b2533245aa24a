"""Constants of the GGUF format, and the limits this loader sets on top of it.

Source of the format: the GGUF specification in ggml (``docs/gguf.md``), versions 2 and 3.

The limits keep a hostile header from costing more than about a second or a few hundred megabytes. They
are well above what the largest published models need: about 260 thousand tokens and 600 thousand merges,
45 thousand tensors where every expert is stored apart, and 30 MB of metadata.
"""

from __future__ import annotations

from typing import Final

MAGIC: Final = b"GGUF"
VERSIONS: Final = (2, 3)
HEADER_BYTES: Final = 24
DEFAULT_ALIGNMENT: Final = 32
INT64_MAX: Final = 2**63 - 1

UINT32: Final = 4
FLOAT32: Final = 6
BOOL: Final = 7
STRING: Final = 8
ARRAY: Final = 9

NUMBER_TYPES: Final = {
    0: "u1",
    1: "i1",
    2: "u2",
    3: "i2",
    4: "u4",
    5: "i4",
    6: "f4",
    7: "u1",
    10: "u8",
    11: "i8",
    12: "f8",
}
"""NumPy type code of each metadata value type of fixed size (7, bool, is a byte that must be 0 or 1)."""

TYPE_NAMES: Final = (
    "UINT8",
    "INT8",
    "UINT16",
    "INT16",
    "UINT32",
    "INT32",
    "FLOAT32",
    "BOOL",
    "STRING",
    "ARRAY",
    "UINT64",
    "INT64",
    "FLOAT64",
)

MAX_DIMENSIONS: Final = 4
MAX_TENSOR_NAME_BYTES: Final = 63  # GGML_MAX_NAME is 64 and counts the terminating zero
MAX_KEY_BYTES: Final = 2**16 - 1  # the specification's own limit

MAX_HEADER_BYTES: Final = 128 * 2**20
MAX_STRING_BYTES: Final = 64 * 2**20
MAX_KEYS: Final = 2**16
MAX_TENSORS: Final = 2**16
MAX_ARRAY_STRINGS: Final = 2**21
"""Strings in all string arrays of a file together."""
