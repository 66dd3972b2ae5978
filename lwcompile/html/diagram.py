"""The drawing of a model's structure: the residual stream, and the branches that leave it and are added back."""

from __future__ import annotations

from html import escape

from lwcompile.budget import format_size
from lwcompile.html import page
from lwcompile.inspect import Part, collapse
from lwcompile.strip import format_count


def draw(view: Part) -> str:
    """One self-contained page."""
    size = f"{format_count(view.parameters)} parameters, {format_size(view.bytes)}"
    head = f"<header><h1>{escape(view.id)}</h1><p class='soft'>{escape(view.note)} · {size}</p></header>"
    return page("inspect", view.id, None, f"<div class='sheet'>{head}{_draw_children(view, max(view.bytes, 1))}</div>")


def _draw_children(part: Part, whole: int) -> str:
    return "".join(_draw(child, part, whole) for child in collapse(part.children))


def _draw(part: Part, parent: Part, whole: int) -> str:
    name = escape(part.id.removeprefix(parent.id).removeprefix("."))
    facts = f"<span class='soft small'>{format_count(part.parameters)} · {format_size(part.bytes)}</span>" if part.bytes else ""
    notes = "".join(f"<span class='note'>{escape(note)}</span>" for note in (part.norm, part.note) if note)
    if part.kind == "entry":
        return f"<section class='entry'><h2>{name} {facts}</h2>{_draw_children(part, whole)}</section>"
    if part.kind == "stream":
        body = _draw_children(part, whole)
        stream = f"<div class='stream'>{body}</div>" if body else ""
        return f"<div class='flow'><h2>{escape(part.id)} {facts}{notes}</h2>{stream}</div>"
    if part.kind == "block":
        title = (
            f"{escape(part.id)} … {escape(part.last)} <b class='times'>{part.repeat} ×</b>"
            if part.repeat > 1
            else escape(part.id)
        )
        stack = " many" if part.repeat > 1 else ""
        return f"<div class='block{stack}'><h3>{title} {facts}</h3>{_draw_sublayers(part, whole)}</div>"
    shape = f"<span class='mono'>{' × '.join(map(str, part.shape))}</span>" if part.shape else ""
    bar = f"<i class='bar' style='width:{max(2.0, 100 * (part.bytes / whole) ** 0.5):.1f}%'></i>"
    return f"<div class='weight {escape(part.kind)}'><b>{name}</b> {shape} {facts}{notes}{bar}</div>"


def _draw_sublayers(block: Part, whole: int) -> str:
    """Branches in order; those that leave and join at one place side by side."""
    rows: list[list[Part]] = []
    for sub in block.children:
        together = rows and sub.note.startswith("parallel") and rows[-1][-1].note.startswith("parallel")
        rows[-1].append(sub) if together else rows.append([sub])
    made = []
    for row in rows:
        boxes = "".join(_draw_sublayer(sub, block, whole) for sub in row)
        after = "<span class='after'>norm</span>" if row[0].norm == "post-norm" else ""
        made.append(f"<div class='branch'>{boxes}<span class='join'>+</span>{after}</div>")
    return "".join(made)


def _draw_sublayer(sub: Part, block: Part, whole: int) -> str:
    name = escape(sub.id.removeprefix(f"{block.id}."))
    facts = f"<span class='soft small'>{format_count(sub.parameters)} · {format_size(sub.bytes)}</span>"
    notes = "".join(f"<span class='note'>{escape(note)}</span>" for note in (sub.norm, sub.note) if note)
    return f"<div class='sublayer {escape(sub.kind)}'><h4>{name} {facts}{notes}</h4>{_draw_children(sub, whole)}</div>"
