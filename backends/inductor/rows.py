"""Products of a few rows with large dense weights: forms of them that the processor's memory keeps up with.

before: linear(x [..., K], w [N, K], bias), of one row
after:  sum(w * x, -1) + bias, which Inductor makes one loop over the rows of w
before: the same of 2 to 4 rows
after:  (w @ x.t()).t() + bias, by the linear algebra library as before

At one row torch's own product by a head of 49152 by 576 takes twice what reading it does, and at a few several times that. The same numbers
are added in another order. Taken where that was measured to be clearly faster.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from lwcompile.backends.inductor.native import code_of
from lwcompile.graph import ModelGraph, iterate_calls
from lwcompile.manager import relative_error
from lwcompile.timings import DeviceTable, least_seconds

aten = torch.ops.aten
log = logging.getLogger("lwcompile")

ROWS = 4
"""Rows of x up to which it is tried."""

LEAST, MOST = 16 << 20, 256 << 20
"""Bytes of a weight from which it is tried: of smaller ones torch's product of a row comes near to reading them, and each shape takes
seconds to measure. And those that are measured at most, by leaving rows out; time is in proportion to them."""

SPREAD = 64 << 20
"""Bytes of weights in rotation while measuring at least, so that the processor's cache does not answer: in a model, it holds others."""

WORTH = 0.9
"""What torch's time must be brought down to."""

BUDGET = 0.2
"""Seconds to measure each for: what is kept decides for good."""

TOLERANCE = 1e-5
"""What a product may differ by from torch's, relative to the largest output."""


@dataclass(frozen=True)
class Few:
    """A product of few rows; the seconds of one by torch and by our form."""

    shape: tuple[int, int]
    rows: int
    seconds: dict[str, float]

    @property
    def ours(self) -> bool:
        return self.seconds["ours"] < WORTH * self.seconds["torch's"]

    def __str__(self) -> str:
        form = f"C++ loops by Inductor, {self.form}" if self.rows == 1 else f"the linear algebra library, {self.form}"
        who = form if self.ours else "the linear algebra library, called by Inductor's code"
        figures = ", ".join(f"{name} {1e6 * seconds:.0f}" for name, seconds in self.seconds.items())
        return f"{who} (measured, us: {figures})"

    @property
    def form(self) -> str:
        return _name(self.rows)


def chosen(graph: ModelGraph, table: DeviceTable) -> dict[str, Few]:
    """The products that were measured, by their nodes' names; `graph` is propagated."""
    if any(i.dynamic for i in graph.inputs):
        return {}
    made = {}
    for node in iterate_calls(graph, aten.linear.default):
        if _fits(node):
            x, weight = (a.meta["val"] for a in node.args[:2])  # type: ignore[union-attr]
            shape, rows = (int(weight.shape[0]), int(weight.shape[1])), math.prod(x.shape[:-1])
            made[node.name] = Few(shape, rows, _seconds(shape, rows, table))
    return made


def _fits(call: fx.Node) -> bool:
    x, weight = call.args[:2]
    if not isinstance(x, fx.Node) or not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return False
    given, held = x.meta["val"], weight.meta["val"]
    return (
        all(t.dtype is torch.float32 and t.device.type == "cpu" for t in (given, held))
        and 1 <= math.prod(given.shape[:-1]) <= ROWS
        and held.is_contiguous()
        and held.nbytes >= LEAST
    )


def lower(graph: ModelGraph, found: dict[str, Few]) -> None:
    """Have these products computed by the form that was chosen, in place."""
    for name, few in found.items():
        if few.ours:
            call = graph.node(name)
            with graph.graph.inserting_before(call):
                new = _product(graph.graph, *call.args, shape=call.args[0].meta["val"].shape)  # type: ignore[arg-type, union-attr]
            new.meta.update(call.meta)
            call.replace_all_uses_with(new)
            graph.graph.erase_node(call)


def _product(graph: fx.Graph, x: fx.Node, weight: fx.Node, bias: fx.Node | None = None, *, shape: Sequence[int]) -> fx.Node:
    """The form, where the graph inserts: x of this shape [..., K] by weight [N, K]."""
    from torch._inductor.inductor_prims import force_stride_order

    call, rows, columns = graph.call_function, math.prod(shape[:-1]), shape[-1]
    if rows == 1:
        row = call(aten.reshape.default, (x, [columns]))
        # made before the loop over w: in it, what x is computed of would be computed again for each of w's rows
        row = call(force_stride_order, (row, [1]))
        made = call(aten.sum.dim_IntList, (call(aten.mul.Tensor, (weight, row)), [-1]))
    else:
        columns_of_x = call(aten.t.default, (call(aten.reshape.default, (x, [rows, columns])),))
        turned = call(aten.t.default, (call(aten.mm.default, (weight, columns_of_x)),))
        made = call(aten.clone.default, (turned,), {"memory_format": torch.contiguous_format})
    if bias is not None:
        made = call(aten.add.Tensor, (made, bias))
    return call(aten.reshape.default, (made, [*shape[:-1], -1]))


def _name(rows: int) -> str:
    return "a product summed row by row" if rows == 1 else "a product turned round"


def _seconds(shape: tuple[int, int], rows: int, table: DeviceTable) -> dict[str, float]:
    """What one call takes by torch's product and by our form of it."""
    measured = (min(shape[0], MOST // (4 * shape[1])), shape[1])
    about = f"{measured[0]}x{measured[1]} by {rows}"

    def weights() -> Callable[[], Tensor]:
        whole = torch.randn(measured, generator=torch.Generator().manual_seed(0))
        each = cycle([whole, *(whole.clone() for _ in range(SPREAD // whole.nbytes))])
        return lambda: next(each)

    x = torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(1))

    def theirs() -> float:
        given = weights()
        return least_seconds(lambda: F.linear(x, given()), BUDGET)

    def ours() -> float:
        given = weights()
        try:
            run = _compiled(x, given())
            error = relative_error(F.linear(x, (w := given())), run(x, w))
        except Exception as failure:  # a compiler that fails, or a version of torch without what the form is made of
            log.warning("%s, %s, cannot be had, and torch's is taken: %s", _name(rows), about, failure)
            return math.inf
        if not error <= TOLERANCE:
            log.warning("%s, %s, is %.1e away from torch's: not used", _name(rows), about, error)
            return math.inf
        return least_seconds(lambda: run(x, given()), BUDGET)

    kinds = {"torch's": ("", theirs), "ours": (f", code {code_of(Path(__file__))}", ours)}
    scale = shape[0] / measured[0]
    return {name: scale * table.get(f"few rows, {name}, {about}{code}", measure) for name, (code, measure) in kinds.items()}


def _compiled(x: Tensor, weight: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """The form as Inductor's code has it."""
    from torch._inductor.compile_fx import compile_fx

    nodes = fx.Graph()
    given = [nodes.placeholder(name) for name in ("x", "weight")]
    nodes.output((_product(nodes, *given, shape=x.shape),))
    module = fx.GraphModule({}, nodes)
    with torch.no_grad(), torch._guards.tracing(torch._guards.TracingContext(None)):
        code: Any = compile_fx(module, [x, weight])
    return lambda x, weight: code(x, weight)[0]
