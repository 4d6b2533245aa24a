"""``mortice parity``: whether an executor computes what the reference does."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from attrs import evolve
from cyclopts import Parameter

from mortice.core.cli.flags import CommonFlags, ExecutorFlags, FileFlags, ModelPath, counts
from mortice.core.cli.render import Screen
from mortice.core.cli.written_files import ForceFlag, require_writable
from mortice.core.errors import ConfigError, InputError, UnsupportedError
from mortice.core.text_file import read_small_text

if TYPE_CHECKING:
    from mortice.core.config import RunConfig
    from mortice.core.parity.report import Cell
    from mortice.core.parity.results import ParityReport
    from mortice.core.pipeline import Pipeline
    from mortice.core.plugin.registry import Registry

__all__ = ["parity"]

_NEEDS_TWO = (
    "parity compares two executors: run it where both have a device, or choose others (--executor, --against). "
    "On a CPU alone, `mortice validate --deep` checks the file, and `mortice plugins check` what a plugin gives, "
    "CUDA headers too"
)


def parity(
    model: ModelPath,
    /,
    *,
    against: Annotated[str, Parameter(help="The executor that is right.")] = "reference",
    text: Annotated[
        Path | None, Parameter(help="A UTF-8 file whose text is fed; by default a text in several scripts.")
    ] = None,
    token_ids: Annotated[
        tuple[int, ...],
        Parameter(
            help="Token ids to feed, separated by commas, for files without a tokenizer.",
            converter=counts,
            negative=(),
            n_tokens=1,
            show_default=False,
        ),
    ] = (),
    tokens: Annotated[int, Parameter(help="The most tokens that are fed.")] = 256,
    tolerances: Annotated[
        Literal["auto", "exact", "rounded"],
        Parameter(help="What may differ; auto is exact with --kv f32 --activations f32, else rounded."),
    ] = "auto",
    heatmap: Annotated[
        Path | None, Parameter(help="Draw errors by layer and kind into this PNG file; needs mortice[pictures].")
    ] = None,
    force: ForceFlag = False,
    contract: FileFlags | None = None,
    executor: ExecutorFlags | None = None,
    common: CommonFlags | None = None,
) -> int:
    """Compare what two executors compute: every operator's value, and the distributions of the next token.

    The executor tested is cuda, unless --executor says otherwise. Exit code 1 when anything is beyond tolerance.

    """
    from mortice.core.parity.compare import compare
    from mortice.core.parity.report import as_dict, load_matplotlib, write_picture
    from mortice.core.parity.tolerances import EXACT, ROUNDED

    common = common or CommonFlags()
    if text is not None and token_ids:
        raise ConfigError("--text and --token-ids: found both, wanted one")
    if tokens < 1:
        raise ConfigError(f"--tokens: found {tokens}, wanted at least 1")
    screen = common.screen()
    chosen = common.settings(contract, executor).config
    if heatmap is not None:
        inputs = [model, text, common.config, chosen.model.contract]
        require_writable("--heatmap", heatmap, force=force, inputs=inputs)
        load_matplotlib()  # a missing package is better known before than after
    chosen = evolve(chosen, model=evolve(chosen.model, path=model))
    with ExitStack() as stack:
        oracle, tested = _open_both(stack, chosen, against, tokens, screen)
        if heatmap is not None:
            require_writable("--heatmap", heatmap, force=force, inputs=oracle.model.file.files)
        ids, source = _tokens(oracle, text, token_ids, tokens)
        report = compare(
            oracle,
            tested,
            ids,
            text=source,
            note=screen.note,
            tolerances={"auto": None, "exact": EXACT, "rounded": ROUNDED}[tolerances],
        )
    screen.result(as_dict(report))
    if not screen.json:
        _print(screen, report)
    if heatmap is not None:
        if not report.comparisons:
            raise UnsupportedError("parity --heatmap: an executor cannot show its values, so there is nothing to draw")
        write_picture(report, heatmap)
        screen.note(f"{heatmap} written")
    return 0 if report.passed else 1


# what is compared ------------------------------------------------------------------------------------------------


def _open_both(
    stack: ExitStack, config: RunConfig, against: str, tokens: int, screen: Screen
) -> tuple[Pipeline, Pipeline]:
    """The oracle, with settings of its own in float32, and the executor tested, with those of the config."""
    from mortice.core.parity.compare import SPARE_CONTEXT
    from mortice.core.stages import choose_executor, registry_for

    name = "cuda" if config.executor.name == "auto" else config.executor.name
    if name == against:
        raise ConfigError(f"--executor and --against: found {name!r} twice, wanted two executors")
    registry = registry_for(config)
    for each in (name, against):
        choose_executor(registry, each, advice=_NEEDS_TWO)
    context = config.executor.context or tokens + SPARE_CONTEXT
    tested = evolve(config, executor=evolve(config.executor, name=name, context=context))
    oracle = evolve(
        tested,
        executor=evolve(tested.executor, name=against, kv="f32", activations="f32"),
        upload=evolve(tested.upload, strategy="auto"),
        kernels=evolve(tested.kernels, layout="auto"),
    )
    # the one tested first: what it refuses is known before the oracle takes its time
    opened = [_open(stack, each, registry, screen) for each in (tested, oracle)]
    return opened[1], opened[0]


def _open(stack: ExitStack, config: RunConfig, registry: Registry, screen: Screen) -> Pipeline:
    from mortice.core.pipeline import prepare

    pipeline = stack.enter_context(prepare(config, registry))
    with screen.upload_progress(registry.observers):
        pipeline.preload()
    return pipeline


def _tokens(pipeline: Pipeline, text: Path | None, token_ids: Sequence[int], most: int) -> tuple[list[int], str]:
    """What is fed, and where it comes from."""
    from mortice.core.parity.text import TEXT

    if token_ids:
        return list(token_ids[:most]), "ids given"
    if "tokenizer.ggml.tokens" not in pipeline.model.file.metadata:
        raise InputError(f"{pipeline.model.file.path}: the file has no tokenizer; give --token-ids")
    if text is None:
        return pipeline.encode(TEXT)[:most], "mortice's own text"
    return pipeline.encode(read_small_text(text, InputError))[:most], str(text)


# what is printed -------------------------------------------------------------------------------------------------


def _print(screen: Screen, report: ParityReport) -> None:
    from mortice.core.parity.report import DISTRIBUTION_COLUMNS, KIND_COLUMNS, distribution_rows, kind_rows, summary

    screen.say(summary(report))
    screen.say()
    screen.table(DISTRIBUTION_COLUMNS, distribution_rows(report), "next-token distributions")
    if report.comparisons:
        screen.say()
        screen.table(KIND_COLUMNS, kind_rows(report), "NMSE by kind of operator, the worst in each kind of step")
        screen.say()
        _heat_map(screen, report)
    screen.say()
    for line in report.failures:
        screen.say(line)
    screen.say("parity: failed" if report.failures else "parity: ok")


def _heat_map(screen: Screen, report: ParityReport) -> None:
    """Errors by layer and kind: coloured on a terminal, else figures alone."""
    from mortice.core.parity.report import grid

    kinds, rows = grid(report)
    title = "NMSE by layer and kind of operator, the worst of all steps"
    names = [kind.replace("+", "\n+") for kind in kinds] if sys.stdout.isatty() else kinds
    cells = [(name, *(_figure(cell) for cell in found)) for name, found in rows]
    if not sys.stdout.isatty():
        screen.table(("layer", *(f">{name}" for name in names)), cells, title)
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left", box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("layer", *names):
        table.add_column(Text(name), justify="right")
    for (layer, found), texts in zip(rows, cells, strict=True):
        table.add_row(layer, *(Text(text, style=_style(cell)) for text, cell in zip(texts[1:], found, strict=True)))
    Console(markup=False, highlight=False, emoji=False).print(table)


def _figure(cell: Cell | None) -> str:
    if cell is None:
        return ""
    return f"{cell.nmse:.1e}{'' if cell.passed else ' !'}"


def _style(cell: Cell | None) -> str:
    """Green through yellow to red as the limit comes near; bold beyond it."""
    if cell is None:
        return ""
    red, green = min(255, int(510 * cell.heat)), min(255, int(510 * (1 - cell.heat)))
    return f"{'' if cell.passed else 'bold '}black on rgb({red},{green},80)"
