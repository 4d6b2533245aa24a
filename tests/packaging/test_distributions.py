"""What a user installs: the wheel, the source distribution and the editable installation."""

from __future__ import annotations

import json
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.packaging.running import ROOT, run

REPORT = """
import importlib, importlib.metadata, importlib.resources, json
names = ["mortice", "mortice.core", "mortice.core.errors", "mortice.plugins", "mortice.arch_contracts"]
contracts = importlib.resources.files("mortice.arch_contracts").iterdir()
print(json.dumps({
    "files": {name: importlib.import_module(name).__file__ for name in names},
    "contracts": sorted(entry.name for entry in contracts if entry.name.endswith(".toml")),
    "typed": importlib.resources.files("mortice").joinpath("py.typed").is_file(),
    "version": importlib.metadata.version("mortice"),
}))
"""
CONTRACTS = sorted(path.name for path in (ROOT / "arch_contracts").glob("*.toml"))


def package_files() -> set[str]:
    """Every file that belongs in the package, by its name there: sources, contracts, kernels, markers."""
    found = {"mortice/__init__.py", "mortice/py.typed"}
    for folder in ("core", "plugins", "arch_contracts"):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                found.add(f"mortice/{path.relative_to(ROOT).as_posix()}")
    return found


def contents(wheel: Path) -> dict[str, bytes]:
    """Files of a wheel but the record of their digests."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith("/RECORD")}


def report(python: Path, cwd: Path) -> dict[str, Any]:
    """What the mortice that `python` imports says of itself."""
    answer: dict[str, Any] = json.loads(run([python, "-I", "-c", REPORT], cwd=cwd))
    return answer


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = set(contents(wheel))
    assert {name for name in names if ".dist-info/" not in name} == package_files()
    information = {name.split(".dist-info/")[1] for name in names if ".dist-info/" in name}
    assert information == {"METADATA", "WHEEL", "entry_points.txt", "licenses/LICENSE"}


def test_the_wheel_names_no_folder_of_the_machine_that_built_it(wheel: Path) -> None:
    place = str(ROOT).encode()
    assert not [name for name, data in contents(wheel).items() if place in data]


def test_the_wheel_installs_and_runs(wheel: Path, new_venv: Callable[[str], Path], tmp_path: Path) -> None:
    python = new_venv("from-wheel")
    run([python, "-m", "pip", "install", "--no-deps", wheel], cwd=tmp_path)
    found = report(python, tmp_path)
    assert all(place.startswith(f"{python.parents[1]}/") for place in found["files"].values())
    assert (found["contracts"], found["typed"]) == (CONTRACTS, True)
    assert found["version"] in wheel.name
    assert "validate" in run([python.parent / "mortice", "--help"], cwd=tmp_path)


def test_the_source_distribution_gives_the_same_wheel(sdist: Path, wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path / "dist"], cwd=source)
    (rebuilt,) = (tmp_path / "dist").glob("*.whl")
    assert contents(rebuilt) == contents(wheel)


def test_the_source_distribution_carries_tests_and_documentation(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {"tests/unit/test_layering.py", "docs/index.md", "LICENSE", "README.md", "pyproject.toml"} <= names
    assert not [name for name in names if "__pycache__" in name or name.endswith((".pyc", ".gguf"))]


def test_an_editable_installation_reads_the_checkout(new_venv: Callable[[str], Path], tmp_path: Path) -> None:
    python = new_venv("editable")
    run(
        [python, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--editable", ROOT],
        cwd=tmp_path,
    )
    found = report(python, tmp_path)
    assert all(place.startswith(f"{ROOT}/") for place in found["files"].values())
    assert (found["contracts"], found["typed"]) == (CONTRACTS, True)
    assert "validate" in run([python.parent / "mortice", "--help"], cwd=tmp_path)


@pytest.mark.parametrize("name", ["core", "plugins", "arch_contracts"])
def test_no_installation_offers_a_bare_top_level_name(wheel: Path, name: str) -> None:
    assert not [file for file in contents(wheel) if file.startswith(f"{name}/")]
