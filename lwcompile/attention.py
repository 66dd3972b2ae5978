"""Attention in one form: what each call attends to, with which heads, under which mask.

grouped queries  keys and values expanded from fewer heads before the call      -> `enable_gqa=True` on the un-expanded ones
masks            whatever subgraph computes which keys are open                 -> one formula (see `masks`), or `is_causal`
sizes            batch and length read from the mask input                      -> read from the data, so that both may differ

Exact: the expansion and each distinct mask are evaluated on probe inputs and compared with what replaces them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import fx

from lwcompile.contract import StoredTensor
from lwcompile.errors import Refused
from lwcompile.graph import ModelGraph, iterate_calls
from lwcompile.masks import Formula, MaskRule, build, recognise
from lwcompile.probe import ancestors, evaluate, sizes_at, symbols, value_inputs, values_above, zeros
from lwcompile.site import Site

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default
HYBRID = torch.ops.lwcompile.hybrid_attention.default
RELU = torch.ops.lwcompile.relu_attention.default
_SLOTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


def slots(node: fx.Node) -> dict[str, Any]:
    """All arguments of an attention call by name."""
    given = dict(zip(_SLOTS, node.args)) | dict(node.kwargs)
    return {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False} | given


def set_slots(node: fx.Node, **changes: Any) -> None:
    """Rewrite an attention call; arguments at their defaults are left out."""
    given = slots(node) | changes
    node.args = (given["query"], given["key"], given["value"], *([given["attn_mask"]] if given["attn_mask"] is not None else []))
    defaults = {"dropout_p": 0.0, "is_causal": False, "enable_gqa": False, "scale": None}
    node.kwargs = {name: given[name] for name, default in defaults.items() if given[name] != default}


@dataclass(frozen=True)
class Attention:
    """One attention call. Shapes: query [B, heads, S, d], key [B, kv_heads, T, d], value [B, kv_heads, T, value_width].

    kind: "self" if keys come from the stream that asks, "cross" if from another input.
    mask: the rule it follows, or None where the mask follows no rule that is known (`bias` is its node).
    softmax_window: keys that are read by softmax where the others are read by feature maps (`lwcompile.linear_attention`; 0 in
        `lwcompile.relu_attention`); None if all are. features: of these maps.
    key_latent, value_latent: [B, 1, S, r], what keys or values follow from position by position (see `latent_of`); None if nothing.
    """

    node: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    heads: int
    kv_heads: int
    key_width: int
    value_width: int
    kind: Literal["self", "cross"]
    mask: MaskRule | None
    bias: fx.Node | None
    softmax_window: int | None = None
    features: int = 0
    key_latent: fx.Node | None = None
    value_latent: fx.Node | None = None


def find_attentions(graph: ModelGraph, within: Collection[fx.Node] | None = None) -> list[Attention]:
    """Every attention call with heads, in order, or those of `within`. Needs `meta["val"]`. Each distinct mask is evaluated once."""
    reads = value_inputs(graph)
    streams = stream_inputs(graph)
    rules: dict[fx.Node, MaskRule | None] = {}
    heads = _single_heads(graph)
    found = []
    for node in iterate_calls(graph, SDPA, HYBRID, RELU):
        query, key, value, mask = _operands(node)
        if query.meta["val"].dim() != 4 or (within is not None and node not in within):
            continue
        if node.target is not SDPA:
            found.append(_linear(node, next(iter(reads[mask]), None) if mask is not None else None))
            continue
        if mask is not None and mask not in rules:
            rules[mask] = recognise(graph, mask, reads)
        rule = MaskRule(bool(slots(node)["is_causal"])) if mask is None else rules[mask]
        own = (reads[query] & streams) <= reads[key]
        q, k, v = (n.meta["val"].shape for n in (query, key, value))
        latents = _fewer((key, value), [latent_of(n, heads, streams) for n in (key, value)])
        kind: Literal["self", "cross"] = "self" if own else "cross"
        found.append(Attention(node, query, key, value, q[1], k[1], k[3], v[3], kind, rule, mask, None, 0, *latents))
    return found


def _single_heads(graph: ModelGraph) -> set[fx.Node]:
    """Values [B, 1, S, r] that linears read: laid out as the one head of a cache."""
    calls = iterate_calls(graph, aten.unsqueeze.default)
    laid = (n for n in calls if n.args[1] == 1 and "val" in n.meta and n.meta["val"].dim() == 4)
    return {n for n in laid if any(user.target is aten.linear.default and user.args[0] is n for user in n.users)}


def latent_of(node: fx.Node, heads: set[fx.Node], streams: set[str]) -> fx.Node | None:
    """The one of `heads` that keys or values follow from, beside positions and constants; None if there is none.

    It is what decoding caches in their place: the graph says by this layout that it is worth computing keys anew.
    """
    cut = values_above(node, heads) if heads else set()
    found = heads & cut
    read = any(n.op == "placeholder" and str(n.target) in streams for n in cut)
    return next(iter(found)) if len(found) == 1 and not read else None


def _fewer(nodes: tuple[fx.Node, fx.Node], latents: list[fx.Node | None]) -> list[fx.Node | None]:
    """The latents, if a token takes fewer numbers in them than in keys and values; one that serves both counts once."""

    def numbers(*cached: fx.Node) -> int:
        shapes = [n.meta["val"].shape for n in dict.fromkeys(cached)]
        return sum(shape[1] * shape[3] for shape in shapes)

    cached = [latent or node for node, latent in zip(nodes, latents)]
    return latents if numbers(*cached) < numbers(*nodes) else [None, None]


def _operands(node: fx.Node) -> tuple[Any, Any, Any, Any]:
    """query, key, value, and what is closed to it: a mask, or what is no padding."""
    given: Any = tuple(slots(node)[name] for name in _SLOTS[:4]) if node.target is SDPA else node.args[:4]
    return given


def _linear(node: fx.Node, padding: str | None) -> Attention:
    query, key, value, open_ = _operands(node)
    hybrid = node.target is HYBRID
    maps, window = cast(fx.Node, node.args[5 if hybrid else 4]), cast(int, node.args[8]) if hybrid else 0
    q, k, v = (n.meta["val"].shape for n in (query, key, value))
    rule, count = MaskRule(hybrid, None, padding), 2 * maps.meta["val"].shape[-1]
    return Attention(node, query, key, value, q[1], k[1], k[3], v[3], "self", rule, open_, window, count)


def attentions_at(graph: ModelGraph, site: Site) -> list[Attention]:
    """The attention calls of one sublayer: those between the residual stream and its branch's output.

    Raises:
        Refused: it holds none that is one operator with heads.
    """
    branch = next((node for node in graph.graph.nodes if node.name == site.node), None)
    if branch is None:
        raise Refused("it is no longer in the graph", site=site.id)
    stops = {node for node in graph.graph.nodes if node.name == site.skip}
    stops |= {source for user in branch.users for source in user.all_input_nodes if source is not branch}
    calls = set(iterate_calls(graph, SDPA, HYBRID, RELU))
    within = ancestors(branch, stops | calls) & calls
    if any("val" not in source.meta for call in within for source in _operands(call)[:3]):
        graph.propagate()
    found = find_attentions(graph, within - stops)
    if not found:
        raise Refused("its attention is written out in a form that is no single operator with heads", site=site.id)
    return found


def beside_weights(graph: ModelGraph, site: Site) -> list[StoredTensor]:
    """What a sublayer stores beside the matrices of its linears and embeddings: norms and biases, as one tensor."""
    branch = next(node for node in graph.graph.nodes if node.name == site.node)
    stops = {node for node in graph.graph.nodes if node.name == site.skip}
    place = {aten.linear.default: 1, aten.embedding.default: 0}
    reads = dict.fromkeys(n.args[place[n.target]] for n in ancestors(branch, stops) if n.target in place)  # type: ignore[index]
    weights = sum(n.meta["val"].numel() for n in reads if isinstance(n, fx.Node) and n.op == "get_attr")
    count = site.parameters - weights
    return [StoredTensor((count,))] if count > 0 else []


def lengths(graph: ModelGraph, attention: Attention, call: Formula) -> tuple[fx.Node, fx.Node]:
    """Size nodes of S and T: read from the inputs where they say it, so that all layers share them, else from queries and keys."""
    nodes, stream = graph.input_nodes(), value_inputs(graph)[attention.query]
    padding = attention.mask.padding if attention.mask is not None else None
    length = attention.query.meta["val"].shape[2]
    places = [(nodes[i.name], d) for i in graph.inputs if i.name in stream - {padding} for d in i.dynamic
              if d > 0 and i.shape[d] == length]  # fmt: skip
    if not places:
        return call.size(attention.query, 2), call.size(attention.key, 2)
    queries = call.size(*places[0])
    return queries, call.size(nodes[padding], 1) if padding is not None else queries


def stream_inputs(graph: ModelGraph) -> set[str]:
    """Inputs that become hidden states: floating-point ones, and integers that look rows up in a table."""
    found = {i.name for i in graph.inputs if i.dtype.is_floating_point}
    reads = value_inputs(graph)
    for node in iterate_calls(graph, aten.embedding.default):
        found |= reads[node.args[1]]  # type: ignore[index]
    return found


# --- grouped queries

_LAYOUT = (
    aten.unsqueeze.default,
    aten.expand.default,
    aten.reshape.default,
    aten.view.default,
    aten.slice.Tensor,
    aten.transpose.int,
    aten.permute.default,
    aten.repeat.default,
    aten.repeat_interleave.self_int,
    aten.clone.default,
    aten.flatten.using_ints,
)


def fold_grouped_queries(graph: ModelGraph) -> None:
    """Let attention read keys and values of fewer heads than queries without repeating them first."""
    for node in list(iterate_calls(graph, SDPA)):
        given = slots(node)
        heads = given["query"].meta["val"].shape[1]
        if given["enable_gqa"] or given["query"].meta["val"].dim() != 4 or given["key"].meta["val"].shape[1] != heads:
            continue
        for key, key_swapped in _narrower(graph, given["key"], heads):
            count = key.meta["val"].shape[2 if key_swapped else 1]
            values = ((v, s) for v, s in _narrower(graph, given["value"], heads) if v.meta["val"].shape[2 if s else 1] == count)
            if (value := next(values, None)) is None:
                continue
            with graph.graph.inserting_before(node):
                narrow = [_heads_first(graph, n, swapped) for n, swapped in ((key, key_swapped), value)]
            set_slots(node, key=narrow[0], value=narrow[1], enable_gqa=True)
            break


def _heads_first(graph: ModelGraph, node: fx.Node, swapped: bool) -> fx.Node:
    if not swapped:
        return node
    call = graph.graph.call_function(aten.transpose.int, (node, 1, 2))
    call.meta |= {"path": node.meta.get("path", ""), "val": node.meta["val"].transpose(1, 2)}
    return call


def _narrower(graph: ModelGraph, full: fx.Node, heads: int) -> Iterator[tuple[fx.Node, bool]]:
    """Nodes that `full` repeats each head of, nearest first, and whether their heads stand after the length."""
    batch, _, length, width = full.meta["val"].shape
    node = full
    while node.op == "call_function" and node.target in _LAYOUT:
        node = node.all_input_nodes[0]
        shape = tuple(node.meta["val"].shape)
        for swapped in (False, True):
            count = shape[2 if swapped else 1] if len(shape) == 4 else 0
            wanted = (batch, length, count, width) if swapped else (batch, count, length, width)
            if (
                0 < count < heads
                and heads % count == 0
                and shape == wanted
                and _repeats(graph, full, node, heads // count, swapped)
            ):
                yield node, swapped


def _repeats(graph: ModelGraph, full: fx.Node, source: fx.Node, times: int, swapped: bool) -> bool:
    """Whether `full` is `source` with each head repeated, at two other sizes."""
    shape = source.meta["val"].shape
    axis = 1 if swapped else 2
    for batch, length in ((3, 5), (1, 4)):
        sizes = sizes_at(graph, batch, length)
        matches = False
        for b in {*(sizes[s] for s in symbols(graph)[0]), shape[0]}:
            for t in {*sizes.values(), shape[axis]}:
                trial = list(shape)
                trial[0], trial[axis] = b, t
                numbers = torch.arange(torch.Size(trial).numel(), dtype=torch.float32).reshape(trial)
                try:
                    expanded = evaluate(graph, full, {**zeros(graph, sizes), source: numbers})
                except (RuntimeError, ValueError, TypeError):
                    continue
                wanted = (numbers.transpose(1, 2) if swapped else numbers).repeat_interleave(times, dim=1)
                matches = matches or torch.equal(expanded, wanted)
        if not matches:
            return False
    return True


# --- masks and sizes


def canonical_masks(graph: ModelGraph) -> None:
    """Write every mask that follows a rule as the rule's formula, and read sizes from the data."""
    calls = list(iterate_calls(graph, SDPA))
    if not calls:
        return
    reads = value_inputs(graph)
    for mask in dict.fromkeys(slots(node)["attn_mask"] for node in calls):
        if mask is None or (rule := recognise(graph, mask, reads)) is None:
            continue
        if (sizes := _size_nodes(graph, mask, rule, calls[0])) is None:
            continue
        queries, keys = sizes
        users = [node for node in mask.users if node.target is SDPA and slots(node)["attn_mask"] is mask]
        whole = rule == MaskRule(True) and queries is keys
        formula = None if whole else build(Formula(graph, calls[0]), rule, queries, keys)
        if formula is not None and "val" not in formula.meta:
            formula.meta["val"] = mask.meta["val"]
        for node in users:
            set_slots(node, attn_mask=formula, is_causal=whole)
    graph.prune()
    _sizes_from_data(graph)


def _size_nodes(graph: ModelGraph, mask: fx.Node, rule: MaskRule, before: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The nodes of S and T: T from the padding input, S from the first other input that is as long as the mask has rows."""
    sizes = sizes_at(graph, 3, 11)
    shape = evaluate(graph, mask, zeros(graph, sizes)).shape
    call, nodes = Formula(graph, before), graph.input_nodes()
    places = [
        (nodes[i.name], d, sizes[s]) for i in graph.inputs for d, s in i.dynamic.items() if d > 0 and i.name != rule.padding
    ]
    query = next(((node, d) for node, d, size in places if size == shape[-2]), None)
    if query is None and (rule.causal or rule.window is not None):
        return None
    if rule.padding is not None:
        keys = call.size(nodes[rule.padding], 1)
    elif (key := next(((node, d) for node, d, size in places if size == shape[-1]), None)) is not None:
        keys = call.size(*key)
    else:
        return None
    return (call.size(*query) if query else keys), keys


def mask_only(graph: ModelGraph) -> set[fx.Node]:
    """Nodes that nothing but attention masks reads."""
    found: set[fx.Node] = set()
    for node in reversed(graph.graph.nodes):
        if node.op == "call_function" and node.users:
            uses = (user in found or _reads_as_mask_only(user, node) for user in node.users)
            if all(uses):
                found.add(node)
    return found


def _reads_as_mask_only(call: fx.Node, node: fx.Node) -> bool:
    if call.target not in (SDPA, HYBRID, RELU):
        return False
    mask = slots(call)["attn_mask"] if call.target is SDPA else call.args[3]
    return mask is node and node not in call.args[:3]


def _sizes_from_data(graph: ModelGraph) -> None:
    """Read each size once, just behind the inputs; outside masks, from the data where the mask input shares it."""
    reads = value_inputs(graph)
    masks = {name for node in iterate_calls(graph, SDPA) if (m := slots(node)["attn_mask"]) is not None for name in reads[m]}
    closed, nodes = mask_only(graph), graph.input_nodes()
    given = {nodes[i.name]: i for i in graph.inputs}
    made: dict[tuple[str, int], fx.Node] = {}
    last = next(iter(graph.graph.nodes))
    for node in graph.graph.nodes:
        if node.target is aten.sym_size.int and node.args[0] in given:
            made[str(node.args[0].target), node.args[1]] = node
        elif node.op == "call_function":
            break
        last = node

    def size(name: str, dim: int) -> fx.Node:
        nonlocal last
        if (name, dim) not in made:
            with graph.graph.inserting_after(last):
                made[name, dim] = last = graph.graph.call_function(aten.sym_size.int, (nodes[name], dim))
            last.meta["val"] = nodes[name].meta["val"].shape[dim]
        return made[name, dim]

    for node in list(iterate_calls(graph, aten.sym_size.int)):
        source, dim = node.args
        if (i := given.get(source)) is None:  # type: ignore[arg-type]
            continue
        places = [(i.name, dim)]
        if i.name in masks and dim in i.dynamic:
            data = (j for j in graph.inputs if j.name not in masks)
            places = [(j.name, d) for j in data for d, s in j.dynamic.items() if s == i.dynamic[dim]] + places  # type: ignore[index]
        node.replace_all_uses_with(size(*places[0]), delete_user_cb=lambda user: user not in closed)  # type: ignore[arg-type]
        node.replace_all_uses_with(size(*places[-1]))  # type: ignore[arg-type]
    graph.prune()
