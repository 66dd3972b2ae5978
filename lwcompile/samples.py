"""Inputs to prove a file on: calibration samples or noise, at two sizes, with left padding, and continued from a cache; longer than the
windows of its attention, or the log says that it is not."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lwcompile.attention import find_attentions
from lwcompile.decode import PAST, empty_cache
from lwcompile.errors import BadInput
from lwcompile.extents import example_sizes, shape_at, summed
from lwcompile.graph import Input, ModelGraph, iterate_calls
from lwcompile.probe import value_inputs
from lwcompile.rolling import bound_of

if TYPE_CHECKING:
    from lwcompile.context import Context

log = logging.getLogger("lwcompile")

Feed = dict[str, Tensor]
PRESENT = "present."
MOST_TOKENS = 96
"""Positions per sample: enough to see what breaks, few enough for the slow kernels of an exact run."""
LONGEST_WINDOW = 512
"""Windows up to this are passed by `BEYOND` positions, however many that takes: what reads too far is not seen within them."""
BEYOND = 8


def cases(graph: ModelGraph, ctx: Context | None) -> Iterator[tuple[Feed, list[Tensor]]]:
    """(inputs by name, what the graph makes of them), twice: whole samples, then fewer and shorter ones.

    A graph with a cache first runs on an empty one, and then on what it put out, a few tokens at a time.
    """
    windows = _windows(graph)
    if least := max((w + BEYOND for w in windows if w <= LONGEST_WINDOW), default=0):
        try:
            yield from list(_cases(graph, ctx, least))
        except (IndexError, RuntimeError) as error:  # more positions than it has places for
            log.warning("proved within its windows of %s: it does not run at %d positions (%s)", windows, least, error)
            yield from _cases(graph, ctx, 0)
    else:
        yield from _cases(graph, ctx, 0)
    if long := [w for w in windows if w > LONGEST_WINDOW]:
        log.warning("proved within its windows of %s: what it reads beyond them is not", long)


def _windows(graph: ModelGraph) -> list[int]:
    """Those of attention, and the bounds of caches that roll, each once."""
    found = [w for a in find_attentions(graph) for w in (a.softmax_window, a.mask.window if a.mask is not None else None)]
    found += [bound_of(symbol) for i in graph.inputs for symbol in i.dynamic.values()]
    return sorted({w for w in found if w})


def _cases(graph: ModelGraph, ctx: Context | None, least: int) -> Iterator[tuple[Feed, list[Tensor]]]:
    run = graph.module(dense=True)
    feed = samples(graph, ctx, least=least)
    with torch.no_grad():
        if any(i.name.startswith(PAST) for i in graph.inputs):
            yield from _continued(graph, run, feed)
            return
        for case in (feed, smaller(graph, feed)):
            yield case, _outputs(run(*(case[i.name] for i in graph.inputs)))


def _outputs(result: object) -> list[Tensor]:
    return [torch.as_tensor(r) for r in (result if isinstance(result, tuple | list) else (result,))]


def _continued(graph: ModelGraph, run: torch.nn.Module, feed: Feed) -> Iterator[tuple[Feed, list[Tensor]]]:
    """The samples without their last tokens from an empty cache, then those."""
    caches = [i for i in graph.inputs if i.name.startswith(PAST)]
    data = [i for i in graph.inputs if not i.name.startswith(PAST)]
    total = next((i for i in data if i.dynamic.get(1) == "total"), None)
    symbol = next(s for i in data if i is not total for d, s in i.dynamic.items() if d > 0)
    length = max(feed[i.name].shape[d] for i in data if i is not total for d, s in i.dynamic.items() if s == symbol)
    batch = next(feed[i.name].shape[0] for i in data)
    past = dict(zip((i.name for i in caches), empty_cache(caches, batch)))
    cut = max(1, length - 3)
    for start, end in ((0, cut), (cut, length)) if length > 1 else ((0, 1),):
        case = {}
        for i in data:
            value = feed[i.name]
            for dim in (d for d, s in i.dynamic.items() if d > 0 and s in (symbol, "total")):
                value = value.narrow(dim, *((0, end) if i is total else (start, end - start)))
            case[i.name] = value.contiguous()
        case |= past
        outputs = _outputs(run(*(case[i.name] for i in graph.inputs)))
        yield case, outputs
        named = dict(zip(graph.outputs, outputs))
        past = {i.name: named[PRESENT + i.name.removeprefix(PAST)] for i in caches}


def samples(graph: ModelGraph, ctx: Context | None, rows: int = 2, least: int = 0) -> Feed:
    """Calibration samples where there are any for an input, noise in its range, of `least` positions or more, for the others."""
    given: dict[str, Tensor] = {}
    calibration = ctx.calibration if ctx is not None else None
    for item in graph.inputs if calibration is not None else ():
        try:
            given |= calibration.inputs_for([item.name], slice(0, rows))  # type: ignore[union-attr]
        except BadInput:
            continue
    given = {name: _shortened(graph, name, value, max(MOST_TOKENS, least)) for name, value in given.items()}
    sizes = _sizes(graph, given, least)
    noise = _noise(graph, sizes)
    return {i.name: given.get(i.name, noise[i.name]) for i in graph.inputs}


def _shortened(graph: ModelGraph, name: str, value: Tensor, most: int) -> Tensor:
    item = next(i for i in graph.inputs if i.name == name)
    for dim in item.dynamic:
        if dim > 0:
            value = value.narrow(dim, 0, min(most, value.shape[dim]))
    return value.contiguous()


def _sizes(graph: ModelGraph, given: Mapping[str, Tensor], least: int = 0) -> dict[str, int]:
    """A value per symbol: the samples' where they say it, else the example's, or `least` positions if that is fewer."""
    known = example_sizes(graph.inputs)
    if least:
        data = [i for i in graph.inputs if not i.name.startswith(PAST)]
        known |= {s: max(least, known[s]) for i in data for d, s in i.dynamic.items() if d > 0 and s in known}
    known |= {s: given[i.name].shape[d] for i in graph.inputs if i.name in given for d, s in i.dynamic.items()}
    return summed(graph.inputs, known)


def _noise(graph: ModelGraph, sizes: Mapping[str, int]) -> Feed:
    """Normal numbers; masks with left padding in the first row; positions that count; ids below the smallest table they index."""
    random, reads = torch.Generator().manual_seed(0), value_inputs(graph)
    rows: dict[str, int] = {}
    for node in iterate_calls(graph, torch.ops.aten.embedding.default):
        table, index = node.args[:2]
        for name in reads[index]:  # type: ignore[index]
            rows[name] = min(rows.get(name, 1 << 60), int(table.meta["val"].shape[0]))  # type: ignore[union-attr]
    made: Feed = {}
    for item in graph.inputs:
        shape = shape_at(item, sizes)
        if item.dtype.is_floating_point:
            made[item.name] = torch.randn(shape, generator=random).to(item.dtype)
        elif item.dtype == torch.bool or item.name.endswith("mask"):
            made[item.name] = padded(torch.ones(shape, dtype=item.dtype))
        elif "position" in item.name:
            made[item.name] = torch.arange(shape[-1]).expand(shape).contiguous().to(item.dtype)
        else:
            top = rows.get(item.name, 2)
            made[item.name] = torch.randint(0, top, shape, generator=random).to(item.dtype)
    return made


def padded(mask: Tensor) -> Tensor:
    """A mask of ones with the first quarter of its first row closed: left padding."""
    mask = mask.clone()
    if mask.dim() == 2 and mask.shape[1] > 1:
        mask[0, : max(1, mask.shape[1] // 4)] = 0
    return mask


def smaller(graph: ModelGraph, feed: Feed) -> Feed:
    """The same inputs at two thirds of every free length, with left padding where a mask says what is padding."""
    sizes = _sizes(graph, feed)
    shorter = summed(graph.inputs, {symbol: max(1, (2 * size) // 3) for symbol, size in sizes.items()})
    made: Feed = {}
    for item in graph.inputs:
        value = feed[item.name]
        for dim, target in enumerate(shape_at(item, shorter)):
            if dim in item.dynamic:
                value = value.narrow(dim, 0, min(target, value.shape[dim]))
        made[item.name] = _repadded(item, value.contiguous())
    return made


def _repadded(item: Input, value: Tensor) -> Tensor:
    return padded(value) if item.name.endswith("mask") and not item.dtype.is_floating_point else value
