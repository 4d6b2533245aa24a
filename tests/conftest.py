"""Before anything imports NumPy: one thread for its products.

Tests run in as many processes as there are cores, and spinning threads of all of them on the same cores would make
each many times slower.
"""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def pytest_configure(config: pytest.Config) -> None:
    """The kit's plugin is here whether mortice is installed or only on the path."""
    if not config.pluginmanager.has_plugin("mortice"):
        from mortice.core.testing import pytest_plugin

        config.pluginmanager.register(pytest_plugin, "mortice")
