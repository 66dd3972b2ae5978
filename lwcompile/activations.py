"""What layers are fed by the calibration samples: the values themselves, and the second moments that solvers ask for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lwcompile.contract import Wanted
from lwcompile.importance import weights_of
from lwcompile.prefix import Cursor
from lwcompile.site import SUBLAYER_KINDS, Site
from lwcompile.stats import InputStats

if TYPE_CHECKING:
    from lwcompile.context import Context
    from lwcompile.graph import ModelGraph
    from lwcompile.program import Program


def activations(
    ctx: Context, program: Program | ModelGraph, sites: Iterable[Site], tokens: int | None = None
) -> Iterator[tuple[Site, Tensor]]:
    """(site, x [tokens, features]): see `Context.activations`."""
    for site, _, parts in _inputs(ctx, program, sites, tokens):
        yield site, torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])


def input_stats(
    ctx: Context, program: Program | ModelGraph, sites: Iterable[Site], tokens: int | None = None, importance: float = 0.0
) -> dict[str, InputStats]:
    """Second moments by site id: see `Context.input_stats`."""
    found: dict[str, InputStats] = {}
    last: tuple[str, InputStats] | None = None
    for site, source, parts in _inputs(ctx, program, sites, tokens):
        if last is None or last[0] != source:
            last = source, moments(ctx, site, parts, importance)
        found[site.id] = last[1]
    return found


def moments(
    ctx: Context, site: Site, parts: Sequence[Tensor], importance: float, dense: Sequence[Tensor] | None = None
) -> InputStats:
    """The statistics of what one site is fed, batch by batch [..., K], on the CPU; `dense` is what the dense program feeds it."""
    stats = InputStats(parts[0].shape[-1], device=parts[0].device)
    weights = weights_of(ctx, site, importance, [part.shape[:-1] for part in parts])
    for i, part in enumerate(parts):
        stats.update(part, weights[i], None if dense is None else dense[i])
    return stats.cpu()


def stats_of(ctx: Context, graph: ModelGraph, site: Site, wanted: Wanted) -> InputStats | None:
    """What a solver may know of a weight's inputs: see `Context.stats_of`."""
    if ctx.prefix is not None and (found := ctx.prefix.stats(site, wanted)) is not None:
        return found
    if site.id in ctx.derived:
        parent, by = ctx.derived[site.id]
        known_of = stats_of(ctx, graph, parent, wanted)
        return known_of if known_of is None or by is None else known_of.through(by)
    stats = ctx.stats.setdefault(wanted.importance, {})
    if site.id not in stats:
        structure = ctx.structure
        known = structure.sites if structure is not None else {site.id: site}
        tied = next((ids for ids in (structure.tied if structure is not None else []) if site.id in ids), ())
        asked = known if ctx.prefix is None else (site.id, *tied)
        linears = [known[id] for id in asked if id in known and known[id].kind == "linear" and id not in stats]
        dense = ctx.program if ctx.program is not None else graph
        stats.update(input_stats(ctx, dense, linears, importance=wanted.importance))
        stats.setdefault(site.id, next((stats[id] for id in tied if id in stats), None))
    return stats[site.id]


def _inputs(
    ctx: Context, program: Program | ModelGraph, sites: Iterable[Site], tokens: int | None
) -> Iterator[tuple[Site, str, list[Tensor]]]:
    """(site, key of what it is fed, its values batch by batch), in the order of the program."""
    cursor = Cursor(program, ctx.batches(program, tokens=tokens), ctx.device)
    executor, plan = cursor.executor, []
    for site in sites:
        key = executor.key(site)
        if site.kind in ("block", *SUBLAYER_KINDS):
            source = key.removesuffix(site.node) + site.skip
            plan.append((executor.index.get(source, -1) + 1, site, source, ""))
        elif (constant := executor.constant_input(site)) is not None:
            yield site, key, [constant]
        else:
            plan.append((executor.position(key), site, executor.input_of(key), key))
    for _, site, source, key in sorted(plan, key=lambda item: item[0]):
        yield site, source, cursor.inputs_at([key])[key] if key else cursor.values_of(source)
