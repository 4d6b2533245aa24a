"""``mortice fit``: whether a model fits, before anything is uploaded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from attrs import evolve

from mortice.core.cli.flags import CommonFlags, ExecutorFlags, FileFlags, ModelPath
from mortice.core.cli.render import size_text
from mortice.core.cli.stages import fit_dict, fit_rows, layouts_of, planned
from mortice.core.counts import counted

if TYPE_CHECKING:
    from mortice.core.pipeline import Pipeline

__all__ = ["fit"]

_REFUSED = 2
_WIDER = 1.5
"""From how much more than its type takes a KV cache counts as stored in another type; pages round up by less."""


def fit(
    file: ModelPath,
    /,
    *,
    model: FileFlags | None = None,
    executor: ExecutorFlags | None = None,
    common: CommonFlags | None = None,
) -> int:
    """Say what a model needs in memory and how long a context may be.

    Nothing is uploaded. The exit code is 2 when it does not fit.

    """
    common = common or CommonFlags()
    screen = common.screen()
    chosen = common.settings(model, executor).config
    chosen = evolve(chosen, model=evolve(chosen.model, path=file))
    with planned(screen, chosen) as pipeline:
        report = pipeline.fit
        longest = pipeline.program.context_length
        screen.result(
            {
                "model": file,
                "executor": pipeline.executor.name,
                "executor_reason": pipeline.executor_reason,
                **fit_dict(report),
                "model_context": longest,
                "layouts": layouts_of(pipeline.plan),
                "weights_by_type": dict(pipeline.plan.bytes_by_qtype),
            }
        )
        screen.say(f"executor {pipeline.executor.name} ({pipeline.executor_reason})")
        screen.table(("memory", ">size"), fit_rows(pipeline.plan, report))
        for line in _stored_wider(pipeline):
            screen.say(line)
        screen.say("fits" if report.fits else f"does not fit: {report.advice}")
        screen.say(f"largest context that fits: {report.largest_context} of the model's {longest} tokens")
        most = f"{report.largest_kv_tokens} tokens of all sequences together"
        none = f"none for a context of {counted(report.context_length, 'token')}"
        screen.say(f"largest KV cache that fits: {most if report.largest_kv_tokens else none}")
        return 0 if report.fits else _REFUSED


def _stored_wider(pipeline: Pipeline) -> Iterator[str]:
    """Why the size of the KV cache is not that of the type asked for, where an executor only rounds to it."""
    from mortice.core.model.kv_types import KV_TYPES, kv_cache_bytes
    from mortice.core.plugin.kv_pages import PAGE_TOKENS, page_count

    asked, report = pipeline.settings.kv_type, pipeline.fit
    if asked not in KV_TYPES:
        return
    tokens = PAGE_TOKENS * page_count(report.kv_tokens)
    own = sum(kv_cache_bytes(shape, asked, tokens) for shape in pipeline.program.kv)
    if report.kv_bytes > _WIDER * own:
        yield (
            f"KV cache in {asked}: executor {pipeline.executor.name} rounds to it and stores wider values; "
            f"stored in {asked} it is {size_text(own)}"
        )
