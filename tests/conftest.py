"""What holds for all tests: one thread for NumPy's products, and nothing that a run draws at random by itself.

Tests run in as many processes as there are cores, and spinning threads of all of them on the same cores would make
each many times slower; so that is set before anything imports NumPy.
"""

from __future__ import annotations

import os
import random
import signal

import pytest
from hypothesis import settings

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# A test that passed here passes everywhere. `--hypothesis-profile=default` looks for examples not seen before.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


def pytest_configure(config: pytest.Config) -> None:
    """The kit's plugin is here whether mortice is installed or only on the path; Ctrl-C interrupts as in a terminal.

    A shell has what it starts in the background ignore it.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if not config.pluginmanager.has_plugin("mortice"):
        from mortice.core.testing import pytest_plugin

        config.pluginmanager.register(pytest_plugin, "mortice")


@pytest.fixture(autouse=True)
def drawn_seeds(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sampling without a seed draws one. Drawn from a test's name, a token that ends an answer early always does."""
    monkeypatch.setattr("mortice.core.text.params.secrets.randbits", random.Random(request.node.nodeid).getrandbits)
