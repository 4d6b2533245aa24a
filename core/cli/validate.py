"""``mortice validate``: hold models against their contracts."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from mortice.core.cli.findings import COLUMNS, counts_text, finding_rows
from mortice.core.cli.flags import CommonFlags, FileFlags
from mortice.core.cli.render import Screen, json_text, printable, size_text
from mortice.core.errors import ConfigError, ModelFileError

if TYPE_CHECKING:
    from mortice.core.validation.results import ModelResult

__all__ = ["validate"]

_REFUSED = 2
_SHOWN_DIGITS = 12
_EMPTY = Path("''")
"""Stands for an empty argument, which `Path` would make the working directory: the others are still validated."""


def _path(_: Any, tokens: Sequence[Any]) -> Path:
    return Path(tokens[0].value) if tokens[0].value else _EMPTY


AnyPath = Annotated[Path, Parameter(help="A model file or folder.", converter=_path, n_tokens=1)]


def validate(
    path: Annotated[AnyPath, Parameter(help="A model file, or a folder to search for models.")],
    /,
    *paths: AnyPath,
    form: Annotated[
        Literal["text", "json", "sarif", "junit"],
        Parameter(name="--format", help="How results are printed: for a person, or for a program.", show_default=False),
    ] = "text",
    strict: Annotated[bool, Parameter(help="Warnings count as errors.", negative=(), show_default=False)] = False,
    deep: Annotated[
        bool,
        Parameter(
            help="Read the tensor data, too: NaN and Inf, rows of zeros, scales out of range.",
            negative=(),
            show_default=False,
        ),
    ] = False,
    contract: FileFlags | None = None,
    common: CommonFlags | None = None,
) -> int:
    """Hold models against their contracts and report everything found.

    Folders are searched for models. No tensor data are read without --deep. Goes on after a broken file; the exit code
    is 2 when any model has an error, with --strict also when any has a warning.

    """
    from mortice.core.stages import read_contract, registry_for
    from mortice.core.validation.check import check_models
    from mortice.core.validation.results import ModelResult

    common = common or CommonFlags()
    output = common.output
    if output.json and form not in ("text", "json"):
        raise ConfigError(f"--json and --format {form}: found both, wanted one")
    if output.json:
        form = "json"
    screen = Screen(json=form != "text", quiet=output.quiet)
    chosen = common.settings(contract).config
    if chosen.model.contract is not None:
        read_contract(chosen.model.contract)  # a mistake in it is said once, not for each model
    registry = registry_for(chosen)
    reading = partial(screen.byte_progress, "tensor data")
    given = [it for it in (path, *paths) if it is not _EMPTY]
    nothing = ModelResult(path=_EMPTY, error=ModelFileError(_EMPTY, "found no text, wanted a path"))
    found = check_models(
        given,
        registry,
        contract=chosen.model.contract,
        quantize=chosen.model.quantize,
        deep=deep,
        reading=reading,
    )
    results = []
    for result in chain([nothing] * (1 + len(paths) - len(given)), found):
        results.append(result)
        _show(screen, result, strict=strict)
        if output.debug and result.error is not None:
            traceback.print_exception(result.error)
    failed = sum(not result.passed(strict=strict) for result in results)
    unknown = sum(result.plugin_failed for result in results)
    if len(results) > 1:
        others = f", {unknown} not validated" if unknown else ""
        screen.say(f"{len(results)} models, {failed - unknown or 'none'} refused{others}")
    _print(form, results, strict=strict)
    return _REFUSED if failed else 0


def _show(screen: Screen, result: ModelResult, *, strict: bool) -> None:
    """One model for a person: a line that says how it went, and what was found."""
    path = printable(str(result.path))
    if result.error is not None:
        screen.say(f"{path}: " + ("not validated, a plugin is at fault" if result.plugin_failed else "refused"))
        for line in result.error_message.splitlines():
            screen.say(f"  {printable(line)}")
    else:
        state = "valid" if result.findings.ok else "not valid"
        refused = ", refused by --strict" if result.findings.ok and not result.passed(strict=strict) else ""
        counts = counts_text(result.findings.items)
        screen.say(f"{path}: {state} against contract {result.contract}, {counts}{refused}")
    if result.template is not None:
        known = result.template["known"]
        digest = str(result.template["sha256"])[:_SHOWN_DIGITS]
        screen.say(f"  chat template {digest}: " + (f"known, {known}" if known else "not among the known ones"))
    if result.findings.items:
        screen.table(COLUMNS, finding_rows(result.findings.items))
    if result.data is not None:
        speed = result.data.nbytes / max(result.data.seconds, 1e-9) / 1e9
        screen.note(
            f"{path}: {size_text(result.data.nbytes)} of tensor data checked in {result.data.seconds:.2f} s, "
            f"{speed:.1f} GB/s"
        )


def _print(form: str, results: list[ModelResult], *, strict: bool) -> None:
    """All results for a program."""
    match form:
        case "json":
            print(json_text([result.as_dict() for result in results]))
        case "sarif":
            from mortice.core.validation.sarif import sarif_log

            print(json_text(sarif_log(results, strict=strict)))
        case "junit":
            from mortice.core.validation.junit import junit_xml

            print(junit_xml(results, strict=strict), end="")
