"""``mortice fit``: whether a model fits, before anything is uploaded."""

from __future__ import annotations

from attrs import evolve

from mortice.core.cli.flags import CommonFlags, ExecutorFlags, FileFlags, ModelPath
from mortice.core.cli.stages import fit_dict, fit_rows, layouts_of, planned

__all__ = ["fit"]

_REFUSED = 2


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
        screen.say("fits" if report.fits else "does not fit")
        screen.say(f"largest context that fits: {report.largest_context} of the model's {longest} tokens")
        screen.say(f"largest KV cache that fits: {report.largest_kv_tokens} tokens of all sequences together")
        return 0 if report.fits else _REFUSED
