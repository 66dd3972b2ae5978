"""Names in a checkpoint, and what becomes of them where whole blocks are gone."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Mapping
from typing import Any

from lwcompile.errors import Refused

INDEXED = re.compile(r"^(.*?)\.(\d+)\.(.*)$")


def renumber(
    config: Mapping[str, Any], expected: Collection[str], stored: Collection[str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """(configuration, name in the program -> name in the checkpoint).

    expected: the architecture's names. Names that a traced model never reads stay out. `Refused` where a block lacks a part that
    others of its list have, and for tensors that the architecture has no name for.
    """
    modules = {name.rpartition(".")[0] for name in expected}
    kept = [name for name in stored if name in expected]
    if unknown := sorted(name for name in stored if name not in expected and name.rpartition(".")[0] in modules):
        raise Refused(f"the architecture has no place for the tensor {unknown[0]!r}")
    lists: dict[str, dict[int, set[str]]] = {}
    for name in expected:
        if (match := INDEXED.match(name)) is not None:
            lists.setdefault(match[1], {}).setdefault(int(match[2]), set())
    for name in kept:
        if (match := INDEXED.match(name)) is not None:
            lists[match[1]][int(match[2])].add(match[3])
    made, names = dict(copy.deepcopy(dict(config))), {name: name for name in kept}
    for prefix, blocks in lists.items():
        present = [index for index, parts in sorted(blocks.items()) if parts]
        whole = set.union(*(blocks[index] for index in present)) if present else set()
        for index in present:
            if missing := sorted(whole - blocks[index]):
                raise Refused(
                    f"{prefix}.{index} lacks {missing[0]}, which others of its list have: only whole blocks can be left out"
                )
        if not present or len(present) == len(blocks):
            continue
        _shorten(made, prefix, present, len(blocks))
        new = {old: i for i, old in enumerate(present)}
        for name in kept:
            match = INDEXED.match(name)
            if match is not None and match[1] == prefix:
                names[name] = f"{prefix}.{new[int(match[2])]}.{match[3]}"
    return made, names


def _shorten(config: dict[str, Any], prefix: str, present: list[int], before: int) -> None:
    """Fewer layers in the configuration: the one count that says `before`, and lists with an entry a layer."""
    counts = [key for key, value in config.items() if value == before and re.search(r"(num|n)_.*(layer|block)", key)]
    if len(counts) != 1:
        raise Refused(f"the configuration does not say how many blocks {prefix} has ({', '.join(counts) or 'no count of them'})")
    config[counts[0]] = len(present)
    for key, value in config.items():
        if isinstance(value, list) and len(value) == before:
            config[key] = [value[index] for index in present]
