"""Packed weights in a graph: what a dequantizing call reads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from lwcompile.formats import NumericFormat, QuantizedTensor
from lwcompile.graph import ModelGraph, iterate_calls


@dataclass(frozen=True)
class PackedWeight:
    """One stored weight [rows, in_features]: its numeric format, and the names that its parts have in the graph."""

    format: NumericFormat
    shape: tuple[int, int]
    codes: str
    scale: str
    zero: str | None

    @property
    def name(self) -> str:
        """The name of the weight that was packed."""
        return self.codes.removesuffix(".codes")

    def read(self, graph: ModelGraph) -> QuantizedTensor:
        parts = {"codes": self.codes, "scale": self.scale} | ({} if self.zero is None else {"zero": self.zero})
        return QuantizedTensor.unpack(self.format, self.shape, {part: graph.tensor(name) for part, name in parts.items()})


def packed_weight(graph: ModelGraph, node: fx.Node) -> PackedWeight | None:
    """What a `dequantize` call reads; None for any other node, and if it does not read stored tensors."""
    if node.target is not torch.ops.lwcompile.dequantize.default:
        return None
    codes, scale, zero, bits, group_size, in_features = node.args
    reads = [n for n in (codes, scale, zero) if n is not None]
    if any(not isinstance(n, fx.Node) or n.op != "get_attr" for n in reads):
        return None
    names = [str(n.target) for n in reads if isinstance(n, fx.Node)]
    stored = [graph.tensors[name] for name in names]
    rows, dtype = graph.store.shape(stored[1])[0], graph.store.dtype(stored[1])
    kind = "none" if zero is None else "integer" if graph.store.dtype(stored[2]) == torch.uint8 else "float"
    format = NumericFormat(bits, group_size, kind, "float16" if dtype == torch.float16 else "float32")  # type: ignore[arg-type]
    return PackedWeight(format, (rows, in_features), names[0], names[1], names[2] if zero is not None else None)  # type: ignore[arg-type]


def packed_weights(graph: ModelGraph) -> Iterator[PackedWeight]:
    """Every packed weight that the graph reads, one for each call."""
    for node in iterate_calls(graph, torch.ops.lwcompile.dequantize.default):
        if (found := packed_weight(graph, node)) is not None:
            yield found
