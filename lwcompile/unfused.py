"""Attention that a model writes out becomes the one operator.

before: matmul(softmax(scale * matmul(q, k^T) + bias), v), with the scale before or after the bias, and `where` or
        `masked_fill` for masks
after:  scaled_dot_product_attention(q, k, v, bias, scale=scale)
cost:   nodes only. Equal to float rounding, except in rows that nothing is open in, which belong to padding.
refuses (leaves as it is): scores that pass through anything else (soft caps, sinks), biases computed from the data, and
        heads folded into the batch
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import fx

from lwcompile.attention import SDPA, stream_inputs
from lwcompile.graph import ModelGraph, iterate_calls
from lwcompile.masks import CLOSED
from lwcompile.probe import value_inputs

aten = torch.ops.aten
_LOWEST = torch.finfo(torch.float32).min / 2  # some kernels read the very lowest as a closed mask, and rows of it as zeros
_Step = tuple[Literal["scale"], float] | tuple[Literal["add"], fx.Node] | tuple[Literal["open", "close"], fx.Node]


def whole_attentions(graph: ModelGraph) -> None:
    """Rewrite in place; needs `meta["val"]`."""
    reads, streams = value_inputs(graph), stream_inputs(graph)
    for softmax in list(iterate_calls(graph, aten.softmax.int, aten._softmax.default)):
        reader = next(iter(softmax.users), None)
        if reader is None or len(softmax.users) > 1 or reader.target is not aten.matmul.default or reader.args[0] is not softmax:
            continue
        found = _steps(graph, softmax.all_input_nodes[0]) if softmax.args[1] in (-1, 3) else None
        if found is None:
            continue
        product, steps = found
        (query, key), value = product.all_input_nodes, reader.all_input_nodes[1]
        whole = all(n.meta["val"].dim() == 4 for n in (query, key, value))
        if not whole or any(isinstance(n, fx.Node) and reads[n] & streams for _, n in steps):
            continue
        with graph.graph.inserting_before(reader):
            scale, bias = _combine(graph, steps)
            inputs = (query, _untransposed(graph, key), value, *([] if bias is None else [bias]))
            call = graph.graph.call_function(SDPA, inputs, {"scale": scale})
        call.meta.update(reader.meta)
        reader.replace_all_uses_with(call)
    graph.prune()
    graph.propagate()


def _steps(graph: ModelGraph, scores: fx.Node) -> tuple[fx.Node, list[_Step]] | None:
    """The product of queries and keys behind the scores, and what is done to it on the way, first to last."""
    steps: list[_Step] = []
    while scores.target is not aten.matmul.default:
        first, *rest = scores.args
        match scores.target:
            case aten.mul.Tensor if isinstance(rest[0], int | float):
                steps.append(("scale", float(rest[0])))
            case aten.div.Tensor if isinstance(rest[0], int | float):
                steps.append(("scale", 1 / float(rest[0])))
            case aten.add.Tensor if isinstance(rest[0], fx.Node) and not scores.kwargs:
                steps.append(("add", rest[0]))
            case aten.masked_fill.Scalar | aten.masked_fill.Tensor if _closes(graph, rest[1]) and isinstance(rest[0], fx.Node):
                steps.append(("close", rest[0]))
            case aten.where.self | aten.where.ScalarOther if _closes(graph, rest[1]) and isinstance(first, fx.Node):
                steps.append(("open", first))
                first = rest[0]
            case _:
                return None
        if not isinstance(first, fx.Node) or first.op != "call_function":
            return None
        scores = first
    return (scores, steps[::-1]) if len(scores.all_input_nodes) == 2 else None


def _closes(graph: ModelGraph, value: object) -> bool:
    """Whether a score of this value leaves nothing after softmax."""
    if isinstance(value, fx.Node):
        if value.op != "get_attr" or graph.tensor(str(value.target)).numel() != 1:
            return False
        value = float(graph.tensor(str(value.target)))
    return isinstance(value, int | float) and value <= CLOSED


def _combine(graph: ModelGraph, steps: list[_Step]) -> tuple[float, fx.Node | None]:
    """One scale and one mask for all steps; the mask is boolean while nothing was added, and else a bias."""
    call, scale, mask, boolean = graph.graph.call_function, 1.0, None, True
    for kind, value in steps:
        if kind == "scale":
            scale *= value  # type: ignore[operator]
            mask = mask if mask is None or boolean else call(aten.mul.Tensor, (mask, value))
            continue
        if kind == "add":
            if mask is None:
                mask = value
            else:
                mask = call(aten.where.ScalarOther, (mask, value, _LOWEST)) if boolean else call(aten.add.Tensor, (mask, value))
            boolean = False
            continue
        open_ = value if kind == "open" else call(aten.logical_not.default, (value,))
        if mask is None:
            mask = open_
        elif boolean:
            mask = call(aten.logical_and.default, (mask, open_))
        else:
            mask = call(aten.where.ScalarOther, (open_, mask, _LOWEST))
    return scale, mask  # type: ignore[return-value]


def _untransposed(graph: ModelGraph, key: fx.Node) -> fx.Node:
    """Keys [B, heads, T, d] from [B, heads, d, T]."""
    swapped = key.target is aten.transpose.int and {d % 4 for d in key.args[1:3]} == {2, 3}  # type: ignore[operator]
    if swapped or (key.target is aten.permute.default and list(key.args[1]) == [0, 1, 3, 2]):  # type: ignore[arg-type]
        return key.all_input_nodes[0]
    return graph.graph.call_function(aten.transpose.int, (key, 2, 3))
