"""What a plan may spend: a size, a number of sublayers to drop, a limit on damage."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from lwcompile.errors import BadPlan

_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([kmgt]?)(i?)b?\s*", re.IGNORECASE)
_POWER = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def parse_size(text: str | int) -> int:
    """Bytes in `80MB` (80,000,000), `1.5 GiB` (1,610,612,736) or a plain number; `BadPlan` if it is none of these."""
    match = _SIZE.fullmatch(str(text))
    if match is None:
        raise BadPlan(f"cannot read {text!r} as a size; write bytes, or a number with kB, MB, GB, KiB, MiB or GiB")
    number, prefix, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** _POWER[prefix.lower()])


def format_size(count: float) -> str:
    """`41.2 MB`: decimal units, as file listings and download pages use them."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(count) >= scale:
            return f"{count / scale:.4g} {unit}"
    return f"{count:.0f} bytes"


def suggest(word: str, known: list[str]) -> str:
    """` (did you mean 'x'?)` for the nearest known word, or nothing."""
    near = get_close_matches(word, known, n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""


@dataclass(frozen=True)
class Budget:
    """Limits on a whole plan; every one that is given holds at once.

    Attributes:
        bytes: at most this many bytes stored, embedding, head and every overhead included.
        avg_bits: at most this many stored bits per parameter of the dense model.
        drop_sublayers: exactly this many attention and MLP sublayers dropped.
        max_damage: at most this much predicted (additive) damage, in the table's unit. Alone, or with `drop_sublayers`,
            it asks for the smallest plan within it.
    """

    bytes: int | None = None
    avg_bits: float | None = None
    drop_sublayers: int | None = None
    max_damage: float | None = None

    def __post_init__(self) -> None:
        for name, low, whole in (
            ("bytes", 1, True),
            ("avg_bits", 0, False),
            ("drop_sublayers", 0, True),
            ("max_damage", 0, False),
        ):
            value = getattr(self, name)
            if value is None:
                continue
            wanted = "a whole number" if whole else "a number"
            if isinstance(value, bool) or not isinstance(value, int if whole else int | float) or math.isnan(value):
                raise BadPlan(f"budget: {name} wants {wanted}, and got {value!r}")
            if value < low or (name == "avg_bits" and value == 0):
                raise BadPlan(f"budget: {name} must be {'at least' if whole else 'above'} {low}, and is {value!r}")

    @classmethod
    def of(cls, values: Mapping[str, Any], where: Callable[[str], str] = lambda key: "budget") -> Budget:
        """Read a budget from YAML or flags; `bytes` may be a size such as `80MB`. `where(key)` places errors in a file."""
        known = [field.name for field in dataclasses.fields(cls)]
        read: dict[str, Any] = {}
        for key, value in values.items():
            if key not in known:
                raise BadPlan(f"{where(key)}: unknown key {key!r}{suggest(str(key), known)}; a budget has {', '.join(known)}")
            try:
                read[key] = _read(key, value)
                cls(**{key: read[key]})
            except BadPlan as error:
                raise BadPlan(f"{where(key)}: {str(error).removeprefix('budget: ')}") from None
        return cls(**read)

    @property
    def sized(self) -> bool:
        return self.bytes is not None or self.avg_bits is not None

    @property
    def empty(self) -> bool:
        return self == NO_BUDGET

    def max_bytes(self, parameters: int) -> int | None:
        """The limit in bytes for a model of `parameters` numbers, or None if the size is free."""
        limits = [] if self.bytes is None else [self.bytes]
        if self.avg_bits is not None:
            limits.append(math.floor(self.avg_bits * parameters / 8 + 1e-6))
        return min(limits, default=None)

    def override(self, other: Budget) -> Budget:
        """This budget with what `other` states in its place.

        A size or a limit on damage replaces all of this budget's: `--max-size 80MB` over a recipe's 4.25 bits means 80 MB.
        """
        if other.sized or other.max_damage is not None:
            drops = self.drop_sublayers if other.drop_sublayers is None else other.drop_sublayers
            return dataclasses.replace(other, drop_sublayers=drops)
        return self if other.empty else dataclasses.replace(self, drop_sublayers=other.drop_sublayers)

    def to_dict(self) -> dict[str, int | float]:
        """What is given, and nothing else."""
        return {key: value for key, value in dataclasses.asdict(self).items() if value is not None}

    def __str__(self) -> str:
        words = []
        if self.bytes is not None:
            words.append(f"at most {format_size(self.bytes)}")
        if self.avg_bits is not None:
            words.append(f"at most {self.avg_bits:g} bits")
        if self.drop_sublayers is not None:
            words.append(f"exactly {self.drop_sublayers} sublayers dropped")
        if self.max_damage is not None:
            words.append(f"damage at most {self.max_damage:g}")
        return ", ".join(words) or "no limit"


NO_BUDGET = Budget()


def _read(key: str, value: Any) -> Any:
    if key == "bytes" and isinstance(value, str):
        return parse_size(value)
    if isinstance(value, str):  # YAML 1.1 reads 1e-3 as a string
        try:
            return float(value)
        except ValueError:
            return value
    return value
