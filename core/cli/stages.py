"""What several commands do on the way to a result, with the notes a person sees meanwhile."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from mortice.core.cli.findings import counts_text, note_findings
from mortice.core.cli.render import Screen, size_text
from mortice.core.counts import counted
from mortice.core.errors import ValidationError

if TYPE_CHECKING:
    from mortice.core.config import RunConfig
    from mortice.core.model.weight_plan import FitReport, WeightPlan
    from mortice.core.pipeline import Pipeline
    from mortice.core.plugin.registry import Registry

__all__ = ["fit_dict", "fit_rows", "layouts_of", "note_model", "planned", "resident"]


@contextmanager
def planned(screen: Screen, config: RunConfig) -> Iterator[Pipeline]:
    """A pipeline up to its plan, closed at the end. It may not fit; `Pipeline.fit` tells.

    Raises:
        ValidationError: after the findings were noted, naming file, contract and how many.

    """
    from mortice.core.pipeline import prepare
    from mortice.core.stages import registry_for

    registry = registry_for(config, wake=True)
    try:
        pipeline = prepare(config, registry, require_fit=False)
    except ValidationError as error:
        # its message has the errors alone; a person is shown all findings, as a table
        if screen.quiet:
            raise
        raise ValidationError(_note_errors(screen, config, registry)) from error
    with pipeline:
        yield pipeline


def _note_errors(screen: Screen, config: RunConfig, registry: Registry) -> str:
    from mortice.core.stages import validate_file

    assert config.model.path is not None, "it has been validated"
    report = validate_file(config.model.path, contract=config.model.contract, registry=registry)
    note_findings(screen, report.findings.items)
    return f"{report.file.path}: {counts_text(report.findings.errors)} against contract {report.contract.name}"


def note_model(screen: Screen, pipeline: Pipeline) -> None:
    """The validation summary and the fit report."""
    model = pipeline.model
    file = model.file
    screen.note(
        f"{file.path}: {file.format} v{file.version}, architecture {file.architecture}, "
        f"{file.parameters / 1e6:.1f} M parameters, {size_text(file.tensor_bytes)}"
    )
    screen.note(f"valid against contract {model.contract.name}: {counts_text(model.findings.items)}")
    note_findings(screen, model.findings.items)
    screen.note(f"executor {pipeline.executor.name} ({pipeline.executor_reason}), upload {pipeline.upload.name}")
    screen.note_table(("memory", ">size"), fit_rows(pipeline.plan, pipeline.fit))


def resident(screen: Screen, pipeline: Pipeline) -> int:
    """Upload with progress shown; bytes moved. Refused when it does not fit."""
    with screen.upload_progress(pipeline.registry.observers):
        return pipeline.preload()


def layouts_of(plan: WeightPlan) -> dict[str, int]:
    """How many weights lie in which layout, the commonest first."""
    return dict(Counter(planned.layout.name for planned in plan.weights).most_common())


def fit_rows(plan: WeightPlan, fit: FitReport) -> list[tuple[str, str]]:
    """A fit report as rows of name and size."""
    layouts = ", ".join(f"{count} {name}" for name, count in layouts_of(plan).items())
    return [
        (f"weights ({layouts})", size_text(fit.weight_bytes)),
        (f"KV cache, {counted(fit.kv_tokens, 'token')}", size_text(fit.kv_bytes)),
        ("workspace", size_text(fit.workspace_bytes)),
        ("needed", size_text(fit.total_bytes)),
        (f"available on {fit.device.name}", size_text(fit.available_bytes)),
    ]


def fit_dict(fit: FitReport) -> dict[str, Any]:
    """A fit report for JSON, in bytes."""
    return {
        "device": {"kind": fit.device.kind, "name": fit.device.name, "index": fit.device.index},
        "context_length": fit.context_length,
        "kv_tokens": fit.kv_tokens,
        "weight_bytes": fit.weight_bytes,
        "kv_bytes": fit.kv_bytes,
        "workspace_bytes": fit.workspace_bytes,
        "total_bytes": fit.total_bytes,
        "available_bytes": fit.available_bytes,
        "fits": fit.fits,
        "largest_context": fit.largest_context,
        "largest_kv_tokens": fit.largest_kv_tokens,
        "least_bytes": fit.least_bytes,
        "least_context": fit.least_context,
    }
