"""What dynamo would guard in an object that calls bring, such as a cache of keys and values: asked anew only of another one.

A cache of thirty layers is some 370 guards before every token. Of the object that was asked last, if nothing was put into or taken out
of it, only that is looked at, and whether tensors have their form (still.py). Of any other, all that dynamo would have asked is asked.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, fx, nn

from lwcompile.backends.dynamo.sources import CONSTANTS, NOTHING, Step, found_in, guard_by, holder_of, steps_of, values_above
from lwcompile.backends.dynamo.still import MANY, Forms, Items, Places, Typed, form

Test = Callable[[Any], bool]
Path = tuple[Step, ...]


@dataclass
class Seen:
    """What one object was made of when it passed. It is not held itself."""

    root: weakref.ref[Any]
    kind: type
    places: Places = field(default_factory=Places)
    items: Items = field(default_factory=Items)
    typed: Typed = field(default_factory=Typed)
    forms: Forms = field(default_factory=Forms)

    def same(self, root: object) -> bool:
        if self.root() is not root or type(root) is not self.kind:
            return False
        return self.places.same() and self.items.same() and self.typed.same() and self.forms.same()


class Alike:
    """What is asked of one argument of a call. `first` is what it is while that is collected."""

    def __init__(self, name: str, first: object) -> None:
        self.name, self.first = name, weakref.ref(first)
        self.asked: dict[Path, list[Test]] = {(): []}  # a path after those that lead to it
        self.tensors: set[Path] = set()
        self.classes: dict[tuple[type, str], Any] = {}
        self.seen: Seen | None = None

    def takes(self, guard: Any) -> bool:
        """Whether this guard of dynamo's is asked here from now on. Those of tensors are to be of fixed sizes."""
        if (steps := steps_of(self.name, str(guard.name))) is None or (value := self._find(steps)) is NOTHING:
            return False
        kind, attribute = guard.create_fn_name(), getattr(guard.create_fn, "keywords", {}).get("attr")
        if attribute is not None:
            return self._takes_attribute(kind, steps, value, attribute)
        if kind == "TYPE_MATCH":
            test: Test = partial(_is_of, type(value))
        elif kind in ("EQUALS_MATCH", "CONSTANT_MATCH") and isinstance(value, CONSTANTS):
            test = partial(_equals, value)
        elif kind == "SEQUENCE_LENGTH" and isinstance(value, list | tuple):
            test = partial(_is_long, len(value))
        elif kind == "TENSOR_MATCH" and type(value) is Tensor and (wanted := form(value)) is not None:
            test = partial(_has_form, wanted)
            self.tensors.add(steps)
        else:
            return False
        self._ask(steps, test)
        return True

    def _takes_attribute(self, kind: str, steps: Path, value: Any, attribute: str) -> bool:
        path = (*steps, (".", attribute))
        holder = holder_of(value, path[-1])
        if not isinstance(holder, dict):
            return False
        there, of_class = attribute in holder, _of_class(type(value), attribute)
        if kind == "NOT_PRESENT_IN_GENERIC_DICT" and not there:
            self._ask(path, partial(_is, NOTHING))
            return True
        if kind != "HASATTR" or (not there and (of_class is NOTHING or hasattr(of_class, "__get__"))):
            return False  # a class that computes it, or what it has not
        if not there:
            self.classes[type(value), attribute] = of_class
            self._ask(steps, partial(_is_of, type(value)))
        self._ask(path, partial(_is_not if there else _is, NOTHING))
        return True

    def _ask(self, path: Path, test: Test) -> None:
        for i in range(1, len(path)):
            self.asked.setdefault(path[:i], [])
        self.asked.setdefault(path, []).append(test)

    def _find(self, path: Path) -> Any:
        value = self.first()
        for step in path:
            if (holder := holder_of(value, step)) is None or (value := found_in(holder, step[1])) is NOTHING:
                return NOTHING
        return value

    def holds(self, root: object) -> bool:
        """Whether this object is as the first one was."""
        if any(_of_class(kind, attribute) is not was for (kind, attribute), was in self.classes.items()):
            return False
        if (seen := self.seen) is not None and seen.same(root):
            return True
        self.seen = self._examined(root)
        return self.seen is not None

    def _examined(self, root: Any) -> Seen | None:
        seen, values, typed = Seen(weakref.ref(root, self._forget), type(root)), dict[Path, Any](), dict[int, Any]()
        for path, tests in self.asked.items():
            value = root
            if path:
                above = values[path[:-1]]
                if (holder := holder_of(above, path[-1])) is None:
                    return None
                value = found_in(holder, path[-1][1])
                if isinstance(holder, dict):
                    seen.places.add(holder, path[-1][1])
                if path[-1][0] == "." and above is not root:
                    typed[id(above)] = above
            if not all(test(value) for test in tests):
                return None
            if isinstance(value, list):
                seen.items.add(value)
            values[path] = value
        tensors = [values[path] for path in self.tensors]
        if len({*map(id, tensors)}) < len(tensors):
            return None
        for each in typed.values():
            seen.typed.add(each)
        seen.forms = Forms(tensors)
        return seen

    def _forget(self, _: object) -> None:
        """An object that is gone is not held by its parts."""
        self.seen = None


def compare(guards: Any, nodes: Sequence[fx.Node]) -> None:
    """Have dynamo ask an `Alike` in place of what it would ask of the objects that bring these inputs, where that is much.

    What it asks of a tensor is left to it where a size may vary, or where another input is of the same form, and might be the same.
    """
    tensors = {str(n._dynamo_source.name): n.meta["example_value"] for n in nodes if _is_tensor(n)}  # type: ignore[attr-defined]
    for source, root in _brought([node._dynamo_source for node in nodes if _is_tensor(node)]):  # type: ignore[attr-defined]
        made = Alike(name := str(source.name), root)
        others = {_size(value) for key, value in tensors.items() if not key.startswith(name)}
        left = {key for key, value in tensors.items() if not all(type(n) is int for n in value.shape) or _size(value) in others}
        taken = {g for g in guards.inner if not (g.create_fn_name() == "TENSOR_MATCH" and str(g.name) in left) and made.takes(g)}
        if len(taken) < MANY or not made.holds(root):
            continue
        guards.inner = type(guards.inner)(g for g in guards.inner if g not in taken)
        guards.add(guard_by(source, made.holds, f"{name} is like the one before"))


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("example_value"), Tensor) and getattr(node, "_dynamo_source", None) is not None


def _size(of: Tensor) -> tuple[Any, ...]:
    return of.dtype, *map(str, of.shape)


def _brought(sources: Sequence[Any]) -> list[tuple[Any, Any]]:
    """The outermost objects on the way to these sources, but for modules and tensors themselves."""
    found: dict[str, tuple[Any, Any]] = {}
    for source in sources:
        try:
            outer, value = next(pair for pair in values_above(source) if not isinstance(pair[1], dict | list | tuple))
            weakref.ref(value)
        except Exception:  # what dynamo made itself, and what cannot be told from its successor at the same place
            continue
        if not isinstance(value, Tensor | nn.Module | type) and isinstance(getattr(value, "__dict__", None), dict):
            found.setdefault(str(outer.name), (outer, value))
    return [*found.values()]


def _of_class(kind: type, attribute: str) -> Any:
    return next((vars(c)[attribute] for c in kind.__mro__ if attribute in vars(c)), NOTHING)


def _is(wanted: object, value: object) -> bool:
    return value is wanted


def _is_not(unwanted: object, value: object) -> bool:
    return value is not unwanted


def _is_of(kind: type, value: object) -> bool:
    return type(value) is kind


def _equals(wanted: Any, value: Any) -> bool:
    return type(value) is type(wanted) and value == wanted


def _is_long(count: int, value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == count


def _has_form(wanted: Any, value: Any) -> bool:
    return type(value) is Tensor and form(value) == wanted
