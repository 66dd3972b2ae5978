"""Choices: one option at one site, priced and scored; the row of a site; and what binds sites together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, TypeAlias

from lwcompile.errors import BadInput, BadPlan
from lwcompile.spec import KEEP, Spec, Value

Options: TypeAlias = tuple[Spec, ...]
"""What a site carries: a structural option, then a numeric one, either absent; `()` is keep."""

Assignment: TypeAlias = Mapping[str, Options]
"""Site id -> what it carries; a site that is absent keeps its original form."""


def canonical(options: Iterable[Spec]) -> Options:
    """One form for options that mean the same: no `keep`, arguments in the order of their names, `x{}` as the word `x`."""
    return tuple(_ordered(option) for option in options if option != KEEP)


def _ordered(spec: Spec) -> Spec:
    return Spec(spec.name, tuple(sorted(((key, _plain(value)) for key, value in spec.args), key=lambda arg: arg[0])))


def _plain(value: Value) -> Value:
    if isinstance(value, tuple):
        return tuple(map(_plain, value))
    if not isinstance(value, Spec):
        return value
    return _ordered(value) if value.args else value.name


def format_options(options: Options) -> str:
    """`drop`, `lowrank{rank=64} + quantize{bits=8}`, or `keep`: how a plan writes what a site carries."""
    return " + ".join(map(str, options)) or str(KEEP)


@dataclass(frozen=True)
class Choice:
    """One option at one site, priced and scored.

    Attributes:
        option: the numeric option, or the only one.
        damage: harm in the table's unit with this option alone in the model; keep is 0. Noise can measure it below 0: the
            prediction counts such a choice as 0.
        bytes: what this site itself stores under the option, as the target backend prices it; sites below not included.
        spread: one standard error of `damage`, 0 if unknown.
        refused: why it cannot be chosen, None if it can.
        silences: removes what stands below: those sites store nothing and do no damage of their own.
        replaces: with `silences`, something else does their work (shared weights), so they do not count as dropped.
        structural: a structural option applied before `option`, for choices that join two.
        shares: with `replaces`, pairs of a weight site below and the site whose tensor it reads instead: what that one carries
            does the damage that it would do at both.
    """

    option: Spec
    damage: float
    bytes: int
    spread: float = 0.0
    refused: str | None = None
    silences: bool = False
    replaces: bool = False
    structural: Spec | None = None
    shares: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        if not math.isfinite(self.damage) and self.refused is None:
            object.__setattr__(self, "refused", f"its damage is {self.damage}, not a number to compare")

    @cached_property
    def options(self) -> Options:
        """What a plan writes for it."""
        return canonical((self.option,) if self.structural is None else (self.structural, self.option))

    @property
    def predicted(self) -> float:
        """The damage that predictions add up."""
        return max(self.damage, 0.0)

    @property
    def removes(self) -> bool:
        return self.silences and not self.replaces


@dataclass(frozen=True)
class SiteRow:
    """The choices of one site, keep first (put there if it is missing)."""

    site: str
    parent: str | None
    kind: str
    parameters: int
    dense_bytes: int
    choices: tuple[Choice, ...] = ()

    def __post_init__(self) -> None:
        keep = [c for c in self.choices if not c.options] or [Choice(KEEP, 0.0, self.dense_bytes)]
        others = [c for c in self.choices if c.options]
        if len(keep) > 1 or len({c.options for c in others}) < len(others):
            raise BadInput(f"{self.site}: the same option stands twice in the table")
        if keep[0].damage != 0.0 or keep[0].refused or keep[0].silences:
            raise BadInput(f"{self.site}: keep must do no damage and silence nothing")
        object.__setattr__(self, "choices", (*keep, *others))

    @cached_property
    def by_options(self) -> dict[Options, Choice]:
        return {choice.options: choice for choice in self.choices}

    def choice(self, options: Options) -> Choice:
        """The choice that carries `options`; `BadPlan` names the offered ones, or says why it was refused."""
        found = self.by_options.get(options) or self.by_options.get(canonical(options))
        if found is None:
            raise BadPlan(f"site {self.site!r} is not offered {format_options(options)}; it is offered {self.offered()}")
        if found.refused is not None:
            raise BadPlan(f"site {self.site!r} cannot carry {format_options(options)}: {found.refused}")
        return found

    def offered(self) -> str:
        return ", ".join(format_options(c.options) for c in self.choices if c.refused is None)


@dataclass(frozen=True)
class Group:
    """Sites that must carry the same option.

    `fused`: a runtime computes them as one matrix (q/k/v, gate/up). `tied`: they read one tensor, whose bytes count once. If the
    damage of a tied tensor was measured with all its uses changed together, it stands at one of them, with 0 at the others.
    """

    name: str
    sites: tuple[str, ...]
    reason: Literal["fused", "tied"] = "fused"

    def __post_init__(self) -> None:
        object.__setattr__(self, "sites", tuple(self.sites))


class Exclusion(NamedTuple):
    """Two options that must not stand in one plan, because their transforms conflict."""

    site: str
    option: Spec
    other: str
    other_option: Spec


NOTHING = Choice(KEEP, 0.0, 0)


def choice_to_json(choice: Choice) -> dict[str, Any]:
    body: dict[str, Any] = {"option": str(choice.option), "damage": choice.damage, "bytes": choice.bytes}
    if not math.isfinite(choice.damage):
        body["damage"] = None
    if choice.structural is not None:
        body["structural"] = str(choice.structural)
    if choice.shares:
        body["shares"] = [list(pair) for pair in choice.shares]
    return body | {
        key: value
        for key in ("spread", "refused", "silences", "replaces")
        if (value := getattr(choice, key)) != getattr(NOTHING, key)
    }


def choice_from_json(body: dict[str, Any]) -> Choice:
    structural = body.get("structural")
    damage = math.nan if body["damage"] is None else float(body["damage"])
    body = body | {"shares": tuple((own, source) for own, source in body.get("shares", ()))}
    return Choice(
        **body | {"option": Spec.parse(body["option"]), "damage": damage, "structural": structural and Spec.parse(structural)}
    )
