"""Every type with a device layout, and its tiles as NumPy writes them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mortice.core.plugin.interfaces import QuantizationType
from mortice.plugins.executors.cuda.lowering.layouts import TileLayout
from mortice.plugins.executors.cuda.type_trial import aligned
from mortice.plugins.qtypes import mortice_qtypes

TYPES = {type_.qtype.name: type_ for type_ in mortice_qtypes() if type_.traits is not None}
NAMES = sorted(TYPES)


def stored(type_: QuantizationType, raw: NDArray[np.uint8], columns: int) -> NDArray[np.uint8]:
    """The tiles of rows, as NumPy writes them over poisoned bytes; 16-byte aligned."""
    layout = TileLayout(type_)
    tiles = aligned(layout.nbytes(type_.qtype, len(raw), columns))
    layout.store(raw, columns, tiles)
    return tiles
