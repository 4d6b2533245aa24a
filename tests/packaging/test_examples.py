"""The example packages as third parties have them: wheels, in a fresh environment, each with its own tests."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.packaging.running import ROOT, run

EXAMPLES = ROOT / "docs" / "examples"
PACKAGES = sorted(path.parent.name for path in EXAMPLES.glob("*/pyproject.toml"))
GIVES = {
    "mortice-fused": {"contracts": ["fused"]},
    "mortice-postnorm": {"contracts": ["postnorm"]},
    "mortice-q1": {"qtypes": ["Q1_0"]},
}


@pytest.fixture(scope="module")
def python(make_venv: Callable[[Path], Path], wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of an environment with mortice and all examples installed from wheels."""
    folder = tmp_path_factory.mktemp("examples")
    for package in PACKAGES:
        source = shutil.copytree(EXAMPLES / package, folder / package)
        run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder / "wheels"], cwd=source)
    python = make_venv(folder / "venv")
    wheels = sorted((folder / "wheels").glob("*.whl"))
    assert len(wheels) == len(PACKAGES)
    run([python, "-m", "pip", "install", "--no-deps", wheel, *wheels], cwd=folder)
    return python


def test_every_example_is_listed() -> None:
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert set(GIVES) == set(PACKAGES)
    assert all(f"({package}/README.md)" in text for package in PACKAGES)


def test_they_are_found_side_by_side(python: Path, tmp_path: Path) -> None:
    listed = json.loads(run([python.parent / "mortice", "plugins", "list", "--json"], cwd=tmp_path))
    found = {plugin["distribution"].split()[0]: plugin for plugin in listed}
    for package, gives in GIVES.items():
        assert found[package]["status"] == "active"
        assert found[package]["gives"] == gives


@pytest.mark.parametrize("package", PACKAGES)
def test_its_own_tests_pass(package: str, python: Path, tmp_path: Path) -> None:
    shutil.copytree(EXAMPLES / package / "tests", tmp_path / "tests")
    said = run([python, "-m", "pytest", "-q", "-rs", "-W", "error", "-p", "no:cacheprovider", "tests"], cwd=tmp_path)
    print(said)
    assert " passed" in said
    assert "failed" not in said


@pytest.mark.parametrize("plugin", ["fused", "postnorm", "q1"])
def test_it_passes_the_check_of_the_command_line(plugin: str, python: Path, tmp_path: Path) -> None:
    said = run([python.parent / "mortice", "plugins", "check", plugin], cwd=tmp_path)
    assert f"{plugin}: " in said
    assert " 0 failed" in said
