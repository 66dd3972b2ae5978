"""Recipes: a whole pipeline in one YAML file, checked before anything runs.

    passes: [fold_norms]                      # rewrites that keep the function, first
    analyses: [fisher]                        # what scores the options
    options:                                  # kind of site, or glob over site ids -> the options offered there
      linear: ["quantize{bits=[3,4,6],group_size=64}"]
      "block0.*": []                          # of the keys that match a site, the last one counts
    allocator: integer_program
    budget: {avg_bits: 4.25}
    heal: distill{steps=200}                  # trains what the plan changed, before it is measured; left out by default
    backend: onnx

Errors name the file, the line and the key. Flags of the command line come over it with `with_`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from fnmatch import fnmatchcase
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, InstanceOf, PrivateAttr, ValidationError
from pydantic_core import core_schema

from lwcompile.budget import NO_BUDGET, Budget, suggest
from lwcompile.errors import BadInput, BadPlan
from lwcompile.spec import Spec
from lwcompile.yamlpos import Document, parse, read


def _spec(value: Any) -> Spec:
    if isinstance(value, Spec):
        return value
    if not isinstance(value, str):
        raise ValueError(f"wants a spec such as quantize{{bits=4}}, and got {value!r}")
    try:
        return Spec.parse(value)
    except BadPlan as error:
        raise ValueError(str(error)) from None


class _AsSpec:
    """Tells pydantic to read a `Spec` from its line, and not to look inside."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        return core_schema.no_info_plain_validator_function(_spec)


def _metric(value: Any) -> Any:
    """A spec as its text; `module:function{...}` is the user's own and stays as it is."""
    if not isinstance(value, str) or ":" in value.partition("{")[0]:
        return value
    return str(_spec(value))


def _several(value: Any) -> Any:
    return () if value is None else (value,) if isinstance(value, str | Spec) else value


def _unless_false(value: Any) -> Any:
    return None if value is False else value


OneSpec = Annotated[Spec, _AsSpec]
Specs = Annotated[tuple[OneSpec, ...], BeforeValidator(_several)]


DEFAULT = "balanced"
"""The recipe that runs where none is named, and whose allocator stands in for one that is not."""


_FLAGS = ("backend", "heal", "metric")
"""Keys that the command line has a flag of the same name for."""


class Reference(NamedTuple):
    """A spec in a recipe, the registry group it is looked up in, and its place in the file."""

    group: str
    spec: Spec
    where: str


class Data(BaseModel):
    """Where samples come from; `dataset` None is the default of the model's modality."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset: str | None = None
    samples: int = Field(default=128, ge=1)
    seqlen: int = Field(default=256, ge=2)
    order: Literal["random", "sequential"] = "random"


class Recipe(BaseModel):
    """What to score, what to offer, what to spend, and where it goes. Immutable; equal recipes have equal `canonical()`.

    Without a backend, tensors cost what they take in the program folder that `compress` writes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    description: str = ""
    passes: Specs = ()
    analyses: Specs = ()
    options: dict[str, Specs] = {}
    allocator: OneSpec = Field(default_factory=lambda: Recipe.named(DEFAULT).allocator)
    budget: InstanceOf[Budget] = NO_BUDGET
    heal: Annotated[OneSpec | None, BeforeValidator(_unless_false)] = None
    backend: OneSpec | None = None
    metric: Annotated[str | None, BeforeValidator(_metric)] = None
    calibration: Data = Data()
    evaluation: Data = Data(samples=64)
    seed: int = 0

    _document: Document = PrivateAttr(default=Document("recipe", {}))
    _over: frozenset[str] = PrivateAttr(default=frozenset())
    """Keys that `with_` replaced: the file's line is not where they come from."""

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a file; `BadPlan` names the line and key of what does not fit, `BadInput` a file that cannot be read."""
        return cls._from(read(path))

    @classmethod
    def parse(cls, text: str, source: str = "recipe.yaml") -> Recipe:
        """Read the text of a file; `source` stands for its name in errors."""
        return cls._from(parse(text, source))

    @classmethod
    def named(cls, name: str) -> Recipe:
        """A recipe that ships with the package; `BadInput` lists them."""
        file = resources.files("lwcompile").joinpath("recipes", f"{name}.yaml")
        if name not in shipped():
            raise BadInput(
                f"no recipe is named {name!r}{suggest(name, shipped())}; there are {', '.join(shipped())}, or give a file"
            )
        return cls.parse(file.read_text(encoding="utf-8"), f"{name}.yaml")

    @classmethod
    def find(cls, name: str | Path) -> Recipe:
        """A shipped recipe by its name, or a file by its path: what `--recipe` takes."""
        path = Path(name)
        return cls.load(path) if path.suffix in (".yaml", ".yml") or path.is_file() else cls.named(str(name))

    @classmethod
    def _from(cls, document: Document) -> Recipe:
        body = dict(document.value)
        if isinstance(body.get("budget"), dict):
            body["budget"] = Budget.of(body["budget"], lambda key: document.where("budget", key))
        try:
            recipe = cls.model_validate({key: value for key, value in body.items() if value is not None})
        except ValidationError as error:
            raise BadPlan(_first(error, document)) from None
        recipe._document = document
        return recipe

    def with_(self, **changes: Any) -> Recipe:
        """This recipe with flags over it: `with_(budget={"avg_bits": 3.5}, calibration={"samples": 64}, seed=1)`.

        None is a flag that was not given; `heal=False` heals nothing. Mappings for `calibration` and `evaluation` merge; a
        budget overrides as `Budget.override` says; everything else replaces.
        """
        body, over = {name: getattr(self, name) for name in type(self).model_fields}, set(self._over)
        for key, value in changes.items():
            if isinstance(value, Mapping):
                value = {k: v for k, v in value.items() if v is not None}
            if value is None:
                continue
            if key == "budget":
                value = self.budget.override(value if isinstance(value, Budget) else Budget.of(value))
            elif isinstance(body.get(key), Data) and isinstance(value, Mapping):
                value = body[key].model_dump() | dict(value)
            else:
                over.add(key)
            body[key] = value
        try:
            recipe = type(self).model_validate(body)
        except ValidationError as error:
            raise BadPlan(_first(error, Document("recipe", {}), _FLAGS)) from None
        recipe._document, recipe._over = self._document, frozenset(over)
        return recipe

    def offered(self, site: str, kind: str) -> list[Spec]:
        """The options of a site, grids expanded: those of the last key that is its kind, its id, or a glob over its id."""
        specs: tuple[Spec, ...] = ()
        for key, value in self.options.items():
            if key == kind or fnmatchcase(site, key):
                specs = value
        return list(dict.fromkeys(option for spec in specs for option in spec.expand()))

    def where(self, *path: str | int) -> str:
        """`recipe.yaml:7`: the line of a key, for errors found later; `--backend` for one that a flag replaced."""
        if path and path[0] in self._over:
            return f"--{path[0]}" if path[0] in _FLAGS else str(path[0])
        return self._document.where(*path)

    def references(self) -> Iterator[Reference]:
        """Every plugin that the recipe names, for the registry to look up before work starts."""
        for group, key in (("passes", "passes"), ("passes", "analyses")):
            for index, spec in enumerate(getattr(self, key)):
                yield Reference(group, spec, self.where(key, index))
        for key, specs in self.options.items():
            for index, spec in enumerate(specs):
                for part in spec.parts:
                    yield Reference("passes", part, self.where("options", key, index))
        yield Reference("allocators", self.allocator, self.where("allocator"))
        if self.heal is not None:
            yield Reference("passes", self.heal, self.where("heal"))
        if self.backend is not None:
            yield Reference("backends", self.backend, self.where("backend"))

    def check_names(self, known: Mapping[str, Collection[str]]) -> None:
        """Raise `BadPlan`, with file and line, for a plugin that is not among `known` (group -> names)."""
        for group, spec, where in self.references():
            names = sorted(known.get(group, ()))
            if spec.name not in names:
                what = {"passes": "pass"}.get(group, group.removesuffix("s"))
                raise BadPlan(f"{where}: unknown {what} {spec.name!r}{suggest(spec.name, names)}; there are {', '.join(names)}")

    def check_specs(self, make: Callable[[Any, Spec], Any]) -> None:
        """Raise `BadPlan`, with file and line, where a plugin does not take its arguments; `make(group, spec)` configures one."""
        for group, spec, where in self.references():
            try:
                for one in spec.expand():
                    solver = getattr(make(group, one), "solver", None)
                    if isinstance(solver, Spec):
                        make("solvers", solver)
            except BadPlan as error:
                said = str(error)
                raise BadPlan(f"{where}: {said if spec.name in said else f'{spec}: {said}'}") from None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and self.canonical() == other.canonical()

    def __hash__(self) -> int:
        return hash(json.dumps(self.canonical()))

    def canonical(self) -> dict[str, Any]:
        """Plain values that say everything the recipe does, defaults included: what a run directory hashes."""
        return {
            "passes": [str(spec) for spec in self.passes],
            "analyses": [str(spec) for spec in self.analyses],
            "options": [[key, [str(spec) for spec in specs]] for key, specs in self.options.items()],
            "allocator": str(self.allocator),
            "budget": self.budget.to_dict(),
            "heal": None if self.heal is None else str(self.heal),
            "backend": None if self.backend is None else str(self.backend),
            "metric": self.metric,
            "calibration": self.calibration.model_dump(),
            "evaluation": self.evaluation.model_dump(),
            "seed": self.seed,
        }


def shipped() -> list[str]:
    """The names of the recipes that come with the package."""
    folder = resources.files("lwcompile").joinpath("recipes")
    return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))


def _first(error: ValidationError, document: Document, flags: Collection[str] = ()) -> str:
    """The first complaint as one sentence with its place."""
    found = error.errors()[0]
    path = tuple(found["loc"])
    if path and path[0] in flags:
        return f"--{path[0]}: {found['msg'].removeprefix('Value error, ')}"
    where = document.where(*path)
    if found["type"] == "extra_forbidden":
        last, known = str(list(path).pop()), list((Data if len(path) > 1 else Recipe).model_fields)
        return f"{where}: unknown key {last!r}{suggest(last, known) or '; there are ' + ', '.join(known)}"
    key = ".".join(str(part) for part in path)
    if "budget" in path:
        return f"{where}: budget wants lines such as avg_bits: 4.25, and got {found['input']!r}"
    if found["type"] in ("model_type", "dict_type"):
        return f"{where}: {key} wants `key: value` lines, and got {found['input']!r}"
    message = found["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    return f"{where}: {key}: {message}" + ("" if found["type"] == "value_error" else f", and got {found['input']!r}")
