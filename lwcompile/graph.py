"""`ModelGraph`: one traced function in one form for every capture.

Functional ATen; parameters and buffers unlifted as `get_attr` nodes whose target is the tensor's qualified name; linear,
layer_norm, rms_norm and scaled_dot_product_attention whole. All edits go through a `ModelGraph`; `digest` covers nodes and
tensors, so an edit that does not is noticed.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import xxhash
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from lwcompile.errors import VerificationError
from lwcompile.ops import is_unpacking
from lwcompile.serialize import graph_from_json, graph_to_json, torch_value
from lwcompile.store import ParameterStore

aten = torch.ops.aten


@dataclass(frozen=True)
class Input:
    """One input of an entry point: an example's shape and dtype, and which dimensions are free (dim -> symbol)."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    dynamic: Mapping[int, str] = field(default_factory=dict)


@dataclass
class ModelGraph:
    """A function over a store. `tensors` maps the qualified names that `get_attr` nodes use to content keys."""

    graph: fx.Graph
    tensors: dict[str, str]
    store: ParameterStore
    inputs: list[Input]
    outputs: list[str]

    # --- reading

    @property
    def nodes(self) -> list[fx.Node]:
        return list(self.graph.nodes)

    def node(self, name: str) -> fx.Node:
        for node in self.graph.nodes:
            if node.name == name:
                return node
        raise KeyError(name)

    def example(self, name: str) -> Tensor:
        """A value of an input's shape and dtype: zeros, or for an input that embeddings are looked up with, their last row."""
        given = next(i for i in self.inputs if i.name == name)
        made = torch.zeros(given.shape, dtype=given.dtype)
        if made.is_floating_point() or made.dtype == torch.bool:
            return made
        reached, rows = {self.input_nodes()[name]}, []
        for node in self.graph.nodes:
            if node.op != "call_function" or not reached.intersection(node.all_input_nodes):
                continue
            if node.target is torch.ops.aten.embedding.default and node.args[1] in reached:
                rows.append(node.args[0].meta["val"].shape[0])
            elif isinstance(value := node.meta.get("val"), Tensor) and not value.is_floating_point():
                reached.add(node)
        return made + (min(rows) - 1 if rows else 0)

    @property
    def output_node(self) -> fx.Node:
        return next(iter(reversed(self.graph.nodes)))

    def input_nodes(self) -> dict[str, fx.Node]:
        return {str(node.target): node for node in self.graph.nodes if node.op == "placeholder"}

    def tensor(self, name: str) -> Tensor:
        return self.store[self.tensors[name]]

    def uses(self, name: str) -> list[fx.Node]:
        """The `get_attr` nodes that read a tensor, under this name or another that is tied to it."""
        key = self.tensors[name]
        return [n for n in self.graph.nodes if n.op == "get_attr" and self.tensors[str(n.target)] == key]

    def parameter_count(self) -> int:
        """Floating-point numbers stored, tied tensors once."""
        keys = {key for key in self.tensors.values() if self.store.dtype(key).is_floating_point}
        return sum(self.store.nbytes(key) // self.store.dtype(key).itemsize for key in keys)

    def nbytes(self) -> int:
        return sum(self.store.nbytes(key) for key in set(self.tensors.values()))

    def level(self) -> str:
        """`quantized` once a dequantizing operator stands in the graph, else `captured`."""
        return "quantized" if any(self._unpacks(node) for node in self.graph.nodes) else "captured"

    @staticmethod
    def _unpacks(node: fx.Node) -> bool:
        """Whether an operator makes a weight from packed tensors that are stored."""
        return is_unpacking(node.target) and all(s.op == "get_attr" for s in node.all_input_nodes)

    # --- editing

    def copy(self) -> ModelGraph:
        """The nodes anew over the same store; names are kept."""
        return ModelGraph(copy.deepcopy(self.graph), dict(self.tensors), self.store, list(self.inputs), list(self.outputs))

    def assign(self, other: ModelGraph) -> None:
        """Become `other`, in place: how a transaction commits."""
        self.graph, self.tensors, self.store = other.graph, other.tensors, other.store
        self.inputs, self.outputs = other.inputs, other.outputs

    def set_tensor(self, name: str, tensor: Tensor) -> None:
        """Bind a name to a new tensor; other names that were tied to the old one keep it."""
        self.tensors[name] = self.store.put(tensor)

    def get_attr(self, name: str, tensor: Tensor | None = None) -> fx.Node:
        """A node reading `name`, made at the current insert point; binds `tensor` to the name if one is given."""
        if tensor is not None:
            self.set_tensor(name, tensor)
        node, stored = self.graph.create_node("get_attr", name), self.tensor(name)  # read before the mode, which no file knows
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            node.meta["val"] = mode.from_tensor(stored)
        return node

    def fresh_name(self, base: str) -> str:
        if base not in self.tensors:
            return base
        return next(name for i in range(1, 1 << 30) if (name := f"{base}_{i}") not in self.tensors)

    def prune(self) -> None:
        """Erase nodes that no output needs, and the bindings that no node reads.

        torch's own dead-code elimination keeps scaled_dot_product_attention, which it counts as impure.
        """
        self.graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
        read = {str(node.target) for node in self.graph.nodes if node.op == "get_attr"}
        self.tensors = {name: key for name, key in self.tensors.items() if name in read}

    # --- running

    def module(self, *, dense: bool = False) -> fx.GraphModule:
        """A runnable module over the store's tensors; call it with the inputs by name, in order.

        dense: replace each dequantized weight by its value, computed once: more memory, no work per call.
        """
        graph = self.folded() if dense else self
        root = {name: graph.tensor(name) for name in graph.tensors}
        nodes = copy.deepcopy(graph.graph)
        for node in nodes.find_nodes(op="placeholder"):
            node.target = node.name  # an input's name may hold dots, as in past_key_values.0.key; a Python argument's may not
        return fx.GraphModule(root, nodes)  # type: ignore[arg-type]

    def folded(self) -> ModelGraph:
        """A copy in which calls that unpack stored weights, and give them another type, are replaced by their results."""
        folded = self.copy()
        folded.store = OverlayStore(self.store)
        made: set[fx.Node] = set()
        for node in folded.nodes:
            if not (self._unpacks(node) or (node.target is torch.ops.aten._to_copy.default and node.args[0] in made)):
                continue
            values = fx.map_arg((node.args, node.kwargs), lambda n: folded.tensor(str(n.target)))
            name = folded.fresh_name(f"{node.all_input_nodes[0].target}.dense")
            with folded.graph.inserting_before(node):
                constant = folded.graph.create_node("get_attr", name)
            folded.tensors[name] = folded.store.hold(node.target(*values[0], **values[1]))  # type: ignore[attr-defined,operator]
            constant.meta.update(node.meta)
            node.replace_all_uses_with(constant)
            made.add(constant)
        folded.prune()
        return folded

    def propagate(self) -> None:
        """Give each node `meta["val"]`: fake tensors for the example inputs. Raises what the first bad node raises."""
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        values: dict[fx.Node, Any] = {}
        examples = {i.name: i for i in self.inputs}
        fakes: dict[str, Tensor] = {}
        with mode, torch.no_grad(), _unlogged():
            for node in self.graph.nodes:
                if node.op == "placeholder":
                    example = examples[str(node.target)]
                    values[node] = torch.empty(example.shape, dtype=example.dtype)
                elif node.op == "get_attr":
                    key = self.tensors[str(node.target)]
                    if key not in fakes:
                        fakes[key] = torch.empty(self.store.shape(key), dtype=self.store.dtype(key))
                    values[node] = fakes[key]
                elif node.op == "call_function":
                    args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
                    try:
                        values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
                    except Exception as error:
                        raise VerificationError(f"shapes do not fit at\n{surroundings(node)}\n{error}") from error
                else:
                    values[node] = fx.map_arg(node.args[0], values.__getitem__)
                node.meta["val"] = values[node]

    # --- identity

    def digest(self) -> str:
        """A hash of nodes, tensors, inputs and outputs."""
        digest = xxhash.xxh3_128(json.dumps(self.to_json(), sort_keys=True).encode())
        return digest.hexdigest()

    def to_json(self) -> dict[str, Any]:
        return {
            "inputs": [
                {"name": i.name, "shape": list(i.shape), "dtype": str(i.dtype).removeprefix("torch."),
                 "dynamic": {str(d): s for d, s in i.dynamic.items()}}
                for i in self.inputs
            ],
            "outputs": self.outputs,
            "nodes": graph_to_json(self.graph),
            "tensors": self.tensors,
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: Mapping[str, Any], store: ParameterStore) -> ModelGraph:
        inputs = [
            Input(i["name"], tuple(i["shape"]), torch_value("dtype", i["dtype"]), {int(d): s for d, s in i["dynamic"].items()})
            for i in data["inputs"]
        ]
        graph = cls(graph_from_json(data["nodes"]), dict(data["tensors"]), store, inputs, list(data["outputs"]))
        graph.propagate()
        return graph


@contextmanager
def _unlogged() -> Iterator[None]:
    """torch logs a traceback of its own for shapes that do not fit; the error that is raised says it better."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


class OverlayStore(ParameterStore):
    """A store for values that live only as long as a run: not hashed, and the store below is not touched."""

    def __init__(self, below: ParameterStore) -> None:
        super().__init__()
        self._below, self._held = below, below._held if isinstance(below, OverlayStore) else 0

    def hold(self, tensor: Tensor) -> str:
        self._held += 1
        key = f"held-{self._held}"
        self._resident[key], self._versions[key] = tensor, tensor._version
        return key

    def __contains__(self, key: str) -> bool:
        return super().__contains__(key) or key in self._below

    def __getitem__(self, key: str) -> Tensor:
        return super().__getitem__(key) if super().__contains__(key) else self._below[key]

    def shape(self, key: str) -> tuple[int, ...]:
        return super().shape(key) if super().__contains__(key) else self._below.shape(key)

    def dtype(self, key: str) -> torch.dtype:
        return super().dtype(key) if super().__contains__(key) else self._below.dtype(key)


def inputs_of(graph: ModelGraph, values: Mapping[str, Tensor]) -> list[Tensor]:
    """The values in the order of the graph's inputs."""
    return [values[i.name] for i in graph.inputs]


def surroundings(node: fx.Node, radius: int = 2) -> str:
    """A node with its neighbours, the node itself marked: what an error shows."""
    lines, before, after = [f"  > {node.format_node()}"], node, node
    for _ in range(radius):
        before, after = before.prev, after.next
        if before.op != "root":
            lines.insert(0, f"    {before.format_node()}")
        if after.op != "root":
            lines.append(f"    {after.format_node()}")
    return "\n".join(lines)


def iterate_calls(graph: ModelGraph, *targets: object) -> Iterator[fx.Node]:
    """The calls of any of these operators, in order."""
    for node in graph.graph.nodes:
        if node.op == "call_function" and node.target in targets:
            yield node
