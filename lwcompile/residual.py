"""The search for residual streams in one graph: residual adds, the spines they form, and the branches off them.

    residual add     `a + b` of one shape where `a` is an ancestor of `b` and a weight lies between: b is a branch off the stream
    spine            the longest chain of residual adds, each one's skip reaching back to the one before; what is nested in a
                     branch hangs off it. Removed, the next longest chain is the next stream (a second tower).
    sublayer         one branch: attention (weighted mixing over positions), moe (routing), mlp, or just `sublayer`

No class names and no module paths: what the graph computes is all that counts here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from lwcompile.graph import ModelGraph
from lwcompile.site import SiteKind

aten = torch.ops.aten

NORMS = (aten.layer_norm.default, aten.rms_norm.default)
WEIGHTED = (aten.linear.default, aten.conv1d.default, aten.conv2d.default, aten.convolution.default)
PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.baddbmm.default, aten.einsum.default)
ATTENTIONS = (
    aten.scaled_dot_product_attention.default,
    torch.ops.lwcompile.hybrid_attention.default,
    torch.ops.lwcompile.relu_attention.default,
)
ROUTING = (aten.topk.default, aten.histc.default, aten.scatter.value, aten.one_hot.default, aten.scatter_.value)

ResidualAdd = tuple[fx.Node, fx.Node, fx.Node]
"""(add, skip, branch)."""


@dataclass(frozen=True)
class Sublayer:
    """One branch off the residual stream: `end = skip + branch`, or `end = norm(skip + branch)` when post-norm."""

    kind: SiteKind
    branch: fx.Node
    add: fx.Node
    skip: fx.Node
    end: fx.Node
    nodes: frozenset[fx.Node]
    cross: bool = False

    @property
    def post_norm(self) -> bool:
        return self.end is not self.add


class Residuals:
    """The search in one graph. Ancestor sets are bit masks over node positions: a thousand blocks fit."""

    def __init__(self, graph: ModelGraph) -> None:
        self.graph = graph
        self.nodes = graph.nodes
        self.index = {node: i for i, node in enumerate(self.nodes)}
        self.above: list[int] = []
        for node in self.nodes:
            mask = 0
            for source in node.all_input_nodes:
                i = self.index[source]
                mask |= self.above[i] | (1 << i)
            self.above.append(mask)
        self.weights_mask = sum(1 << i for i, node in enumerate(self.nodes) if self._is_weighted(node))

    def _is_weighted(self, node: fx.Node) -> bool:
        """Whether a call multiplies by a stored tensor of two or more dimensions."""
        if node.op != "call_function" or node.target is aten.embedding.default:
            return False
        if node.target in WEIGHTED:
            return True
        name = str(node.target)
        if not any(word in name for word in ("mm", "matmul", "conv", "einsum", "linear")):
            return False
        return any(s.op == "get_attr" and len(shape_of(s)) >= 2 for s in node.all_input_nodes)

    def is_above(self, a: fx.Node, b: fx.Node) -> bool:
        return bool(self.above[self.index[b]] >> self.index[a] & 1)

    def _weights_between(self, a: fx.Node, b: fx.Node) -> bool:
        """Whether a weighted call lies on a path from a to b (b included)."""
        i, j = self.index[a], self.index[b]
        candidates = self.weights_mask & (self.above[j] | (1 << j))
        while candidates:
            low = (candidates & -candidates).bit_length() - 1
            if self.above[low] >> i & 1:
                return True
            candidates &= candidates - 1
        return False

    # --- residual adds and spines

    def residual_adds(self) -> dict[fx.Node, tuple[fx.Node, fx.Node]]:
        """add -> (skip, branch)."""
        found: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}
        for node in self.nodes:
            if node.target is not aten.add.Tensor or node.kwargs.get("alpha", 1) != 1:
                continue
            a, b = node.args[:2]
            if not isinstance(a, fx.Node) or not isinstance(b, fx.Node) or shape_of(a) != shape_of(b) or len(shape_of(a)) < 2:
                continue
            for skip, branch in ((a, b), (b, a)):
                if self.is_above(skip, branch):
                    if self._weights_between(skip, branch):
                        found[node] = (skip, branch)
                elif skip in found and self.is_above(found[skip][0], branch) and self._weights_between(found[skip][0], branch):
                    found[node] = (skip, branch)
                if node in found:
                    break
        return found

    def spines(self) -> list[list[ResidualAdd]]:
        """Chains of (add, skip, branch), the longest first, none nested in a branch of an earlier one."""
        adds = self.residual_adds()
        chains: list[list[ResidualAdd]] = []
        while adds:
            before: dict[fx.Node, fx.Node | None] = {}
            length: dict[fx.Node, int] = {}
            for add, (skip, _) in adds.items():
                reach = self.above[self.index[skip]] | (1 << self.index[skip])
                before[add] = next((a for a in reversed(list(length)) if reach >> self.index[a] & 1), None)
                previous = before[add]
                length[add] = 1 + (length[previous] if previous is not None else 0)
            last = max(length, key=lambda a: (length[a], self.index[a]))
            if chains and length[last] < 2:
                break
            spine: list[ResidualAdd] = []
            node: fx.Node | None = last
            while node is not None:
                spine.append((node, *adds[node]))
                node = before[node]
            spine.reverse()
            chains.append(spine)
            taken = {add for add, _, _ in spine}
            adds = {a: v for a, v in adds.items() if a not in taken and not self._nested(a, spine)}
        return chains

    def _nested(self, add: fx.Node, spine: Sequence[ResidualAdd]) -> bool:
        within = any(add is branch or (self.is_above(skip, add) and self.is_above(add, branch)) for _, skip, branch in spine)
        return within or self.is_above(spine[0][0], add) or self._spans(add, spine)

    def _spans(self, add: fx.Node, spine: Sequence[ResidualAdd]) -> bool:
        """A long skip around the spine is not a stream of its own."""
        return self.is_above(spine[-1][0], add)

    # --- sublayers

    def sublayers(self, spine: Sequence[ResidualAdd]) -> list[Sublayer]:
        ends = [self._end(add, spine[i + 1][1] if i + 1 < len(spine) else None) for i, (add, _, _) in enumerate(spine)]
        if len(ends) > 1 and all(end is not add for end, (add, _, _) in zip(ends[:-1], spine)):
            ends[-1] = self._norm_after(spine[-1][0]) or ends[-1]
        found = []
        for (add, skip, branch), end in zip(spine, ends):
            for part in self._parts(skip, branch):
                nodes = self._branch_nodes(skip, part)
                kind = self._kind(nodes)
                found.append(Sublayer(kind, part, add, skip, end, nodes, kind == "attention" and self._is_cross(skip, nodes)))
        return found

    def _norm_after(self, add: fx.Node) -> fx.Node | None:
        users = [u for u in add.users if u.op == "call_function"]
        return users[0] if len(users) == 1 and users[0].target in NORMS and users[0].args[0] is add else None

    def _end(self, add: fx.Node, next_skip: fx.Node | None) -> fx.Node:
        """The stream after an add: its norm where that is what the next branch leaves from (post-norm), else the add."""
        norm = self._norm_after(add)
        return norm if norm is not None and norm is next_skip else add

    def _parts(self, skip: fx.Node, branch: fx.Node) -> list[fx.Node]:
        """Parallel branches arrive as one sum; each weighted term that does not read another is a branch."""
        if branch.target is not aten.add.Tensor:
            return [branch]
        a, b = branch.args[:2]
        if not isinstance(a, fx.Node) or not isinstance(b, fx.Node) or shape_of(a) != shape_of(b):
            return [branch]
        if self.is_above(a, b) or self.is_above(b, a):
            return [branch]
        if not self._weights_between(skip, a) or not self._weights_between(skip, b):
            return [branch]
        return [*self._parts(skip, a), *self._parts(skip, b)]

    def _branch_nodes(self, skip: fx.Node, branch: fx.Node) -> frozenset[fx.Node]:
        """What the branch computes: nodes between skip and branch, and nodes that nothing but the branch reads."""
        own: set[fx.Node] = {branch}
        start, stop = self.index[skip], self.index[branch]
        above = self.above[stop]
        for i in range(stop - 1, -1, -1):
            node = self.nodes[i]
            if node.op != "call_function" or not above >> i & 1:
                continue
            if self.above[i] >> start & 1 or (node.users and all(u in own for u in node.users)):
                own.add(node)
        return frozenset(own)

    def _kind(self, nodes: frozenset[fx.Node]) -> SiteKind:
        targets = {node.target for node in nodes}
        if targets & set(ATTENTIONS) or self._mixes_by_softmax(nodes):
            return "attention"
        if targets & set(ROUTING) or any("grouped_mm" in str(t) for t in targets):
            return "moe"
        linears = sum(node.target is aten.linear.default for node in nodes)
        return "mlp" if linears >= 2 else "sublayer"

    def _mixes_by_softmax(self, nodes: frozenset[fx.Node]) -> bool:
        products = [n for n in nodes if n.target in PRODUCTS and not any(s.op == "get_attr" for s in n.all_input_nodes)]
        soft = [n for n in nodes if n.target in (aten.softmax.int, aten._softmax.default)]
        return any(self.is_above(s, p) for s in soft for p in products)

    def _is_cross(self, skip: fx.Node, nodes: frozenset[fx.Node]) -> bool:
        linears = [n for n in nodes if n.target is aten.linear.default]
        return any(not self.is_above(skip, n) for n in linears)


def shape_of(node: object) -> tuple[int, ...]:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return tuple(value.shape) if isinstance(value, Tensor) else ()
