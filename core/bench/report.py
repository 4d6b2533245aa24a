"""A benchmark's numbers as Markdown, JSON, CSV or a plot in the terminal."""

from __future__ import annotations

import csv
import importlib
import io
import platform
import statistics
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from attrs import asdict

from mortice.core.bench.results import BenchReport, SpeedRow
from mortice.core.counts import counted
from mortice.core.errors import ConfigError
from mortice.core.version import __version__

__all__ = ["as_dict", "csv_text", "load_plotext", "markdown", "number", "plot", "table"]


def as_dict(report: BenchReport) -> dict[str, Any]:
    """Everything, in seconds and bytes, with what was worked out from it."""
    startup = report.startup
    return {
        "mortice": __version__,
        "python": platform.python_version(),
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        **asdict(report.subject),
        "settings": asdict(report.settings),
        "read_bandwidth": report.read_bandwidth,
        "startup": {
            **asdict(startup),
            "upload_rate": startup.upload_rate,
            "first_token_warm_median": statistics.median(startup.first_token_warm),
        },
        "rows": [_row_dict(row) for row in report.rows],
        "profile": [asdict(row) for row in report.profile],
    }


def _row_dict(row: SpeedRow) -> dict[str, Any]:
    return {
        "test": row.test,
        "tokens": row.tokens,
        "depth": row.depth,
        "sequences": row.sequences,
        "tokens_per_second": row.mean,
        "tokens_per_second_sd": row.deviation,
        "tokens_per_second_median": row.median,
        "bytes_per_token": row.token_bytes,
        "bytes_per_second": row.bytes_per_second,
        "bandwidth_share": row.bandwidth_share,
        "host_seconds_per_token": row.host_seconds_per_token,
        "seconds": row.seconds,
    }


def csv_text(report: BenchReport) -> str:
    """One line for each test, with a header; the seconds of the repeats are joined by blanks."""
    subject = {"model": report.subject.model, "executor": report.subject.executor, "device": report.subject.device}
    rows = [{**subject, **_row_dict(row), "seconds": " ".join(map(str, row.seconds))} for row in report.rows]
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


# Markdown --------------------------------------------------------------------------------------------------------


def markdown(report: BenchReport) -> str:
    """Tables for a person: what was measured, the speeds, the start-up, the profile."""
    parts = [_subject(report), _speeds(report), _startup(report)]
    if report.profile:
        parts.append(_profile(report))
    return "\n\n".join(parts)


def _subject(report: BenchReport) -> str:
    subject = report.subject
    layouts = ", ".join(f"{count} {name}" for name, count in subject.layouts.items())
    load = "" if subject.load_average is None else f"; load average before {subject.load_average:.1f}"
    bandwidth = "not measured" if report.read_bandwidth is None else f"{report.read_bandwidth / 1e9:.1f} GB/s measured"
    model = f"{subject.model}: {subject.architecture}, {subject.parameters / 1e6:.1f} M parameters"
    place = f"executor {subject.executor} on {subject.device}; weights as {layouts}; KV cache {subject.kv_type}"
    return "\n".join(
        (
            f"{model}, {subject.file_bytes / 2**20:.1f} MiB; mortice {__version__}",
            f"{place}, context {subject.context_length}; upload {subject.upload}",
            f"read bandwidth {bandwidth}; {subject.cores} cores{load}",
            *([", ".join(f"{name} {value}" for name, value in subject.choices.items())] if subject.choices else ()),
        )
    )


def _speeds(report: BenchReport) -> str:
    columns = ("test", ">tokens", ">depth", ">seqs", ">tok/s", ">± sd", ">median", ">MB/token", ">GB/s", ">% of read")
    rows = [
        (
            row.test,
            str(row.tokens),
            str(row.depth),
            str(row.sequences),
            f"{row.mean:.2f}",
            number(row.deviation, 1, 2),
            f"{row.median:.2f}",
            number(row.token_bytes, 1e-6, 2),
            number(row.bytes_per_second, 1e-9, 2),
            number(row.bandwidth_share, 100, 1),
            number(row.host_seconds_per_token, 1e6, 1),
        )
        for row in report.rows
    ]
    return table((*columns, ">host µs/token"), rows)


def _startup(report: BenchReport) -> str:
    startup = report.startup
    size = f"{startup.upload_bytes / 1e6:.1f} MB"
    rate = number(startup.upload_rate, 1e-9, 2)
    upload = f"upload of {size}, made on the way" if startup.made else f"upload of {size} at {rate} GB/s"
    prompt = counted(startup.prompt_tokens, "token")
    rows = [
        ("open, validate, plan", _seconds(startup.plan_seconds)),
        (upload, _seconds(startup.upload_seconds)),
        ("the rest of the preload", _seconds(startup.open_seconds)),
        (f"first token after {prompt}, cold: all of the above and the prompt", _seconds(startup.first_token_cold)),
        (f"first token after {prompt}, warm (median)", _seconds(statistics.median(startup.first_token_warm))),
    ]
    return table(("start", ">time"), rows)


def _profile(report: BenchReport) -> str:
    columns = ("step", ">depth", ">seqs", "what", ">launches", ">ms/step", ">%")
    rows = [
        (
            f"{row.test} {row.tokens}",
            str(row.depth),
            str(row.sequences),
            row.label,
            str(row.launches),
            f"{1e3 * row.seconds:.3f}",
            f"{100 * row.share:.1f}",
        )
        for row in report.profile
    ]
    return table(columns, rows)


def number(value: float | None, factor: float, digits: int) -> str:
    """`value * factor`, or a dash for what is not known."""
    return "-" if value is None else f"{value * factor:.{digits}f}"


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.1f} ms"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table that also reads well as text. A column written ``>name`` is aligned to the right."""
    names = [column.removeprefix(">") for column in columns]
    widths = [max(3, *(len(line[place]) for line in (names, *rows))) for place in range(len(names))]
    right = [column.startswith(">") for column in columns]

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(cells, widths, right, strict=True)
        )
        return f"| {' | '.join(padded)} |"

    rule = ["-" * (width - 1) + ":" if to_right else "-" * width for width, to_right in zip(widths, right, strict=True)]
    return "\n".join((line(names), line(rule), *(line(row) for row in rows)))


# plot ------------------------------------------------------------------------------------------------------------


def load_plotext() -> Any:
    """The package that draws in a terminal.

    Raises:
        ConfigError: when it is not installed.

    """
    try:
        return importlib.import_module("plotext")
    except ImportError:
        raise ConfigError(
            "bench -o plot: the package plotext is not installed; pip install plotext, or use -o md"
        ) from None


def plot(report: BenchReport) -> str:
    """Bars of the median speeds, one diagram for each kind of test; see `load_plotext`."""
    plotext = load_plotext()
    diagrams = []
    for test in ("prefill", "decode"):
        rows = [row for row in report.rows if row.test == test]
        if rows:
            plotext.clear_figure()
            labels = [f"{row.tokens} @ {row.depth}" + f" x {row.sequences}" * (row.sequences > 1) for row in rows]
            plotext.simple_bar(labels, [row.median for row in rows], width=80, title=f"{test}, tok/s, tokens @ depth")
            diagrams.append(str(plotext.build()))
    return "\n".join(diagrams)
