"""The catalogue of passes, written from their own docstrings and fields: `python -m lwcompile.catalogue > docs/passes.md`.

Only what comes with lwcompile itself is listed; `lwcompile passes` also shows what else is installed.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from typing import Any

from lwcompile.cli.plugins import describe
from lwcompile.registry import load, plugins

KINDS = {
    "analysis": ("Analyses", "Annotate sites and edit nothing. Named under `analyses:` in a recipe."),
    "transform": ("Transforms", "Rewrite the graph at a site. Offered under `options:` in a recipe."),
    "healer": ("Healers", "Train what a plan changed against the dense model. Named by `heal:` in a recipe, or `--heal`."),
    "solver": ("Solvers", "Find the codes and scales of a numeric format for one weight. Named by `quantize{solver=...}`."),
    "allocator": ("Allocators", "Choose an option for every site under a budget. Named by `allocator:` in a recipe."),
    "backend": ("Backends", "Price tensors, write files, and prove that they compute what the graph does."),
    "codegen": (
        "Codegens",
        'Make a graph into something to call in this process. Named by `torch.compile(options={"codegen": ...})`.',
    ),
    "metric": ("Metrics", "The unit that damage is counted in. Named by `metric:` in a recipe, or `--metric`."),
}

WORDS = {"None": "none", "True": "true", "False": "false", "": '""'}
"""Python's words as specs spell them."""

HEAD = """# The catalogue

Generated from the passes' own docstrings and fields by `python -m lwcompile.catalogue`; a test keeps it up to date.
Every pass is written as one line, `name{option=value}`, in recipes, plans and on the command line; options at their
defaults may be left out.
"""


def catalogue() -> str:
    """The whole page as Markdown."""
    found = [(describe(p, cls), cls) for p in plugins() if p.distribution == "lwcompile" for cls in [load(p.group, p.name)]]
    sections = [HEAD]
    for kind, (title, about) in KINDS.items():
        members = [(one, cls) for one, cls in found if one["kind"] == kind]
        if members:
            sections.append(f"## {title}\n\n{about}\n")
            sections.append("\n".join(f"- [`{one['name']}`](#{one['name']}): {_first(cls)}" for one, cls in members) + "\n")
            shown: dict[str, str] = {}
            sections += ["\n".join(_entry(one, cls, shown)) for one, cls in members]
    return "\n".join(sections)


def _own(cls: type) -> str:
    own = inspect.getdoc(cls) or ""
    return "" if own.startswith(f"{cls.__name__}(") else own  # what dataclass writes where there is none


def _first(cls: type) -> str:
    """The first sentence of the class, or else of its module."""
    text = (_own(cls) or inspect.getdoc(inspect.getmodule(cls)) or "").partition("\n\n")[0]
    return " ".join(text.split())


def _entry(one: dict[str, Any], cls: type, shown: dict[str, str]) -> Iterator[str]:
    """`shown`: modules whose text stands above already, and under which name."""
    yield f"### {one['name']}\n"
    yield " ".join(_promises(one, cls)) + "\n"
    if own := _own(cls):
        yield f"{own}\n"
    first = shown.setdefault(cls.__module__, one["name"])
    if one["kind"] == "metric":
        pass
    elif first != one["name"]:
        yield f"See [`{first}`](#{first}).\n"
    elif text := inspect.getdoc(inspect.getmodule(cls)):
        yield f"```text\n{text}\n```\n"
    if one["options"]:
        rows = ([f"`{o['name']}`", o["type"], WORDS.get(o["default"], o["default"])] for o in one["options"])
        yield from _table(("option", "type", "default"), rows)


def _promises(one: dict[str, Any], cls: Any) -> Iterator[str]:
    yield f"`{one['where'].partition(':')[0]}`."
    if one["kind"] == "transform":
        yield "Exact: the same function to 1e-5." if cls.exact else "Lossy: its damage is measured."
        yield f"At sites of kind {', '.join(cls.kinds)}."
        yield "Structural." if cls.structural else "A numeric format."
        below = "Replaces" if cls.replaces else "Silences"
        yield from [f"{below} the sites below."] if cls.silences else []
        yield from [f"Conflicts with {', '.join(cls.conflicts)}."] if cls.conflicts else []
    if getattr(cls, "requires", ()):
        yield f"Requires {', '.join(cls.requires)}."
    if getattr(cls, "provides", ()):
        yield f"Provides {', '.join(cls.provides)}."
    if getattr(cls, "needs_hessian", False):
        yield "Needs calibration samples."


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    header = list(header)
    for row in (header, ["---"] * len(header), *rows):
        yield "| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |"
    yield ""


if __name__ == "__main__":
    print(catalogue(), end="")
