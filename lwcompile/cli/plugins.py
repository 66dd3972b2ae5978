"""`passes`, `backends`: what is installed, and what it takes. Listing imports no plugin."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lwcompile.cli.console import show, show_json
from lwcompile.cli.flags import Json

if TYPE_CHECKING:
    from lwcompile.registry import Plugin


def register(app: typer.Typer) -> None:
    app.command()(passes)
    app.command()(backends)


def passes(
    name: Annotated[str | None, typer.Argument(help="Show this one's documentation and options.")] = None, json: Json = False
) -> None:
    """List passes, allocators, solvers and metrics, or describe one."""
    _show_plugins(("passes", "allocators", "solvers", "metrics"), name, json)


def backends(
    name: Annotated[str | None, typer.Argument(help="Show this one's documentation and options.")] = None, json: Json = False
) -> None:
    """List backends and codegens, or describe one."""
    _show_plugins(("backends", "codegens"), name, json)


def _show_plugins(groups: tuple[str, ...], name: str | None, as_json: bool) -> None:
    from lwcompile.registry import plugins

    found = [plugin for plugin in plugins() if plugin.group in groups]
    if name is not None:
        return _describe([plugin for plugin in found if plugin.name == name], name, found, as_json)
    rows = [{"name": p.name, "kind": _singular(p.group), "distribution": p.distribution} for p in found]
    if as_json:
        return show_json(rows)
    from rich.table import Table

    drawn = Table(box=None, header_style="dim", pad_edge=False)
    for heading in ("name", "kind", "distribution"):
        drawn.add_column(heading)
    for row in rows:
        drawn.add_row(*row.values())
    show(drawn)


def _describe(matching: list[Plugin], name: str, known: list[Plugin], as_json: bool) -> None:
    from lwcompile.budget import suggest
    from lwcompile.errors import BadInput
    from lwcompile.registry import load

    if not matching:
        names = sorted({plugin.name for plugin in known})
        raise BadInput(f"nothing is named {name!r}{suggest(name, names)}; there are {', '.join(names) or 'none'}")
    described = [describe(plugin, load(plugin.group, plugin.name)) for plugin in matching]
    if as_json:
        return show_json(described if len(described) > 1 else described[0])
    for one in described:
        show(_card(one))


def describe(plugin: Plugin, cls: Any) -> dict[str, Any]:
    """Name, kind, documentation, and each option with its type and default."""
    from lwcompile.contract import AnalysisPass, HealPass, TransformPass

    kinds = {AnalysisPass: "analysis", TransformPass: "transform", HealPass: "healer"}
    bases = inspect.getmro(cls) if isinstance(cls, type) else ()
    kind = next((word for base, word in kinds.items() if base in bases), _singular(plugin.group))
    module = inspect.getmodule(cls)
    own = inspect.getdoc(cls) or ""
    generated = own.startswith(f"{getattr(cls, '__name__', '')}(")  # what dataclass writes where there is none
    texts = [text for text in ("" if generated else own, (module and inspect.getdoc(module)) or "") if text]
    options = []
    if dataclasses.is_dataclass(cls):
        hints = typing.get_type_hints(cls)
        fields = [field for field in dataclasses.fields(cls) if field.init]
        options = [{"name": f.name, "type": _type(hints[f.name]), "default": _default(f)} for f in fields]
    return {
        "name": plugin.name, "kind": kind, "distribution": plugin.distribution, "where": plugin.value,
        "exact": getattr(cls, "exact", None), "documentation": "\n\n".join(texts), "options": options,
    }  # fmt: skip


def _card(one: dict[str, Any]) -> Any:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    promise = {True: ", exact", False: ", lossy", None: ""}[one["exact"] if one["kind"] == "transform" else None]
    title = Text.assemble((one["name"], "bold"), f"  {one['kind']}{promise}, from {one['distribution']}")
    options = Table(box=None, header_style="dim", pad_edge=False)
    for heading in ("option", "type", "default"):
        options.add_column(heading)
    for option in one["options"]:
        options.add_row(*(Text(str(option[key])) for key in ("name", "type", "default")))
    return Group(title, "", Text(one["documentation"]), "", options if one["options"] else Text("no options", style="dim"))


def _type(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return " | ".join(repr(value) for value in typing.get_args(hint))
    if isinstance(hint, type) and not typing.get_args(hint):
        return hint.__name__
    return str(hint).replace("typing.", "").replace("lwcompile.spec.", "")


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return str(field.default)
    return "required" if field.default_factory is dataclasses.MISSING else str(field.default_factory())


def _singular(group: str) -> str:
    return {"passes": "pass"}.get(group, group.removesuffix("s"))
