"""The decode graph: the same function, continued from cached keys and values.

before: logits = f(input_ids [B, S], attention_mask [B, S], position_ids [B, S])
after:  logits, present.{i}.key/.value = f(input_ids [B, S], attention_mask [B, P + S], position_ids [B, S],
        past_key_values.{i}.key/.value [B, kv_heads, P, width]); P = 0 is prefill, so one graph serves both

Made from whatever a prefill graph has become: attentions that were dropped have no cache, and the others are numbered in
order. Keys are cached as attention reads them (after rotation), heads not repeated. Positions that come from counting
(`arange(S)`, a table's first S rows, a running sum of the mask) are taken from P on. Cross-attention reads the encoder's
states anew at each step.

Keys or values that follow from a latent (`attention.latent_of`) are computed anew from the cached latents, and where that takes
positions, the past ones are cached too, once: `past_key_values.{input}`, [B, P]. Behind a causal window the cache rolls
(`lwcompile.rolling`): it holds min(P, window - 1 + sinks) positions, and its free length is named `past_{bound}`. P itself must
still be known: without a padding input, one cache stays whole.

cost:    nodes only, and with `check` a forward over 2 x 6 tokens, or enough to fill the caches that roll up to `_LONGEST_CHECK`, once
         whole and once in pieces, which are compared
refuses: graphs without attention, attention to later positions, a fixed length, and graphs whose decoding the check finds
         different (an operator other than attention mixes positions)
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from lwcompile.attention import HYBRID, Attention, find_attentions, mask_only, set_slots
from lwcompile.errors import Refused
from lwcompile.graph import Input, ModelGraph, iterate_calls
from lwcompile.masks import Formula, MaskRule, build
from lwcompile.probe import ancestors, evaluate, value_inputs, values_above, zeros
from lwcompile.rolling import Rolling, bound_of, cache_symbol, capacity

aten = torch.ops.aten
TOLERANCE = 1e-4
PAST, PARTS = "past_key_values.", ("key", "value", "state")
LATENT = "latent"
_EXAMPLE_PAST, _EXAMPLE_KEPT = 3, 1
_LONGEST_CHECK = 520


def cached_attentions(graph: ModelGraph) -> list[Attention]:
    """The self-attentions whose keys and values decoding keeps, in order."""
    return [a for a in find_attentions(graph) if a.kind == "self"]


def cache_bytes_per_token(graph: ModelGraph, dtype: torch.dtype = torch.float32) -> int:
    """Bytes that each further token of one sequence takes in the cache; behind a window, a cache that is full takes no more."""
    growing = (a for a in cached_attentions(graph) if capacity(_kept(a)) is None)
    return dtype.itemsize * sum(heads * width for a in growing for _, heads, width in _cached(a))


def _cached(a: Attention) -> list[tuple[fx.Node, int, int]]:
    """What is cached of an attention: the node, its heads, and the width of each. One latent that serves both is cached once."""
    key = (a.key, a.kv_heads, a.key_width) if a.key_latent is None else (a.key_latent, 1, _width(a.key_latent))
    value = (a.value, a.kv_heads, a.value_width) if a.value_latent is None else (a.value_latent, 1, _width(a.value_latent))
    return [key] if key == value else [key, value]


def _width(node: fx.Node) -> int:
    return node.meta["val"].shape[-1]


def _parts(a: Attention) -> tuple[str, ...]:
    return (LATENT,) if len(_cached(a)) == 1 else PARTS


def derive_decode(graph: ModelGraph, *, check: bool = True, roll: bool = True) -> ModelGraph:
    """The graph that continues from a cache; the given one is left as it is.

    roll: let caches behind a window roll; otherwise all are P long.

    Raises:
        Refused: the graph cannot be decoded step by step; the reason names the operator.
    """
    decode = graph.copy()
    decode.propagate()
    attentions = cached_attentions(decode)
    if not attentions:
        written = any(iterate_calls(decode, aten.softmax.int, aten._softmax.default))
        reason = "attention is written out in a form that is no single operator" if written else "no self-attention is left"
        raise Refused(f"the graph cannot be decoded from a cache: {reason}")
    for a in attentions:
        if a.mask is not None and not a.mask.causal:
            raise Refused("attention reads later positions (an encoder); only causal models decode", site=a.node.name)
    data, dim = _sequence(decode, attentions[0])
    padding = _padding(decode, attentions, data.dynamic[dim])
    bounds = [capacity(_kept(a)) if roll and a.key_latent is a.value_latent is None else None for a in attentions]
    if padding is None and None not in bounds:
        bounds[0] = None
    pasts = [_add_past(decode, i, a, data, bound) for i, (a, bound) in enumerate(zip(attentions, bounds))]
    whole = next((past[0] for past, bound in zip(pasts, bounds) if bound is None), pasts[0][0])
    lengths = _lengths(decode, data, dim, padding, whole)
    closed, copies = mask_only(decode), {lengths.queries: lengths.keys}
    unruled = dict.fromkeys(a.bias for a in attentions if a.mask is None and a.bias is not None)
    biases = {bias: _bias_rows(decode, bias, lengths, padding, copies) for bias in unruled}
    _continue_positions(decode, lengths, padding, closed, copies)
    if padding is not None:
        decode.inputs[decode.inputs.index(padding)] = _longer(padding)
    presents: dict[str, fx.Node] = {}
    rolling: dict[MaskRule, Rolling] = {}
    revived = _Revived(decode, data.dynamic[dim], copies)
    for i, (a, past, bound) in enumerate(zip(attentions, pasts, bounds)):
        if bound is None or (rule := _kept(a)) is None:
            made = _attend_to_past(decode, a, past, lengths, biases, revived)
        else:
            if rule not in rolling:
                rolling[rule] = Rolling(decode, a.node, rule, past[0], lengths.queries, lengths.keys)
            made = _attend_within(decode, a, past, rolling[rule])
        presents |= {f"present.{i}.{part}": node for part, node in zip(_parts(a), made)}
    presents |= revived.presents
    output = decode.output_node
    output.args = ((*output.args[0], *presents.values()),)  # type: ignore[misc]
    decode.outputs += presents
    decode.prune()
    decode.propagate()
    if check:
        verify_decode(graph, decode)
    return decode


def _kept(a: Attention) -> MaskRule | None:
    """The rule of the keys that must be kept: those that softmax reads."""
    return a.mask if a.softmax_window is None or a.mask is None else replace(a.mask, window=a.softmax_window)


@dataclass(frozen=True)
class _Lengths:
    """Size nodes: S queries, T keys, P = T - S cached ones."""

    queries: fx.Node
    keys: fx.Node
    past: fx.Node


def _sequence(graph: ModelGraph, attention: Attention) -> tuple[Input, int]:
    """The input and dimension that the number of queries is read from."""
    masks = {name for a in find_attentions(graph) if a.mask and (name := a.mask.padding)}
    stream = value_inputs(graph)[attention.query] - masks
    length = attention.query.meta["val"].shape[2]
    for i in graph.inputs:
        for dim in i.dynamic:
            if i.name in stream and dim > 0 and i.shape[dim] == length:
                return i, dim
    raise Refused("the sequence length is fixed in this graph; capture it with a free length", site=attention.node.name)


def _padding(graph: ModelGraph, attentions: Iterable[Attention], symbol: str) -> Input | None:
    """The [batch, length] input that marks padding, among the masks of these attentions or beside them."""
    named = {a.mask.padding for a in attentions if a.mask is not None and a.mask.padding}
    read = value_inputs(graph)
    named |= {n for a in attentions if a.mask is None and a.bias is not None for n in read[a.bias]}
    found = [i for i in graph.inputs if i.name in named and i.dynamic.get(1) == symbol]
    if len(found) > 1:
        raise Refused(f"attentions read different padding inputs ({', '.join(i.name for i in found)})")
    return found[0] if found else None


def _add_past(graph: ModelGraph, index: int, attention: Attention, data: Input, bound: int | None) -> tuple[fx.Node, ...]:
    """Placeholders for one attention's cache, of any length or of one up to `bound`; then, if it is partly linear, for its state."""
    last = [n for n in graph.graph.nodes if n.op == "placeholder"][-1]
    nodes, length = [], _EXAMPLE_PAST if bound is None else _EXAMPLE_KEPT
    held = [(node, heads, length, width) for node, heads, width in _cached(attention)]
    if bound is not None and attention.features:
        held.append((attention.key, attention.kv_heads, attention.features, attention.value_width + 1))
    for part, (node, heads, rows, width) in zip(_parts(attention), held):
        name = f"{PAST}{index}.{part}"
        with graph.graph.inserting_after(last):
            last = graph.graph.create_node("placeholder", name, name=name.replace(".", "_"))
        value = node.meta["val"]
        shape = (value.shape[0], heads, rows, width)
        free = {0: data.dynamic[0]} if 0 in data.dynamic else {}
        graph.inputs.append(Input(name, shape, value.dtype, free if part == "state" else free | {2: cache_symbol(bound)}))
        last.meta["val"] = value.new_empty(shape)
        nodes.append(last)
    return tuple(nodes)


def _lengths(graph: ModelGraph, data: Input, dim: int, padding: Input | None, past: fx.Node) -> _Lengths:
    """T is the padding input's length, or without one the first cache's and the queries' together."""
    nodes = graph.input_nodes()
    inputs = [n for n in graph.graph.nodes if n.op == "placeholder"]
    call = Formula(graph, inputs[-1].next)  # a packed weight's dequantize may stand before the inputs
    queries = call.size(nodes[data.name], dim)
    keys = call.size(nodes[padding.name], 1) if padding else call(operator.add, call.size(past, 2), queries)
    for node in [n for n in iterate_calls(graph, aten.sym_size.int) if n not in (queries, keys)]:
        same = next((n for n in (queries, keys) if n.target is node.target and n.args == node.args), node)
        node.replace_all_uses_with(same)
    return _Lengths(queries, keys, call(operator.sub, keys, queries))


def _longer(padding: Input) -> Input:
    """The padding input covers the cache too."""
    shape = (padding.shape[0], padding.shape[1] + _EXAMPLE_PAST)
    return replace(padding, shape=shape, dynamic={**padding.dynamic, 1: "total"})


def _attend_to_past(
    graph: ModelGraph,
    a: Attention,
    past: tuple[fx.Node, ...],
    lengths: _Lengths,
    biases: Mapping[fx.Node, fx.Node],
    revived: _Revived,
) -> tuple[fx.Node, ...]:
    """Join cached and new keys and values, or what they follow from, and open the mask over them."""
    if a.node.target is HYBRID:
        key, value = _joined(graph, a, past)
        a.node.args = (a.query, key, value, *a.node.args[3:])
        return key, value
    sources = [latent or node for node, latent in ((a.key, a.key_latent), (a.value, a.value_latent))]
    held = dict(zip(dict.fromkeys(sources), past))
    kept = {source: revived.join(source, past, a) for source, past in held.items()}
    key, value = (
        kept[source] if source is node else revived.of_all_keys(node) for source, node in zip(sources, (a.key, a.value))
    )
    rule = build(Formula(graph, a.node), a.mask, lengths.queries, lengths.keys) if a.mask is not None else None
    set_slots(a.node, key=key, value=value, attn_mask=biases.get(a.bias, rule), is_causal=False)  # type: ignore[arg-type]
    return tuple(kept.values())


def _joined(graph: ModelGraph, a: Attention, past: tuple[fx.Node, ...]) -> tuple[fx.Node, fx.Node]:
    with graph.graph.inserting_before(a.node):
        key, value = (graph.graph.call_function(aten.cat.default, ([p, n], 2)) for p, n in zip(past, (a.key, a.value)))
    for node in (key, value):
        node.meta["path"] = a.node.meta.get("path", "")
    return key, value


def _attend_within(graph: ModelGraph, a: Attention, past: tuple[fx.Node, ...], rolling: Rolling) -> tuple[fx.Node, ...]:
    """Join what is kept with the new keys and values, read it through the window, and let go of what falls out of it."""
    key, value = _joined(graph, a, past)
    widths = zip((key, value), (a.key_width, a.value_width))
    kept = [rolling.keep(node, a.kv_heads, width, a.node.next) for node, width in widths]
    if a.node.target is not HYBRID:
        set_slots(a.node, key=key, value=value, attn_mask=rolling.mask, is_causal=False)
        return kept[0], kept[1]
    map_key = a.node.args[6]
    a.node.args = (a.query, key, value, rolling.open, past[2], *a.node.args[5:])
    with graph.graph.inserting_after(a.node):
        args = (key, value, rolling.open, past[2], map_key, a.softmax_window)
        state = graph.graph.call_function(torch.ops.lwcompile.absorb_keys.default, args)
    return kept[0], kept[1], state


class _Revived:
    """Keys and values of all T positions, computed anew from the cached latents and positions.

    symbol: the name of the free length S. copies: what is known already of nodes over T positions.
    """

    def __init__(self, graph: ModelGraph, symbol: str, copies: dict[fx.Node, fx.Node]) -> None:
        self.graph, self.symbol, self.copies = graph, symbol, copies
        self.presents: dict[str, fx.Node] = {}

    def join(self, node: fx.Node, past: fx.Node, a: Attention) -> fx.Node:
        """What is cached and what is new: keys and values before the attention, latents before what reads them."""
        made, plain = self.graph.graph, node in (a.key, a.value)
        with made.inserting_before(a.node) if plain else made.inserting_after(node):
            joined = made.call_function(aten.cat.default, ([past, node], 2))
        joined.meta["path"] = a.node.meta.get("path", "")
        if not plain:
            self.copies[node] = joined
        return joined

    def of_all_keys(self, node: fx.Node) -> fx.Node:
        for name, given in self.graph.input_nodes().items():
            if given not in self.copies and given in values_above(node, self.copies):
                self._remember(next(i for i in self.graph.inputs if i.name == name), given)
        return _over_all_keys(self.graph, node, self.copies)

    def _remember(self, given: Input, node: fx.Node) -> None:
        """Cache an input along the sequence, such as the positions that keys are rotated by."""
        if self.symbol not in given.dynamic.values():
            return
        if [d for d, s in given.dynamic.items() if s == self.symbol] != [1] or 0 not in given.dynamic or len(given.shape) != 2:
            raise Refused(f"keys are computed anew with the past of {given.name}, which is not [batch, length]", site=node.name)
        name, last = f"{PAST}{given.name}", [n for n in self.graph.graph.nodes if n.op == "placeholder"][-1]
        shape = (given.shape[0], _EXAMPLE_PAST)
        self.graph.inputs.append(Input(name, shape, given.dtype, {0: given.dynamic[0], 1: cache_symbol(None)}))
        with self.graph.graph.inserting_after(last):
            past = self.graph.graph.create_node("placeholder", name, name=name.replace(".", "_"))
        past.meta["val"] = node.meta["val"].new_empty(shape)
        with self.graph.graph.inserting_after(past):
            joined = self.graph.graph.call_function(aten.cat.default, ([past, node], 1))
        self.copies[node] = self.presents[f"present.{given.name}"] = joined


def _over_all_keys(graph: ModelGraph, node: fx.Node, copies: dict[fx.Node, fx.Node]) -> fx.Node:
    """`node` computed for T positions instead of S; what does not depend on S is not copied."""
    needed = ancestors(node, copies)
    for source in [n for n in graph.graph.nodes if n in needed and n not in copies and n.op == "call_function"]:
        if any(n in copies for n in source.all_input_nodes):
            with graph.graph.inserting_after(source):
                copies[source] = graph.graph.node_copy(source, lambda n: copies.get(n, n))
    return copies.get(node, node)


def _last(graph: ModelGraph, node: fx.Node, dim: int, lengths: _Lengths) -> fx.Node:
    """The last S of T along one dimension."""
    return graph.graph.call_function(aten.slice.Tensor, (node, dim, lengths.past, lengths.keys))


def _bias_rows(
    graph: ModelGraph, bias: fx.Node, lengths: _Lengths, padding: Input | None, copies: dict[fx.Node, fx.Node]
) -> fx.Node:
    """A mask that follows no rule we know: computed for T x T as prefill would, of which the last S rows are read."""
    if reads := value_inputs(graph)[bias] - {padding.name if padding else ""}:
        raise Refused(f"the attention mask depends on the values of {', '.join(sorted(reads))}", site=bias.name)
    whole = _over_all_keys(graph, bias, copies)
    with graph.graph.inserting_after(whole):
        return whole if bias.meta["val"].shape[-2] == 1 else _last(graph, whole, -2, lengths)


def _continue_positions(
    graph: ModelGraph, lengths: _Lengths, padding: Input | None, closed: set[fx.Node], copies: dict[fx.Node, fx.Node]
) -> None:
    """What sizes and the padding input alone decide (counts, a table's first rows, running sums of the mask) is computed for T
    positions, and the last S of them are what the data meets."""
    nodes = graph.nodes
    decided = _decided(graph, padding)
    for node in [n for n in nodes if n in decided and n not in closed]:
        leaves = [u for u in node.users if u not in decided and u not in closed and u.target is not aten.sym_size.int]
        dims = _following(graph, node) if leaves else []
        if not dims:
            continue
        last = whole = _over_all_keys(graph, node, copies)
        with graph.graph.inserting_before(min(leaves)):
            for dim in dims:
                last = _last(graph, last, dim, lengths)
                copies[last] = whole
        for user in leaves:
            user.replace_input_with(node, last)


def _decided(graph: ModelGraph, padding: Input | None) -> set[fx.Node]:
    """Tensors that follow from sizes, stored tensors and the padding input; a looked-up table is data already."""
    found: set[fx.Node] = set()
    for node in graph.graph.nodes:
        inner = [n for n in node.all_input_nodes if n.op != "get_attr" and not isinstance(n.meta.get("val", 0), int | float)]
        computed = node.op == "call_function" and node.target not in (aten.embedding.default, aten.sym_size.int)
        given = padding is not None and node.op == "placeholder" and node.target == padding.name
        if isinstance(node.meta.get("val"), Tensor) and (given or (computed and all(n in found for n in inner))):
            found.add(node)
    return found


def _following(graph: ModelGraph, node: fx.Node) -> list[int]:
    """The dimensions of `node` that are as long as the sequence."""
    shapes = []
    for length in (29, 53):
        feeds = zeros(graph, {i.dynamic[d]: length for i in graph.inputs for d in i.dynamic if d > 0})
        shapes.append(evaluate(graph, node, feeds).shape)
    return [d for d, pair in enumerate(zip(*shapes)) if pair == (29, 53)]


# --- the check


def verify_decode(prefill: ModelGraph, decode: ModelGraph) -> None:
    """Run both on random inputs, decoding in pieces of 4, 1 and 1 tokens, or of as many as make the caches roll, and then 4, 1 and 1;
    `Refused` where a row that is no padding differs."""
    full = max((bound + 1 for i in decode.inputs if (bound := bound_of(i.dynamic.get(2, "")))), default=0)
    for fill in (full, 0) if 0 < full + 6 <= _LONGEST_CHECK else (0,):
        try:
            return _compare(prefill, decode, fill)
        except (RuntimeError, IndexError):
            if not fill:  # a table of positions may be shorter than the window, which then never closes
                raise


def _compare(prefill: ModelGraph, decode: ModelGraph, fill: int) -> None:
    attentions = cached_attentions(decode)
    data, dim = _sequence(decode, attentions[0])
    padding = next((i.name for i in decode.inputs if i.dynamic.get(1) == "total"), None)
    feeds = _random_inputs(prefill, data, dim, padding, fill + 6)
    symbol = data.dynamic[dim]
    with torch.no_grad():
        wanted = prefill.module(dense=True)(*feeds.values())[0]
        run = decode.module(dense=True)
        cache = empty_cache((i for i in decode.inputs if i.name.startswith(PAST)), 2)
        pieces, ends = [], [fill, fill + 4, fill + 5, fill + 6]
        for start, end in zip([0, *ends], ends):
            if start == end:
                continue
            step = []
            for i in prefill.inputs:
                value = feeds[i.name]
                for d in (d for d, s in i.dynamic.items() if s == symbol):
                    value = value.narrow(d, *((0, end) if i.name == padding else (start, end - start)))
                step.append(value)
            outputs = run(*step, *cache)
            cache = list(outputs[len(prefill.outputs) :])
            pieces.append(outputs[0])
    got = torch.cat(pieces, 1)
    rows = feeds[padding].bool() if padding else torch.ones(wanted.shape[:2], dtype=torch.bool)
    error = (got - wanted)[rows].abs().max() / wanted[rows].abs().max().clamp(min=1e-30)
    if not error <= TOLERANCE:
        raise Refused(f"decoding differs from the whole sequence by {error:.1e}: an operator besides attention mixes positions")


def empty_cache(pasts: Iterable[Input], batch: int) -> list[Tensor]:
    """What generation starts from: for each cache input one of no position."""
    return [torch.zeros([batch, *(0 if d in i.dynamic else n for d, n in enumerate(i.shape) if d)], dtype=i.dtype) for i in pasts]


def _random_inputs(graph: ModelGraph, data: Input, dim: int, padding: str | None, length: int) -> dict[str, Tensor]:
    """Two sequences of `length`, the first padded by 2 on the left; in the order of the graph's inputs."""
    symbol, random, reads = data.dynamic[dim], torch.Generator().manual_seed(0), value_inputs(graph)
    tables = [n.all_input_nodes[:2] for n in iterate_calls(graph, aten.embedding.default)]
    mask = torch.ones(2, length, dtype=torch.int64)
    mask[0, :2] = 0 if padding else 1
    feeds = {}
    for i in graph.inputs:
        shape = [{symbol: length}.get(i.dynamic.get(d, ""), 2 if d == 0 and d in i.dynamic else n) for d, n in enumerate(i.shape)]
        if i.dtype.is_floating_point:
            feeds[i.name] = torch.randn(shape, generator=random).to(i.dtype)
            continue
        if i.name == padding:
            value = mask
        elif i.name == data.name:
            value = torch.randint(0, 1 << 30, shape, generator=random)
        elif shape == [2, length] and i.dynamic.get(1) == symbol:
            value = (mask.cumsum(1) - 1).clamp(min=0)
        else:
            value = torch.ones(shape, dtype=torch.int64)
        rows = [table.meta["val"].shape[0] for table, index in tables if i.name in reads[index]]
        feeds[i.name] = (value % min(rows) if rows else value).to(i.dtype)
    return feeds
