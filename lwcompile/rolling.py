"""Caches that roll: behind a causal window, decoding keeps the last `window - 1` positions and the sinks, and lets the rest go.

    entry l of L = kept + S    position p = l + T - L, or for l < sinks: l + min(first, T - L)
    allowed[b, 0, i, l]        (l <= i + L - S) & (i + L - S - l < window | l < sinks + first - min(first, T - L)) & padding[b, p]

The positions of what is kept follow from T, L and the padding alone, so no input says them; and as keys are kept as attention reads
them (after rotation), none has to change its place. `first` is a row's first position that is no padding: rows padded on the left
keep other columns as their sinks. Until T reaches the capacity everything is kept, and both lines are those of a whole cache.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from lwcompile.graph import ModelGraph
from lwcompile.masks import Formula, MaskRule, build, first_open, padding_of

aten = torch.ops.aten


def capacity(rule: MaskRule | None) -> int | None:
    """Positions that a rule needs behind the one that asks; None without a bound."""
    if rule is None or not rule.causal or rule.window is None:
        return None
    return rule.window - 1 + rule.sinks


def cache_symbol(capacity: int | None) -> str:
    """The name of a cache's free length: `past`, or `past_131` for one that keeps at most so many."""
    return "past" if capacity is None else f"past_{capacity}"


def bound_of(symbol: str) -> int | None:
    """The most positions that a cache with this name for its length keeps; None for any other name."""
    kind, _, bound = symbol.partition("_")
    return int(bound) if kind == "past" and bound.isdigit() else None


class Rolling:
    """The nodes that all caches of one rule share: their mask, which entries are no padding (`open`), and which are kept.

    past: one of the caches, [B, heads, kept, width]. queries, total: size nodes of S and T.
    """

    def __init__(
        self, graph: ModelGraph, before: fx.Node, rule: MaskRule, past: fx.Node, queries: fx.Node, total: fx.Node
    ) -> None:
        self.graph, self.rule = graph, rule
        call = Formula(graph, before)
        keys = call(operator.add, call.size(past, 2), queries)
        gone = call(operator.sub, total, keys)
        place = call(aten.arange.start, gone, total)
        open_ = end = None
        self.sinks: fx.Node | None = None
        if rule.padding is not None:
            padding = padding_of(call, rule.padding)
            if not rule.sinks:
                open_ = call(aten.index_select.default, padding, 1, place)
            else:
                first, entry = first_open(call, padding), call(aten.arange.default, keys)
                start = call(aten.clamp_max.default, first, gone)
                sunk = call(aten.add.Tensor, entry, start)
                place = call(aten.where.self, call(aten.lt.Scalar, entry, rule.sinks), sunk, place)
                open_ = call(aten.gather.default, padding, 1, place)
                end = call(aten.add.Scalar, call(aten.sub.Tensor, first, start), rule.sinks)
                full = call(aten.clamp_max.default, first, call(operator.sub, total, capacity(rule)))
                moved = call(aten.sub.Tensor, call(aten.maximum.default, full, start), start)
                self.sinks = call(aten.add.Tensor, call(aten.slice.Tensor, entry, 0, 0, rule.sinks), moved)
        self.open = open_
        self.mask = build(call, rule, queries, keys, open_=open_, end=end)

    def keep(self, joined: fx.Node, heads: int, width: int, before: fx.Node) -> fx.Node:
        """What stays in the cache of past and new entries [B, heads, L, width]."""
        rule = self.rule
        assert rule.window is not None
        with self.graph.graph.inserting_before(before):
            call = self.graph.graph.call_function
            if not rule.sinks:
                return call(aten.slice.Tensor, (joined, 2, 1 - rule.window))
            rest = call(aten.slice.Tensor, (call(aten.slice.Tensor, (joined, 2, rule.sinks)), 2, 1 - rule.window))
            if self.sinks is None:
                first = call(aten.slice.Tensor, (joined, 2, 0, rule.sinks))
            else:
                rows = call(aten.unsqueeze.default, (call(aten.unsqueeze.default, (self.sinks, 1)), 3))
                first = call(aten.gather.default, (joined, 2, call(aten.expand.default, (rows, [-1, heads, -1, width]))))
            return call(aten.cat.default, ([first, rest], 2))
