"""The kit inside pytest: suites are collected, faults are reported, fixtures are there, and nobody is slowed down."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mortice.core.errors import DeviceError
from mortice.core.plugin.events import StepDone, UploadProgress
from mortice.core.testing.events import EventRecorder
from mortice.core.testing.fake_device import FakeArena
from mortice.core.testing.pytest_plugin import TinyModel
from mortice.plugins.executors.cuda.device.properties import list_devices
from tests.packaging.running import attempt
from tests.support.tiny import FUSED_WITH_BIAS_AND_NORM, logits

PLUGIN = ("-p", "no:cacheprovider", "-p", "no:benchmark", "--strict-markers", "-W", "error", "-q", "-rfs")

SUITE = """
import numpy as np
from mortice.core.model.qtypes import QType
from mortice.core.plugin.interfaces import QuantizationType
from mortice.core.testing.qtype_suite import QTypeSuite

def dequantize(rows):
    return rows.copy().view("<f4").reshape(len(rows), rows.shape[1] // 4) {change}

class TestMine(QTypeSuite):
    type = QuantizationType(qtype=QType(1900, "MINE", 1, 4), dequantize=dequantize)
"""


def collected(folder: Path, text: str, *flags: str) -> tuple[int, str]:
    """What pytest says of a file of tests."""
    (folder / "test_mine.py").write_text(text)
    load = () if _installed() else ("-p", "mortice.core.testing.pytest_plugin")
    done = attempt([sys.executable, "-m", "pytest", *PLUGIN, *load, *flags, folder], cwd=folder)
    return done.returncode, done.stdout


def _installed() -> bool:
    from importlib.metadata import entry_points

    return any(point.value == "mortice.core.testing.pytest_plugin" for point in entry_points(group="pytest11"))


def test_a_suite_in_a_file_of_tests_is_run_and_skips_say_why(tmp_path: Path) -> None:
    code, said = collected(tmp_path, SUITE.format(change=""))
    assert code == 0, said
    assert "6 passed" in said
    assert "MINE has no CUDA traits header" in said


def test_a_fault_fails_the_test_that_is_for_it(tmp_path: Path) -> None:
    code, said = collected(tmp_path, SUITE.format(change="* np.float32(len(rows))"))
    assert code == 1
    assert "FAILED test_mine.py::TestMine::test_a_block_means_the_same_wherever_it_stands" in said
    assert "a row by itself gives other values than among others" in said


def test_checks_on_a_gpu_have_the_marker(tmp_path: Path) -> None:
    code, said = collected(tmp_path, SUITE.format(change=""), "-m", "gpu", "--collect-only")
    assert code == 0, said
    assert "test_the_header_equals_the_reference_on_a_gpu" in said
    assert "3/" in said


def test_a_gpu_that_is_missing_is_the_reason_of_the_skip(tmp_path: Path) -> None:
    try:
        list_devices()
        pytest.skip("a GPU is there")
    except DeviceError as error:
        reason = str(error)
    text = (
        "from mortice.core.testing.qtype_suite import QTypeSuite\n"
        "from mortice.plugins.qtypes import mortice_qtypes\n"
        "class TestQ(QTypeSuite):\n"
        "    type = next(type_ for type_ in mortice_qtypes() if type_.qtype.name == 'Q8_0')\n"
    )
    code, said = collected(tmp_path, text, "-m", "gpu")
    assert code == 0, said
    assert reason in said


def test_the_plugin_imports_nothing_heavy() -> None:
    code = "import pytest, sys; before = set(sys.modules); import mortice.core.testing.pytest_plugin; "
    code += "print(*(set(sys.modules) - before))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {name for name in loaded if not name.startswith("mortice")} == set()
    assert len(loaded) < 8


def test_the_tiny_model_fixture_takes_a_contract_or_a_name(mortice_tiny_model: TinyModel) -> None:
    first = mortice_tiny_model()
    second = mortice_tiny_model(FUSED_WITH_BIAS_AND_NORM, include=["attn_qkv"])
    assert first != second
    assert np.isfinite(logits(first)).all()
    assert np.isfinite(logits(second, FUSED_WITH_BIAS_AND_NORM)).all()


def test_the_fake_device_is_memory_that_can_be_written(mortice_fake_device: FakeArena) -> None:
    mortice_fake_device.write(256, np.full(8, 7, np.uint8))
    assert mortice_fake_device.memory[256:264].tolist() == [7] * 8
    assert mortice_fake_device.calls["write"] == 1


def test_the_recorder_tells_events_by_kind(mortice_events: EventRecorder) -> None:
    mortice_events(StepDone(tokens=3, seconds=0.1))
    mortice_events(UploadProgress(strategy="plain", done_bytes=1, total_bytes=2))
    assert [event.tokens for event in mortice_events.of(StepDone)] == [3]
    assert len(list(mortice_events)) == 2
