"""A comparison as JSON, tables and a picture."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from attrs import frozen

from mortice.core.errors import ConfigError
from mortice.core.parity.measures import TOP
from mortice.core.parity.results import MODES, Comparison, ParityReport
from mortice.core.version import __version__
from mortice.core.whole_file import written_beside

__all__ = ["Cell", "as_dict", "distribution_rows", "grid", "kind_rows", "load_matplotlib", "summary", "write_picture"]

Rows = list[tuple[str, ...]]


def as_dict(report: ParityReport) -> dict[str, Any]:
    """Everything, every position's divergence included."""
    tolerances, wrong = report.tolerances, report.first_wrong
    return {
        "mortice": __version__,
        "model": report.model,
        "executor": report.executor,
        "device": report.device,
        "against": report.oracle,
        "kv_type": report.kv_type,
        "activations": report.activations,
        "text": report.text,
        "tokens": report.tokens,
        "passed": report.passed,
        "failures": report.failures,
        "first_wrong": None if wrong is None else _comparison(wrong),
        "tolerances": {
            "name": tolerances.name,
            "operator_nmse": tolerances.operator_nmse,
            "kind_nmse": tolerances.kind_nmse,
            "kl_mean": tolerances.kl_mean,
            "top_mean": tolerances.top_mean,
            "top_p99": tolerances.top_p99,
        },
        "distributions": [
            {
                "mode": found.mode,
                "positions": len(found.kl),
                "kl_mean": float(found.kl.mean()),
                "kl_max": float(found.kl.max()),
                "same_top": found.same_top,
                "widest_margin": found.widest_margin,
                "top_mean": found.top_mean,
                "top_p99": found.top_p99,
                "kl": [float(value) for value in found.kl],
            }
            for found in report.distributions
        ],
        "operators": [_comparison(found) for found in report.comparisons],
    }


def _comparison(found: Comparison) -> dict[str, Any]:
    return {
        "operator": found.operator,
        "layer": found.layer,
        "kind": found.kind,
        "covers": found.covers,
        "mode": found.mode,
        "nmse": found.nmse,
        "inherited": found.inherited,
        "limit": found.limit,
        "passed": found.passed,
    }


def summary(report: ParityReport) -> str:
    """What was compared, in two lines."""
    return (
        f"{report.model}: executor {report.executor} on {report.device} against {report.oracle}\n"
        f"KV cache {report.kv_type}, activations {report.activations}, tolerances {report.tolerances.name}; "
        f"{report.tokens} tokens of {report.text}"
    )


DISTRIBUTION_COLUMNS = (
    "step",
    ">positions",
    ">KL mean",
    ">KL max",
    ">same best",
    f">top-{TOP} mean",
    f">top-{TOP} p99",
    "verdict",
)
KIND_COLUMNS = ("operators", ">values", *(f">{mode}" for mode in MODES), ">limit", "worst at", "verdict")


def distribution_rows(report: ParityReport) -> Rows:
    """A row for each kind of step, under `DISTRIBUTION_COLUMNS`."""
    return [
        (
            found.mode,
            str(len(found.kl)),
            f"{found.kl.mean():.2e}",
            f"{found.kl.max():.2e}",
            f"{100 * found.same_top:.1f} %",
            f"{found.top_mean:.2e}",
            f"{found.top_p99:.2e}",
            _verdict(not list(found.failures(report.tolerances))),
        )
        for found in report.distributions
    ]


def kind_rows(report: ParityReport) -> Rows:
    """A row for each kind of operator, under `KIND_COLUMNS`: the worst error in each kind of step.

    The limit and the place are those of the operator that comes nearest to its limit, or goes furthest beyond. A kind
    that an executor fuses in one kind of step and not in another has ``-`` where it was not compared.
    """
    rows: Rows = []
    for kind, found in _by_kind(report.comparisons).items():
        worst = max(found, key=_share_of_limit)
        modes = ([each.nmse for each in found if each.mode == mode] for mode in MODES)
        rows.append(
            (
                kind,
                str(len({each.operator for each in found})),
                *(f"{max(values):.1e}" if values else "-" for values in modes),
                f"{worst.limit:.1e}",
                worst.operator,
                _verdict(all(each.passed for each in found)),
            )
        )
    return rows


def _by_kind(comparisons: Sequence[Comparison]) -> dict[str, list[Comparison]]:
    kinds: dict[str, list[Comparison]] = {}
    for found in comparisons:
        kinds.setdefault(found.kind, []).append(found)
    return kinds


def _share_of_limit(found: Comparison) -> float:
    return found.nmse / found.limit


def _verdict(passed: bool) -> str:
    return "ok" if passed else "WRONG"


# layer by kind ---------------------------------------------------------------------------------------------------


@frozen
class Cell:
    """The worst value of a kind in a layer; `heat` is 0 at the float32 rounding of 1e-14, 1 at its limit and beyond."""

    nmse: float
    heat: float
    passed: bool


def grid(report: ParityReport) -> tuple[list[str], list[tuple[str, list[Cell | None]]]]:
    """Kinds, and for each layer its name and a cell for each kind; None where the layer has no such operator.

    What stands before the first layer and after the last is one row, the last.
    """
    kinds = list(_by_kind(report.comparisons))
    layers: dict[int | None, dict[str, Comparison]] = {}
    for found in report.comparisons:
        row = layers.setdefault(found.layer, {})
        if found.kind not in row or _share_of_limit(row[found.kind]) < _share_of_limit(found):
            row[found.kind] = found
    ordered = sorted(layers, key=lambda layer: math.inf if layer is None else layer)
    return kinds, [
        (
            "outside" if layer is None else str(layer),
            [_cell(layers[layer][kind]) if kind in layers[layer] else None for kind in kinds],
        )
        for layer in ordered
    ]


def _cell(found: Comparison) -> Cell:
    coldest = -14.0
    span = math.log10(found.limit) - coldest
    heat = 0.0 if found.nmse <= 0 else 1.0 if found.nmse >= found.limit else (math.log10(found.nmse) - coldest) / span
    return Cell(found.nmse, min(max(heat, 0.0), 1.0), found.passed)


def load_matplotlib() -> Any:
    """The package that draws pictures, set up to need no display.

    Raises:
        ConfigError: when it is not installed.

    """
    try:
        matplotlib = importlib.import_module("matplotlib")
    except ImportError:
        raise ConfigError(
            "parity --heatmap: the package matplotlib is not installed; pip install 'mortice[pictures]', "
            "or go without --heatmap"
        ) from None
    matplotlib.use("Agg")
    return importlib.import_module("matplotlib.figure")


def write_picture(report: ParityReport, path: Path) -> None:
    """Draw `grid` into a PNG file, whole or not at all: a row for each layer, a column for each kind.

    Raises:
        ConfigError: when matplotlib is not installed.
        ExecutionError: when the file cannot be written.

    """
    figures = load_matplotlib()
    kinds, rows = grid(report)
    heat = np.array([[np.nan if cell is None else cell.heat for cell in cells] for _, cells in rows])
    figure = figures.Figure(figsize=(3 + 1.1 * len(kinds), 2.5 + 0.28 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(heat, cmap="RdYlGn_r", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(kinds)), kinds, rotation=40, ha="right")
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.set_ylabel("layer")
    axes.set_title(f"{report.model}: {report.executor} against {report.oracle}\nNMSE, worst of all steps", fontsize=10)
    for y, (_, cells) in enumerate(rows):
        for x, cell in enumerate(cells):
            if cell is not None:
                weight: Mapping[str, Any] = {} if cell.passed else {"fontweight": "bold"}
                axes.text(x, y, f"{cell.nmse:.0e}", ha="center", va="center", fontsize=7, **weight)
    figure.colorbar(image, label="0: 1e-14 or less, 1: the limit (log scale)")
    with written_beside(path) as part:
        figure.savefig(part, format="png", dpi=120)
