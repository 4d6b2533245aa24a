"""Times of products as Markdown, JSON or CSV."""

from __future__ import annotations

import csv
import io
import platform
from datetime import UTC, datetime
from typing import Any

from attrs import asdict

from mortice.core.bench.products import LeftOut, ProductReport, ProductRow
from mortice.core.bench.report import number, table
from mortice.core.version import __version__

__all__ = ["products_as_dict", "products_csv", "products_markdown"]


def products_as_dict(report: ProductReport) -> dict[str, Any]:
    """Everything, in seconds and bytes, with what was worked out from it."""
    return {
        "mortice": __version__,
        "python": platform.python_version(),
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "executor": report.executor,
        "device": report.device,
        "read_bandwidth": report.read_bandwidth,
        "rows": [_row_dict(row) for row in report.rows],
        "left_out": [asdict(left) for left in report.left_out],
    }


def _row_dict(row: ProductRow) -> dict[str, Any]:
    return {
        "model": row.model,
        "product": row.product,
        "outputs": row.outputs,
        "columns": row.columns,
        "qtype": row.qtype,
        "sequences": row.sequences,
        "bytes": row.nbytes,
        "launches": row.launches,
        "seconds_median": row.median,
        "bytes_per_second": row.bytes_per_second,
        "bandwidth_share": row.bandwidth_share,
        "seconds": row.seconds,
    }


def products_csv(report: ProductReport) -> str:
    """One line for each row, with a header; the seconds of the repeats are joined by blanks."""
    place = {"executor": report.executor, "device": report.device}
    buffer = io.StringIO()
    writer: csv.DictWriter[str] | None = None
    for row in report.rows:
        line = {**place, **_row_dict(row), "seconds": " ".join(map(str, row.seconds))}
        if writer is None:
            writer = csv.DictWriter(buffer, list(line), lineterminator="\n")
            writer.writeheader()
        writer.writerow(line)
    return buffer.getvalue()


def products_markdown(report: ProductReport) -> str:
    """A table for a person, and below it what was left out."""
    bandwidth = number(report.read_bandwidth, 1e-12, 3)
    head = f"executor {report.executor} on {report.device}; read bandwidth {bandwidth} TB/s measured; "
    rows = [
        (
            row.model,
            row.product,
            f"{row.outputs} x {row.columns}",
            row.qtype,
            str(row.sequences),
            f"{row.nbytes / 1e6:.2f}",
            f"{1e6 * row.median:.1f}",
            f"{row.bytes_per_second / 1e12:.3f}",
            number(row.bandwidth_share, 100, 1),
        )
        for row in report.rows
    ]
    columns = ("model", "product", ">shape", "type", ">seqs", ">MB", ">µs", ">TB/s", ">% of read")
    parts = [f"{head}mortice {__version__}", table(columns, rows)]
    if report.left_out:
        parts.append("\n".join(f"left out: {_left_out(left)}" for left in report.left_out))
    return "\n\n".join(parts)


def _left_out(left: LeftOut) -> str:
    return f"{' '.join(filter(None, (left.model, left.qtype, left.product)))}: {left.reason}"
