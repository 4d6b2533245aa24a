"""The CUDA executor's device comes up on a thread of its own, while others read the model file."""

from __future__ import annotations

import subprocess
import sys
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from mortice.core.errors import DeviceError
from mortice.core.plugin.interfaces import Wakes
from mortice.plugins.executors.cuda import executor as executor_module
from mortice.plugins.executors.cuda.executor import CudaExecutor


def opening(monkeypatch: pytest.MonkeyPatch, refusals: list[Exception]) -> list[threading.Thread]:
    """Devices that only pretend; refused as often as there are refusals. The threads that opened one, in order."""
    threads: list[threading.Thread] = []

    def open_device() -> Any:
        threads.append(threading.current_thread())
        if refusals:
            raise refusals.pop(0)
        return SimpleNamespace(make_current=lambda: None)

    monkeypatch.setattr(executor_module, "open_device", open_device)
    monkeypatch.setattr(executor_module, "begin_driver", lambda: None)
    monkeypatch.setattr(executor_module, "find_cublas", lambda: None)
    monkeypatch.setattr(executor_module, "is_driver_installed", lambda: True)
    return threads


def test_a_woken_executor_opens_its_device_once_on_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = opening(monkeypatch, [])
    executor = CudaExecutor()
    assert isinstance(executor, Wakes)
    for _ in range(2):
        executor.wake()
        executor.opened()
    assert [thread is threading.current_thread() for thread in threads] == [False]
    assert not threads[0].is_alive()


def test_the_driver_begins_while_its_bindings_are_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    opening(monkeypatch, [])
    imported = threading.Event()
    began: list[bool] = []
    monkeypatch.setattr(executor_module, "import_bindings", lambda _: imported.set())
    monkeypatch.setattr(executor_module, "begin_driver", lambda: began.append(imported.wait(60)))
    executor = CudaExecutor()
    executor.wake()
    executor.opened()
    assert began == [True], "the import did not wait for the driver"


def test_where_there_is_no_driver_nothing_is_woken(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = opening(monkeypatch, [DeviceError("no driver")])
    monkeypatch.setattr(executor_module, "is_driver_installed", lambda: False)
    monkeypatch.setattr(executor_module, "find_cublas", lambda: threads.append(threading.current_thread()))
    executor = CudaExecutor()
    executor.wake()
    assert not threads
    with pytest.raises(DeviceError, match=r"^no driver$"):
        executor.opened()


def test_what_went_wrong_while_waking_is_said_when_the_device_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    opening(monkeypatch, [DeviceError("no driver"), DeviceError("no driver")])
    executor = CudaExecutor()
    executor.wake()
    with pytest.raises(DeviceError, match=r"^no driver$"):
        executor.opened()
    assert executor.opened() is not None


def test_what_only_a_run_needs_is_not_imported_with_the_plugins() -> None:
    code = """
import sys
from mortice.core.plugin.registry import make_registry
make_registry()
assert "mortice.plugins.executors.cuda.executor" in sys.modules
cuda = [f"cuda.{name}" for name in ("runtime", "lowering", "arena", "sources", "tuning")]
for name in (*cuda, "reference.runtime", "reference.ops"):
    assert f"mortice.plugins.executors.{name}" not in sys.modules, name
"""
    subprocess.run([sys.executable, "-c", code], check=True)
