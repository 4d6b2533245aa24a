"""How fast this machine's cores read memory, all together."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

__all__ = ["read_bandwidth"]

_REPEATS = 5


def read_bandwidth(nbytes: int = 1 << 29) -> float:
    """Bytes a second: the fastest of a few passes of all cores over an array of `nbytes` bytes.

    The default is beyond the caches of most machines. Each core takes the maximum of its part, which is a pass over
    memory with one vector instruction a load.
    """
    cores = os.cpu_count() or 1
    parts = np.array_split(np.ones(nbytes // 4, np.float32), cores)
    best = float("inf")
    with ThreadPoolExecutor(cores) as pool:
        for _ in range(_REPEATS):
            started = time.perf_counter()
            list(pool.map(np.max, parts))
            best = min(best, time.perf_counter() - started)
    return nbytes / best
