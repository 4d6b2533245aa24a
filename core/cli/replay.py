"""``mortice replay``: a recorded run once more, and the first token that differs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from attrs import evolve, frozen
from cyclopts import Parameter

from mortice.core.cli.flags import ModelPath, OutputFlags
from mortice.core.cli.render import Screen, printable
from mortice.core.cli.run import prompt_ids
from mortice.core.cli.stages import note_model, planned, resident
from mortice.core.counts import counted
from mortice.core.errors import InputError

if TYPE_CHECKING:
    from mortice.core.config import RunConfig
    from mortice.core.pipeline import Pipeline
    from mortice.core.record import Difference, RecordedToken, RunRecord

__all__ = ["replay"]

_DIFFERENT = 1


@frozen(kw_only=True)
class _Replayed:
    """What became of it: tokens that were equal, the first that was not, and how far log-probabilities were apart."""

    equal_tokens: int
    difference: Difference | None
    logprob_drift: float


def replay(
    record: Annotated[ModelPath, Parameter(help="A file that mortice run --record wrote.")],
    /,
    *,
    model: Annotated[
        Path | None,
        Parameter(
            name=("--model", "-m"),
            help="Where the model is now, under any name; what is in its files has to be what was recorded.",
        ),
    ] = None,
    contract: Annotated[
        Path | None,
        Parameter(help="Where the contract of --contract is now; one that says something else is named as a change."),
    ] = None,
    executor: Annotated[str | None, Parameter(help="Run on another executor than the recorded one.")] = None,
    output: OutputFlags | None = None,
) -> int:
    """Repeat a recorded run and say the first token that differs.

    Config, prompt and seed are those of the record; the environment's variables are not read. Exit code 0 when every
    token is the same, 1 when one differs, 2 when the run cannot be repeated: another model, a config not understood.

    """
    from mortice.core.record import Environment, read_record

    output = output or OutputFlags()
    screen = Screen(json=output.json, quiet=output.quiet)
    recorded = read_record(record)
    config = _config(recorded, model, contract, executor)
    with planned(screen, config) as pipeline:
        note_model(screen, pipeline)
        pipeline.fit.require()
        _require_same_model(screen, recorded, pipeline)
        resident(screen, pipeline)
        changes = list(recorded.environment.changes(Environment.of(pipeline)))
        for change in changes:
            screen.note(change)
        found = _replayed(screen, recorded, config, pipeline)
    screen.result(
        {
            "equal": found.difference is None,
            "equal_tokens": found.equal_tokens,
            "difference": None if found.difference is None else _as_dict(found.difference),
            "logprob_drift": found.logprob_drift,
            "changes": changes,
        }
    )
    if found.difference is None:
        screen.say(
            f"equal: {counted(len(recorded.prompt), 'token')} of the prompt, {found.equal_tokens} of the answer; "
            f"log-probabilities differ by at most {found.logprob_drift:.2g}"
        )
        return 0
    screen.say(printable(str(found.difference)))
    return _DIFFERENT


def _config(recorded: RunRecord, model: Path | None, contract: Path | None, executor: str | None) -> RunConfig:
    """The recorded config with what the flags say.

    Raises:
        InputError: when model or contract is not where it was and no flag says where it is.

    """
    config = recorded.config
    for name, given, what in (("path", model, "model"), ("contract", contract, "contract")):
        before = getattr(config.model, name)
        if given is not None:
            changes: dict[str, Any] = {name: given}
            config = evolve(config, model=evolve(config.model, **changes))
        elif before is not None and not before.exists():
            raise InputError(f"{before}: no such file or folder; --{what} PATH says where the {what} of the run is now")
    if executor is not None:
        config = evolve(config, executor=evolve(config.executor, name=executor))
    return config


def _require_same_model(screen: Screen, recorded: RunRecord, pipeline: Pipeline) -> None:
    from mortice.core.file_hash import FileHashes

    file = pipeline.model.file
    with FileHashes(file.files) as hashes, screen.byte_progress("hashing the model") as progress:
        recorded.require_files(hashes.result(progress), file.files[0].parent)


def _replayed(screen: Screen, recorded: RunRecord, config: RunConfig, pipeline: Pipeline) -> _Replayed:
    """Run until the end or the first difference."""
    from mortice.core.record import RecordedToken, first_difference

    ids = prompt_ids(screen, pipeline, config.prompt)
    difference = first_difference("prompt", _tokens(pipeline, recorded.prompt), _tokens(pipeline, ids))
    tokens: list[RecordedToken] = []
    drift = 0.0
    if difference is None:
        with pipeline.session() as session:
            for piece in session.generate(ids, config.sampling, config.generation):
                text = pipeline.tokenizer.piece(piece.id)
                tokens.append(RecordedToken(id=piece.id, text=text, logprob=piece.logprob))
                before = recorded.tokens[len(tokens) - 1 : len(tokens)]
                if not before or before[0].id != piece.id:
                    break
                drift = max(drift, abs(before[0].logprob - piece.logprob))
        difference = first_difference("answer", recorded.tokens, tokens)
    equal = len(tokens) if difference is None else difference.position if difference.part == "answer" else 0
    return _Replayed(equal_tokens=equal, difference=difference, logprob_drift=drift)


def _tokens(pipeline: Pipeline, ids: Sequence[int]) -> list[RecordedToken]:
    """Tokens of a prompt. A recorded id beyond the vocabulary has no text: then the tokenizer is another."""
    from mortice.core.record import RecordedToken

    size = pipeline.tokenizer.vocab_size
    return [RecordedToken(id=token, text=pipeline.tokenizer.piece(token) if 0 <= token < size else "") for token in ids]


def _as_dict(difference: Difference) -> dict[str, Any]:
    def token(found: RecordedToken | None) -> dict[str, Any] | None:
        return None if found is None else {"id": found.id, "text": found.text, "logprob": found.logprob}

    return {
        "part": difference.part,
        "position": difference.position,
        "recorded": token(difference.recorded),
        "now": token(difference.now),
    }
