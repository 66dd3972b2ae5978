"""Plans: which option each site carries, in a YAML file that people read, edit and compare.

    unit: nats/token
    budget: {avg_bits: 4.25}
    predicted: 0.0123
    sites:
      embedding: quantize{bits=4,group_size=64}

      block3.attention: drop
      block3.mlp.down_proj: lowrank{rank=64} + quantize{bits=8}

A site that is not named keeps its original form. A key may be a glob, such as `"block*"`: it stands for the sites that are offered
what it says. Errors name the file and the line.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from lwcompile.budget import NO_BUDGET, Budget, format_size, suggest
from lwcompile.errors import BadInput, BadPlan
from lwcompile.spec import KEEP, Spec
from lwcompile.table import Assignment, Choice, Group, Options, OptionTable, SiteRow, canonical, format_options
from lwcompile.yamlpos import Document, parse, read

VERSION = 1
_NUMBERS = ("predicted", "conditional", "measured", "bytes", "avg_bits")
_KEYS = ("version", "unit", "budget", *_NUMBERS, "interval", "origin", "sites")
_JOINT = re.compile(r'"(?:\\.|[^"\\])*"|(?<=\s)\+(?=\s)')
_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_./\-{}=,\[\]+ ]*[A-Za-z0-9_}]|[A-Za-z_]")
_WORDS = frozenset({"true", "false", "yes", "no", "on", "off", "null", "y", "n"})  # what YAML 1.1 reads as something else
_NUMBERED = re.compile(r"(.*?\d+)(?:\.|$)")


class Change(NamedTuple):
    """One difference between two plans."""

    site: str
    before: Options
    after: Options

    def __str__(self) -> str:
        return f"{self.site}: {format_options(self.before)} -> {format_options(self.after)}"


@dataclass(frozen=True)
class Plan:
    """Site -> options, with what was asked, what was predicted and what was measured.

    Attributes:
        choices: site id -> a structural option, then a numeric one, either absent; a site that is absent keeps its form.
        budget: what was asked for.
        unit: of every damage here.
        predicted: the sum of the sites' damages.
        conditional: damage of the whole plan on calibration samples, as the allocator that searched for it measured it.
        measured: damage of the whole plan on held-out data, with its 95 % `interval`.
        bytes, avg_bits: everything stored, as predicted.
        origin: how it came about: model digest, recipe, allocator, versions, seed, notes.
        source, lines: the file it was read from and the line of each site, for errors.
    """

    choices: dict[str, Options]
    budget: Budget = NO_BUDGET
    unit: str = ""
    predicted: float | None = None
    conditional: float | None = None
    measured: float | None = None
    interval: tuple[float, float] | None = None
    bytes: int | None = None
    avg_bits: float | None = None
    origin: dict[str, Any] = field(default_factory=dict)
    source: str | None = field(default=None, compare=False, repr=False)
    lines: dict[str, int] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        carried = {site: canonical(options) for site, options in self.choices.items()}
        object.__setattr__(self, "choices", {site: options for site, options in carried.items() if options})

    @classmethod
    def of(cls, table: OptionTable, assignment: Assignment, budget: Budget = NO_BUDGET, **origin: Any) -> Plan:
        """The plan of an assignment, with what the table predicts for it. What a dropped parent silences is left out."""
        found = table.evaluate(assignment)
        return cls(
            choices=table.effective(assignment),
            budget=budget,
            unit=table.unit,
            predicted=found.damage,
            bytes=found.bytes,
            avg_bits=found.avg_bits,
            origin=origin,
        )

    def __getitem__(self, site: str) -> Options:
        """What `site` carries; `()` is keep."""
        return self.choices.get(site, ())

    def diff(self, other: Plan) -> list[Change]:
        """What `other` does differently, in the order of this plan's sites, then of those that only `other` names."""
        sites = dict.fromkeys([*self.choices, *other.choices])
        return [Change(site, self[site], other[site]) for site in sites if self[site] != other[site]]

    def digest(self) -> str:
        """A hash of what the sites carry, and of nothing else: two plans with equal digests compile to the same model."""
        carried = sorted((site, format_options(options)) for site, options in self.choices.items())
        return hashlib.sha256(json.dumps(carried).encode()).hexdigest()

    def where(self, site: str) -> str:
        """`plan.yaml:17`, or nothing for a plan that came from no file."""
        if self.source is None:
            return ""
        return f"{self.source}:{self.lines[site]}" if site in self.lines else self.source

    def spread(self, table: OptionTable) -> Plan:
        """The plan with each key that holds a `*` replaced by the sites it matches that can carry its options and are not named.

        `BadPlan` for a key that no site takes.
        """
        choices, lines = {site: options for site, options in self.choices.items() if "*" not in site}, dict(self.lines)
        for key in (site for site in self.choices if "*" in site):
            rows = (row for id, row in table.sites.items() if fnmatchcase(id, key) and id not in choices)
            found = [row.site for row in rows if (c := row.by_options.get(self.choices[key])) is not None and c.refused is None]
            if not found:
                where = self.where(key)
                raise BadPlan(
                    f"{where and where + ': '}no site that {key!r} matches can carry {format_options(self.choices[key])}"
                )
            choices |= dict.fromkeys(found, self.choices[key])
            lines |= {site: self.lines[key] for site in found if key in self.lines}
        return dataclasses.replace(self, choices=choices, lines=lines)

    def validate(self, offered: OptionTable | Mapping[str, Iterable[Spec] | None], groups: Sequence[Group] = ()) -> None:
        """Raise `BadPlan`, with file and line, for an unknown site, an option not offered, a broken group or a conflict.

        `offered` is a table, or the options by site id, where None lets a site carry anything.
        """
        table = offered if isinstance(offered, OptionTable) else _table(self.choices, offered, groups)
        found = table.violations(self.choices)
        if not found:
            return
        first = found[0]
        places = [self.where(site) for site in sorted(first.sites, key=lambda site: site not in self.lines)]
        also = f" (see {places[1]})" if len(places) > 1 and places[1] not in (places[0], self.source or "") else ""
        more = f"; {len(found) - 1} more such errors follow" if len(found) > 1 else ""
        raise BadPlan(f"{places[0] and places[0] + ': '}{first.message}{also}{more}")

    # --- the file

    def to_yaml(self, table: OptionTable | None = None) -> str:
        """The text of the file; with a table, each line ends with a comment that gives the site's damage and size."""
        lines = [
            "# Which option each site carries. A site that is not named keeps its original form; edit freely.",
            _block("version", VERSION),
        ]
        if self.unit:
            lines.append(_block("unit", self.unit))
        if not self.budget.empty:
            lines.append(f"budget: {_flow(self.budget.to_dict())}")
        lines += [_block(name, value) for name in _NUMBERS if (value := getattr(self, name)) is not None]
        if self.interval is not None:
            lines.append(f"interval: {_flow(list(self.interval))}")
        if self.origin:
            lines.append(_block("origin", json.loads(json.dumps(self.origin, default=str))))
        lines.append("sites:" if self.choices else "sites: {}")
        section = None
        for site, options in self.choices.items():
            if section not in (None, _section(site)):
                lines.append("")
            section = _section(site)
            lines.append(f"  {_scalar(site)}: {_scalar(format_options(options))}{_comment(table, site, options)}")
        return "\n".join(lines) + "\n"

    def save(self, path: str | Path, table: OptionTable | None = None) -> None:
        """Write the file, whole or not at all; `BadInput` says why it cannot be written."""
        path = Path(path)
        temporary = None
        try:
            with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.name, delete=False, encoding="utf-8") as file:
                temporary = Path(file.name)
                file.write(self.to_yaml(table))
                file.flush()
                os.fsync(file.fileno())
            temporary.chmod(0o644)
            temporary.replace(path)
        except OSError as error:
            if temporary is not None:
                temporary.unlink(missing_ok=True)
            raise BadInput(f"cannot write the plan {path}: {error.strerror or error}") from None

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a file; `BadPlan` names the line of what does not fit, `BadInput` a file that cannot be read."""
        return cls._from(read(path))

    @classmethod
    def parse(cls, text: str, source: str = "plan.yaml") -> Plan:
        """Read the text of a file; `source` stands for its name in errors."""
        return cls._from(parse(text, source))

    @classmethod
    def _from(cls, document: Document) -> Plan:
        body = document.value
        for key in body:
            if key not in _KEYS:
                hint = suggest(str(key), list(_KEYS)) or f"; a plan has {', '.join(_KEYS)}"
                raise BadPlan(f"{document.where(key)}: unknown key {key!r}{hint}")
        if body.get("version", VERSION) != VERSION:
            raise BadPlan(f"{document.where('version')}: version {body['version']!r}, and this lwcompile reads {VERSION}")
        values: dict[str, Any] = {name: _number(document, name) for name in _NUMBERS}
        for name, default in (("unit", ""), ("origin", {}), ("sites", {}), ("budget", {})):
            value = default if body.get(name) is None else body[name]
            if not isinstance(value, type(default)):
                wanted = "a text" if isinstance(default, str) else "`key: value` lines"
                raise BadPlan(f"{document.where(name)}: {name} wants {wanted}, and got {value!r}")
            values[name] = value
        values["budget"] = Budget.of(values["budget"], lambda key: document.where("budget", key))
        sites = values.pop("sites")
        if not all(isinstance(site, str) for site in sites):
            site = next(site for site in sites if not isinstance(site, str))
            raise BadPlan(f"{document.where('sites', site)}: {site!r} is no site id")
        return cls(
            choices={site: _options(document, site, text) for site, text in sites.items()},
            interval=_interval(document),
            source=document.source,
            lines={site: document.lines["sites", site] for site in sites},
            **values,
        )

    def normalize(self, form: Callable[[Spec], Spec]) -> Plan:
        """This plan with each option in the form that its transform writes, so that stated defaults do not tell two apart."""
        choices = {site: tuple(form(option) for option in options) for site, options in self.choices.items()}
        return dataclasses.replace(self, choices=choices)

    def replace(self, **changes: Any) -> Plan:
        """This plan with some fields changed, such as `measured` and `interval`."""
        return dataclasses.replace(self, **changes)


def _options(document: Document, site: str, text: Any) -> Options:
    where = document.where("sites", site)
    if text is None:
        return ()
    if not isinstance(text, str):
        raise BadPlan(f"{where}: site {site!r} wants an option such as quantize{{bits=4}}, and got {text!r}")
    cuts = [match.span() for match in _JOINT.finditer(text) if match.group() == "+"]
    starts, ends = [0, *(end for _, end in cuts)], [*(start for start, _ in cuts), len(text)]
    try:
        options = tuple(Spec.parse(text[start:end]) for start, end in zip(starts, ends))
    except BadPlan as error:
        raise BadPlan(f"{where}: {error}") from None
    if len(options) > 2 or (len(options) == 2 and KEEP in options):
        raise BadPlan(f"{where}: site {site!r} takes one structural option and one numeric one, and got {text!r}")
    return options


def _number(document: Document, name: str) -> float | int | None:
    value = document.value.get(name)
    try:
        number = None if value is None else float(value)
        if isinstance(value, bool) or (number is not None and math.isnan(number)):
            raise ValueError
        return value if isinstance(value, int) else number
    except (TypeError, ValueError):
        raise BadPlan(f"{document.where(name)}: {name} wants a number, and got {value!r}") from None


def _interval(document: Document) -> tuple[float, float] | None:
    value = document.value.get("interval")
    if value is None:
        return None
    try:
        low, high = map(float, value)
        return low, high
    except (TypeError, ValueError):
        raise BadPlan(f"{document.where('interval')}: interval wants [low, high], and got {value!r}") from None


def _section(site: str) -> str:
    """What a blank line parts in the file: the block, or everything outside of blocks."""
    match = _NUMBERED.match(site)
    return match.group(1) if match else ""


def _scalar(text: str) -> str:
    """`text` for a YAML line, bare wherever YAML would read it back as it is."""
    bare = _PLAIN.fullmatch(text) and text.lower() not in _WORDS
    return text if bare else yaml.safe_dump(text, default_style='"', allow_unicode=True, width=math.inf).strip()


def _flow(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, default_flow_style=True, width=math.inf).strip()


def _block(key: str, value: Any) -> str:
    for unicode in (True, False):  # PyYAML writes a few line separators as they are, and reads them back as spaces
        text = yaml.safe_dump({key: value}, sort_keys=False, default_flow_style=False, allow_unicode=unicode, width=math.inf)
        if yaml.safe_load(text) == {key: value}:
            break
    return text.rstrip("\n")


def _comment(table: OptionTable | None, site: str, options: Options) -> str:
    if table is None or site not in table.sites or options not in table.sites[site].by_options:
        return ""
    choice = table.sites[site].by_options[options]
    return f"  # damage {choice.damage:.3g}, {format_size(choice.bytes)}"


def _table(choices: Assignment, offered: Mapping[str, Iterable[Spec] | None], groups: Sequence[Group]) -> OptionTable:
    """A table without scores, for checking a plan against sites and options alone."""
    rows = {}
    for site, specs in offered.items():
        options = choices.get(site, ()) if specs is None else ()
        free = [Choice(options[-1], 0.0, 0, structural=options[0] if len(options) > 1 else None)] if options else []
        given = {canonical([spec]): spec for spec in specs or () if spec != KEEP}
        rows[site] = SiteRow(site, None, "", 0, 0, (*free, *(Choice(spec, 0.0, 0) for spec in given.values())))
    return OptionTable("", 1, rows, tuple(groups))
