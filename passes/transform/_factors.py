"""Low-rank factors of a weight, or of a difference of two, in the norm of its outputs: what several transforms share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, fx

from lwcompile.context import Context
from lwcompile.contract import Wanted
from lwcompile.errors import Refused
from lwcompile.graph import ModelGraph
from lwcompile.site import Site
from lwcompile.stats import InputStats

aten = torch.ops.aten


def stats_for(graph: ModelGraph, site: Site, ctx: Context, importance: float) -> InputStats | None:
    """What is known of a linear's inputs, its tokens weighed by importance to this power; None without samples."""
    if ctx.calibration is None and ctx.prefix is None:
        return None
    return ctx.stats_of(graph, site, Wanted(importance))


def principal(weight: Tensor, rank: int, hessian: Tensor | None) -> tuple[Tensor, Tensor]:
    """B [N, r] and A [r, K], float64, with B A of all rank-r matrices the nearest to W [N, K] in tr((W - BA) H (W - BA)^T).

    B holds the leading eigenvectors of the outputs' second moments W H W^T, and A = B^T W: what SVD of W L gives, H = L L^T
    (SVD-LLM, arXiv 2403.07378), without an inverse. H [K, K] None is the identity. A tall W = QR is done on R.
    """
    w = weight.double()
    tall = w.shape[0] > w.shape[1]
    frame, core = torch.linalg.qr(w) if tall else (None, w)
    moments = core @ core.T if hessian is None else core @ hessian.to(core) @ core.T
    vectors = torch.linalg.eigh((moments + moments.T) / 2).eigenvectors.flip(1)[:, :rank]
    return (vectors if frame is None else frame @ vectors), vectors.T @ core


def effective_rank(graph: ModelGraph, name: str) -> float:
    """exp of the entropy of a stored weight's squared singular values, each over their sum (arXiv 2509.25622)."""
    return entropy_rank(spectrum(graph.tensors[name], lambda: graph.tensor(name)))


def energy_rank(graph: ModelGraph, name: str, energy: float) -> int:
    """The fewest directions of a stored weight that hold this part of its squared singular values."""
    held = spectrum(graph.tensors[name], lambda: graph.tensor(name)).cumsum(0)
    return int((held < energy - 1e-12).sum()) + 1


def entropy_rank(share: Tensor) -> float:
    return torch.special.entr(share).sum().exp().item()


def spectrum(key: str, make: Callable[[], Tensor]) -> Tensor:
    """Squared singular values of a matrix, largest first, each over their sum; found once under its content key."""
    if key not in _SPECTRA:
        squares = torch.linalg.svdvals(make().double()).square()
        _SPECTRA[key] = squares / squares.sum().clamp_min(torch.finfo(squares.dtype).tiny)
    return _SPECTRA[key]


_SPECTRA: dict[str, Tensor] = {}


def residual_sites(site: Site, call: fx.Node, name: str, shape: tuple[int, int], rank: int) -> tuple[Site, Site]:
    """The sites of A [r, K] and B [N, r] beside a linear of a block or sublayer, whose weight has this name."""
    path, (n, k) = call.meta.get("path", ""), shape
    inner = Site(
        f"{site.id}.{call.name}_down",
        "linear",
        site.id,
        site.entry,
        path,
        f"{call.name}_down",
        weight=f"{name}_down",
        shape=(rank, k),
    )
    return inner, replace(inner, id=f"{site.id}.{call.name}_up", node=f"{call.name}_up", weight=f"{name}_up", shape=(n, rank))


def add_residual(graph: ModelGraph, call: fx.Node, sites: tuple[Site, Site], a: Tensor, b: Tensor) -> None:
    """linear(x, W, b) -> linear(x, W, b) + linear(linear(x, A), B); the call's node goes on standing for the first term."""
    inner, outer = sites
    with graph.graph.inserting_after(call):
        total = graph.graph.call_function(aten.add.Tensor, (call, call))
    call.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)
    new, linear = graph.graph.create_node, aten.linear.default
    with graph.graph.inserting_before(total):
        down, up = (graph.get_attr(str(s.weight), m.contiguous()) for s, m in ((inner, a), (outer, b)))
        thin = new("call_function", linear, (call.args[0], down), name=inner.node)
        wide = new("call_function", linear, (thin, up), name=outer.node)
    total.args = (call, wide)
    value = call.meta.get("val")
    for node, made in ((thin, values_of(call, len(a))), (wide, value), (total, value)):
        node.meta.update(path=inner.path, val=made)


def only_call(graph: ModelGraph, site: Site) -> fx.Node:
    """The linear that alone reads the site's weight; `Refused` where the weight is shared, gone, or no float matrix."""
    if site.weight is None or site.weight not in graph.tensors or len(site.shape) != 2:
        raise Refused("it has no stored matrix", site=site.id)
    if site.kind != "linear":
        raise Refused("only the weight of a linear has low-rank factors", site=site.id)
    users = [user for read in graph.uses(site.weight) for user in read.users]
    call = next((user for user in users if user.name == site.node), None)
    if call is None or call.target is not aten.linear.default:
        raise Refused("it is no longer in the graph", site=site.id)
    if others := [user for user in users if user is not call]:
        raise Refused(f"its weight is also read by {others[0].format_node()}", site=site.id)
    if not torch.isfinite(graph.tensor(site.weight)).all():
        raise Refused("its weight holds NaN or infinity", site=site.id)
    return call


def factor_sites(site: Site, rank: int) -> tuple[Site, Site]:
    """The sites of A [r, K] and B [N, r], whose inputs are the site's own and A applied to them."""
    n, k = site.shape
    inner = Site(
        f"{site.id}.a", "linear", site.id, site.entry, site.path, f"{site.node}_a", "", "", f"{site.weight}.a", (rank, k)
    )
    return inner, replace(inner, id=f"{site.id}.b", node=f"{site.node}_b", weight=f"{site.weight}.b", shape=(n, rank))


def values_of(call: fx.Node, width: int) -> object:
    """The fake value of a linear that reads what `call` reads and puts out `width` channels."""
    fed = call.args[0].meta.get("val")  # type: ignore[union-attr]
    return fed.new_empty((*fed.shape[:-1], width)) if isinstance(fed, Tensor) else None
