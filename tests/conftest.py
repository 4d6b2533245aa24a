"""Before anything imports NumPy: one thread for its products.

Tests run in as many processes as there are cores, and spinning threads of all of them on the same cores would make
each many times slower.
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
