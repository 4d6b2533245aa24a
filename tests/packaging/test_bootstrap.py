"""The two helpers of the set-up: pip for a Python without ensurepip, and the extra that suits a driver."""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType

import pytest

from tests.packaging.running import ROOT


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / ".ci" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


bootstrap_pip, cuda_extra = load("bootstrap_pip"), load("cuda_extra")


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name is the base class's
        pass


@pytest.fixture
def index(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A package index on this machine: its address and the folder that it serves."""
    folder = tmp_path / "index"
    (folder / "pip").mkdir(parents=True)
    handler = partial(QuietHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", folder
        server.shutdown()
        thread.join()


@pytest.fixture
def pip_wheel() -> Path:
    """The pip wheel that came with this Python or with Debian."""
    bundled = importlib.util.find_spec("ensurepip")
    folders = [Path("/usr/share/python-wheels")]
    if bundled is not None and bundled.origin is not None:
        folders.insert(0, Path(bundled.origin).parent / "_bundled")
    found = [wheel for folder in folders for wheel in folder.glob("pip-*.whl")]
    if not found:
        pytest.skip("no pip wheel on this machine")
    return found[0]


@pytest.fixture
def bare_python(tmp_path: Path) -> Path:
    """Python of a virtual environment that has no pip."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    return tmp_path / "bare/bin/python"


def publish(index_folder: Path, wheel: Path, digest: str) -> None:
    (index_folder / wheel.name).write_bytes(wheel.read_bytes())
    page = f'<a href="../{wheel.name}#sha256={digest}" data-requires-python="&gt;=3.7">{wheel.name}</a>'
    (index_folder / "pip/index.html").write_text(page)


def test_pip_comes_from_the_index_that_is_named(
    index: tuple[str, Path], pip_wheel: Path, bare_python: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(index[1], pip_wheel, hashlib.sha256(pip_wheel.read_bytes()).hexdigest())
    monkeypatch.setenv("PIP_INDEX_URL", index[0])
    monkeypatch.delenv("PIP_CERT", raising=False)
    assert bootstrap_pip._from_index(bare_python) == f"{index[0]}/{pip_wheel.name}"
    version = subprocess.run([bare_python, "-m", "pip", "--version"], capture_output=True, text=True, check=True)
    assert version.stdout.startswith(f"pip {pip_wheel.name.split('-')[1]} ")


def test_a_pip_with_another_digest_than_the_index_says_is_refused(
    index: tuple[str, Path], pip_wheel: Path, bare_python: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(index[1], pip_wheel, "0" * 64)
    monkeypatch.setenv("PIP_INDEX_URL", index[0])
    monkeypatch.delenv("PIP_CERT", raising=False)
    with pytest.raises(bootstrap_pip.BootstrapError, match=f"the index says {'0' * 64}"):
        bootstrap_pip._from_index(bare_python)


def test_the_newest_pip_that_runs_on_this_python_is_taken() -> None:
    def link(name: str, attributes: str = "", digest: str = f"#sha256={'a' * 64}") -> str:
        return f'<a href="https://files.example/{name}{digest}" {attributes}>{name}</a>\n'

    page = (
        link("pip-9.0.3-py2.py3-none-any.whl")
        + link("pip-9.9-py3-none-any.whl")
        + link("pip-24.10-py3-none-any.whl", 'data-requires-python="&gt;=3.8"')
        + link("pip-24.9-py3-none-any.whl")
        + link("pip-25.0-py3-none-any.whl", 'data-yanked=""')
        + link("pip-25.1-py3-none-any.whl", digest="")
        + link("pip-25.2b1-py3-none-any.whl")
        + link("pip-30.0-py3-none-any.whl", 'data-requires-python="&gt;=3.12"')
        + link("pip-24.11.tar.gz")
    )
    address = "https://files.example/pip/"
    assert bootstrap_pip.newest_pip(page, address, (3, 11)).url.endswith("/pip-24.10-py3-none-any.whl")
    assert bootstrap_pip.newest_pip(page, address, (3, 12)).url.endswith("/pip-30.0-py3-none-any.whl")
    with pytest.raises(bootstrap_pip.BootstrapError, match="offers no pip wheel"):
        bootstrap_pip.newest_pip(link("pip-24.11.tar.gz"), address, (3, 11))


def test_without_any_source_of_pip_the_message_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap_pip.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("PIP_INDEX_URL", raising=False)
    with pytest.raises(bootstrap_pip.BootstrapError, match=r"apt-get install python3-venv.*PIP_INDEX_URL"):
        bootstrap_pip.install_pip(tmp_path / "python")


@pytest.mark.parametrize(
    ("driver", "extra"),
    [
        ("590.44.01", "cuda13"),
        ("580.65.06", "cuda13"),
        ("579.99", "cuda12"),
        ("525.60.13", "cuda12"),
        ("470.1", None),
    ],
)
def test_the_driver_decides_the_cuda_extra(driver: str, extra: str | None) -> None:
    choice = cuda_extra.for_driver(driver)
    assert choice.extra == extra
    assert f"NVIDIA driver {driver}" in choice.reason


@pytest.mark.parametrize(("version", "extra"), [(13010, "cuda13"), (12080, "cuda12"), (11080, None)])
def test_the_cuda_version_decides_where_there_is_no_nvidia_smi(version: int, extra: str | None) -> None:
    assert cuda_extra.for_cuda_version(version).extra == extra


@pytest.mark.parametrize(
    ("script", "extra"),
    [
        ("echo 580.65.06; echo 580.65.06", "cuda13"),
        ("echo 'NVIDIA-SMI has failed: no driver'; exit 9", None),
        ("echo 'No devices were found'", None),
    ],
)
def test_nvidia_smi_is_believed_only_where_it_names_a_driver(
    script: str, extra: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = tmp_path / "nvidia-smi"
    command.write_text(f"#!/bin/sh\n{script}\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(cuda_extra, "_from_libcuda", lambda: None)
    assert cuda_extra.choose("auto").extra == extra
