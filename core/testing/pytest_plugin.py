"""The kit as a pytest plugin, loaded where mortice is installed; ``-p no:mortice`` leaves it out.

It adds three fixtures and the marker ``gpu``, and imports nothing of mortice until a test asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from mortice.arch_contracts.schema import Contract
    from mortice.core.testing.events import EventRecorder
    from mortice.core.testing.fake_device import FakeArena

__all__ = ["TinyModel"]

TinyModel = Callable[..., Path]
"""``mortice_tiny_model(contract, **arguments)``: a new GGUF file; the arguments are those of `write_tiny_model`."""


def pytest_configure(config: pytest.Config) -> None:
    """Make the marker known, so that ``--strict-markers`` accepts it."""
    config.addinivalue_line("markers", "gpu: needs a GPU; skipped, with the reason shown, where there is none")


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark the checks of suites that run on a GPU."""
    if getattr(getattr(item, "function", None), "mortice_gpu", False):
        item.add_marker(pytest.mark.gpu)


@pytest.fixture
def mortice_tiny_model(tmp_path: Path) -> TinyModel:
    """Write small models with random weights for any contract, a plugin's or a built-in one by its name."""
    from mortice.core.testing.registries import registry_with
    from mortice.core.testing.tiny_models import write_tiny_model

    def write(contract: Contract | str = "llama", **arguments: Any) -> Path:
        if isinstance(contract, str):
            contract = registry_with().contracts[contract].value
        path = tmp_path / f"tiny-{len(list(tmp_path.glob('tiny-*.gguf')))}.gguf"
        return write_tiny_model(path, contract, **arguments)

    return write


@pytest.fixture
def mortice_fake_device() -> Iterator[FakeArena]:
    """A device of 16 MiB of ordinary memory; in the end nothing may be held, and it must not have been misused."""
    from mortice.core.testing.fake_device import FakeArena

    device = FakeArena(16 << 20)
    yield device
    assert not device.misuses, "; ".join(device.misuses)
    assert not device.held, f"{len(device.held)} pieces of pinned memory were not given back"


@pytest.fixture
def mortice_events() -> EventRecorder:
    """An observer that remembers every event."""
    from mortice.core.testing.events import EventRecorder

    return EventRecorder()
