"""Dynamo's sources, such as `L['self']._modules['0'].weight`: their values, and the steps to them through dictionaries and lists, by
nothing that computes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

_STEP = re.compile(r"\.([A-Za-z_]\w*)|\['([^'\\]*)'\]|\[(\d+)\]")

Step = tuple[str, str | int]
"""("." and an attribute), or ("[]" and a key or number)."""

CONSTANTS = (int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device)
"""Of these, equal ones are as good as each other."""

NOTHING = object()
"""What lies where no such key is."""


def steps_of(base: str, name: str) -> tuple[Step, ...] | None:
    """The steps from the value named `base` to that named `name`; None where something else leads there."""
    if not name.startswith(base):
        return None
    steps, at = list[Step](), len(base)
    while at < len(name):
        if (found := _STEP.match(name, at)) is None:
            return None
        attribute, key, number = found.groups()
        steps.append((".", attribute) if attribute else ("[]", key if number is None else int(number)))
        at = found.end()
    return tuple(steps)


def holder_of(value: Any, step: Step) -> dict[Any, Any] | Sequence[Any] | None:
    """The dictionary, list or tuple in which this step from `value` looks; None where something else decides what is found."""
    how, key = step
    if how == "[]":
        wanted = dict if isinstance(key, str) else list | tuple
        return value if isinstance(value, wanted) else None
    if hasattr(getattr(type(value), str(key), None), "__set__"):  # computed, whatever the dictionary says
        return None
    found = getattr(value, "__dict__", None)
    return found if isinstance(found, dict) else None


def found_in(holder: dict[Any, Any] | Sequence[Any], key: Any) -> Any:
    """What lies there, or `NOTHING`."""
    if isinstance(holder, dict):
        return holder.get(key, NOTHING)
    return holder[key] if key < len(holder) else NOTHING


def values_above(source: Any) -> Iterator[tuple[Any, Any]]:
    """The sources that lead to this one in the frame that dynamo traces, outermost first, and what each is there."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    chain = []
    while source is not None:
        chain.append(source)
        source = getattr(source, "base", None)
    output = InstructionTranslator.current_tx().output
    scope = {"L": output.local_scope, "G": output.global_scope}
    for each in reversed(chain):
        yield each, eval(str(each.name), scope)


def guard_by(source: Any, holds: Callable[[Any], bool], said: str, this: bool = False) -> Any:
    """A guard that asks `holds` of the source's value. this: the value is to be the object that it is, and the code goes with it."""
    return source.make_guard(partial(_ask, holds, said, this))


def _ask(holds: Callable[[Any], bool], said: str, this: bool, builder: Any, guard: Any) -> None:
    if this:
        builder.ID_MATCH(guard)
    add = builder.get_guard_manager(guard).add_lambda_guard
    try:
        add(holds, [said], guard.user_stack)
    except TypeError:  # before torch 2.13 without the last
        add(holds, [said])
