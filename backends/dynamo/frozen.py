"""Arguments of dynamo's that are part of the code: what is looked at before each call, by us and by dynamo."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx

from lwcompile.backends.dynamo.capture import source_of

_version = attrgetter("_version")


class Frozen:
    """The arguments at these positions, some hundreds of them, so looked at by functions that loop in C."""

    def __init__(self, arguments: Sequence[Any], positions: Sequence[int]) -> None:
        self.positions = positions
        self.held = self._taken(arguments)  # so that no other tensor has the id of one of them
        self.state = _state(self.held)

    def changed(self, arguments: Sequence[Any]) -> bool:
        """Whether one of them is another tensor, was written to, or lies elsewhere."""
        return _state(self._taken(arguments)) != self.state

    def foreign(self, arguments: Sequence[Any]) -> bool:
        """Whether all of them are other tensors."""
        return not {*map(id, self.held)} & {*map(id, self._taken(arguments))}

    def _taken(self, arguments: Sequence[Any]) -> list[Tensor]:
        return [arguments[i] for i in self.positions]


def _state(tensors: Sequence[Tensor]) -> list[Any]:
    return [*map(id, tensors), *map(_version, tensors), *map(Tensor.data_ptr, tensors)]


def leave_to_us(module: fx.GraphModule, frozen: Sequence[int]) -> None:
    """Have dynamo not look at these arguments before each call: whoever holds them does, by what they are, and raises where another is
    found."""
    nodes = list(module.graph.find_nodes(op="placeholder"))
    names = {source_of(nodes[i]) for i in frozen}
    if (context := torch._guards.TracingContext.try_get()) is not None:
        guards = context.guards_context.dynamo_guards
        guards.inner = {g for g in guards.inner if g.create_fn_name() != "TENSOR_MATCH" or str(g.name) not in names}


def tell_apart(module: fx.GraphModule, frozen: Sequence[int]) -> None:
    """Have dynamo compile another model of the same class anew: to dynamo weights are inputs, and it would take this code for both."""
    context = torch._guards.TracingContext.try_get()
    source = getattr(module.graph.find_nodes(op="placeholder")[frozen[0]], "_dynamo_source", None) if frozen else None
    if context is None or source is None:
        return
    while hasattr(source, "base"):
        source = source.base
    context.guards_context.dynamo_guards.add(source.make_guard(_is_this_module))


def _is_this_module(builder: Any, guard: Any) -> None:
    if isinstance(builder.get(guard), torch.nn.Module):
        builder.ID_MATCH(guard)
