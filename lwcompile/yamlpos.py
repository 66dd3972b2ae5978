"""YAML with line numbers, so that an error in a plan or recipe names the place to mend."""

from __future__ import annotations

import re
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lwcompile.errors import BadInput, BadPlan

Key = tuple[Hashable, ...]
_LARGEST = 1_000_000  # keys and items; aliases of aliases could ask for more than there is memory
_FLOW_SPEC = re.compile(r"[\[{,].*\w\{")
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class Document:
    """The values of one file; `lines` holds the line of every key and item, by its path from the root."""

    source: str
    value: dict[str, Any]
    lines: dict[Key, int] = field(default_factory=dict)

    def where(self, *path: Hashable) -> str:
        """`plan.yaml:17`: the place of `path`, or of the nearest part of it that has a line."""
        for end in range(len(path), 0, -1):
            if path[:end] in self.lines:
                return f"{self.source}:{self.lines[path[:end]]}"
        return self.source


def read(path: str | Path) -> Document:
    """The document at `path`. `BadInput` if it cannot be read, `BadPlan` with file and line if it is not a YAML mapping."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise BadInput(f"{path} is not text in UTF-8, so it is no YAML file") from None
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror or error}") from None
    return parse(text, source=str(path))


def parse(text: str, source: str = "<text>") -> Document:
    """The document in `text`; duplicate keys, cycles and tags that make objects are refused."""
    try:
        root = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{source}:{mark.line + 1}" if mark else source
        line = text.splitlines()[mark.line] if mark and mark.line < len(text.splitlines()) else ""
        hint = "; inside [ ] or { }, put a spec such as quantize{bits=4} in quotes" if _FLOW_SPEC.search(line) else ""
        raise BadPlan(f"{place}: not YAML: {error.problem or error.context}{hint}") from None
    except yaml.YAMLError as error:
        raise BadPlan(f"{source}: not YAML: {error}") from None
    if root is None:
        return Document(source, {})
    if not isinstance(root, yaml.MappingNode):
        raise BadPlan(f"{source}:{root.start_mark.line + 1}: expected `key: value` lines")
    builder = _Builder(source)
    return Document(source, builder.build(root, ()), builder.lines)


class _Builder:
    """Turns YAML nodes into plain values and notes their lines."""

    def __init__(self, source: str) -> None:
        self.source, self.lines = source, {}
        self.scalars: Any = yaml.constructor.SafeConstructor()
        self.open: set[int] = set()

    def build(self, node: yaml.Node, path: Key) -> Any:
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(node)
        if id(node) in self.open:
            raise BadPlan(f"{self.source}:{node.start_mark.line + 1}: an alias that contains itself")
        if len(self.lines) > _LARGEST:
            raise BadPlan(f"{self.source}: more than {_LARGEST:,} entries")
        self.open.add(id(node))
        value = self.mapping(node, path) if isinstance(node, yaml.MappingNode) else self.sequence(node, path)
        self.open.remove(id(node))
        return value

    def scalar(self, node: yaml.ScalarNode) -> Any:
        try:
            return self.scalars.construct_object(node)
        except (yaml.YAMLError, ValueError) as error:
            reason = getattr(error, "problem", None) or error
            raise BadPlan(f"{self.source}:{node.start_mark.line + 1}: {reason}") from None

    def sequence(self, node: Any, path: Key) -> list[Any]:
        items = []
        for index, child in enumerate(node.value):
            self.lines[(*path, index)] = child.start_mark.line + 1
            items.append(self.build(child, (*path, index)))
        return items

    def mapping(self, node: Any, path: Key) -> dict[Any, Any]:
        values: dict[Any, Any] = {}
        for key_node, child in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise BadPlan(f"{self.source}:{line}: a key must be one word")
            key = self.scalar(key_node)
            if key in values:
                first = self.lines[(*path, key)]
                raise BadPlan(f"{self.source}:{line}: {key!r} is given twice, first at line {first}")
            self.lines[(*path, key)] = line
            values[key] = self.build(child, (*path, key))
        return values
