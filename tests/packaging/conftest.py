"""Virtual environments and built distributions that the packaging tests share."""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.packaging.running import ROOT, run


@pytest.fixture(scope="session")
def packages_without_mortice(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of links to all installed packages but mortice, so that no test downloads its dependencies."""
    folder = tmp_path_factory.mktemp("packages")
    for kind in ("purelib", "platlib"):
        for entry in Path(sysconfig.get_path(kind)).iterdir():
            link = folder / entry.name
            if "mortice" not in entry.name.lower() and not link.exists():
                link.symlink_to(entry)
    return folder


@pytest.fixture(scope="session")
def make_venv(packages_without_mortice: Path) -> Callable[[Path], Path]:
    """Give a function that makes a virtual environment with all packages but mortice; returns its Python."""

    def make(venv: Path) -> Path:
        run([sys.executable, "-m", "venv", "--without-pip", venv], cwd=venv.parent)
        site_packages = next(venv.glob("lib/python*/site-packages"))
        (site_packages / "others.pth").write_text(f"{packages_without_mortice}\n")
        nvidia = packages_without_mortice / "nvidia"
        if nvidia.exists():  # cuda-python looks for NVRTC in site-packages itself
            (site_packages / nvidia.name).symlink_to(nvidia)
        return venv / "bin" / "python"

    return make


@pytest.fixture
def new_venv(tmp_path: Path, make_venv: Callable[[Path], Path]) -> Callable[[str], Path]:
    """`make_venv` for an environment of a given name in the test's own folder."""
    return lambda name: make_venv(tmp_path / name)


@pytest.fixture(scope="session")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder that holds the wheel and the source distribution of this checkout."""
    folder = tmp_path_factory.mktemp("dist")
    run([sys.executable, "-m", "hatchling", "build", "-d", folder], cwd=ROOT)
    return folder


@pytest.fixture(scope="session")
def wheel(distributions: Path) -> Path:
    """The wheel built straight from this checkout."""
    (path,) = distributions.glob("*.whl")
    return path


@pytest.fixture(scope="session")
def sdist(distributions: Path) -> Path:
    """The source distribution of this checkout."""
    (path,) = distributions.glob("*.tar.gz")
    return path
