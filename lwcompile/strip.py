"""The end of a run in the terminal: one strip with a cell per block, and a small table of what it cost and what it saved.

A cell's colour is the bits per weight over the block. Half a cell is missing where a sublayer was dropped, all of it where the
block was, and it is pale where another one's weights are read. Without colour (a pipe, `NO_COLOR`) each half cell is a digit:
its bits, `f` for floating point, `=` for another's weights, `-` for dropped.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.segment import Segment
from rich.style import Style
from rich.table import Table
from rich.text import Text

from lwcompile.budget import format_size

SCALE: tuple[tuple[float, str], ...] = (
    (2.0, "#f2d64b"),
    (3.0, "#a8cf45"),
    (4.0, "#4fb86b"),
    (5.0, "#2a9d8a"),
    (6.0, "#2f7f9b"),
    (8.0, "#46599b"),
    (10.0, "#5b4a86"),
)
"""Bits -> colour: near-equal steps of lightness, told apart by colour-blind eyes too, visible on black and on white."""

FLOAT = "#9aa0a8"
"""The colour of what stays in floating point (12 bits and more)."""


def bits_colour(bits: float) -> str:
    """The colour of a number of bits per weight, `#rrggbb`."""
    if bits >= 12:
        return FLOAT
    if bits <= SCALE[0][0]:
        return SCALE[0][1]
    for (low, a), (high, b) in itertools.pairwise(SCALE):
        if bits <= high:
            return _mix(a, b, (bits - low) / (high - low))
    return SCALE[-1][1]


def _mix(a: str, b: str, t: float) -> str:
    pairs = ((int(a[i : i + 2], 16), int(b[i : i + 2], 16)) for i in (1, 3, 5))
    return "#" + "".join(f"{round(x + t * (y - x)):02x}" for x, y in pairs)


def _digit(bits: float) -> str:
    return "f" if bits >= 12 else "=" if bits == 0 else str(min(9, round(bits)))


class Strip:
    """A rich renderable over the `model` section of a report."""

    def __init__(self, model: Mapping[str, Any]) -> None:
        self.blocks: Sequence[Mapping[str, Any]] = model.get("blocks", [])
        other: Sequence[Mapping[str, Any]] = model.get("other", [])
        self.before = [part for part in other if part["kind"] == "embedding"]
        self.after = [part for part in other if part["kind"] == "head"]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        colour = bool(console.color_system) and not console.no_color
        cells = [self._cell(block["sublayers"], colour) for block in self.blocks]
        left = [Segment("embedding ", Style(dim=True)), *self._part(self.before, colour), Segment(" ")] if self.before else []
        right = [Segment(" "), *self._part(self.after, colour), Segment(" head", Style(dim=True))] if self.after else []
        indent = sum(cell_len(s.text) for s in left)
        room = max(1, (options.max_width - indent - (8 if right else 0)) // 2)
        for start in range(0, max(len(cells), 1), room):
            row = cells[start : start + room]
            yield from left if start == 0 else [Segment(" " * indent)]
            for cell in row:
                yield from cell
            if start + room >= len(cells):
                yield from right
            yield Segment.line()
            yield Segment(" " * indent + self._ruler(start, len(row)), Style(dim=True))
            yield Segment.line()
        yield from self._legend(colour)

    def _cell(self, sublayers: Sequence[Mapping[str, Any]], colour: bool) -> list[Segment]:
        """Two characters: the first half of the sublayers, then the second (attention, then MLP)."""
        cut = (len(sublayers) + 1) // 2
        halves = [sublayers[:cut], sublayers[cut:] or sublayers[:cut]]
        alive = [[s for s in half if not s["dropped"]] for half in halves]
        if not colour:
            return [Segment(_digit(mean_bits(half)) if half else "-") for half in alive]
        everything = [s for s in sublayers if not s["dropped"]]
        style = Style(color=bits_colour(mean_bits(everything))) if everything else None
        pale = Segment("▒", Style(color=FLOAT))
        return [(Segment("█", style) if mean_bits(h) else pale) if h else Segment("·", Style(dim=True)) for h in alive]

    def _part(self, parts: Sequence[Mapping[str, Any]], colour: bool) -> list[Segment]:
        bits = mean_bits(parts)
        return [Segment("██", Style(color=bits_colour(bits)))] if colour else [Segment(_digit(bits))]

    def _ruler(self, start: int, count: int) -> str:
        """The number of every fifth block, under its cell."""
        line = [" "] * (2 * count + 4)
        for i in range(count):
            if (start + i) % 5 == 0:
                text = str(start + i)
                line[2 * i : 2 * i + len(text)] = text
        return "".join(line).rstrip()

    def _alive(self) -> list[Mapping[str, Any]]:
        return [s for block in self.blocks for s in block["sublayers"] if not s["dropped"]]

    def _legend(self, colour: bool) -> Iterator[Segment]:
        if not colour:
            shared = "= = another's weights, " if any(s["bits"] == 0 for s in self._alive()) else ""
            yield Segment(f"each block: attention, MLP; digit = bits per weight, f = floating point, {shared}- = dropped")
            yield Segment.line()
            return
        for bits in sorted({round(s["bits"]) for s in self._alive() if s["bits"]}):
            yield Segment("█ ", Style(color=bits_colour(bits)))
            yield Segment(f"{bits} bits  ", Style(dim=True))
        if any(s["bits"] == 0 for s in self._alive()):
            yield Segment("▒ ", Style(color=FLOAT))
            yield Segment("another's weights  ", Style(dim=True))
        if any(s["dropped"] for b in self.blocks for s in b["sublayers"]):
            yield Segment("· dropped", Style(dim=True))
        yield Segment.line()


def mean_bits(parts: Sequence[Mapping[str, Any]]) -> float:
    """Bits per weight over several parts, each weighted by its dense size."""
    weight = sum(part["dense_bytes"] for part in parts)
    if weight <= 0:
        return max((part["bits"] for part in parts), default=0.0)
    return sum(part["bits"] * part["dense_bytes"] for part in parts) / weight


def summary_table(report: Mapping[str, Any]) -> Table:
    """Size, damage, perplexity and speed, before and after; what was not measured is left out."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("", "before", "after", ""):
        table.add_column(heading, justify="left" if not heading else "right")
    for row in summary_rows(report):
        table.add_row(*row)
    return table


def summary_rows(report: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """(what, before, after, remark) for each figure that the report holds."""
    rows: list[tuple[str, str, str, str]] = []
    before, after = _size(report, "before"), _size(report, "after")
    if before and after:
        rows.append(("size", format_size(before), format_size(after), f"{before / after:.2f}x smaller"))
    elif after:
        rows.append(("size", "", format_size(after), ""))
    if bits := _bits(report, after):
        rows.append(("bits per weight", "", f"{bits:.2f}", "everything stored counts"))
    if (damage := _get(report, "measured", "value")) is not None:
        low, high = _get(report, "measured", "low"), _get(report, "measured", "high")
        interval = f"95 % {low:.4g} to {high:.4g} " if low is not None and high is not None else ""
        rows.append(("damage", "0", f"{damage:.4g}", f"{interval}{report.get('unit', '')}"))
    elif report.get("predicted") is not None:
        rows.append(("damage", "0", f"{report['predicted']:.4g}", f"{report.get('unit', '')}, predicted, not measured"))
    if (unhealed := _get(report, "healing", "before")) is not None:
        refused = _get(report, "healing", "refused")
        remark = f"not healed: {refused}" if refused else f"{_get(report, 'healing', 'kept')} steps kept"
        rows.append(("before healing", "", f"{value_of(unhealed):.4g}", remark))
    perplexity = _get(report, "evaluation", "compressed", "perplexity")
    if perplexity:
        dense = _get(report, "evaluation", "dense", "perplexity")
        rows.append(
            ("perplexity", f"{value_of(dense):.2f}" if dense else "", f"{value_of(perplexity):.2f}", _interval(perplexity))
        )
    if agreement := _get(report, "evaluation", "compressed", "agreement"):
        rows.append(("agreement", "", f"{100 * value_of(agreement):.1f} %", "of most likely tokens"))
    for key, label in (("prefill_ms", "prefill"), ("decode_ms", "decode a token")):
        a, b = _get(report, "speed", "before", key), _get(report, "speed", "after", key)
        if b:
            rows.append((label, f"{a:.1f} ms" if a else "", f"{b:.1f} ms", f"{a / b:.2f}x" if a else ""))
    return rows


def format_count(n: int) -> str:
    """`134.5 M`, `9,248`."""
    for unit, scale in ((" B", 1e9), (" M", 1e6)):
        if n >= scale:
            return f"{n / scale:.4g}{unit}"
    return f"{n:,}"


def value_of(estimate: Any) -> float:
    """The mean of an estimate: a number, or a mapping with `mean` or `value`."""
    if isinstance(estimate, Mapping):
        return float(estimate["mean"] if "mean" in estimate else estimate["value"])
    return float(estimate)


def _interval(estimate: Any) -> str:
    if isinstance(estimate, Mapping) and estimate.get("low") is not None:
        return f"95 % {estimate['low']:.2f} to {estimate['high']:.2f}"
    return ""


def _size(report: Mapping[str, Any], when: str) -> float | None:
    """Bytes on disk where a file was written, else what the weights take."""
    if size := _get(report, "speed", when, "file_bytes"):
        return size
    if when == "before":
        return _get(report, "model", "dense_bytes")
    return _get(report, "bytes", "file") or _get(report, "bytes", "planned")


def _bits(report: Mapping[str, Any], size: float | None) -> float | None:
    """Of the written file where there is one, else as planned."""
    if size and _get(report, "bytes", "file") and (count := _get(report, "model", "parameters")):
        return 8 * size / count
    return _get(report, "bytes", "avg_bits")


def _get(data: Mapping[str, Any], *path: str) -> Any:
    value: Any = data
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def closing(report: Mapping[str, Any]) -> Group:
    """What a compile ends with: the strip, a blank line, the table."""
    return Group(Strip(report["model"]), Text(""), summary_table(report))
