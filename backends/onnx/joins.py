"""Linears of one input in one numeric format -> one product.

    before: linear(x, dequantize(q)), linear(x, dequantize(k)), linear(x, dequantize(v))
    after:  Split(MatMulNBits(x, [q; k; v]))

The input is rounded to int8 once and the threads meet once. Rows are joined as the file is written, so that nothing is folded or
kept twice. A weight that is read elsewhere too, but not by the same company, stays alone: one copy of it is all the file holds.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import fx

from lwcompile.backends.onnx.quantized import QuantizedWeight, joined_weight, quantized_weight
from lwcompile.graph import ModelGraph

LINEAR = torch.ops.aten.linear.default

Member = tuple[fx.Node, QuantizedWeight]


class Joins:
    """Which packed products of a graph become one."""

    def __init__(self, graph: ModelGraph) -> None:
        self.graph = graph
        self._groups: dict[fx.Node, list[Member]] = {}
        companies: dict[str, set[tuple[str, ...]]] = defaultdict(set)
        for node in graph.graph.nodes:
            if node in self._groups or (weight := quantized_weight(graph, node)) is None:
                continue
            for user in node.users:
                if user in self._groups:
                    continue
                group = self._candidates(user) if user.target is LINEAR and user.args[1] is node else []
                self._groups |= dict.fromkeys((member for member, _ in group), group)
                keys = self._keys(group) or (self._key(weight),)
                for key in keys:
                    companies[key].add(keys)
        self._single = {key for key, found in companies.items() if len(found) == 1}

    def group(self, node: fx.Node) -> tuple[list[fx.Node], QuantizedWeight] | None:
        """The linears that are computed with this one, and their weights as one; None if it stands alone."""
        group = self._groups.get(node, [])
        if len(group) < 2 or not self._single.issuperset(self._keys(group)):
            return None
        return [member for member, _ in group], joined_weight([weight for _, weight in group])

    def _key(self, weight: QuantizedWeight) -> str:
        return self.graph.tensors[weight.codes[0]]

    def _keys(self, group: Sequence[Member]) -> tuple[str, ...]:
        return tuple(self._key(weight) for _, weight in group)

    def _candidates(self, node: fx.Node) -> list[Member]:
        """The linears that read what `node` reads, in the same format and both with or both without a stored bias."""
        found: list[Member] = []
        bias = _bias(node)
        for user in sorted(node.args[0].users):  # type: ignore[union-attr]
            if user.target is not LINEAR or user.args[0] is not node.args[0] or not isinstance(user.args[1], fx.Node):
                continue
            weight, own = quantized_weight(self.graph, user.args[1]), _bias(user)
            if weight is not None and (own is None) == (bias is None) and (own is None or own.op == "get_attr"):
                found.append((user, weight))
        form = next((w.storage.form for n, w in found if n is node), None)
        return [(n, w) for n, w in found if w.storage.form == form]


def _bias(node: fx.Node) -> fx.Node | None:
    return node.args[2] if len(node.args) > 2 else None  # type: ignore[return-value]
