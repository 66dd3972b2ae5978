"""FX graph -> ONNX graph: walks the nodes in order and asks the operator table for each.

An operator's lowering is a function `(l: Lowering, node, *args, **kwargs) -> value`, registered with `@lowers("add.Tensor")`;
nodes among its arguments arrive as `ir.Value` (tensors), `Size` or numbers (sizes), or tuples of these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from lwcompile.backends.onnx.builder import Builder, Size, onnx_dtype
from lwcompile.backends.onnx.joins import Joins
from lwcompile.backends.onnx.quantized import Quantized
from lwcompile.errors import LwError, Refused
from lwcompile.extents import Dim, Extents, Free, extents
from lwcompile.graph import ModelGraph, surroundings

Lower = Callable[..., Any]
TABLE: dict[str, tuple[Lower, bool]] = {}
"""Lowerings by operator name, as `operator_name` gives it, and whether they take the nodes instead of their values."""


def lowers(*names: str, nodes: bool = False) -> Callable[[Lower], Lower]:
    """Register a lowering. nodes: pass the arguments as they stand in the graph, for one that looks behind them."""

    def register(function: Lower) -> Lower:
        TABLE.update(dict.fromkeys(names, (function, nodes)))
        return function

    return register


FUSIONS: dict[str, list[Lower]] = {}
"""Lowerings of a call together with what it is computed from, tried before the table: they return None where they don't apply."""


def fuses(*names: str) -> Callable[[Lower], Lower]:
    """Register a fusion `(g: Lowering, node) -> value or None`. The nodes it stands for fall away if nothing else reads them."""

    def register(function: Lower) -> Lower:
        for name in names:
            FUSIONS.setdefault(name, []).append(function)
        return function

    return register


def operator_name(node: fx.Node) -> str:
    """`add.Tensor` for torch's operators, `size.mul` for arithmetic on sizes."""
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target).removeprefix("aten.").removesuffix(".default")
    if node.op != "call_function":
        return node.op
    return f"size.{getattr(node.target, '__name__', node.target)}"


class Lowering:
    """One graph on its way to ONNX."""

    def __init__(self, graph: ModelGraph, accuracy_level: int) -> None:
        self.graph = graph
        self.b = Builder()
        self.extents: Extents = extents(graph)
        self.quantized = Quantized(self.b, graph, accuracy_level)
        self.joins = Joins(graph)
        self.values: dict[fx.Node, Any] = {}
        self.inputs: list[ir.Value] = []
        self._initializers: dict[tuple[str, bool], str] = {}
        self._symbols: dict[Free, Size] = {}
        self._returned: list[ir.Value] = []
        self._merged: dict[fx.Node, ir.Value] = {}
        self._shared_by_others = self._read_outside_linears()

    def run(self, name: str) -> ir.Graph:
        for reserved in (*(i.name for i in self.graph.inputs), *self.graph.outputs):
            self.b.fresh(reserved)
        for node in self.graph.nodes:
            if node.op == "output":
                break
            self.b.prefix = "w" if operator_name(node) == "lwcompile.dequantize" else node.name
            if node.op == "placeholder":
                self.values[node] = self._input(node)
            elif node.op == "call_function" and node not in self.values:
                self._call(node)
        outputs = [self._output(v, n) for v, n in zip(self.graph.output_node.args[0], self.graph.outputs)]  # type: ignore[arg-type]
        return self.b.finish(name, self.inputs, outputs)

    # --- what lowerings ask

    def dims(self, node: object) -> tuple[Dim, ...]:
        return self.extents.dims[node]  # type: ignore[index]

    def rank(self, node: object) -> int:
        return len(self.dims(node))

    def dtype(self, node: object) -> torch.dtype:
        return self.extents.dtypes[node]  # type: ignore[index]

    def kind(self, node: object) -> ir.DataType:
        return onnx_dtype(self.dtype(node))

    def value(self, item: Any) -> Any:
        """An argument with its nodes replaced by what they were lowered to."""
        if isinstance(item, fx.Node):
            if item.op == "get_attr" and item not in self.values:
                self.values[item] = self._stored(item)
            return self.values[item]
        if isinstance(item, list | tuple):
            return type(item)(self.value(i) for i in item)
        return {k: self.value(v) for k, v in item.items()} if isinstance(item, dict) else item

    def size(self, dim: Dim, source: ir.Value | None = None, axis: int = 0) -> int | Size:
        """A size as a number, or as the input's that it equals, or read off `source`."""
        if isinstance(dim, int):
            return dim
        if dim in self._symbols:
            return self._symbols[dim]
        if source is None:
            raise Refused(f"a size ({dim.first} or {dim.second}) is computed in a way that cannot be followed")
        return self.b.size_of(source, axis)

    def sizes(self, node: fx.Node, source: ir.Value) -> list[int | Size]:
        """All sizes of a tensor node."""
        return [self.size(d, source, i) for i, d in enumerate(self.dims(node))]

    def reshape(
        self, x: ir.Value, dims: Sequence[Dim], source: Sequence[Dim], sizes: Sequence[int | Size] | None = None
    ) -> ir.Value:
        """Reshape to these dims, by constants if at all possible: a size kept in place is 0, one free size is -1.

        sizes: the sizes as computed, used if two or more must be; the sizes known of the inputs otherwise.
        """
        if list(dims) == list(source):
            return x
        spec: list[int | Size | None] = []
        for i, dim in enumerate(dims):
            kept = i < len(source) and dim == source[i] and not isinstance(dim, int)
            spec.append(0 if kept else dim if isinstance(dim, int) and dim != 0 else None)
        unknown = [i for i, s in enumerate(spec) if s is None]
        computed = {i: s for i, s in enumerate(sizes or ()) if isinstance(s, Size)}
        inferred = next(
            (i for i in unknown if i not in computed and dims[i] not in self._symbols), unknown[-1] if unknown else -1
        )
        for i in unknown:
            spec[i] = -1 if i == inferred else computed[i] if i in computed else self.size(dims[i])
        return self.b.op("Reshape", x, self.b.shape([s for s in spec if s is not None]))

    # --- heads

    def origin(self, node: fx.Node) -> fx.Node:
        """The tensor behind reshapes and expansions that change nothing."""
        while operator_name(node) in ("reshape", "expand") and self.dims(node.args[0]) == self.dims(node):
            node = node.args[0]  # type: ignore[assignment]
        return node

    def heads_swapped(self, node: fx.Node) -> fx.Node | None:
        """The tensor of which `node` swaps the second and third of four axes."""
        node = self.origin(node)
        name = operator_name(node)
        swaps = name == "transpose.int" and sorted(node.args[1:]) in ([1, 2], [-3, -2])  # type: ignore[type-var]
        moves = name == "permute" and list(node.args[1]) == [0, 2, 1, 3]  # type: ignore[arg-type]
        return self.origin(node.args[0]) if (swaps or moves) and self.rank(node) == 4 else None  # type: ignore[arg-type]

    def merged(self, node: fx.Node) -> ir.Value | None:
        """A tensor [batch, heads, sequence, width] as [batch, sequence, heads * width], if that is what it was made from."""
        node = self.origin(node)
        if node in self._merged:
            return self._merged[node]
        if (source := self.heads_swapped(node)) is None:
            return None
        batch, heads, sequence, width = self.dims(node)
        if not isinstance(heads, int) or not isinstance(width, int):
            return None
        flat = (batch, sequence, heads * width)
        if operator_name(source) == "reshape" and self.dims(source.args[0]) == flat:
            return self.value(source.args[0])
        return self.b.op("Reshape", self.value(source), self.b.ints([0, 0, heads * width]))

    def split_heads(self, node: fx.Node, flat: ir.Value) -> ir.Value:
        """Note that `node` [batch, heads, sequence, width] is known as [batch, sequence, heads * width]; its value proper."""
        self._merged[node] = flat
        heads, width = self.dims(node)[1], self.dims(node)[3]
        assert isinstance(heads, int) and isinstance(width, int)
        return self.b.op("Transpose", self.b.op("Reshape", flat, self.b.ints([0, 0, heads, width])), perm=[0, 2, 1, 3])

    def known_flat(self, node: fx.Node) -> ir.Value | None:
        """The value of a reshape that undoes `split_heads`, or None for any other node."""
        source = node.args[0]
        if not isinstance(source, fx.Node) or (split := self.heads_swapped(source)) is None or split not in self._merged:
            return None
        batch, heads, sequence, width = self.dims(split)
        return self._merged[split] if self.dims(node) == (batch, sequence, heads * width) else None  # type: ignore[operator]

    # --- the ends

    def _input(self, node: fx.Node) -> ir.Value:
        dims = [self.extents.symbol(d) for d in self.dims(node)]
        value = ir.Value(name=str(node.target), shape=ir.Shape(dims), type=ir.TensorType(self.kind(node)))
        self.inputs.append(value)
        for i, dim in enumerate(self.dims(node)):
            if isinstance(dim, Free) and dim not in self._symbols:
                self._symbols[dim] = self.b.size_of(value, i)
        return value

    def _output(self, node: fx.Node, name: str) -> ir.Value:
        value = self.value(node)
        if isinstance(value, Size):
            value = value.value
        if not isinstance(value, ir.Value):
            value = self.b.constant(value, ir.DataType.INT64)
        while value.producer() is None or value in self._returned:
            value = self.b.op("Identity", value)
        self._returned.append(value)
        value.name = name
        dims = [self.extents.symbol(d) for d in self.extents.dims.get(node, ())]
        value.shape = ir.Shape([f"{name}_dim{i}" if d is None else d for i, d in enumerate(dims)])
        return value

    # --- weights

    def _read_outside_linears(self) -> set[str]:
        """Keys of stored matrices that something other than a linear's weight argument reads."""
        keys = set()
        for node in self.graph.nodes:
            if node.op != "get_attr":
                continue
            if any(operator_name(u) != "linear" or u.args[1] is not node or u.args[0] is node for u in node.users):
                keys.add(self.graph.tensors[str(node.target)])
        return keys

    def _stored(self, node: fx.Node) -> ir.Value:
        name = str(node.target)
        key, store = self.graph.tensors[name], self.graph.store
        bound = self._initializers.setdefault((key, False), name)
        return self.b.stored(bound, lambda: store[key], store.shape(key), store.dtype(key))

    def transposed(self, node: fx.Node) -> ir.Value:
        """A stored matrix [N, K] as [K, N]: written that way round, unless something else reads it as it is."""
        key, store = self.graph.tensors[str(node.target)], self.graph.store
        if key in self._shared_by_others:
            return self.b.op("Transpose", self.value(node), perm=[1, 0])
        bound = self._initializers.setdefault((key, True), str(node.target))
        return self.b.stored(bound, lambda: store[key].t(), store.shape(key)[::-1], store.dtype(key))

    # --- calls

    def _call(self, node: fx.Node) -> None:
        if node in self.extents.sizes and not isinstance(self.extents.sizes[node], Free):
            self.values[node] = self.extents.sizes[node]
            return
        if node in self.extents.sizes and self.extents.sizes[node] in self._symbols:
            self.values[node] = self._symbols[self.extents.sizes[node]]
            return
        name = operator_name(node)
        if name not in TABLE:
            raise Refused(f"no lowering for {node.target}", site=node.meta.get("path") or node.name)
        for fusion in FUSIONS.get(name, ()):
            if (fused := fusion(self, node)) is not None:
                self.values[node] = self._typed(node, fused)
                return
        lower, nodes = TABLE[name]
        args, kwargs = (node.args, node.kwargs) if nodes else self.value((node.args, dict(node.kwargs)))
        try:
            result = lower(self, node, *args, **kwargs)
        except LwError:
            raise
        except Exception as error:
            raise Refused(
                f"cannot lower this use of {node.target}: {type(error).__name__}: {error}\n{surroundings(node)}"
            ) from error
        self.values[node] = self._typed(node, result)

    def _typed(self, node: fx.Node, result: Any) -> Any:
        if not isinstance(result, ir.Value) or node not in self.extents.dtypes:
            return result
        return self.b.cast(result, self.kind(node))
