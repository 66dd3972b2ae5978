"""Attention of a few queries over a cache: `lwcompile::few_attention`, float32, C++ of our own.

before: scaled_dot_product_attention(query [B, H, 1, D], key, value [B, H / n, T, D], mask)
after:  lwcompile::few_attention(query, key, value, mask, scale)

torch's own kernel is made for many queries: at one it takes several times what reading keys and values does. Taken where that is
what was measured; up to `QUERIES` of them, heads of the widths that the kernel has, without dropout.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from lwcompile.attention import SDPA, slots
from lwcompile.backends.inductor.native import code_of, load
from lwcompile.graph import ModelGraph, iterate_calls
from lwcompile.manager import relative_error
from lwcompile.timings import DeviceTable, least_seconds

log = logging.getLogger("lwcompile")

SOURCE = Path(__file__).with_name("attention.cpp")

QUERIES = 4
"""Queries up to which it is tried."""

WIDTHS = (32, 64, 96, 128)
"""Of a head, as `attention.cpp` has them."""

TOLERANCE = 1e-5
"""What it may differ by from torch's kernel, relative to the largest output."""

_TAKES = "Tensor query, Tensor key, Tensor value, Tensor? mask, float scale"
torch.library.define("lwcompile::few_attention", f"({_TAKES}) -> Tensor")
torch.library.define("lwcompile::few_attention.into", f"(Tensor(a!) out, {_TAKES}) -> ()")  # for a tape, see tape.py


@torch.library.register_fake("lwcompile::few_attention")
def _(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    return query.new_empty(query.shape)


def unavailable() -> str | None:
    """Why the operator cannot run here; None if it can, and then it is loaded."""
    return load(SOURCE)


def candidates(graph: ModelGraph) -> list[fx.Node]:
    """The attentions that it could compute; `graph` is propagated."""
    if any(i.dynamic for i in graph.inputs):
        return []
    return [node for node in iterate_calls(graph, SDPA) if _fits(node)]


def _fits(node: fx.Node) -> bool:
    given = slots(node)
    values = [given[name].meta["val"] for name in ("query", "key", "value")]
    mask = None if given["attn_mask"] is None else given["attn_mask"].meta["val"]
    query, key, value = values
    return (
        all(v.dim() == 4 and v.dtype is torch.float32 for v in values)
        and query.shape[2] <= QUERIES
        and query.shape[3] in WIDTHS
        and key.shape == value.shape
        and key.shape[:1] + key.shape[3:] == query.shape[:1] + query.shape[3:]
        and (key.shape[1] == query.shape[1] or (given["enable_gqa"] and query.shape[1] % key.shape[1] == 0))
        and (mask is None or mask.dtype in (torch.bool, torch.float32))
        and not given["is_causal"]
        and not given["dropout_p"]
    )


def chosen(graph: ModelGraph, table: DeviceTable) -> dict[str, dict[str, float]]:
    """Attentions, by their nodes' names, where our kernel was measured to be the fastest, and the seconds of both."""
    found = candidates(graph)
    if not found or unavailable() is not None:
        return {}
    seconds = {node.name: _seconds(slots(node), table) for node in found}
    return {name: took for name, took in seconds.items() if took["ours"] < took["torch's"]}


def lower(graph: ModelGraph, names: Iterable[str]) -> None:
    """Have these calls computed by our kernel, in place."""
    for call in map(graph.node, names):
        given = slots(call)
        width = given["query"].meta["val"].shape[-1]
        scale = width**-0.5 if given["scale"] is None else given["scale"]
        with graph.graph.inserting_before(call):
            args = (given["query"], given["key"], given["value"], given["attn_mask"], scale)
            new = graph.graph.call_function(torch.ops.lwcompile.few_attention.default, args)
        new.meta.update(call.meta)
        call.replace_all_uses_with(new)
        graph.graph.erase_node(call)


def words(took: dict[str, float]) -> str:
    """Who runs it, and by which figures."""
    figures = ", ".join(f"{name} {1e6 * seconds:.0f}" for name, seconds in took.items())
    return f"our attention of few queries in C++, float32 (measured, us: {figures})"


def _seconds(given: dict[str, Any], table: DeviceTable) -> dict[str, float]:
    """What one call takes by torch's kernel and by ours."""
    query, key = (tuple(given[name].meta["val"].shape) for name in ("query", "key"))
    mask = None if given["attn_mask"] is None else given["attn_mask"].meta["val"]
    about = f"{'x'.join(map(str, query))} over {'x'.join(map(str, key))}, mask {None if mask is None else mask.dtype}"
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(shape, generator=random) for shape in (query, key, key))
    bias = (
        None
        if mask is None
        else torch.zeros(mask.shape)
        if mask.dtype is torch.float32
        else torch.ones(mask.shape, dtype=torch.bool)
    )

    def theirs() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, bias, enable_gqa=query[1] != key[1])

    def ours() -> Tensor:
        return torch.ops.lwcompile.few_attention.default(q, k, v, bias, query[-1] ** -0.5)

    def proven() -> float:
        error = relative_error(theirs(), ours())
        if not error <= TOLERANCE:
            log.warning("our attention, %s, is %.1e away from torch's: not used", about, error)
            return math.inf
        return least_seconds(ours)

    kinds = {"torch's": ("", lambda: least_seconds(theirs)), "ours": (f", code {code_of(SOURCE)}", proven)}
    return {name: table.get(f"attention, {name}, {about}{code}", measure) for name, (code, measure) in kinds.items()}
