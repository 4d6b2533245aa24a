"""Put pip into a virtual environment on a Python that has no ensurepip (Debian without python3-venv).

Tried in turn: the pip of the base interpreter; the index that PIP_INDEX_URL names; Debian's own pip wheel,
which `apt-get download` fetches without root.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import ssl
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urldefrag, urljoin

TIMEOUT_SECONDS = 60


class BootstrapError(Exception):
    """pip could not be had; the message says what was tried and what to do."""


class Wheel(NamedTuple):
    """One pip wheel that an index offers."""

    version: tuple[int, ...]
    url: str
    sha256: str


def install_pip(venv_python: Path) -> str:
    """Install pip for `venv_python`; returns where it came from.

    Raises:
        BootstrapError: no source worked.

    """
    tried: list[str] = []
    for source in (_from_base_interpreter, _from_index, _from_debian):
        try:
            return source(venv_python)
        except (BootstrapError, OSError, subprocess.CalledProcessError) as error:
            tried.append(str(error))
    raise BootstrapError(
        "this Python can make no virtual environment with pip: it has no ensurepip; "
        + "; ".join(tried)
        + ". Install it (on Debian: apt-get install python3-venv) or set PIP_INDEX_URL to a package index"
    )


def newest_pip(index_page: str, page_url: str, python: tuple[int, int]) -> Wheel:
    """Pick the newest final pip that runs on `python` from a simple index's page (PEP 503, PEP 592).

    Raises:
        BootstrapError: the page offers none that carries a SHA-256.

    """
    parser = _Links()
    parser.feed(index_page)
    wheels = [w for w in (_wheel(link, page_url, python) for link in parser.links) if w is not None]
    if not wheels:
        wanted = f"Python {python[0]}.{python[1]}"
        raise BootstrapError(f"{page_url} offers no pip wheel with a sha256 for {wanted}")
    return max(wheels)


class _Links(HTMLParser):
    """Collects the attributes of every anchor."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[dict[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        if tag == "a":
            self.links.append(dict(attrs))


def _wheel(link: dict[str, str | None], page_url: str, python: tuple[int, int]) -> Wheel | None:
    url, fragment = urldefrag(urljoin(page_url, link.get("href") or ""))
    name = re.search(r"/pip-(\d+(?:\.\d+)*)-py3-none-any\.whl$", url)
    digest = re.fullmatch(r"sha256=([0-9a-f]{64})", fragment)
    if name is None or digest is None or "data-yanked" in link:
        return None
    oldest = re.search(r">=\s*3\.(\d+)", link.get("data-requires-python") or "")
    if oldest is not None and python < (3, int(oldest[1])):
        return None
    return Wheel(tuple(int(part) for part in name[1].split(".")), url, digest[1])


def _from_base_interpreter(venv_python: Path) -> str:
    if importlib.util.find_spec("pip") is None:
        raise BootstrapError("it has no pip")
    command = [sys.executable, "-m", "pip", "--python", str(venv_python), "install", "--quiet", "pip"]
    subprocess.run(command, check=True)
    return f"the pip of {sys.executable}"


def _from_index(venv_python: Path) -> str:
    index = os.environ.get("PIP_INDEX_URL")
    if not index:
        raise BootstrapError("PIP_INDEX_URL is not set")
    page_url = index.rstrip("/") + "/pip/"
    page = _get(page_url, accept="text/html").decode("utf-8", "replace")
    wheel = newest_pip(page, page_url, sys.version_info[:2])
    content = _get(wheel.url)
    found = hashlib.sha256(content).hexdigest()
    if found != wheel.sha256:
        raise BootstrapError(f"{wheel.url}: sha256 {found}, the index says {wheel.sha256}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, wheel.url.rsplit("/", 1)[1])
        path.write_bytes(content)
        _install_wheel(venv_python, path)
    return wheel.url


def _get(url: str, accept: str = "*/*") -> bytes:
    request = urllib.request.Request(url, headers={"Accept": accept})
    context = ssl.create_default_context(cafile=os.environ.get("PIP_CERT"))
    with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS, context=context) as answer:
        content: bytes = answer.read()
    return content


def _from_debian(venv_python: Path) -> str:
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise BootstrapError("there is no apt-get")
    with tempfile.TemporaryDirectory() as folder:
        refusal = _apt_get(folder, ["download", "python3-pip-whl"])
        if refusal:  # images often come without package lists; fetch them aside and leave the system's as they are
            Path(folder, "lists/partial").mkdir(parents=True)
            Path(folder, "cache/archives/partial").mkdir(parents=True)
            aside = ["-o", f"Dir::State::lists={folder}/lists", "-o", f"Dir::Cache={folder}/cache"]
            refusal = _apt_get(folder, [*aside, "update"])
            refusal = refusal or _apt_get(folder, [*aside, "download", "python3-pip-whl"])
        packages = list(Path(folder).glob("python3-pip-whl_*.deb"))
        if refusal or not packages:
            raise BootstrapError(f"apt-get download python3-pip-whl failed ({refusal})")
        subprocess.run(["dpkg-deb", "-x", str(packages[0]), folder], check=True)
        wheels = list(Path(folder).glob("usr/share/python-wheels/pip-*.whl"))
        if not wheels:
            raise BootstrapError(f"{packages[0].name} holds no pip wheel")
        _install_wheel(venv_python, wheels[0])
    return f"Debian's {packages[0].name}"


def _apt_get(folder: str, arguments: list[str]) -> str:
    """Run apt-get in `folder`; returns the last line of what went wrong, or an empty text."""
    command = ["apt-get", "-qq", "-o", "APT::Sandbox::User=root", *arguments]
    answer = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if answer.returncode == 0:
        return ""
    return (answer.stderr.strip() or f"exit code {answer.returncode}").split("\n")[-1]


def _install_wheel(venv_python: Path, wheel: Path) -> None:
    """Let the pip inside `wheel` install itself (a wheel is a zip that Python can run from)."""
    command = [str(venv_python), f"{wheel}/pip", "install", "--quiet", "--no-index", str(wheel)]
    subprocess.run(command, check=True)
