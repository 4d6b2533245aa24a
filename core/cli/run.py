"""``mortice run``: one prompt, one answer; or many from a file, see `run_many`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from attrs import evolve
from cyclopts import Parameter

from mortice.core.cli.answer import (
    Answer,
    check_prompt,
    give_answer,
    prompt_encoder,
    read_stdin,
    require_chat,
)
from mortice.core.cli.flags import (
    ConfigFlags,
    ConfigOrModel,
    ExecutorFlags,
    GenerationFlags,
    ModelFlags,
    OutputFlags,
    PluginFlags,
    PromptFlags,
    config_or_model,
    settings,
)
from mortice.core.cli.render import Screen
from mortice.core.cli.run_many import run_many
from mortice.core.cli.stages import note_model, planned, resident
from mortice.core.cli.written_files import ForceFlag, require_writable
from mortice.core.errors import ConfigError

if TYPE_CHECKING:
    from mortice.core.config import PromptConfig, RunConfig
    from mortice.core.file_hash import FileHashes
    from mortice.core.pipeline import Pipeline

__all__ = ["prompt_ids", "run"]


def run(
    config: ConfigOrModel = None,
    /,
    *,
    model: ModelFlags | None = None,
    prompt: PromptFlags | None = None,
    record: Annotated[
        Path | None, Parameter(help="Write all that decided the answer into this JSON file, for mortice replay.")
    ] = None,
    jsonl: Annotated[
        Path | None,
        Parameter(
            help="Answer many prompts at once: one JSON object a line in this file, - for standard input, with prompt, "
            "and if wanted id and any sampling or generation key.",
            allow_leading_hyphen=True,
        ),
    ] = None,
    output: Annotated[
        Path | None, Parameter(help="Write the results of --jsonl into this file, not on standard output.")
    ] = None,
    force: ForceFlag = False,
    generation: GenerationFlags | None = None,
    executor: ExecutorFlags | None = None,
    plugins: PluginFlags | None = None,
    any_key: ConfigFlags | None = None,
    talk: OutputFlags | None = None,
) -> int:
    """Answer one prompt with a model, or many at once.

    The answer is streamed to standard output; what was found out about the file, the memory needed, the upload and
    the speed go to standard error.

    """
    talk = talk or OutputFlags()
    screen = Screen(json=talk.json, quiet=talk.quiet)
    config, model = config_or_model(config, model)
    chosen = settings(config, model, prompt, generation, executor, plugins, any_key).config
    inputs = [config, chosen.model.path, chosen.model.contract]
    if jsonl is not None:
        _require_alone(prompt, record, talk)
        _require_given(chosen, prompt=False)
        return run_many(screen, chosen, jsonl, output, inputs, force=force)
    if output is not None:
        raise ConfigError("--output: only the results of --jsonl go to a file; pass --jsonl too, or leave it out")
    _require_given(chosen)
    if record is not None:
        require_writable("--record", record, force=force, inputs=inputs)
    text = _prompt_text(chosen.prompt)
    sampling = chosen.sampling.seeded()
    chosen = evolve(chosen, prompt=evolve(chosen.prompt, text=text), sampling=sampling)
    with planned(screen, chosen) as pipeline:
        note_model(screen, pipeline)
        if record is not None:
            require_writable("--record", record, force=force, inputs=pipeline.model.file.files)
        pipeline.fit.require()
        ids = prompt_ids(screen, pipeline, chosen.prompt)
        check_prompt(pipeline, ids)
        with _hashing(pipeline, record) as hashes:
            resident(screen, pipeline)
            answer = Answer(prompt_tokens=len(ids))
            with pipeline.session() as session:
                give_answer(screen, pipeline, session, ids, sampling, chosen.generation, answer)
            if record is not None and hashes is not None:
                _write_record(screen, record, pipeline, chosen, hashes, ids, answer)
        screen.note(answer.speed_text())
        if not sampling.greedy:
            screen.note(f"seed {sampling.seed}")
        screen.result(
            {
                "model": chosen.model.path,
                "contract": pipeline.model.contract.name,
                "executor": pipeline.executor.name,
                "executor_reason": pipeline.executor_reason,
                "device": pipeline.fit.device.name,
                "seed": None if sampling.greedy else sampling.seed,
                **answer.as_dict(),
            }
        )
    return 0


def _require_alone(prompt: PromptFlags | None, record: Path | None, talk: OutputFlags) -> None:
    """Refuse flags that make no sense beside a file of prompts."""
    if prompt is not None and prompt.prompt_text is not None:
        raise ConfigError("--prompt: --jsonl gives the prompts; pass one of the two")
    if record is not None:
        raise ConfigError("--record: keeps the run of one prompt; leave it or --jsonl out")
    if talk.json:
        raise ConfigError("--json: the results of --jsonl are JSON already, an object a line; leave it out")


def _require_given(config: RunConfig, *, prompt: bool = True) -> None:
    """Refuse a run without model or, where one is needed, prompt, naming both where both are missing."""
    missing = []
    if config.model.path is None:
        missing.append(("model.path: no model given", "--model FILE"))
    if prompt and config.prompt.text is None:
        missing.append(("prompt.text: no prompt given", "--prompt TEXT"))
    if missing:
        what, flags = zip(*missing, strict=True)
        it = "it" if len(missing) == 1 else "them"
        raise ConfigError(f"{', '.join(what)}; pass {' and '.join(flags)} or set {it} in the config")


def _prompt_text(prompt: PromptConfig) -> str:
    assert prompt.text is not None, "it has been checked"
    require_chat(prompt)
    if prompt.text != "-":
        return prompt.text
    return read_stdin().removesuffix("\n").removesuffix("\r")


@contextmanager
def _hashing(pipeline: Pipeline, record: Path | None) -> Iterator[FileHashes | None]:
    """Hash the model's files beside the run, when it is recorded."""
    from mortice.core.file_hash import FileHashes

    if record is None:
        yield None
    else:
        with FileHashes(pipeline.model.file.files) as hashes:
            yield hashes


def _write_record(
    screen: Screen,
    path: Path,
    pipeline: Pipeline,
    config: RunConfig,
    hashes: FileHashes,
    ids: list[int],
    answer: Answer,
) -> None:
    from mortice.core.record import RunRecord

    with screen.byte_progress("hashing the model") as progress:
        files = hashes.result(progress)
    RunRecord.of(pipeline, config, files, ids, answer.pieces).write(path)
    screen.note(f"record of the run in {path}; mortice replay {path} repeats it")


def prompt_ids(screen: Screen, pipeline: Pipeline, prompt: PromptConfig) -> list[int]:
    """Token ids of what is asked, through the chat template where the prompt is one of a chat."""
    assert prompt.text is not None, "it has been checked"
    with prompt_encoder(screen, pipeline, prompt) as encode:
        return encode(prompt.text)
