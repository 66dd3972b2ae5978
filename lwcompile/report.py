"""Reports: what a run did, in one JSON file, and the same as one HTML page that needs nothing else.

    report = Report.build(name=..., table=table, plan=plan, curve=pareto(table, allocator), sites=structure.sites,
                          measured={...}, remarks=[...], versions={...}, ...)
    report.save(run_dir)             # report.json and report.html
    Report.load(run_dir).data        # the JSON again

Sections that `build` derives: `model` (bits and bytes of every block), `table`, `plan`, `predicted`, `pareto`, `bytes.parts`.
Sections that it takes as they are: `recipe`, `measured`, `evaluation`, `remarks`, `analyses`, `speed`, `parity`, `bytes`,
`seconds`, `versions`, `seed`, `calibration`, and any other, which the page shows as a table. An analysis may hold
`pairs`: `[{"site", "option", "predicted", "measured"}]` on held-out sites, which the page draws.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lwcompile.errors import BadInput
from lwcompile.plans import Plan
from lwcompile.site import SUBLAYER_KINDS, Site
from lwcompile.table import OptionTable, format_options

FORMAT = 1

PARTS = ("embedding", "head", "attention", "mlp", "other", "scales", "rest")
"""Where bytes go: `scales` are scales, zero points and padding of all sites; `rest` is what no site stores."""


@dataclass(frozen=True)
class Report:
    """One JSON-able mapping; see the module for its sections."""

    data: dict[str, Any]

    @classmethod
    def build(
        cls,
        *,
        name: str,
        table: OptionTable,
        plan: Plan,
        curve: Sequence[Plan] = (),
        sites: Mapping[str, Site] | None = None,
        license: str | None = None,
        **sections: Any,
    ) -> Report:
        """A report of `plan` among the choices of `table`.

        Args:
            curve: plans of other sizes from the same table, for the Pareto curve.
            sites: the structure's sites, for a table whose rows leave blocks and sublayers out.
            sections: see the module.
        """
        tree = _Tree(table, sites)
        found = tree.describe(plan)
        dense = tree.describe(Plan({}))
        data: dict[str, Any] = {
            "format": FORMAT,
            "model": {
                "name": name,
                "license": license,
                "parameters": table.parameters,
                "dense_bytes": dense["bytes"],
                "blocks": found.pop("blocks"),
                "other": found.pop("other"),
            },
            "budget": plan.budget.to_dict(),
            "unit": table.unit,
            "table": json.loads(table.to_json()),
            "plan": {site: [str(option) for option in options] for site, options in plan.choices.items()},
            "predicted": found["damage"],
            "pareto": [_point(tree.describe(other)) for other in curve],
            **sections,
        }
        given = dict(sections.get("bytes") or {})
        data["bytes"] = {
            "planned": found["bytes"],
            "avg_bits": found["avg_bits"],
            "parts": found["parts"],
            "dense_parts": dense["parts"],
        } | given
        return cls(data)

    def save(self, folder: str | Path) -> Path:
        """Write `report.json` and `report.html` into a folder, each whole or not at all; the HTML's path."""
        from lwcompile.rundir import write_atomic

        folder = Path(folder)
        write_atomic(folder / "report.json", json.dumps(finite(self.data), indent=1, allow_nan=False).encode())
        write_atomic(folder / "report.html", self.html().encode())
        return folder / "report.html"

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """Read a `report.json`, or the one in a run directory; `BadInput` if there is none or it is damaged."""
        path = Path(path)
        file = path / "report.json" if path.is_dir() else path
        if not file.is_file():
            raise BadInput(f"{path} holds no report.json; name a run directory that `lwcompile runs` lists as finished")
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise BadInput(f"{file} is not a report ({error}); run the export again") from None
        if not isinstance(data, dict) or "model" not in data:
            raise BadInput(f"{file} is not a report: it has no section 'model'; run the export again")
        return cls(data)

    def html(self) -> str:
        """The page: self-contained, with its data, style and script inline."""
        from lwcompile.html import page
        from lwcompile.html.view import report_view

        return page("report", self.data["model"]["name"], report_view(self.data))

    def summary(self) -> dict[str, Any]:
        """The figures of the closing table, for `--json`."""
        keys = ("predicted", "measured", "unit", "evaluation", "speed", "parity", "seconds", "plan")
        model = self.data["model"]
        kept = {key: self.data[key] for key in keys if key in self.data}
        sizes = {key: value for key, value in self.data.get("bytes", {}).items() if key != "parts"}
        return {
            "model": model["name"],
            "parameters": model["parameters"],
            "dense_bytes": model["dense_bytes"],
            "bytes": sizes,
            **kept,
        }


def _point(found: dict[str, Any]) -> dict[str, Any]:
    """A point of the Pareto curve: what the page redraws when the slider stops there."""
    strip = [[None if s["dropped"] else s["bits"] for s in block["sublayers"]] for block in found.pop("blocks")]
    return {**found, "strip": strip, "other": {part["id"]: part["bits"] for part in found["other"]}}


def finite(value: Any) -> Any:
    """The same as plain JSON: null for infinities and NaN, numbers for other libraries' scalars, text for the rest."""
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, Mapping):
        return {str(key): finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [finite(inner) for inner in value]
    return finite(value.item()) if hasattr(value, "item") else str(value)


class _Tree:
    """The rows of a table under the model's blocks and sublayers."""

    def __init__(self, table: OptionTable, sites: Mapping[str, Site] | None) -> None:
        self.table = table
        known = {id: (row.kind, row.parent) for id, row in table.sites.items()}
        self.nodes = ({id: (str(site.kind), site.parent) for id, site in sites.items()} if sites else {}) | known
        if sites:  # a table without rows for blocks has rows without parents
            for id, (kind, parent) in known.items():
                if parent is None and id in sites:
                    self.nodes[id] = (kind, sites[id].parent)
        self.blocks = [id for id, (kind, _) in self.nodes.items() if kind == "block"]
        self.above = {id: self._above(id) for id in self.nodes}

    def _above(self, id: str) -> tuple[str, ...]:
        chain: list[str] = []
        while (parent := self.nodes[id][1]) is not None and parent in self.nodes and parent not in chain:
            chain.append(parent)
            id = parent
        return tuple(chain)

    def sublayers(self, block: str) -> list[str]:
        """The sublayers that stand right below a block; the block itself if it has none."""
        found = [id for id, (kind, parent) in self.nodes.items() if parent == block and kind in SUBLAYER_KINDS]
        return found or [block]

    def describe(self, plan: Plan) -> dict[str, Any]:
        """Damage, bytes, bits, what is dropped, every block and what stands outside, and where the bytes go."""
        table, found = self.table, self.table.evaluate(plan.choices)
        carried = table.effective(plan.choices)
        chosen = {id: table.sites[id].choice(carried.get(id, ())) for id in table.sites}
        silenced = {id for id in table.sites if any(chosen[a].silences for a in table.paths[id])}
        counted = {min(ids, key=list(table.sites).index): ids for ids in table.stores}
        gone = {id for id, choice in chosen.items() if choice.removes}

        def row(id: str, below: Sequence[str]) -> dict[str, Any]:
            live = [i for i in below if i not in silenced]
            parameters = sum(table.sites[i].parameters for i in self._leaves(below))
            stored = sum(chosen[i].bytes for i in live)
            own = sum(chosen[i].bytes for i in live if i in counted)
            dense = sum(table.sites[i].dense_bytes for i in below)
            bits = 8 * stored / parameters if parameters else 0.0
            return {"id": id, "bits": round(bits, 4), "bytes": own, "dense_bytes": dense}

        blocks: list[dict[str, Any]] = []
        for block in self.blocks:
            parts = []
            for sub in self.sublayers(block):
                below = [i for i in table.sites if i == sub or sub in self.above[i]]
                dropped = sub in gone or any(a in gone for a in self.above[sub])
                parts.append({**row(sub, below), "kind": self.nodes[sub][0], "dropped": dropped})
            blocks.append({"id": block, "sublayers": parts})
        inside = {id for id in table.sites if id in self.blocks or any(a in self.blocks for a in self.above[id])}
        other = [{**row(id, [id]), "kind": self._part(id)} for id in table.sites if id not in inside]
        parts = self._parts(chosen, silenced, counted, found.bytes)
        return {
            "bytes": found.bytes,
            "avg_bits": found.avg_bits,
            "damage": found.damage,
            "dropped": list(found.dropped),
            "plan": {id: format_options(options) for id, options in carried.items()},
            "parts": parts,
            "blocks": blocks,
            "other": other,
        }

    def _leaves(self, ids: Sequence[str]) -> list[str]:
        inner = {self.table.sites[id].parent for id in ids} | {self.nodes[id][1] for id in ids}
        return [id for id in ids if id not in inner and self.table.sites[id].dense_bytes > 0]

    def _part(self, id: str) -> str:
        """Which of PARTS a site belongs to."""
        kinds = {self.nodes[a][0] for a in (id, *self.above[id])}
        if id.split(".")[-1] == "head" or ".head." in f".{id}.":
            return "head"
        for part in ("embedding", "attention"):
            if part in kinds:
                return part
        return "mlp" if kinds & {"mlp", "moe"} else "other"

    def _parts(self, chosen: Mapping[str, Any], silenced: set[str], counted: Mapping[str, Any], total: int) -> dict[str, int]:
        found: Counter[str] = Counter()
        for id, choice in chosen.items():
            if id in silenced or id not in counted:
                continue
            bits = choice.option.get("bits")
            codes = choice.bytes
            if isinstance(bits, int | float) and not isinstance(bits, bool):
                codes = min(choice.bytes, round(self.table.sites[id].parameters * bits / 8))
            found[self._part(id)] += codes
            found["scales"] += choice.bytes - codes
        found["rest"] = total - sum(found.values())
        return {part: found[part] for part in PARTS if found[part] > 0}
