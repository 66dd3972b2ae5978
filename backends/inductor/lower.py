"""Products with packed weights become calls of the packed operators.

before: linear(x, dequantize(q)), linear(x, dequantize(k)), embedding(dequantize(e), ids)
after:  slices of lwcompile::packed_linear(x, panels of q and k); lwcompile::packed_embedding(ids, panels of e)

What is packed is kept by content while some compiled graph holds it: a tied embedding and head, and the graphs of one model, share it.
"""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakValueDictionary

import torch
from torch import Tensor, fx

from lwcompile.backends.inductor.packed import Panels
from lwcompile.backends.inductor.products import Product, bias_of
from lwcompile.backends.inductor.ways import DENSE, Choice, Way
from lwcompile.graph import ModelGraph, OverlayStore
from lwcompile.packed import PackedWeight

aten = torch.ops.aten

_kept: WeakValueDictionary[tuple[str | None, ...], Tensor] = WeakValueDictionary()


def lowered(graph: ModelGraph, chosen: Sequence[tuple[Product, Choice]]) -> ModelGraph:
    """A copy in which every product that is not dense is a call of a packed operator."""
    made = graph.copy()
    made.store = OverlayStore(graph.store)
    nodes = {node.name: node for node in made.graph.nodes}
    held: dict[int, str] = {}
    for product, choice in chosen:
        if choice.way != DENSE:
            _lower(made, product, [nodes[call.name] for call in product.calls], choice.way, held)
    made.prune()
    return made


def _lower(graph: ModelGraph, product: Product, calls: Sequence[fx.Node], way: Way, held: dict[int, str]) -> None:
    panels = _panels(graph, product.weights)
    with graph.graph.inserting_before(calls[0]):
        parts = {name: _constant(graph, f"{product.weights[0].name}.{name}s", part, held) for name, part in panels.parts.items()}
        stored = (parts["codes"], parts["scale"], parts.get("zero"))
        if product.looks_up:
            args = (calls[0].args[1], *stored, panels.bits, panels.group_size, *panels.shape)
            found = graph.graph.call_function(torch.ops.lwcompile.packed_embedding.default, args)
            outs = [found if product.dtype is torch.float32 else _cast(graph, found, product.dtype)]
        else:
            args = (
                calls[0].args[0],
                *stored,
                bias_of(calls[0]),
                panels.bits,
                panels.group_size,
                panels.shape[0],
                way.few,
                way.int8,
            )
            whole = graph.graph.call_function(torch.ops.lwcompile.packed_linear.default, args)
            outs = [whole] if len(calls) == 1 else _slices(graph, whole, product)
    for call, out in zip(calls, outs):
        out.meta.update(call.meta)
        call.replace_all_uses_with(out)
        graph.graph.erase_node(call)


def _cast(graph: ModelGraph, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    return graph.graph.call_function(aten._to_copy.default, (node,), {"dtype": dtype})


def _slices(graph: ModelGraph, whole: fx.Node, product: Product) -> list[fx.Node]:
    made, start = [], 0
    for weight in product.weights:
        end = start + weight.shape[0]
        made.append(graph.graph.call_function(aten.slice.Tensor, (whole, -1, start, end)))
        start = end
    return made


def _constant(graph: ModelGraph, name: str, tensor: Tensor, held: dict[int, str]) -> fx.Node:
    """A node that reads a tensor, held under one name however often it is read."""
    assert isinstance(graph.store, OverlayStore)
    if id(tensor) not in held:
        held[id(tensor)] = graph.fresh_name(name)
        graph.tensors[held[id(tensor)]] = graph.store.hold(tensor)
    return graph.graph.create_node("get_attr", held[id(tensor)])


def _panels(graph: ModelGraph, weights: Sequence[PackedWeight]) -> Panels:
    """The weights as one, packed anew if nothing holds them yet."""
    stored = [None if name is None else graph.tensors[name] for w in weights for name in (w.codes, w.scale, w.zero)]
    key = (str(weights[0].format), *stored)
    parts = {name: _kept.get((name, *key)) for name in ("codes", "scale", "zero")}
    if parts["codes"] is None or parts["scale"] is None or (parts["zero"] is None and weights[0].zero is not None):
        made = Panels.joined([Panels.of(weight.read(graph)) for weight in weights])
        _kept.update({(name, *key): part for name, part in made.parts.items()})
        return made
    columns = weights[0].shape[1]
    shape = (sum(weight.shape[0] for weight in weights), columns)
    return Panels(parts["codes"], parts["scale"], parts["zero"], weights[0].format.bits, weights[0].format.group(columns), shape)
