"""What the passes on norms share: reading a norm's call, and moving what stands behind it into the linears that read it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from lwcompile.contract import StoredTensor
from lwcompile.errors import Refused
from lwcompile.graph import ModelGraph
from lwcompile.residual import NORMS
from lwcompile.site import Site

aten = torch.ops.aten


@dataclass(frozen=True)
class Norm:
    """One call of `(x - mean(x)) / s * gain + shift` over the last dimension, where s^2 = mean((x - mean(x))^2) + eps.

    centred: a LayerNorm; an RMSNorm takes no mean away. gain, shift: names of stored tensors [width], or None.
    """

    node: fx.Node
    x: fx.Node
    centred: bool
    eps: float
    gain: str | None
    shift: str | None

    def deviation(self, x: Tensor) -> Tensor:
        """s of each token, float64: x [..., width] -> [...]."""
        return deviation(x.double(), self.centred, self.eps)


def deviation(x: Tensor, centred: bool, eps: float) -> Tensor:
    return (x.var(-1, correction=0) if centred else x.square().mean(-1)).add(eps).sqrt()


def by_its_own(centred: bool, eps: float, folded: bool, others: float, x: Tensor) -> Tensor:
    """What the norm would have each reader read, which divides by `others` what it is given: x by its own deviation instead."""
    wide = x if x.dtype == torch.float64 else x.float()
    base = wide - wide.mean(-1, keepdim=True) if centred and not folded else wide
    return (base * (others / deviation(wide, centred, eps).unsqueeze(-1))).to(x.dtype)


def norm_at(graph: ModelGraph, site: Site) -> Norm:
    """The norm of a site; `Refused` if it is gone, is over several dimensions, or computes its gain."""
    node = next((n for n in graph.graph.nodes if n.name == site.node), None)
    if node is None or node.target not in NORMS:
        raise Refused("it is no longer in the graph", site=site.id)
    return read_norm(node)


def read_norm(node: fx.Node) -> Norm:
    centred = node.target is aten.layer_norm.default
    names = ("input", "normalized_shape", "weight", *(["bias"] if centred else []), "eps")
    given = dict(zip(names, node.args)) | dict(node.kwargs)
    if len(given["normalized_shape"]) != 1:  # type: ignore
        raise Refused("it is a norm over several dimensions")
    stored = [given.get("weight"), given.get("bias")]
    if any(isinstance(s, fx.Node) and s.op != "get_attr" for s in stored):
        raise Refused("its gain is computed, not stored")
    gain, shift = (str(s.target) if isinstance(s, fx.Node) else None for s in stored)
    eps = given.get("eps", 1e-5 if centred else None)
    if eps is None:  # what torch takes for an RMSNorm that states none
        eps = torch.finfo(node.meta["val"].dtype).eps
    return Norm(node, given["input"], centred, float(eps), gain, shift)  # type: ignore


def readers(graph: ModelGraph, norm: Norm) -> list[fx.Node]:
    """The linears that read a norm, if nothing else does and nothing else reads their weights; else `Refused`."""
    found: list[fx.Node] = []
    sources = [norm.node]
    for source in sources:
        for user in source.users:
            if user.target is aten.linear.default and user.args[0] is source:
                found.append(user)
            elif _keeps_rows(user):
                sources.append(user)
            else:
                what = "an output" if user.op == "output" else f"{user.name}, which is no linear"
                raise Refused(f"it is read by {what}")
    for linear in found:
        weight = linear.args[1]
        if not isinstance(weight, fx.Node) or weight.op != "get_attr":
            raise Refused(f"its reader {linear.name} has a weight that is computed, not stored")
        for use in graph.uses(str(weight.target)):
            if others := [user.name for user in use.users if user not in found]:
                raise Refused(f"its reader {linear.name} shares its weight with {others[0]}")
    return found


def _keeps_rows(node: fx.Node) -> bool:
    """Whether a call moves or picks whole tokens: what is done to each token's channels may as well be done after it."""
    if node.target not in (aten.reshape.default, aten.select.int, aten.slice.Tensor):
        return False
    before, after = (n.meta["val"].shape for n in (node.args[0], node))  # type: ignore[union-attr]
    if node.target is aten.reshape.default:
        return before[-1] == after[-1]
    return node.args[1] not in (-1, len(before) - 1)


def new_biases(graph: ModelGraph, norm: Norm, into: Sequence[fx.Node]) -> list[StoredTensor]:
    """The biases that `fold` adds to linears that have none."""
    if norm.shift is None or not graph.tensor(norm.shift).any():
        return []
    weights = [graph.tensor(str(linear.args[1].target)) for linear in into if len(linear.args) < 3 or linear.args[2] is None]  # type: ignore[union-attr]
    return [StoredTensor((w.shape[0],), dtype=str(w.dtype).removeprefix("torch.")) for w in weights]


def fold(graph: ModelGraph, norm: Norm, into: Sequence[fx.Node], divisor: float = 1.0, centre: bool = False) -> None:
    """Move `(x C) / divisor * gain + shift` into the linears that read it: W' = W diag(gain / divisor) C, b' = b + W shift.

    C takes the mean away, if `centre`. A bias is added where the shift is not zero and there was none.
    """
    gain = None if norm.gain is None else graph.tensor(norm.gain).double()
    shift = None if norm.shift is None or not graph.tensor(norm.shift).any() else graph.tensor(norm.shift).double()
    weights: dict[str, list[str]] = {}
    for linear in into:
        weight, bias = str(linear.args[1].target), linear.args[2] if len(linear.args) > 2 else None  # type: ignore[union-attr]
        weights.setdefault(graph.tensors[weight], [n for n, key in graph.tensors.items() if key == graph.tensors[weight]])
        if shift is None:
            continue
        stored = graph.tensor(weight)
        moved = stored.double() @ shift
        if isinstance(bias, fx.Node):
            moved += graph.tensor(str(bias.target)).double()
        name = graph.fresh_name(str(bias.target) if isinstance(bias, fx.Node) else f"{weight.removesuffix('.weight')}.bias")
        with graph.graph.inserting_before(linear):
            read = graph.get_attr(name, moved.to(stored.dtype))
        linear.args = (*linear.args[:2], read)
    for names in weights.values():
        stored = graph.tensor(names[0])
        made = stored.double() if gain is None else stored.double() * gain
        made = made - made.mean(1, keepdim=True) if centre else made
        for name in names:
            graph.set_tensor(name, (made / divisor).to(stored.dtype))
