"""A program as a picture in SVG: an operator is a box, what flows between them a line, alike layers stand once.

Written as text, with no package that draws. A box stands one row below the lowest box it reads from.
"""

from __future__ import annotations

from collections.abc import Sequence
from xml.sax.saxutils import escape

from attrs import frozen

from mortice.core.contracts.listing import STREAM, Line, Part, parts_of
from mortice.core.counts import counted
from mortice.core.model.program import Program

__all__ = ["program_picture"]

_WIDTH, _HEIGHT, _GAP_X, _GAP_Y, _MARGIN = 250, 46, 26, 26, 24
_SHOWN = 38
_COLOURS = {
    "linear": "#cfe2f3",
    "attention": "#f4cccc",
    "kv_write": "#f4cccc",
    "norm": "#d9ead3",
    "rope": "#fff2cc",
    "add": "#eeeeee",
}
_OTHER = "#f3eafd"
_TIP = (
    '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    '<path d="M0 0L8 4L0 8z" fill="#555"/></marker></defs>'
)


@frozen
class _Box:
    line: Line
    row: int
    column: int


def program_picture(program: Program) -> str:
    """The picture of a program, an SVG document."""
    drawn, top, width = [], _MARGIN + 30, 0
    for part in parts_of(program):
        boxes = _placed(part)
        columns = 1 + max(box.column for box in boxes)
        part_width = columns * _WIDTH + (columns - 1) * _GAP_X + 2 * _MARGIN
        height = (1 + max(box.row for box in boxes)) * (_HEIGHT + _GAP_Y) - _GAP_Y + 2 * _MARGIN
        drawn.append((part, boxes, top, height))
        top += height + _GAP_Y
        width = max(width, part_width)
    width += 2 * _MARGIN
    body: list[str] = []
    for number, (part, boxes, part_top, height) in enumerate(drawn):
        body += _part(part, boxes, part_top, height, width)
        if number + 1 < len(drawn):
            body.append(_arrow(width / 2, part_top + height, width / 2, part_top + height + _GAP_Y))
    title = f"{program.architecture}: {counted(program.num_layers, 'layer')}, hidden size {program.hidden_size}"
    size = f'width="{width}" height="{top}" viewBox="0 0 {width} {top}"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">',
            _TIP,
            f'<rect width="{width}" height="{top}" fill="white"/>',
            _text(width / 2, _MARGIN + 6, title, "bold"),
            *body,
            "</svg>",
            "",
        ]
    )


def _placed(part: Part) -> list[_Box]:
    """A row for each operator below all it reads, and the next free column of that row."""
    rows: dict[str, int] = {}
    taken: dict[int, int] = {}
    boxes = []
    for line in part.lines:
        row = 1 + max((rows[name] for name in line.inputs if name in rows), default=-1)
        boxes.append(_Box(line, row, taken.get(row, 0)))
        taken[row] = taken.get(row, 0) + 1
        if line.out:
            rows[line.out] = row
    return boxes


def _part(part: Part, boxes: Sequence[_Box], top: int, height: int, width: int) -> list[str]:
    in_row: dict[int, int] = {}
    for box in boxes:
        in_row[box.row] = max(in_row.get(box.row, 0), box.column + 1)

    def place(box: _Box) -> tuple[float, float]:
        count = in_row[box.row]
        left = (width - count * _WIDTH - (count - 1) * _GAP_X) / 2
        return left + box.column * (_WIDTH + _GAP_X), top + _MARGIN + box.row * (_HEIGHT + _GAP_Y)

    drawn = []
    if part.title:
        drawn.append(
            f'<rect x="{_MARGIN}" y="{top}" width="{width - 2 * _MARGIN}" height="{height}" rx="8" fill="none" '
            'stroke="#999" stroke-dasharray="5 4"/>'
        )
        drawn.append(_text(_MARGIN + 10, top + 16, part.title, "bold", "start"))
    writer: dict[str, _Box] = {}
    for box in boxes:
        x, y = place(box)
        side = x + _WIDTH * (0.8 if len(box.line.inputs) > 1 else 0.5)
        for name in box.line.inputs:
            source = writer.get(name)
            if source is None:  # from before the part
                drawn.append(_arrow(side, y - _GAP_Y / 2, side, y, STREAM))
                continue
            from_x, from_y = place(source)
            if box.row == source.row + 1:
                drawn.append(_arrow(from_x + _WIDTH / 2, from_y + _HEIGHT, x + _WIDTH / 2, y))
            else:  # around what stands between
                most = max(in_row[row] for row in range(source.row, box.row))
                lane = width / 2 + (most * (_WIDTH + _GAP_X)) / 2 - _GAP_X / 4
                drawn.append(_path(f"M{from_x + _WIDTH:g} {from_y + _HEIGHT / 2:g}H{lane:g}V{y - 10:g}H{side:g}V{y:g}"))
        if box.line.out:
            writer[box.line.out] = box
    return drawn + [part for box in boxes for part in _box(box, *place(box))]


def _box(box: _Box, x: float, y: float) -> list[str]:
    line = box.line
    colour = _COLOURS.get(line.kind, _OTHER)
    title = f"{line.out} [{line.width}]" if line.out else line.kind
    rect = f'<rect x="{x:g}" y="{y:g}" width="{_WIDTH}" height="{_HEIGHT}" rx="5" fill="{colour}" stroke="#666"/>'
    return [
        f"<g><title>{escape(line.text)}</title>{rect}",
        _text(x + _WIDTH / 2, y + 18, title, "bold"),
        _text(x + _WIDTH / 2, y + 35, line.text if len(line.text) <= _SHOWN else line.text[: _SHOWN - 1] + "…"),
        "</g>",
    ]


def _arrow(x1: float, y1: float, x2: float, y2: float, label: str = "") -> str:
    middle = (y1 + y2) / 2
    line = _path(f"M{x1:g} {y1:g}C{x1:g} {middle:g} {x2:g} {middle:g} {x2:g} {y2:g}")
    return line + (_text(x1 + 10, y1 + 4, label) if label else "")


def _path(path: str) -> str:
    return f'<path d="{path}" fill="none" stroke="#555" stroke-linejoin="round" marker-end="url(#tip)"/>'


def _text(x: float, y: float, text: str, weight: str = "normal", anchor: str = "middle") -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-weight="{weight}">{escape(text)}</text>'
