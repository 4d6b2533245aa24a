"""``mortice fit``: whether a model fits, before anything is uploaded."""

from __future__ import annotations

from attrs import evolve

from mortice.core.cli.flags import (
    ConfigFile,
    ConfigFlags,
    ExecutorFlags,
    FileFlags,
    ModelPath,
    OutputFlags,
    PluginFlags,
    settings,
)
from mortice.core.cli.render import Screen
from mortice.core.cli.stages import fit_dict, fit_rows, layouts_of, planned

__all__ = ["fit"]

_REFUSED = 2


def fit(
    file: ModelPath,
    /,
    *,
    config: ConfigFile = None,
    model: FileFlags | None = None,
    executor: ExecutorFlags | None = None,
    plugins: PluginFlags | None = None,
    any_key: ConfigFlags | None = None,
    output: OutputFlags | None = None,
) -> int:
    """Say what a model needs in memory and how long a context may be.

    Nothing is uploaded. The exit code is 2 when it does not fit.

    """
    output = output or OutputFlags()
    screen = Screen(json=output.json, quiet=output.quiet)
    chosen = settings(config, model, executor, plugins, any_key).config
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
        return 0 if report.fits else _REFUSED
