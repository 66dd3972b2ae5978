"""The calls of a graph that read packed weights, and who computes each.

    linear(x, dequantize(codes, ...), bias)     by the way that was measured to be the fastest (`ways`)
    embedding(dequantize(codes, ...), ids)      looked up in the packed weight

Linears of one input in one format, such as queries, keys and values, are one product: x is prepared once, and one call made. A
weight that is also read in other company stays alone, so that it is packed once.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx

from lwcompile.backends.inductor import packed, ways
from lwcompile.backends.inductor.ways import BY_ROWS, DENSE, IN_PLACE, Choice
from lwcompile.formats import NumericFormat
from lwcompile.graph import ModelGraph
from lwcompile.packed import PackedWeight, packed_weight
from lwcompile.timings import DeviceTable

aten = torch.ops.aten
log = logging.getLogger("lwcompile")

Wanted = Literal["measured", "packed", "dense"]

TYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Of activations; sums are in float32."""


@dataclass(frozen=True)
class Product:
    """Calls of one input, each with its packed weight; `rows` of x, None if their number is free."""

    calls: tuple[fx.Node, ...]
    weights: tuple[PackedWeight, ...]
    rows: int | None = None

    @property
    def looks_up(self) -> bool:
        return self.calls[0].target is aten.embedding.default

    @property
    def format(self) -> NumericFormat:
        return self.weights[0].format

    @property
    def dtype(self) -> torch.dtype:
        """Of what goes in and comes out."""
        return self.calls[0].meta["val"].dtype

    @property
    def shape(self) -> tuple[int, int]:
        """[N, K] of the weights, one under the other."""
        return sum(weight.shape[0] for weight in self.weights), self.weights[0].shape[1]


def products(graph: ModelGraph) -> list[Product]:
    """The products and look-ups of packed weights; `graph` is propagated."""
    found: dict[tuple[object, ...], list[tuple[fx.Node, PackedWeight]]] = defaultdict(list)
    for node in graph.graph.nodes:
        if (weight := packed_weight(graph, node)) is not None:
            for read in _reads(node):
                for call in read.users:
                    if call.target is aten.embedding.default and call.args[0] is read:
                        found[(call,)].append((call, weight))
                    elif call.target is aten.linear.default and call.args[1] is read and call.meta["val"].dtype in TYPES:
                        found[_company(call, weight)].append((call, weight))
    free = any(i.dynamic for i in graph.inputs)
    made = []
    for company in _apart(graph, list(found.values())):
        calls, weights = zip(*sorted(company))
        looks_up = calls[0].target is aten.embedding.default
        rows = None if free or looks_up else math.prod(calls[0].args[0].meta["val"].shape[:-1])
        made.append(Product(calls, weights, rows))
    return made


def _reads(weight: fx.Node) -> list[fx.Node]:
    """A dequantized weight, and itself in other types."""
    return [weight, *(node for node in weight.users if node.target is aten._to_copy.default)]


def bias_of(call: fx.Node) -> fx.Node | None:
    """A linear's bias."""
    return call.args[2] if len(call.args) > 2 else None  # type: ignore[return-value]


def _company(call: fx.Node, weight: PackedWeight) -> tuple[object, ...]:
    """What linears have in common that are computed together; a call of its own if it has a bias or part of a panel."""
    alone = bias_of(call) is not None or weight.shape[0] % packed.PANEL
    return (call,) if alone else (call.args[0], weight.format, weight.shape[1])


def _apart(graph: ModelGraph, companies: list[list[tuple[fx.Node, PackedWeight]]]) -> list[list[tuple[fx.Node, PackedWeight]]]:
    """The companies, taken apart where a weight is read in more than one."""
    seen: dict[str, set[tuple[str, ...]]] = defaultdict(set)
    for company in companies:
        contents = tuple(graph.tensors[weight.codes] for _, weight in company)
        for key in contents:
            seen[key].add(contents)
    made = []
    for company in companies:
        together = all(len(seen[graph.tensors[weight.codes]]) == 1 for _, weight in company)
        made += [company] if together else [[member] for member in company]
    return made


def choices(graph: ModelGraph, wanted: Wanted, int8: bool, table: DeviceTable) -> list[tuple[Product, Choice]]:
    """The way of each product; `wanted` and `int8` as the codegen's options have them."""
    found = products(graph)
    if not found or wanted == "dense":
        return [(product, Choice(DENSE)) for product in found]
    if reason := packed.unavailable():
        log.warning("products run with dense weights: %s", reason)
        return [(product, Choice(DENSE)) for product in found]
    return [(product, _chosen(product, wanted, int8, table)) for product in found]


def _chosen(product: Product, wanted: Wanted, int8: bool, table: DeviceTable) -> Choice:
    if product.looks_up:
        return Choice(IN_PLACE)
    if wanted == "packed":
        return Choice(BY_ROWS)
    return ways.choose(product.format, product.shape, product.rows, int8, table, product.dtype)


def executors(graph: ModelGraph, chosen: list[tuple[Product, Choice]]) -> dict[str, str]:
    """Node -> who runs it, for the calls that read packed weights, and the weights."""
    said = {call.name: _words(product, choice) for product, choice in chosen for call in product.calls}
    packed_calls = {call for product, choice in chosen if choice.way != DENSE for call in product.calls}
    for node in graph.graph.nodes:
        if packed_weight(graph, node) is not None:
            reads = _reads(node)
            if all(packed_calls.issuperset({*read.users} - {*reads}) for read in reads):
                said |= dict.fromkeys((read.name for read in reads), "nobody: what reads the weight takes its codes")
    return said


def _words(product: Product, choice: Choice) -> str:
    """Who runs it, and by which figures."""
    rows, columns = product.shape
    joined = f", {len(product.calls)} in one call" if len(product.calls) > 1 else ""
    about = f"{product.format.bits} bits, {rows}x{columns}{joined}"
    if choice.way == DENSE:
        words = f"the linear algebra library, {about}, made dense when compiled"
    elif product.looks_up:
        words = f"our packed look-up in C++, {about}, float32"
    else:
        words = (
            f"our packed product in C++, {about}, {'activations in int8' if choice.way.int8 else choice.way.name + ', float32'}"
        )
    took = ", ".join(f"{name} {1e6 * seconds:.0f}" for name, seconds in choice.seconds.items())
    return f"{words} (measured, us: {took})" if took else words
