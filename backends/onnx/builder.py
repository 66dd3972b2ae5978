"""`Builder`: an ONNX graph that is written operator by operator, equal expressions once.

Sizes that follow the inputs are `Size`: a one-element int64 tensor, so that shapes are concatenations of them. Constants and
initializers are stored once each; nodes that no output needs are dropped at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from lwcompile.errors import Refused

OPSET = 23
IR_VERSION = 11
MICROSOFT = "com.microsoft"
OWN = "lwcompile"

_DTYPES: dict[torch.dtype, ir.DataType] = {
    torch.float32: ir.DataType.FLOAT,
    torch.float64: ir.DataType.DOUBLE,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
    torch.int64: ir.DataType.INT64,
    torch.int32: ir.DataType.INT32,
    torch.int16: ir.DataType.INT16,
    torch.int8: ir.DataType.INT8,
    torch.uint8: ir.DataType.UINT8,
    torch.bool: ir.DataType.BOOL,
}


def onnx_dtype(dtype: torch.dtype) -> ir.DataType:
    if dtype not in _DTYPES:
        raise Refused(f"ONNX has no {dtype}")
    return _DTYPES[dtype]


def _key(value: Any) -> Any:
    """An attribute's value as part of a node's identity."""
    return tuple(value) if isinstance(value, list) else value.tobytes() if isinstance(value, ir.Tensor) else value


@dataclass(frozen=True)
class Size:
    """A number that follows the inputs: a tensor of one element, int64 unless the graph computes with fractions of sizes."""

    value: ir.Value


Number = int | float | bool
Shape = Sequence[int | Size]


class Builder:
    """Collects nodes, constants and initializers of one graph."""

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {}
        self.functions: dict[str, ir.Function] = {}
        self.prefix = "v"
        self._made: dict[Any, tuple[ir.Value, ...]] = {}
        self._constants: dict[Any, ir.Value] = {}
        self._names: dict[str, int] = {}

    # --- nodes

    def op(
        self, kind: str, *inputs: ir.Value | None, dtype: ir.DataType | None = None, domain: str = "", **attrs: Any
    ) -> ir.Value:
        """One node of one output. The output's dtype is the first input's unless `dtype` says otherwise."""
        return self.ops(kind, *inputs, outputs=1, dtype=dtype, domain=domain, **attrs)[0]

    def ops(
        self, kind: str, *inputs: ir.Value | None, outputs: int, dtype: ir.DataType | None = None, domain: str = "", **attrs: Any
    ) -> tuple[ir.Value, ...]:
        while inputs and inputs[-1] is None:
            inputs = inputs[:-1]
        frozen = tuple((k, _key(v)) for k, v in sorted(attrs.items()))
        key = (domain, kind, tuple(id(i) for i in inputs), frozen, outputs, dtype)
        if key not in self._made:
            attributes = ir.convenience.convert_attributes({k: v for k, v in attrs.items() if v is not None})
            name = self.fresh(self.prefix)
            node = ir.Node(domain, kind, inputs, attributes, num_outputs=outputs, name=name)
            for i, value in enumerate(node.outputs):
                value.name = name if outputs == 1 else self.fresh(f"{name}_{i}")
                if (kind_of := dtype or (inputs[0].dtype if inputs and inputs[0] is not None else None)) is not None:
                    value.dtype = kind_of
            self.nodes.append(node)
            self._made[key] = tuple(node.outputs)
        return self._made[key]

    def fresh(self, base: str) -> str:
        count = self._names.get(base, 0)
        self._names[base] = count + 1
        return base if count == 0 else self.fresh(f"{base}.{count}")

    # --- constants and weights

    def constant(self, value: Any, dtype: ir.DataType) -> ir.Value:
        """A number or a (nested) list of numbers."""
        array = np.asarray(value, dtype=dtype.numpy())
        key = (dtype, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self.initializer(self.fresh("c"), ir.Tensor(array, dtype=dtype))
        return self._constants[key]

    def scalar(self, number: Number, like: ir.Value) -> ir.Value:
        """A constant of rank 0 of another value's dtype."""
        assert like.dtype is not None
        return self.constant(number, like.dtype)

    def ints(self, values: Sequence[int]) -> ir.Value:
        return self.constant(list(values), ir.DataType.INT64)

    def initializer(self, name: str, tensor: Any) -> ir.Value:
        """A stored tensor; a name is bound once."""
        if name not in self.initializers:
            self._names.setdefault(name, 1)
            self.initializers[name] = ir.Value(
                name=name, shape=ir.Shape(tensor.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
            )
        return self.initializers[name]

    def stored(self, name: str, read: Callable[[], torch.Tensor], shape: Sequence[int], dtype: torch.dtype) -> ir.Value:
        """An initializer whose bytes are computed when the file is written."""
        kind = onnx_dtype(dtype)

        def tensor() -> ir.Tensor:
            value = read().detach().contiguous()
            if value.dtype == torch.bfloat16:
                return ir.Tensor(value.view(torch.uint16).numpy().view(kind.numpy()), dtype=kind)
            return ir.Tensor(value.numpy(), dtype=kind)

        return self.initializer(name, ir.LazyTensor(tensor, kind, ir.Shape(shape), name=name))

    # --- sizes and shapes

    def shape(self, dims: Shape) -> ir.Value:
        """A shape tensor from numbers and sizes."""
        if all(isinstance(d, int) for d in dims):
            return self.ints([d for d in dims if isinstance(d, int)])
        parts: list[ir.Value] = []
        pending: list[int] = []
        for dim in dims:
            if isinstance(dim, Size):
                if pending:
                    parts.append(self.ints(pending))
                parts.append(dim.value)
                pending = []
            else:
                pending.append(dim)
        if pending:
            parts.append(self.ints(pending))
        return parts[0] if len(parts) == 1 else self.op("Concat", *parts, axis=0)

    def size_of(self, value: ir.Value, dim: int) -> Size:
        return Size(self.op("Shape", value, start=dim, end=dim + 1, dtype=ir.DataType.INT64))

    def vector(self, number: Number | Size, dtype: ir.DataType = ir.DataType.INT64) -> ir.Value:
        """A number or size as a tensor of one element."""
        return self.cast(number.value, dtype) if isinstance(number, Size) else self.constant([number], dtype)

    def point(self, number: Number | Size, dtype: ir.DataType = ir.DataType.INT64) -> ir.Value:
        """A number or size as a tensor of rank 0."""
        if isinstance(number, Size):
            return self.cast(self.op("Squeeze", number.value, self.ints([0])), dtype)
        return self.constant(number, dtype)

    # --- small common things

    def cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        return value if value.dtype == dtype else self.op("Cast", value, dtype=dtype, to=dtype)

    def call(self, name: str, make: Callable[[], ir.Function], *inputs: ir.Value, dtype: ir.DataType) -> ir.Value:
        """Call a function of the model's own, which runtimes inline; made when it is first called."""
        if name not in self.functions:
            self.functions[name] = make()
        return self.op(name, *inputs, domain=OWN, dtype=dtype)

    # --- the end

    def finish(self, name: str, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value]) -> ir.Graph:
        """The graph with what its outputs need and nothing else."""
        needed, keep = {id(v) for v in outputs}, []
        for node in reversed(self.nodes):
            if any(id(v) in needed for v in node.outputs):
                keep.append(node)
                needed |= {id(v) for v in node.inputs if v is not None}
        stored = [v for v in self.initializers.values() if id(v) in needed]
        imports = {"": OPSET}
        for node in keep:
            if node.domain:
                imports[node.domain] = 1
        return ir.Graph(inputs, outputs, nodes=keep[::-1], initializers=stored, opset_imports=imports, name=name)
