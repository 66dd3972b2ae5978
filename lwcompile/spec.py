"""One-line specs, `name{key=value}`: how a pass and its options are written in YAML, on the command line and in plans.

`Spec.parse(str(spec)) == spec` for every spec, so what a report prints can be pasted back into a recipe.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from lwcompile.errors import BadPlan

Scalar = int | float | bool | str | None
Value: TypeAlias = "Scalar | tuple[Value, ...] | Spec"

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.\-/]*")
_NUMBER = re.compile(r"[+-]?(\d+\.\d*([eE][+-]?\d+)?|\.\d+([eE][+-]?\d+)?|\d+[eE][+-]?\d+|\d+|inf)(?![A-Za-z0-9_.\-/])")
_WORDS: dict[str, Scalar] = {"true": True, "false": False, "none": None}


@dataclass(frozen=True)
class Spec:
    """A name with typed arguments, in the order they were written; `then` holds what is joined to it: `low_rank + quantize`."""

    name: str
    args: tuple[tuple[str, Value], ...] = ()
    then: tuple[Spec, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Spec:
        """Read one spec, or several joined by `+`; `BadPlan` names the column of the first character that does not fit."""
        reader = _Reader(text.strip())
        parts = [reader.spec()]
        while reader.take("+"):
            parts.append(reader.spec())
        reader.expect_end()
        return cls.joined(parts)

    @classmethod
    def joined(cls, parts: Sequence[Spec]) -> Spec:
        """One option that applies these in order: a structural one, and the numeric format of what it leaves."""
        return cls(parts[0].name, parts[0].args, tuple(parts[1:]))

    @property
    def parts(self) -> tuple[Spec, ...]:
        """Itself alone, or what it joins, in order."""
        return (Spec(self.name, self.args), *self.then) if self.then else (self,)

    @classmethod
    def of(cls, name: str, **args: Value | list[Value]) -> Spec:
        return cls(name, tuple((key, tuple(v) if isinstance(v, list) else v) for key, v in args.items()))

    def __str__(self) -> str:
        args = f"{{{','.join(f'{key}={_format(value)}' for key, value in self.args)}}}" if self.args else ""
        return " + ".join([self.name + args, *map(str, self.then)])

    def get(self, key: str, default: Value = None) -> Value:
        return dict(self.args).get(key, default)

    def expand(self) -> list[Spec]:
        """The grid of a spec whose arguments hold lists: `quantize{bits=[3,4]}` is two options."""
        if self.then:
            return [Spec.joined(parts) for parts in itertools.product(*(part.expand() for part in self.parts))]
        axes = [[(key, v) for v in (value if isinstance(value, tuple) else (value,))] for key, value in self.args]
        return [Spec(self.name, combination) for combination in itertools.product(*axes)]


KEEP = Spec("keep")


def _format(value: Value) -> str:
    if isinstance(value, tuple):
        return f"[{','.join(map(_format, value))}]"
    if isinstance(value, Spec):
        return str(value) if value.args else f"{value}{{}}"
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    plain = _NAME.fullmatch(value) and value.lower() not in _WORDS and not _NUMBER.fullmatch(value)
    return value if plain else json.dumps(value, ensure_ascii=not value.isprintable())


class _Reader:
    """A recursive-descent reader over one line."""

    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0

    def fail(self, wanted: str) -> BadPlan:
        return BadPlan(f"cannot read the spec {self.text!r}: expected {wanted} at column {self.at + 1}")

    def skip(self) -> None:
        while self.at < len(self.text) and self.text[self.at].isspace():
            self.at += 1

    def take(self, char: str) -> bool:
        self.skip()
        if not self.text.startswith(char, self.at):
            return False
        self.at += len(char)
        return True

    def expect_end(self) -> None:
        self.skip()
        if self.at != len(self.text):
            raise self.fail("the end of the line")

    def name(self, what: str) -> str:
        self.skip()
        match = _NAME.match(self.text, self.at)
        if match is None:
            raise self.fail(what)
        self.at = match.end()
        return match.group()

    def spec(self) -> Spec:
        name = self.name("a name")
        return Spec(name, self.arguments() if self.take("{") else ())

    def arguments(self) -> tuple[tuple[str, Value], ...]:
        args: dict[str, Value] = {}
        if self.take("}"):
            return ()
        while True:
            key = self.name("an option's name")
            if key in args:
                raise self.fail(f"each option once, but {key!r} is repeated before")
            if not self.take("="):
                raise self.fail(f"'=' after {key!r}")
            args[key] = self.value()
            if self.take("}"):
                return tuple(args.items())
            if not self.take(","):
                raise self.fail("',' or '}'")

    def value(self) -> Value:
        if self.take("["):
            return self.list()
        self.skip()
        if self.text.startswith('"', self.at):
            return self.string()
        if number := _NUMBER.match(self.text, self.at):
            self.at = number.end()
            return int(number.group()) if re.fullmatch(r"[+-]?\d+", number.group()) else float(number.group())
        word = self.name("a value")
        if self.text.startswith("{", self.at):
            self.at += 1
            return Spec(word, self.arguments())
        return _WORDS.get(word.lower(), word)

    def list(self) -> tuple[Value, ...]:
        items: list[Value] = []
        if self.take("]"):
            return ()
        while True:
            items.append(self.value())
            if self.take("]"):
                return tuple(items)
            if not self.take(","):
                raise self.fail("',' or ']'")

    def string(self) -> str:
        try:
            value, end = json.JSONDecoder().raw_decode(self.text, self.at)
        except json.JSONDecodeError:
            raise self.fail('a closed "string"') from None
        self.at = end
        return value
