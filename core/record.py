"""The record of a run: all that decided its tokens, and the tokens.

What is compared when a run is repeated: the model's files have to be the same, byte for byte; whatever else differs
(plugins, compiled code, device, libraries) is named, for it may be why tokens do.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from math import isfinite
from pathlib import Path
from typing import Any

import cattrs
from attrs import asdict, evolve, field, fields, frozen, has

from mortice.arch_contracts.expressions import Expression
from mortice.arch_contracts.structuring import make_converter, mistakes
from mortice.core.config import RunConfig
from mortice.core.config_layers import config_from
from mortice.core.counts import counted
from mortice.core.errors import InputError, ModelFileError
from mortice.core.file_hash import FileHash
from mortice.core.pipeline import Pipeline
from mortice.core.plugin.interfaces import Identified, Tuned
from mortice.core.text.generation import Piece
from mortice.core.text_file import parse_json, read_small_text
from mortice.core.version import __version__
from mortice.core.whole_file import write_text

__all__ = ["Difference", "Environment", "RecordedToken", "RunRecord", "first_difference", "read_record"]

_KIND = "mortice run"
_VERSION = 1
_MAX_BYTES = 256 << 20
_LIBRARIES = ("numpy", "gguf", "tokenizers", "cuda-python", "nvidia-cuda-nvrtc", "nvidia-cublas")


@frozen(kw_only=True)
class RecordedToken:
    """A token: its id, its text as the vocabulary has it, and the natural log-probability it was chosen with."""

    id: int
    text: str
    logprob: float = 0.0


@frozen(kw_only=True)
class Environment:
    """What a run ran in; each part by name, so that what differs can be named.

    Attributes:
        program: mortice, Python, the libraries and every plugin that took part, with versions.
        executor: its name, the upload strategy, how weights lie, the device, and what was chosen by measuring it.
        contract: the contract's name and the SHA-256 of what it says.
        code: SHA-256 of the compiled code or source that the executor ran, by piece.

    """

    program: Mapping[str, str]
    executor: Mapping[str, str]
    contract: Mapping[str, str]
    code: Mapping[str, str]

    @classmethod
    def of(cls, pipeline: Pipeline) -> Environment:
        """That of a pipeline whose weights are resident."""
        program = {"mortice": __version__, "python": platform.python_version(), "machine": platform.machine()}
        for library in _LIBRARIES:
            try:
                program[library] = metadata.version(library)
            except metadata.PackageNotFoundError:
                continue
        for record in pipeline.registry.manager.records.values():
            if record.status == "active":
                program[f"plugin {record.name}"] = _versioned(record.distribution, record.version)
        device, settings = pipeline.fit.device, pipeline.settings
        contract = pipeline.model.contract
        runtime = pipeline.runtime
        return cls(
            program=program,
            executor={
                "executor": pipeline.executor.name,
                "device": device.name,
                "compute capability": ".".join(map(str, device.compute_capability or ())),
                "context": str(settings.context_length),
                "KV cache": settings.kv_type,
                "activations": settings.activations,
                "step tokens": str(settings.step_tokens),
                "layouts": ", ".join(sorted({planned.layout.name for planned in pipeline.plan.weights})),
                **(runtime.measured_choices() if isinstance(runtime, Tuned) else {}),
            },
            contract={contract.name: hashlib.sha256(json.dumps(_plain(contract)).encode()).hexdigest()},
            code=dict(runtime.code_hashes()) if isinstance(runtime, Identified) else {},
        )

    def changes(self, now: Environment) -> Iterator[str]:
        """What is another now, one line each."""
        for part in ("program", "executor", "contract", "code"):
            before, after = getattr(self, part), getattr(now, part)
            for name in dict.fromkeys((*before, *after)):
                old, new = before.get(name, "none"), after.get(name, "none")
                if old != new:
                    what = {"contract": f"contract {name}", "code": f"code of {name}"}.get(part, name)
                    yield f"{what}: recorded with {_short(old)}, now {_short(new)}"


def _plain(value: Any) -> Any:
    """What a contract says, in an order that is the same in every process (that of a set of strings is not)."""
    if isinstance(value, Expression):
        return value.text
    if has(type(value)):
        return {attribute.name: _plain(getattr(value, attribute.name)) for attribute in fields(type(value))}
    if isinstance(value, Mapping):
        return [[key, _plain(item)] for key, item in value.items()]
    if isinstance(value, frozenset | set):
        return sorted(map(str, value))
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _versioned(distribution: str, version: str) -> str:
    return distribution if distribution.endswith(f" {version}") else f"{distribution} {version}".strip()


def _short(text: str) -> str:
    return text[:12] if len(text) == 64 and " " not in text else text or "none"


@frozen(kw_only=True)
class RunRecord:
    """A run.

    Attributes:
        config: every key of every table, the prompt and the seed as they were used.
        files: the model's files, hashed whole.
        environment: what it ran in.
        prompt: ids of the prompt.
        tokens: what was generated.
        finish_reason: why it ended.

    """

    config: RunConfig = field(repr=False)
    files: tuple[FileHash, ...]
    environment: Environment = field(repr=False)
    prompt: tuple[int, ...] = field(repr=False)
    tokens: tuple[RecordedToken, ...] = field(repr=False)
    finish_reason: str

    @classmethod
    def of(
        cls,
        pipeline: Pipeline,
        config: RunConfig,
        files: Sequence[FileHash],
        prompt: Sequence[int],
        pieces: Sequence[Piece],
    ) -> RunRecord:
        """The record of a run that has ended.

        Args:
            pipeline: what ran.
            config: its config, with the prompt's text and the seed that were used.
            files: hashes of the model's files.
            prompt: ids of the prompt.
            pieces: what was generated.

        """
        tokens = (
            RecordedToken(id=piece.id, text=pipeline.tokenizer.piece(piece.id), logprob=piece.logprob)
            for piece in pieces
        )
        return cls(
            config=config,
            files=tuple(files),
            environment=Environment.of(pipeline),
            prompt=tuple(prompt),
            tokens=tuple(tokens),
            finish_reason=str(pieces[-1].finish_reason) if pieces else "",
        )

    def write(self, path: Path) -> None:
        """Write it as JSON; the file is there complete or as it was.

        Raises:
            ExecutionError: when it cannot be written.

        """
        config = asdict(self.config)
        # where the program stands when it is replayed must not matter
        config["model"]["path"] = self.config.model.path and self.config.model.path.absolute()
        config["model"]["contract"] = self.config.model.contract and self.config.model.contract.absolute()
        document = {"record": _KIND, "version": _VERSION, **asdict(self), "config": config}
        write_text(path, json.dumps(document, indent=1, default=str) + "\n")

    def require_files(self, found: Sequence[FileHash], folder: Path) -> None:
        """Refuse a model that is not the recorded one. What counts is what is in its files, not how they are called.

        Raises:
            ModelFileError: naming the first file that differs, is missing or was not there.

        """
        rest, missing = list(found), []
        for file in self.files:
            same = [other for other in rest if (other.nbytes, other.sha256) == (file.nbytes, file.sha256)]
            if same:
                rest.remove(same[0])
            else:
                missing.append(file)
        alone = len(missing) == len(rest) == 1
        for file in missing:
            other = next((other for other in rest if alone or other.name == file.name), None)
            if other is None:
                raise ModelFileError(folder, f"has no file like {file.name} of the record")
            if other.nbytes != file.nbytes:
                message = f"has {counted(other.nbytes, 'byte')}, the record says {file.nbytes}"
            else:
                message = f"SHA-256 is {other.sha256[:12]}…, the record says {file.sha256[:12]}…"
            raise ModelFileError(folder / other.name, f"{message}: it is not the model that was run")
        if rest:
            raise ModelFileError(folder / rest[0].name, "is not among the model's files in the record")


def read_record(path: Path) -> RunRecord:
    """A record that `RunRecord.write` wrote.

    Raises:
        InputError: when the file cannot be read or is not a record of this version.
        ConfigError: for a config that is not understood, listing every mistake.

    """
    try:
        document = parse_json(read_small_text(path, InputError, _MAX_BYTES))
    except ValueError as error:
        raise InputError(f"{path}: not JSON: {error}") from None
    if not isinstance(document, dict) or document.pop("record", None) != _KIND:
        raise InputError(f"{path}: is no record of a run; mortice run --record writes one")
    version = document.pop("version", None)
    if version != _VERSION or isinstance(version, bool):
        raise InputError(f"{path}: found version {version!r} of the record, wanted {_VERSION}")
    given = document.pop("config", None)
    if not isinstance(given, dict):
        raise InputError(f"{path}: config: missing, wanted a table for each part")
    config = config_from(given, str(path))
    try:
        parts = make_converter().structure({**document, "config": {}}, RunRecord)
    except (cattrs.BaseValidationError, TypeError, ValueError) as error:
        raise InputError(f"{path}: {'; '.join(mistakes(error, 'record'))}") from None
    if config.prompt.text is None:
        raise InputError(f"{path}: config.prompt.text: missing, wanted the prompt that was run")
    for position, token in enumerate(parts.tokens):
        if not isfinite(token.logprob):
            raise InputError(f"{path}: tokens: {position}: logprob: found {token.logprob}, wanted a finite number")
    return evolve(parts, config=config)


@frozen(kw_only=True)
class Difference:
    """The first place where two runs differ.

    Attributes:
        part: ``prompt`` or ``answer``.
        position: counted in the part from 0.
        recorded: the token in the record; None when the record had ended.
        now: the token now; None when the run had ended.

    """

    part: str
    position: int
    recorded: RecordedToken | None
    now: RecordedToken | None

    def __str__(self) -> str:
        recorded, now = (_token_text(token) for token in (self.recorded, self.now))
        return f"token {self.position} of the {self.part} differs: recorded {recorded}, now {now}"


def _token_text(token: RecordedToken | None) -> str:
    return "the end" if token is None else f"{token.id} {token.text!r}"


def first_difference(part: str, recorded: Sequence[RecordedToken], now: Sequence[RecordedToken]) -> Difference | None:
    """Where two sequences of tokens part; None when they are equal."""
    for position in range(max(len(recorded), len(now))):
        old = recorded[position] if position < len(recorded) else None
        new = now[position] if position < len(now) else None
        if old is None or new is None or old.id != new.id:
            return Difference(part=part, position=position, recorded=old, now=new)
    return None
