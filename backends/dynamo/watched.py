"""What dynamo would guard in a model's modules, looked at by one guard that loops in C, and weights that are not handed over.

dynamo guards every module, dictionary and number that it read, one at a time, and loads every weight for every call: for thirty
layers that is some 1,800 guards and 270 arguments, and much of the time that a small model takes to decode a token. What was read
lies in dictionaries (`__dict__`, `_modules`, `_parameters`), so whether each of them holds, under its key, the object that it held
implies what dynamo's guards ask of it, and is known in a fraction of their time (still.py). Only guards of which that is true are
taken over (`_ASKS`); all others stay.
"""

from __future__ import annotations

import logging
import re
import weakref
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn

from lwcompile.backends.dynamo.capture import source_of
from lwcompile.backends.dynamo.still import Place, Places, Typed

log = logging.getLogger("lwcompile")

_STEP = re.compile(r"\.([A-Za-z_]\w*)|\['([^'\\]*)'\]")
_CONSTANTS = (int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device)
_ASKS: dict[str, Any] = {
    **dict.fromkeys(("TYPE_MATCH", "ID_MATCH", "DUPLICATE_INPUT"), object),
    **dict.fromkeys(("EQUALS_MATCH", "CONSTANT_MATCH", "NONE_MATCH", "TRUE_MATCH", "FALSE_MATCH"), _CONSTANTS),
    "DICT_NOT_CONTAINS": dict,
    "NOT_PRESENT_IN_GENERIC_DICT": object,
    "HASATTR": object,
}
"""Guards that ask of objects of these types nothing but which they are; the last three, whether a key is there."""

TRIES = 3
"""Of one model. Something replaces an object there at every call then, maybe by its like, which dynamo's own guards would let pass."""

_made: WeakKeyDictionary[nn.Module, list[Watch]] = WeakKeyDictionary()


class Watch:
    """Places below one module, and what lies there."""

    def __init__(self, name: str, root: nn.Module) -> None:
        self.name, self.root = name, weakref.ref(root)
        self.places, self.modules, self.kind = Places(), Typed(), type(root)

    def takes(self, guard: Any) -> bool:
        """Whether this guard of dynamo's is implied by what is watched from now on."""
        kind, given = guard.create_fn_name(), getattr(guard.create_fn, "keywords", {})
        if kind not in _ASKS or (found := self._find(str(guard.name))) is None:
            return False
        path, value = found
        if not isinstance(value, _ASKS[kind]):
            return False
        if kind in ("DICT_NOT_CONTAINS", "NOT_PRESENT_IN_GENERIC_DICT", "HASATTR"):
            holder, key = (value, given.get("key")) if "key" in given else (getattr(value, "__dict__", None), given.get("attr"))
            if not isinstance(holder, dict) or key is None or (key in holder) != (kind == "HASATTR"):
                return False
            if kind == "HASATTR" and _computed(value, key):
                return False
            path.append((holder, key))
        if kind == "DUPLICATE_INPUT":
            other = self._find(str(given["source_b"].name)) if "source_b" in given else None
            if other is None or other[1] is not value:
                return False
            path += other[0]
        self._watch(path)
        return True

    def place(self, name: str) -> Place | None:
        """Where the object of this name lies; on the way there everything is watched, and the object itself is not."""
        found = self._find(name)
        if found is None or not found[0]:
            return None
        self._watch(found[0][:-1])
        return found[0][-1]

    def holds(self, root: object) -> bool:
        """Whether everything lies where it did, and is of the class it was."""
        if root is not self.root() or type(root) is not self.kind:
            return False
        return (self.places.same() or self._equal()) and self.modules.same()

    def _equal(self) -> bool:
        """The same, where constants may be others of the same value."""
        found = self.places.now()
        for a, b in zip(found, self.places.values):
            if a is not b and not (type(a) is type(b) and isinstance(a, _CONSTANTS) and a == b):
                return False
        self.places.take(found)
        return True

    def _watch(self, path: Sequence[Place]) -> None:
        for holder, key in path:
            if self.places.add(holder, key) and isinstance(value := holder.get(key), nn.Module):
                self.modules.add(value)

    def _find(self, name: str) -> tuple[list[Place], Any] | None:
        """The dictionaries that lead from the root to the object of this name, and the object; None where something else leads there."""
        if not name.startswith(self.name):
            return None
        value, path, at = self.root(), list[Place](), len(self.name)
        while at < len(name):
            if (step := _STEP.match(name, at)) is None:
                return None
            at, (attribute, key) = step.end(), step.groups()
            holder = value if attribute is None else getattr(value, "__dict__", None)
            if not isinstance(holder, dict) or _computed(value, attribute or ""):
                return None
            if attribute == "__dict__":
                value = holder
                continue
            key = attribute or key
            if key not in holder:
                return None
            path.append((holder, key))
            value = holder[key]
        return path, value


def watch(module: fx.GraphModule, frozen: Sequence[int]) -> tuple[nn.Module, dict[int, Place]] | None:
    """Have dynamo ask a `Watch` in place of what it would ask of the model's modules.

    Returns the model, and where the weights at positions `frozen` lie, those of them that are found: dynamo asks nothing of them, so
    somebody else has to. None of them is where watching this model did not work out. None where there is no model, or none to be found.

    Another model of its class is compiled anew in any case: to dynamo weights are inputs, and it would take this code for both.
    """
    context = torch._guards.TracingContext.try_get()
    nodes = module.graph.find_nodes(op="placeholder")
    found = _model(getattr(nodes[frozen[0]], "_dynamo_source", None)) if frozen and context is not None else None
    if context is None or found is None:
        return None
    source, root = found
    guards = context.guards_context.dynamo_guards
    before = _made.setdefault(root, [])
    if sum(not watch.holds(root) for watch in before) >= TRIES:
        log.info("dynamo looks at every module before each call: %s changes all the time", source.name)
        guards.add(source.make_guard(_is_this))
        return root, {}
    before.append(made := Watch(str(source.name), root))
    places = {i: place for i in frozen if (place := made.place(source_of(nodes[i]))) is not None}
    weights = {source_of(nodes[i]) for i in places}
    asked = (g for g in guards.inner if not (str(g.name) in weights and g.create_fn_name() == "TENSOR_MATCH"))
    guards.inner = type(guards.inner)(g for g in asked if not made.takes(g))
    guards.add(source.make_guard(partial(_ask, made)))
    return root, places


def forget() -> None:
    """Every model may be watched again."""
    _made.clear()


def leave_out(module: fx.GraphModule, weights: Mapping[int, Tensor]) -> None:
    """Have dynamo not hand over the arguments at these positions: it asks the graph what it takes after that was compiled."""
    graph, nodes = module.graph, module.graph.find_nodes(op="placeholder")
    for i, value in weights.items():
        name = f"_weight{i}"
        module.register_buffer(name, value, persistent=False)
        with graph.inserting_after(nodes[-1]):
            nodes[i].replace_all_uses_with(graph.get_attr(name))
        graph.erase_node(nodes[i])
    module.recompile()


def _model(source: Any) -> tuple[Any, nn.Module] | None:
    """The outermost module that a weight of this source belongs to, in the frame that dynamo traces, with its source."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    chain = []
    while source is not None:
        chain.append(source)
        source = getattr(source, "base", None)
    try:
        output = InstructionTranslator.current_tx().output
        scope = {"L": output.local_scope, "G": output.global_scope}
        found = ((s, eval(str(s.name), scope)) for s in reversed(chain))
        return next(((s, value) for s, value in found if isinstance(value, nn.Module)), None)
    except Exception as error:
        log.info("dynamo looks at every module before each call: %s: %s", type(error).__name__, error)
        return None


def _computed(value: object, attribute: str) -> bool:
    """Whether the class computes this attribute, whatever the dictionary holds."""
    return hasattr(getattr(type(value), attribute, None), "__set__")


def _is_this(builder: Any, guard: Any) -> None:
    builder.ID_MATCH(guard)  # and dynamo forgets the code when the module is gone


def _ask(watched: Watch, builder: Any, guard: Any) -> None:
    _is_this(builder, guard)
    add, said = builder.get_guard_manager(guard).add_lambda_guard, [f"{watched.name}'s modules hold what they held"]
    try:
        add(watched.holds, said, guard.user_stack)
    except TypeError:  # before torch 2.13 without the last
        add(watched.holds, said)
