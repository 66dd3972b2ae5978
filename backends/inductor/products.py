"""Who computes each product with a packed weight: chosen by measurement, remembered in the device table.

before: linear(x, dequantize(codes, ...), bias), embedding(dequantize(codes, ...), ids)
after:  lwcompile::packed_linear(x, panels, ...), lwcompile::packed_embedding(ids, panels, ...); or as it was, where dense wins

    dense     the weight is made when the graph is compiled, and multiplied by the linear algebra library
    in place  codes are multiplied where they lie in their words: few rows of x
    by parts  a part of the weight at a time is made in the processor's first cache: many rows of x

The table is asked for the product's shape, format and number of rows. Where that number is free, the packed operator decides when it
is called: up to how many rows it multiplies in place is what was measured. What is measured is compared with the dense product
first. A weight that several calls read, as a tied embedding and head, is packed once; graphs of one model share it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import cycle
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from lwcompile.backends.inductor import packed
from lwcompile.backends.inductor.native import code_of
from lwcompile.backends.inductor.packed import Panels
from lwcompile.formats import NumericFormat, QuantizedTensor
from lwcompile.graph import ModelGraph, OverlayStore
from lwcompile.manager import relative_error
from lwcompile.packed import PackedWeight, packed_weight
from lwcompile.timings import DeviceTable, least_seconds

aten = torch.ops.aten
log = logging.getLogger("lwcompile")

TOLERANCE = 1e-5
"""What a packed product may differ by from the dense one, relative to the largest output: float32 sums in another order."""

BUCKETS = (1, 2, 4, 8, 16, 32, 128)
"""Numbers of rows that are measured; in between, the next larger one speaks, and above all the last."""

MEASURED_ROWS = 4096
"""Rows of a weight that are measured at most; time is in proportion beyond."""

SPREAD = 48 << 20
"""Bytes of weights in rotation while measuring, so that the processor's cache does not answer."""


FEW = 16
"""Rows that are multiplied in place where nothing was measured."""


@dataclass(frozen=True)
class Way:
    """How one product is computed. `few`: up to how many rows of x the packed operator multiplies in place; None is dense."""

    name: str
    few: int | None


DENSE, IN_PLACE, BY_PARTS = Way("dense", None), Way("in place", 1 << 30), Way("by parts", 0)


@dataclass(frozen=True)
class Product:
    """A call that reads a packed weight: `rows` of x, or None if their number is free, or if it looks rows up."""

    call: fx.Node
    weight: PackedWeight
    rows: int | None

    @property
    def looks_up(self) -> bool:
        return self.call.target is aten.embedding.default


@dataclass(frozen=True)
class Choice:
    """A way, and the seconds by which it was chosen, if it was."""

    way: Way
    seconds: dict[str, float] = field(default_factory=dict)


_DENSE = Choice(DENSE)


def products(graph: ModelGraph) -> Iterator[Product]:
    """The float32 products and look-ups whose weight is packed; `graph` is propagated."""
    free = any(i.dynamic for i in graph.inputs)
    for node in graph.graph.nodes:
        if (weight := packed_weight(graph, node)) is None:
            continue
        for call in node.users:
            if call.target is aten.embedding.default and call.args[0] is node:
                yield Product(call, weight, None)
            elif call.target is aten.linear.default and call.args[1] is node and call.args[0] is not node:
                x = call.args[0].meta["val"]  # type: ignore[union-attr]
                if x.dtype is torch.float32:
                    yield Product(call, weight, None if free else math.prod(x.shape[:-1]))


def choose(product: Product, table: DeviceTable) -> Choice:
    """The fastest way, by the table."""
    if product.looks_up:
        return Choice(IN_PLACE)
    format, (rows, columns) = product.weight.format, product.weight.shape
    shape = (min(rows, MEASURED_ROWS), columns)
    if product.rows is None:
        return Choice(Way("in place or by parts", _crossover(format, shape, table)))
    bucket = next((b for b in BUCKETS if b >= product.rows), BUCKETS[-1])
    seconds = {way.name: _seconds(way, format, shape, bucket, table) for way in (DENSE, IN_PLACE, BY_PARTS)}
    best = min((DENSE, IN_PLACE, BY_PARTS), key=lambda way: seconds[way.name])
    scale = rows / shape[0] * product.rows / bucket
    return Choice(best, {name: took * scale for name, took in seconds.items()})


def _crossover(format: NumericFormat, shape: tuple[int, int], table: DeviceTable) -> int:
    """The largest measured number of rows up to which codes are best multiplied in place."""
    few = 4
    for bucket in (8, 16, 32):
        if _seconds(IN_PLACE, format, shape, bucket, table) > _seconds(BY_PARTS, format, shape, bucket, table):
            break
        few = bucket
    return few


def _seconds(way: Way, format: NumericFormat, shape: tuple[int, int], rows: int, table: DeviceTable) -> float:
    """What the product of `rows` by a weight [N, K] of this format takes."""
    code = "" if way is DENSE else f", code {code_of(packed.SOURCE)}"
    about = f"{format.bits} bits, groups of {format.group(shape[1])}, zero {format.zero_point}, {format.scale_dtype} scales"
    key = f"{way.name}, {shape[0]}x{shape[1]} by {rows}, {'float32' if way is DENSE else about}{code}"
    return table.get(key, lambda: _measure(way, format, shape, rows))


def _measure(way: Way, format: NumericFormat, shape: tuple[int, int], rows: int) -> float:
    weight, x = _example(format, shape), torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(1))
    dense = weight.dequantize()
    if way.few is None:
        weights = cycle([dense, *(dense.clone() for _ in range(SPREAD // dense.nbytes))])
        return least_seconds(lambda: F.linear(x, next(weights)))
    few, panels = way.few, Panels.of(weight)
    wanted, made = F.linear(x.double(), dense.double()), panels.multiply(x, None, few)
    if not (error := relative_error(wanted, made)) <= TOLERANCE:
        log.warning("%s, a packed product of %s by %s rows is %.1e away from the dense one: not used", way.name, shape, rows, error)
        return math.inf
    packs = cycle([panels, *(panels.clone() for _ in range(SPREAD // panels.nbytes))])
    return least_seconds(lambda: next(packs).multiply(x, None, few))


def _example(format: NumericFormat, shape: tuple[int, int]) -> QuantizedTensor:
    """Random codes on a grid like a trained weight's."""
    random = torch.Generator().manual_seed(0)
    grid = (shape[0], format.groups(shape[1]))
    codes = torch.randint(0, format.top + 1, shape, generator=random, dtype=torch.uint8)
    scale = 0.01 + 0.01 * torch.rand(grid, generator=random)
    zero = None if format.zero_point == "none" else format.center + torch.randint(-1, 2, grid, generator=random).float()
    return QuantizedTensor.of(format, codes, format.round_scale(scale), zero)


# --- in a graph


def choices(graph: ModelGraph, wanted: str, table: DeviceTable | None = None) -> dict[str, Choice]:
    """The way of each call that reads a packed weight, by its node's name; `wanted` as the codegen's option `products` has it."""
    found = [] if graph.level() == "captured" else list(products(graph))
    if not found or wanted == "dense":
        return {product.call.name: _DENSE for product in found}
    if reason := packed.unavailable():
        log.warning("products run with dense weights: %s", reason)
        return {product.call.name: _DENSE for product in found}
    if wanted == "packed":
        return {product.call.name: Choice(Way("in place or by parts", FEW)) for product in found}
    table = DeviceTable() if table is None else table
    return {product.call.name: choose(product, table) for product in found}


def lowered(graph: ModelGraph, chosen: Mapping[str, Choice]) -> ModelGraph:
    """A copy whose packed products are calls of the packed operators; those that are dense stay as they were."""
    made = graph.copy()
    made.store = OverlayStore(graph.store)
    names: dict[str, str] = {}
    for product in list(products(graph)):
        if (few := chosen[product.call.name].way.few) is not None:
            _lower(made, product, made.node(product.call.name), few, names)
    made.prune()
    return made


def _lower(graph: ModelGraph, product: Product, call: fx.Node, few: int, names: dict[str, str]) -> None:
    panels = _panels(graph, product.weight)
    with graph.graph.inserting_before(call):
        parts = [_constant(graph, f"{product.weight.name}.panels.{part}", tensor, names) for part, tensor in panels.parts.items()]
        stored = (*parts, *[None] * (3 - len(parts)))
        if product.looks_up:
            args = (call.args[1], *stored, panels.bits, panels.group_size, *panels.shape)
            new = graph.graph.call_function(torch.ops.lwcompile.packed_embedding.default, args)
        else:
            bias = call.args[2] if len(call.args) > 2 else None
            args = (call.args[0], *stored, bias, panels.bits, panels.group_size, panels.shape[0], few)
            new = graph.graph.call_function(torch.ops.lwcompile.packed_linear.default, args)
    new.meta.update(call.meta)
    call.replace_all_uses_with(new)
    graph.graph.erase_node(call)


def _constant(graph: ModelGraph, base: str, tensor: Tensor, names: dict[str, str]) -> fx.Node:
    """A node that reads a tensor, which is held under one name however often it is read."""
    assert isinstance(graph.store, OverlayStore)
    key = str(id(tensor))
    if key not in names:
        names[key] = graph.fresh_name(base)
        graph.tensors[names[key]] = graph.store.hold(tensor)
    return graph.graph.create_node("get_attr", names[key])


_kept: WeakValueDictionary[tuple[str | None, ...], Tensor] = WeakValueDictionary()
"""Packed parts by the content of what they were packed from, for as long as some compiled graph holds them."""


def _panels(graph: ModelGraph, weight: PackedWeight) -> Panels:
    stored = tuple(None if name is None else graph.tensors[name] for name in (weight.codes, weight.scale, weight.zero))
    about = (*stored, str(weight.format))
    parts = {part: _kept.get((part, *about)) for part in ("codes", "scale", "zero")}
    if parts["codes"] is None or parts["scale"] is None:
        made = Panels.of(weight.read(graph))
        _kept.update({(part, *about): tensor for part, tensor in made.parts.items()})
        return made
    return Panels(parts["codes"], parts["scale"], parts["zero"], weight.format.bits, weight.format.group(weight.shape[1]), weight.shape)


def executors(graph: ModelGraph, wanted: str) -> dict[str, str]:
    """Node -> who runs it, for the calls that read packed weights, and the weights."""
    found, chosen = list(products(graph)) if graph.level() == "quantized" else [], choices(graph, wanted)
    said = {product.call.name: _words(product, chosen[product.call.name]) for product in found}
    for weight in {n for product in found for n in product.call.all_input_nodes if packed_weight(graph, n) is not None}:
        if all(chosen.get(user.name, _DENSE).way.few is not None for user in weight.users):
            said[weight.name] = "nobody: what reads the weight takes its codes"
    return said


def _words(product: Product, choice: Choice) -> str:
    """Who runs it, and by which figures, in words."""
    rows, columns = product.weight.shape
    about = f"{product.weight.format.bits} bits, {rows}x{columns}"
    if choice.way.few is None:
        words = f"the linear algebra library, {about} made dense when compiled"
    elif product.looks_up:
        words = f"our packed look-up in C++, {about}, float32"
    else:
        words = f"our packed product in C++, {about}, {choice.way.name}, float32"
    took = ", ".join(f"{name} {1e6 * seconds:.0f}" for name, seconds in choice.seconds.items())
    return f"{words} (measured, us: {took})" if took else words
