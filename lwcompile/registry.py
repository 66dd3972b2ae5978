"""The registry: plugins by name, from entry points. Names are listed without importing; one is imported when it is asked for.

A plugin that fails to load breaks only itself, and the error says whose it is. Two distributions that offer one name are both
named, and neither is chosen.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal

from lwcompile import API_VERSION
from lwcompile.contract import Pass, configure
from lwcompile.errors import BadPlan, LwError, PluginError
from lwcompile.spec import Spec

Group = Literal["passes", "allocators", "solvers", "backends", "codegens", "metrics"]
GROUPS: tuple[Group, ...] = ("passes", "allocators", "solvers", "backends", "codegens", "metrics")


@dataclass(frozen=True)
class Plugin:
    """One entry point: its name, the group it registers in, and the distribution it came with."""

    name: str
    group: Group
    distribution: str
    value: str


@cache
def _points(group: Group) -> list[EntryPoint]:
    """Read once a process: the search of every installed distribution takes tens of milliseconds."""
    return list(entry_points(group=f"lwcompile.{group}"))


def _owner(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else "an unknown distribution"


def plugins(group: Group | None = None) -> list[Plugin]:
    """Every plugin of a group (or of all), by name; nothing is imported."""
    found = {
        Plugin(point.name, g, _owner(point), point.value) for g in (GROUPS if group is None else (group,)) for point in _points(g)
    }
    return sorted(found, key=lambda p: (p.group, p.name, p.distribution))


def load(group: Group, name: str) -> Any:
    """The class that a plugin registers.

    Raises:
        BadPlan: no plugin has this name; the message lists those there are.
        PluginError: two distributions offer it, it fails to import, or it was written for another pass contract.
    """
    points = {(_owner(p), p.value): p for p in _points(group) if p.name == name}
    if not points:
        names = sorted({p.name for p in _points(group)})
        raise BadPlan(f"no {_singular(group)} is named {name!r}; installed are {', '.join(names) or 'none'}")
    if len(points) > 1:
        owners = " and ".join(f"{owner} ({value})" for owner, value in sorted(points))
        raise PluginError(f"the {_singular(group)} {name!r} is offered by {owners}; uninstall one of them")
    ((owner, value), point) = next(iter(points.items()))
    try:
        plugin = point.load()
    except Exception as error:
        kind = type(error).__name__
        raise PluginError(f"the {_singular(group)} {name!r} of {owner} ({value}) does not load: {kind}: {error}") from error
    if not isinstance(plugin, type):
        raise PluginError(f"the {_singular(group)} {name!r} of {owner} ({value}) is a {type(plugin).__name__}, not a class")
    if getattr(plugin, "api", API_VERSION) != API_VERSION:
        raise PluginError(
            f"the {_singular(group)} {name!r} of {owner} was written for version {plugin.api} of the pass contract, "
            f"and this is version {API_VERSION}; install a matching release of {owner}"
        )
    return plugin


def make(group: Group, spec: Spec | str) -> Any:
    """The configured plugin that a spec names."""
    spec = Spec.parse(spec) if isinstance(spec, str) else spec
    plugin = load(group, spec.name)
    try:
        return configure(plugin, spec)
    except LwError:
        raise
    except Exception as error:
        raise PluginError(f"the {_singular(group)} {spec.name!r} ({plugin.__module__}) cannot be configured: {error}") from error


def providers(key: str) -> list[str]:
    """The analyses that provide an annotation; broken plugins are passed over."""
    names = []
    for point in _points("passes"):
        try:
            plugin = point.load()
        except Exception:  # a plugin that does not load provides nothing
            continue
        if isinstance(plugin, type) and issubclass(plugin, Pass) and key in getattr(plugin, "provides", ()):
            names.append(point.name)
    return sorted(names)


def _singular(group: Group) -> str:
    return {"passes": "pass"}.get(group, group.removesuffix("s"))
