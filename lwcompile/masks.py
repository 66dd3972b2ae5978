"""Attention masks, recognised by what they let through and rebuilt in one formula.

before: whatever subgraph a model's library traced, for as many queries as keys
after:  allowed[b, 0, i, j] = (j <= i + T - S) & (i + T - S - j < window | j < first[b] + sinks) & padding[b, j]
        with T = padding.shape[1] keys and S = input.shape[1] queries, so that one graph serves prefill (T = S) and
        decoding (T > S: the queries are the last S positions); first[b] is the first position that is no padding
cost:   a handful of evaluations of each distinct mask at sizes below about 60 (below 1100 for a long window)
refuses: masks that are neither boolean nor 0 / very negative (ALiBi, relative position biases), and patterns that none of
        the hypotheses reproduces on every probe; these stay as they are

A mask is evaluated with several sizes and with left, right and scattered padding, and must equal the hypothesis on each.
Rows of an additive mask in which nothing is allowed are not compared: softmax makes them a mean over everything, they belong
to padding, and no other row reads them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from lwcompile.graph import ModelGraph
from lwcompile.probe import ancestors, evaluate, sizes_at, zeros

aten = torch.ops.aten
_DIRECT = 1024  # windows up to this size are probed as they are; longer ones through smaller stand-ins
_STAND_INS = (5, 8, 13)
_LONGEST = 2048  # of a stored mask that is compared whole
CLOSED = -1e4  # an additive mask at or below this leaves exactly nothing after softmax in float32


@dataclass(frozen=True)
class MaskRule:
    """Which of the T keys each of the last S positions may read.

    causal: none after its own. window: none `window` or more away. padding: none where this input, [batch, T], is 0.
    sinks: with a window, this many first positions (behind left padding) are open to all; where nothing is causal, they also
        read all, as global tokens do (arXiv 2004.05150). A causal rule has the same form: its sinks read what is before them.
    """

    causal: bool
    window: int | None = None
    padding: str | None = None
    sinks: int = 0

    def allowed(self, queries: int, keys: int, padding: Tensor | None = None) -> Tensor:
        """The rule as a boolean tensor [batch or 1, 1, queries, keys]: the reference that masks are compared with."""
        query, key = torch.arange(keys - queries, keys)[:, None], torch.arange(keys)
        distance = query - key
        open_ = distance >= 0 if self.causal else torch.ones_like(distance, dtype=torch.bool)
        inside = torch.ones(1, keys, dtype=torch.bool) if self.padding is None or padding is None else padding.bool()
        if self.window is not None:
            end = (inside.int().argmax(1) + self.sinks)[:, None, None, None]
            sunk = key < end if self.causal else (key < end) | (query < end)
            open_ = open_ & ((distance.abs() < self.window) | (sunk if self.sinks else torch.tensor(False)))
        return open_ & inside[:, None, None, :]


@dataclass(frozen=True)
class _Probe:
    value: Tensor
    padding: Tensor | None

    def matches(self, rule: MaskRule) -> bool:
        """Whether the mask lets through what the rule does."""
        value = self.value
        queries, keys = value.shape[-2:]
        wanted = rule.allowed(queries, keys, self.padding)
        if value.dtype == torch.bool:
            return torch.equal(*torch.broadcast_tensors(value, wanted))
        value, wanted = torch.broadcast_tensors(value, wanted)
        rows = wanted.any(-1, keepdim=True).expand_as(wanted)
        return bool(torch.where(wanted, value == 0, value <= CLOSED)[rows].all())


def recognise(graph: ModelGraph, mask: fx.Node, reads: dict[fx.Node, frozenset[str]]) -> MaskRule | None:
    """The rule a mask follows at every size, or None if no hypothesis reproduces it."""
    padding = next(iter(reads[mask]), None)
    if len(reads[mask]) > 1 or (padding and len(next(i for i in graph.inputs if i.name == padding).shape) != 2):
        return None
    try:
        return _recognise(graph, mask, padding)
    except (RuntimeError, IndexError, ValueError, TypeError):  # a mask that does not run at other sizes follows no rule
        return None


def _recognise(graph: ModelGraph, mask: fx.Node, padding: str | None) -> MaskRule | None:
    numbers, tables = _numbers(mask), _table_sizes(graph, mask)
    near = max([n for n in numbers if n <= _DIRECT] + tables, default=0)
    far = [n for n in numbers if n > _DIRECT]
    if len(far) > 1 or near > _LONGEST:
        return None
    largest = near if near in tables else max(24, sum(sorted(n for n in numbers if n <= _DIRECT)[-2:]) + 9)
    if not far:
        return _infer(graph, mask, padding, largest, {})
    rules = [_infer(graph, mask, padding, largest, {far[0]: n}) for n in _STAND_INS]
    first = rules[0]
    if first is None or any(rule is None for rule in rules):
        return None
    if first.window is None:
        return first if all(rule == first for rule in rules) else None
    offset = first.window - _STAND_INS[0]
    if rules != [replace(first, window=n + offset) for n in _STAND_INS]:
        return None
    return replace(first, window=far[0] + offset)


def _numbers(mask: fx.Node) -> set[int]:
    """Numbers that a mask may compare or subtract positions with, such as a window."""
    values = ("mul", "div", "where", "masked_fill", "full", "scalar_tensor")  # what is written into a mask, not where
    found: set[int] = set()
    for node in ancestors(mask):
        written = str(node.target).removeprefix("aten.").split(".")[0] in values
        kinds = (int,) if written else (int, float)
        found |= {int(abs(a)) for a in node.args if type(a) in kinds and 1 < abs(a) < 1 << 31}  # type: ignore[arg-type,operator]
    return found


def _table_sizes(graph: ModelGraph, mask: fx.Node) -> list[int]:
    """Lengths of the stored tensors a mask reads, and numbers among them: what differs may begin only there."""
    sizes: list[int] = []
    for node in (n for n in ancestors(mask) if n.op == "get_attr"):
        tensor = graph.tensor(str(node.target))
        if tensor.numel() > 1:
            sizes.append(max(tensor.shape))
        elif tensor.numel() and 1 < abs(float(tensor)) < 1 << 31:
            sizes.append(int(abs(float(tensor))))
    return sizes


def _infer(graph: ModelGraph, mask: fx.Node, padding: str | None, largest: int, constants: dict[int, int]) -> MaskRule | None:
    probes = list(_probes(graph, mask, padding, largest, constants))
    if any(p.value.dim() not in (2, 4) or p.value.dtype not in (torch.bool, torch.float32) for p in probes):
        return None
    return next((rule for rule in _hypotheses(probes[0].value, padding) if all(p.matches(rule) for p in probes)), None)


def _probes(graph: ModelGraph, mask: fx.Node, padding: str | None, largest: int, constants: dict[int, int]) -> Iterator[_Probe]:
    """The mask at several sizes: first the largest without padding, then all paddings."""
    signs = {sign: value for n, value in constants.items() for sign, value in ((n, value), (-n, -value))}
    for i, (batch, length) in enumerate(((1, largest), (3, 12), (3, 7), (2, 5), (1, 6), (1, 1))):
        feeds = zeros(graph, sizes_at(graph, batch, length))
        given = None
        if padding is not None:
            node = graph.input_nodes()[padding]
            given = feeds[node] = _padding(feeds[node].shape, first=i == 0).to(feeds[node].dtype)
        yield _Probe(evaluate(graph, mask, feeds, signs), given)


def _padding(shape: torch.Size, first: bool) -> Tensor:
    """1 where a token stands: everywhere, or rows padded left, right and in scattered places."""
    mask = torch.ones(tuple(shape), dtype=torch.int64)
    if first:
        return mask
    length = shape[1]
    for row in range(shape[0]):
        if row % 3 == 0:
            mask[row, : length // 3] = 0
        elif row % 3 == 1:
            mask[row, length - length // 3 :] = 0
        else:
            mask[row] = torch.rand(length, generator=torch.Generator().manual_seed(length)) < 0.6
    return mask


def _hypotheses(value: Tensor, padding: str | None) -> Iterator[MaskRule]:
    """Rules to try, from the largest probe without padding."""
    open_ = value.reshape(-1, *value.shape[-2:])[0]
    open_ = open_ if open_.dtype == torch.bool else open_ == 0
    row = open_[-1].int()
    last, first = int(row.flip(0).cumprod(0).sum()), int(row.cumprod(0).sum())
    window, sinks = (None, 0) if last == len(row) else (last, first)
    names = (padding, None) if padding else (None,)
    for name in names if last else ():
        yield MaskRule(False, window, name, sinks)  # first: a mask of one row for all queries is not causal
        yield MaskRule(True, window, name, sinks)


class Formula:
    """Adds calls before a node, reusing equal ones that stand before it already, so that building twice changes nothing."""

    def __init__(self, graph: ModelGraph, before: fx.Node) -> None:
        self.graph, self.before = graph, before
        self._known: dict[Any, fx.Node] = {}
        for node in graph.graph.nodes:
            if node is before:
                break
            if node.op == "call_function":
                self._known.setdefault(self._key(node.target, node.args, node.kwargs), node)

    @staticmethod
    def _key(target: object, args: object, kwargs: object) -> tuple[object, str, str]:
        return target, repr(args), repr(kwargs)

    def __call__(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        key = self._key(target, args, kwargs)
        if key not in self._known:
            with self.graph.graph.inserting_before(self.before):
                self._known[key] = self.graph.graph.call_function(target, args, kwargs)
        return self._known[key]

    def size(self, node: fx.Node, dim: int) -> fx.Node:
        return self(aten.sym_size.int, node, dim)


def build(
    call: Formula, rule: MaskRule, queries: fx.Node, keys: fx.Node, *, open_: fx.Node | None = None, end: fx.Node | None = None
) -> fx.Node | None:
    """The canonical mask of a rule for size nodes S and T: [S, T] or, with padding, [batch, 1, S or 1, T]; None if all open.

    open_: bool [batch, T], where there is no padding, if not what the rule's input says. end: int64 [batch, 1], the position
    behind each row's sinks, if not the first that is no padding and `sinks` more.
    """
    mask: fx.Node | None = None
    if open_ is None and rule.padding is not None:
        open_ = padding_of(call, rule.padding)
    if rule.causal or rule.window is not None:
        start = call(operator.sub, keys, queries)
        position = call(aten.unsqueeze.default, call(aten.arange.start, start, keys), 1)
        key = call(aten.arange.default, keys)
        if rule.causal:
            mask = call(aten.le.Tensor, key, position)
        if rule.window is not None:
            distance = call(aten.sub.Tensor, position, key)
            distance = distance if rule.causal else call(aten.abs.default, distance)
            near = call(aten.lt.Scalar, distance, rule.window)
            if rule.sinks and end is None and open_ is not None:
                end = call(aten.add.Scalar, first_open(call, open_), rule.sinks)
            for place in ((key,) if rule.causal else (key, position)) if rule.sinks else ():
                near = call(aten.logical_or.default, near, _before(call, place, end, rule.sinks))
            mask = near if mask is None else call(aten.logical_and.default, mask, near)
    if open_ is None:
        return mask
    open_ = call(aten.unsqueeze.default, call(aten.unsqueeze.default, open_, 1), 1)
    return open_ if mask is None else call(aten.logical_and.default, mask, open_)


def padding_of(call: Formula, name: str) -> fx.Node:
    """The padding input as bool [batch, T]."""
    padding = call.graph.input_nodes()[name]
    dtype = next(i.dtype for i in call.graph.inputs if i.name == name)
    return padding if dtype == torch.bool else call(aten._to_copy.default, padding, dtype=torch.bool)


def first_open(call: Formula, open_: fx.Node) -> fx.Node:
    """The first position of each row that is no padding: bool [batch, T] -> int64 [batch, 1]."""
    return call(aten.argmax.default, call(aten._to_copy.default, open_, dtype=torch.int32), 1, True)


def _before(call: Formula, place: fx.Node, end: fx.Node | None, sinks: int) -> fx.Node:
    if end is None:
        return call(aten.lt.Scalar, place, sinks)
    return call(aten.lt.Tensor, place, call(aten.unsqueeze.default, call(aten.unsqueeze.default, end, 1), 1))
