"""What `mortice plugins new` writes: each kind is installed into one fresh environment, and its tests pass there."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from mortice.core.scaffold.package import KINDS
from tests.packaging.running import run

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("new plugins")]


@pytest.fixture
def python(wheel: Path, new_venv: Callable[[str], Path], tmp_path: Path) -> Path:
    """Python of an environment with mortice and a plugin of each kind, all installed from wheels."""
    made = new_venv("plugins")
    run([made, "-m", "pip", "install", "--no-deps", wheel], cwd=tmp_path)
    for kind in KINDS:
        run([made.parent / "mortice", "plugins", "new", f"acme-{kind}", "--kind", kind], cwd=tmp_path)
    folders = [f"./acme-{kind}" for kind in KINDS]
    run([made, "-m", "pip", "install", "--no-deps", "--no-build-isolation", *folders], cwd=tmp_path)
    return made


def test_a_package_of_each_kind_installs_and_its_tests_pass(python: Path, tmp_path: Path) -> None:
    for kind in KINDS:
        said = run([python, "-m", "pytest", "-q", "-p", "no:cacheprovider"], cwd=tmp_path / f"acme-{kind}")
        assert " passed" in said
    listed = {plugin["name"]: plugin for plugin in json.loads(_mortice(python, "list", "--json"))}
    gives = {kind: listed[f"acme-{kind}"]["gives"] for kind in KINDS}
    assert gives == {
        "arch": {"contracts": ["acme_arch"]},
        "qtype": {"qtypes": ["ACME_QTYPE"]},
        "upload": {"uploads": ["acme-upload"]},
        "loader": {"loaders": ["acme-loader"]},
    }
    assert {listed[f"acme-{kind}"]["contract_version"] for kind in KINDS} == {1}
    assert {listed[f"acme-{kind}"]["distribution"] for kind in KINDS} == {f"acme-{kind} 0.1.0" for kind in KINDS}
    for kind in KINDS:
        assert " 0 failed" in _mortice(python, "check", f"acme-{kind}")


def _mortice(python: Path, *arguments: str) -> str:
    with tempfile.TemporaryDirectory() as elsewhere:
        return run([python.parent / "mortice", "plugins", *arguments, "-q"], cwd=Path(elsewhere))
