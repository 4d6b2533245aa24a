"""The parent's side of the process that renders a chat template: starts it, asks it, ends it."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attrs import frozen

from mortice.core.errors import TemplateError

__all__ = ["TemplateLimits", "TemplateProcess"]

_WORKER = Path(__file__).with_name("template_worker.py")
_ENVIRONMENT = ("LD_LIBRARY_PATH", "PATH", "TZ")
_KEY = "tokenizer.chat_template"


@frozen(kw_only=True)
class TemplateLimits:
    """What a template may take.

    Attributes:
        cpu_seconds: processor time for compiling it, and for each rendering.
        wall_seconds: real time for the same, waited for on a machine busy with other things.
        memory_bytes: address space of the process that renders.
        output_chars: length of a rendering.
        source_chars: length of the template.

    """

    cpu_seconds: float = 1.0
    wall_seconds: float = 20.0
    memory_bytes: int = 512 << 20
    output_chars: int = 4 << 20
    source_chars: int = 1 << 20


class TemplateProcess:
    """Renders one template in a child process, started on first use and kept. Safe to use from several threads."""

    def __init__(self, source: str, limits: TemplateLimits, where: str = _KEY) -> None:
        self._where = where
        if len(source) > limits.source_chars:
            raise TemplateError(f"{where}: {len(source)} characters, wanted at most {limits.source_chars}")
        self._limits = limits
        self._setup = {
            "template": source,
            "cpu_seconds": limits.cpu_seconds,
            "memory_bytes": limits.memory_bytes,
            "output_chars": limits.output_chars,
        }
        self._lock = threading.Lock()
        self._child: _Child | None = None

    def start(self) -> None:
        """Start the process without waiting for it."""
        with self._lock:
            self._started()

    def render(self, variables: Mapping[str, Any]) -> str:
        """The template's text for `variables`, which must be JSON values.

        Raises:
            TemplateError: the template is broken, raises, or takes more than its limits.

        """
        return self._ask(json.dumps({"render": variables}))

    def check(self) -> None:
        """Compile the template without rendering it.

        Raises:
            TemplateError: the template is broken, or takes more than its limits.

        """
        self._ask(None)

    def audit(self) -> list[tuple[int, str]]:
        """What in the template looks suspicious: line and reason (`template_constructs`).

        Raises:
            TemplateError: the template is broken, or takes more than its limits.

        """
        return [(line, reason) for line, reason in json.loads(self._ask(json.dumps({"audit": True})))]

    def _ask(self, request: str | None) -> str:
        """The answer to a request; None only compiles."""
        with self._lock:
            child = self._started()
            try:
                if not child.compiled:
                    child.ask(None, self._limits)
                    child.compiled = True
                return "" if request is None else child.ask(request, self._limits)
            except _Refused as refusal:
                if refusal.fatal or not child.compiled:
                    self._end()
                raise TemplateError(f"{self._where}: {refusal}") from None
            except BaseException:  # an interrupt leaves an answer unread: this child cannot be asked again
                self._end()
                raise

    def close(self) -> None:
        """End the process. A later `render` starts another."""
        with self._lock:
            self._end()

    def _started(self) -> _Child:
        child = self._child
        if child is None or child.owner != os.getpid():
            if not sys.executable:
                raise TemplateError(
                    f"{self._where}: no Python interpreter found (sys.executable is empty) to render it in"
                )
            self._child = child = _Child(json.dumps({**self._setup, "sys_path": sys.path}))
        return child

    def _end(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.end()


class _Refused(Exception):  # noqa: N818 - not an error of ours
    def __init__(self, reason: str, *, fatal: bool) -> None:
        super().__init__(reason)
        self.fatal = fatal


class _Child:
    """One running worker and the two pipes to it."""

    def __init__(self, setup: str) -> None:
        self.owner = os.getpid()
        self.compiled = False
        self._process = subprocess.Popen(  # noqa: S603 - our own script
            [sys.executable, "-I", "-S", str(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ} | {"PYTHONUTF8": "1"},
            cwd="/",
            start_new_session=True,
            bufsize=0,
        )
        self._rest = b""
        self.end = weakref.finalize(self, _end_process, self._process, self.owner)
        self._send(setup)

    def ask(self, request: str | None, limits: TemplateLimits) -> str:
        if request is not None:
            self._send(request)
        answer = json.loads(self._receive(limits))
        if "error" in answer:
            raise _Refused(answer["error"], fatal=False)
        text: str = answer["text"]
        return text

    def _send(self, line: str) -> None:
        pipe = self._process.stdin
        assert pipe is not None, "opened with a pipe"
        data = memoryview(line.encode() + b"\n")
        try:
            while data:
                data = data[pipe.write(data) :]
        except BrokenPipeError:
            pass  # it has died; reading its answer says of what

    def _receive(self, limits: TemplateLimits) -> bytes:
        pipe = self._process.stdout
        assert pipe is not None, "opened with a pipe"
        deadline = time.monotonic() + limits.wall_seconds
        parts = [self._rest]
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, selectors.EVENT_READ)
            while b"\n" not in parts[-1]:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise _Refused(f"no answer within {limits.wall_seconds:g} s", fatal=True)
                data = pipe.read(1 << 20)
                if not data:
                    raise _Refused(self._cause_of_death(limits), fatal=True)
                parts.append(data)
        line, _, self._rest = b"".join(parts).partition(b"\n")
        return line

    def _cause_of_death(self, limits: TemplateLimits) -> str:
        code = self._process.wait()
        if code == -signal.SIGPROF:
            return f"it takes more than {limits.cpu_seconds:g} s of processor time"
        return f"rendering it ended the process it runs in (exit status {code})"


def _end_process(process: subprocess.Popen[bytes], owner: int) -> None:
    if os.getpid() != owner:  # a fork's copy: the process is not its child
        return
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
