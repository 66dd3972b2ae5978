"""The options of `torch.compile(backend="layerwise", options={...})`, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lwcompile.backends.dynamo.plan import Given
from lwcompile.budget import suggest
from lwcompile.errors import BadInput
from lwcompile.pipeline import Result
from lwcompile.plans import Plan
from lwcompile.program import Program
from lwcompile.recipe import Recipe

KNOWN = ("plan", "recipe", "codegen")


@dataclass(frozen=True)
class Options:
    """See the text of `lwcompile.backends.dynamo.backend`."""

    plan: Given | None = None
    recipe: Recipe | None = None
    codegen: str = "auto"

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Options:
        for key in given:
            if key not in KNOWN:
                raise BadInput(
                    f"torch.compile's option {key!r} is unknown{suggest(key, list(KNOWN))}; there are {', '.join(KNOWN)}"
                )
        codegen = given.get("codegen", "auto")
        if not isinstance(codegen, str):
            raise BadInput(f"the option codegen wants a name, and got {codegen!r}")
        recipe = given.get("recipe")
        if recipe is not None and not isinstance(recipe, Recipe | str | Path):
            raise BadInput(f"the option recipe wants a recipe, its name or its file, and got {recipe!r}")
        if isinstance(recipe, str | Path):
            recipe = Recipe.find(recipe)
        plan = _plan(given.get("plan"))
        if recipe is not None and plan is None and not recipe.budget.empty:
            raise BadInput(
                "the recipe's budget needs samples, and torch.compile has none: make a plan of it with `lwcompile plan` or "
                "`lwcompile compress`, and give that as options={'plan': ...}"
            )
        return cls(plan, recipe, codegen)


def _plan(given: Any) -> Given | None:
    if given is None:
        return None
    if isinstance(given, Result):
        return _of_result(_Same(given))
    if isinstance(given, Plan):
        return _of_plan(_Same(given))
    if isinstance(given, str | Path):
        path = Path(given)
        stamp = path / "program.json" if path.is_dir() else path
        return _of_path(path, stamp.stat().st_mtime_ns if stamp.is_file() else 0)
    raise BadInput(f"the option plan wants a folder, a plan or its file, or a result of lw.compress, and got {given!r}")


def forget() -> None:
    """Read plans and solve weights anew."""
    for cached in (_of_result, _of_plan, _of_path):
        cached.cache_clear()


@dataclass(frozen=True, eq=False)
class _Kept:
    value: Any


class _Same(_Kept):
    """One object, by identity: each graph of a model comes with the same options."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


@cache
def _of_result(result: _Same) -> Given:
    return Given(result.value.plan, result.value.program)


@cache
def _of_plan(plan: _Same) -> Given:
    return Given(plan.value)


@cache
def _of_path(path: Path, changed: int) -> Given:
    if not path.is_dir():
        return Given(Plan.load(path))
    if not (path / "plan.yaml").is_file():
        raise BadInput(f"{path} holds no plan.yaml; name a folder that `lwcompile compress` wrote")
    return Given(Plan.load(path / "plan.yaml"), Program.load(path))
