"""What the report page draws, worked out from a report: the page's script places and colours, and decides nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from lwcompile.errors import BadInput
from lwcompile.report import finite
from lwcompile.spec import KEEP, Spec
from lwcompile.strip import FLOAT, SCALE, format_count, summary_rows
from lwcompile.table import Choice, OptionTable, canonical, format_options

_BLOCK = re.compile(r"(?P<prefix>.*?)block(?P<number>\d+)(?:\.(?P<rest>.*))?$")
_SHOWN = {
    "format", "model", "table", "plan", "predicted", "pareto", "remarks", "analyses", "unit", "measured", "evaluation", "speed",
}  # fmt: skip


_TITLES = {
    "evaluation": "Evaluation",
    "speed": "Speed",
    "parity": "Parity of the written file with the graph",
    "bytes": "Bytes",
    "seconds": "Time, in seconds",
    "calibration": "Calibration",
    "budget": "Budget",
    "recipe": "Recipe",
    "versions": "Versions",
}


def report_view(data: Mapping[str, Any]) -> dict[str, Any]:
    """report.json -> what report.js reads."""
    model = data["model"]
    table = _table(data)
    measured = data.get("measured") or {}
    return finite(
        {
            "name": model["name"],
            "facts": _facts(data),
            "unit": data.get("unit", ""),
            "figures": [dict(zip(("what", "before", "after", "note"), row)) for row in summary_rows(data)],
            "scale": {"stops": SCALE, "float": FLOAT},
            "blocks": [
                {"id": b["id"], "sublayers": [{"id": s["id"], "kind": s["kind"]} for s in b["sublayers"]]}
                for b in model["blocks"]
            ],
            "other": [{"id": part["id"], "kind": part["kind"]} for part in model["other"]],
            "exported": _exported(data, table),
            "pareto": data.get("pareto") or [],
            "measured": measured or None,
            "dense": {"bytes": model["dense_bytes"], "parts": data.get("bytes", {}).get("dense_parts") or {}},
            "facets": facets(table) if table else [],
            "scatter": [
                {**pair, "analysis": analysis["name"]}
                for analysis in data.get("analyses") or []
                for pair in analysis.get("pairs") or []
            ],
            "analyses": data.get("analyses") or [],
            "remarks": _remarks(data, table),
            "tables": list(_tables(data)),
        }
    )


def _table(data: Mapping[str, Any]) -> OptionTable | None:
    if not data.get("table"):
        return None
    try:
        return OptionTable.from_json(json.dumps(data["table"]))
    except BadInput:
        return None  # a report of another version still shows what it measured


def _facts(data: Mapping[str, Any]) -> list[str]:
    model, recipe = data["model"], data.get("recipe") or {}
    words = [f"{format_count(model['parameters'])} parameters", f"{len(model['blocks'])} blocks"]
    if isinstance(recipe, Mapping) and recipe.get("name"):
        words.append(f"recipe {recipe['name']}")
    if budget := data.get("budget"):
        words.append(
            "budget "
            + ", ".join(f"{key} {value:,}" if isinstance(value, int) else f"{key} {value}" for key, value in budget.items())
        )
    if model.get("license"):
        words.append(f"license {model['license']}")
    return words


def _exported(data: Mapping[str, Any], table: OptionTable | None) -> dict[str, Any]:
    """The plan that was compiled, in the form of a point of the curve."""
    model, sizes = data["model"], data.get("bytes") or {}
    joined = {
        site: " + ".join([options] if isinstance(options, str) else options) for site, options in (data.get("plan") or {}).items()
    }
    stored = sum(s["bytes"] for b in model["blocks"] for s in b["sublayers"]) + sum(part["bytes"] for part in model["other"])
    planned = sizes.get("planned") or sizes.get("file") or stored
    strip = [[None if s["dropped"] else s["bits"] for s in block["sublayers"]] for block in model["blocks"]]
    return {
        "bytes": planned,
        "avg_bits": sizes.get("avg_bits") or 8 * planned / max(model["parameters"], 1),
        "damage": data.get("predicted"),
        "dropped": [s["id"] for b in model["blocks"] for s in b["sublayers"] if s["dropped"]],
        "plan": joined,
        "parts": sizes.get("parts") or {},
        "strip": strip,
        "other": {part["id"]: part["bits"] for part in model["other"]},
        "file": sizes.get("file"),
    }


# --- the heat map


def facets(table: OptionTable) -> list[dict[str, Any]]:
    """One small map for each role in a block (rows: options, columns: blocks), and one for the sites outside of blocks.

    Cells are `[column, row, damage, spread, bytes, refused]` with the site's id by column.
    """
    roles: dict[str, dict[int, str]] = {}
    outside: list[str] = []
    for id, row in table.sites.items():
        if len(row.choices) < 2:
            continue
        match = _BLOCK.fullmatch(id)
        if match is None:
            outside.append(id)
            continue
        role = match["prefix"] + (match["rest"] or "whole block")
        roles.setdefault(role, {})[int(match["number"])] = id
    made = [_facet(table, role, [(str(n), id) for n, id in sorted(ids.items())], "block") for role, ids in roles.items()]
    if outside:
        made.append(_facet(table, "outside of blocks", [(id, id) for id in outside], "site"))
    return made


def _facet(table: OptionTable, title: str, columns: Sequence[tuple[str, str]], axis: str) -> dict[str, Any]:
    choices: dict[str, Choice] = {}
    sizes: dict[str, list[float]] = {}
    for _, id in columns:
        row = table.sites[id]
        for choice in row.choices:
            name = format_options(choice.options)
            choices.setdefault(name, choice)
            sizes.setdefault(name, []).append(choice.bytes / max(row.dense_bytes, 1))
    order = sorted(choices, key=lambda name: (name != str(KEEP), -sum(sizes[name]) / len(sizes[name]), name))
    labels = short_labels([choices[name].options for name in order])
    cells = []
    for column, (_, id) in enumerate(columns):
        for choice in table.sites[id].choices:
            at = order.index(format_options(choice.options))
            cells.append([column, at, choice.damage, choice.spread, choice.bytes, choice.refused])
    return {
        "title": title,
        "axis": axis,
        "columns": [name for name, _ in columns],
        "sites": [id for _, id in columns],
        "options": order,
        "labels": labels,
        "cells": cells,
    }


def short_labels(options: Sequence[tuple[Spec, ...]]) -> list[str]:
    """What tells options apart, in few letters: `4 bit g64`, `drop`, `window 128`, `keep`."""
    specs = [spec for joint in options for spec in joint]
    varying: dict[str, list[str]] = {}
    named: set[tuple[str, str]] = set()
    for name in {spec.name for spec in specs}:
        same = [dict(spec.args) for spec in specs if spec.name == name]
        keys = dict.fromkeys(key for args in same for key in args)
        varying[name] = [key for key in keys if len({args.get(key) for args in same}) > 1]
        others = [key for key in varying[name] if key not in ("bits", "group_size")]
        if len(others) > 1 or any(key not in args for key in others for args in same):  # a number alone would not say of what
            named |= {(name, key) for key in others}
    made = [" + ".join(_label(spec, varying[spec.name], named) for spec in joint) or str(KEEP) for joint in options]
    return made if len(set(made)) == len(made) else [format_options(joint) for joint in options]


def _label(spec: Spec, varying: Iterable[str], named: Collection[tuple[str, str]]) -> str:
    args = dict(spec.args)
    bits = args.get("bits")
    words = [spec.name] if bits is None else [f"{bits} bit"]
    for key in varying:
        value = args.get(key)
        if key == "bits" or value is None:
            continue
        if isinstance(value, bool):
            words.append(key if value else f"no {key}")
        elif key == "group_size":
            words.append(f"g{value}")
        else:
            words.append(f"{key} {value}" if (spec.name, key) in named and not isinstance(value, str) else str(value))
    return " ".join(words)


# --- tables


def _remarks(data: Mapping[str, Any], table: OptionTable | None) -> list[dict[str, Any]]:
    """Every remark of a pass, then every option the table refuses; runs of one reason over many sites stay one row each."""
    made = [
        {
            "kind": remark.get("kind", "note"),
            "pass": remark.get("pass", ""),
            "site": remark.get("site") or "",
            "text": remark.get("text", ""),
            "numbers": ", ".join(f"{key} {_text(value)}" for key, value in (remark.get("numbers") or {}).items()),
        }
        for remark in data.get("remarks") or []
    ]
    said = {(remark["site"], remark["text"]) for remark in made}
    for row in table.sites.values() if table else ():
        for choice in row.choices:
            if choice.refused is not None and (row.site, choice.refused) not in said:
                numbers = format_options(canonical(choice.options))
                made.append(
                    {"kind": "refused", "pass": choice.option.name, "site": row.site, "text": choice.refused, "numbers": numbers}
                )
    return made


def _tables(data: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    """Every other section as rows of key and value, the known ones first and with a title of their own."""
    rest = [key for key in data if key not in _TITLES and key not in _SHOWN]
    for key in [*_TITLES, *rest]:
        value = data.get(key)
        if value in (None, {}, [], ""):
            continue
        rows = list(_rows(value)) if isinstance(value, Mapping | list) else [("", _text(value))]
        if key == "bytes":
            rows = [row for row in rows if "parts" not in row[0]]
        yield {"title": _TITLES.get(key, key.replace("_", " ").capitalize()), "rows": rows}


def _rows(value: Any, path: str = "") -> Iterable[tuple[str, str]]:
    if isinstance(value, Mapping) and {"mean", "low", "high"} <= set(value):
        yield (
            path,
            f"{_text(value['mean'])} (95 % {_text(value['low'])} to {_text(value['high'])}) {value.get('unit', '')}".rstrip(),
        )
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _rows(inner, f"{path} {key}".strip())
    elif isinstance(value, list) and any(isinstance(v, Mapping | list) for v in value):
        for i, inner in enumerate(value):
            yield from _rows(inner, f"{path} {i + 1}".strip())
    else:
        yield path, ", ".join(map(_text, value)) if isinstance(value, list) else _text(value)


def _text(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return "yes" if value else "no" if value is False else "none"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.5g}" if isinstance(value, float) else str(value)
