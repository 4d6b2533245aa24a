"""A tiny model for the commands to work on, and a way to call them in this process."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from attrs import frozen

from mortice.core.cli.main import main
from mortice.core.plugin.registry import make_registry
from mortice.core.testing.tiny_models import write_tiny_model

TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


@frozen
class Ran:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output, which has to be one JSON document."""
        return json.loads(self.out)


Mortice = Callable[..., Ran]


class _Terminal(io.BytesIO):
    """Bytes that a person types."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def mortice(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Mortice:
    """Call the command line in this process; `stdin` is what it may read, with `errors` as Python opened it."""
    for name in [name for name in os.environ if name.startswith("MORTICE_")]:
        monkeypatch.delenv(name)

    def call(*arguments: object, stdin: bytes = b"", errors: str = "strict", terminal: bool = False) -> Ran:
        given = io.TextIOWrapper(_Terminal(stdin) if terminal else io.BytesIO(stdin), encoding="utf-8", errors=errors)
        monkeypatch.setattr(sys, "stdin", given)
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return call


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of two layers with random weights and a chat template."""
    contract = make_registry().contracts["llama"].value
    return write_tiny_model(
        tmp_path_factory.mktemp("models") / "tiny.gguf", contract, metadata={"tokenizer.chat_template": TEMPLATE}
    )
