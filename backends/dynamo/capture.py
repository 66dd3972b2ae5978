"""What dynamo hands over becomes the same `ModelGraph` as every other capture.

before: torch functions over parameters, buffers, inputs and sizes as placeholders, writing into inputs as they please
after:  functional ATen in canonical form; parameters and buffers stored under their names in the module; sizes read from the
        inputs; what was written into an input is one more output, with the input that takes it

Traced with dynamo's own fake tensors, so that whatever the trace assumes of a size becomes a guard of dynamo's.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from lwcompile.canonical import canonicalize
from lwcompile.errors import Refused
from lwcompile.graph import Input, ModelGraph
from lwcompile.store import ParameterStore
from lwcompile.tracing import is_higher_order, module_path

aten = torch.ops.aten


@dataclass
class Captured:
    """A graph, and how dynamo's arguments and results map to its inputs and outputs.

    Attributes:
        frozen: position of an argument -> the tensor that the graph stores.
        numbers: position of an argument -> the Python number that it carries, which the graph takes as constant.
        inputs: the argument of each graph input; `examples` are dynamo's fake tensors for them.
        writes: output -> input that takes its value.
        results: for each result, the position of a graph output; or `argument` or `constant` with what it is.
    """

    graph: ModelGraph
    frozen: dict[int, Tensor]
    inputs: list[int]
    examples: list[Tensor]
    numbers: dict[int, float] = field(default_factory=dict)
    writes: dict[str, str] = field(default_factory=dict)
    results: list[tuple[str, Any]] = field(default_factory=list)


def capture(module: fx.GraphModule, arguments: Sequence[Any]) -> Captured:
    """The graph of dynamo's `module`, which is left as it is.

    Raises:
        Refused: the graph does what a `ModelGraph` does not hold: control flow, numbers beside tensors, other devices.
    """
    from torch._functorch.aot_autograd import aot_export_module
    from torch._guards import TracingContext, tracing

    placeholders = module.graph.find_nodes(op="placeholder")
    fakes = [node.meta["example_value"] for node in placeholders]
    if devices := {v.device.type for v in fakes if isinstance(v, Tensor)} - {"cpu"}:
        raise Refused(f"the graph runs on {', '.join(sorted(devices))}, and rewriting is for the processor so far")
    context = TracingContext.try_get()
    given = copy.deepcopy(module)
    numbers = _fix_numbers(given, arguments)
    with tracing(TracingContext(context.fake_mode if context is not None else None)), _unwound():
        traced, signature = aot_export_module(given, fakes, trace_joint=False, pre_dispatch=True)
    writes = {output: _position(traced, target) for output, target in signature.user_inputs_to_mutate.items()}
    frozen = {i: value for i, value in stored_arguments(module, arguments).items() if i not in writes.values()}
    made = _Builder(traced, placeholders, _counted(fakes, context), frozen).run(writes)  # type: ignore[arg-type]
    shared = _sharing(made.graph)
    canonicalize(made.graph)
    _keep_apart(made.graph, shared)
    made.numbers = numbers
    return made


@contextmanager
def _unwound() -> Iterator[None]:
    """Leave no transform of functorch's behind that the graph entered (vmap does) and, when it failed, did not leave."""
    depth = torch._C._functorch.get_dynamic_layer_stack_depth()
    try:
        yield
    finally:
        torch._C._functorch.pop_dynamic_layer_stack_and_undo_to_depth(depth)


def _counted(fakes: Sequence[Any], context: Any) -> list[Any]:
    """With a tensor of that many elements for each free number that is no tensor's size: a graph reads numbers as sizes."""
    sizes = {str(s.node.expr) for v in fakes if isinstance(v, Tensor) for s in v.shape if isinstance(s, torch.SymInt)}
    made = list(fakes)
    for i, value in enumerate(fakes):
        if isinstance(value, torch.SymInt) and str(value.node.expr) not in sizes:
            with context.fake_mode:
                made[i] = Counted(torch.empty(value, dtype=torch.int8))
            sizes.add(str(value.node.expr))
    return made


@dataclass(frozen=True)
class Counted:
    """The fake tensor that stands for a number."""

    value: Tensor


def as_input(value: Any) -> Tensor:
    """What a graph input takes for one of dynamo's arguments; see `_counted`."""
    return value if isinstance(value, Tensor) else torch.empty(value, dtype=torch.int8)


def _fix_numbers(module: fx.GraphModule, arguments: Sequence[Any]) -> dict[int, float]:
    """Replace what is read of numbers that dynamo carries in tensors, as a module's own float under dynamic shapes."""
    found: dict[int, float] = {}
    for i, (node, value) in enumerate(zip(module.graph.find_nodes(op="placeholder"), arguments)):
        reads = list(node.users)
        if isinstance(value, Tensor) and value.dim() == 0 and reads and all(n.target == "item" for n in reads):
            found[i] = value.item()
            for read in reads:
                _put_number(module, read, found[i])
    module.recompile()
    return found


def _put_number(module: fx.GraphModule, read: fx.Node, value: float) -> None:
    for user in list(read.users):
        user.args, user.kwargs = fx.map_arg((user.args, user.kwargs), lambda n: value if n is read else n)
    module.graph.erase_node(read)


def _position(traced: Any, name: str) -> int:
    return next(i for i, node in enumerate(traced.graph.find_nodes(op="placeholder")) if node.name == name)


def stored_arguments(module: fx.GraphModule, arguments: Sequence[Any]) -> dict[int, Tensor]:
    """Position -> parameter or buffer, among the arguments of dynamo's graph."""
    placeholders = module.graph.find_nodes(op="placeholder")
    pairs = enumerate(zip(placeholders, arguments))
    return {i: value for i, (node, value) in pairs if isinstance(value, Tensor) and _is_stored(node, value)}


def _is_stored(node: fx.Node, value: Tensor) -> bool:
    """Parameters and buffers of modules, as long as a write into them can be noticed afterwards."""
    source = source_of(node)
    return not value.is_inference() and (
        isinstance(value, torch.nn.Parameter) or re.search(r"_buffers('])?\[", source) is not None
    )


def source_of(node: fx.Node) -> str:
    """Where dynamo took an argument from, as Python."""
    source = getattr(node, "_dynamo_source", None)
    name = getattr(source, "name", "")
    return name() if callable(name) else str(name)  # type: ignore


def _name(node: fx.Node) -> str:
    """`L['self']._modules['layers']._modules['0']._parameters['weight']` -> `layers.0.weight`; `L['ids']` -> `ids`.

    A module that hides its own attributes is read through its `__dict__`: `...__dict__['_modules']['norm']`.
    """
    source = source_of(node)
    words = re.findall(r"\['?([^\[\]']+)'?\]|\.([A-Za-z]\w*)", source)
    path = [word for a, b in words if (word := a or b) not in ("_modules", "_parameters", "_buffers")]
    stored = re.search(r"_(parameters|buffers)('])?\[", source) is not None
    return ".".join(path[1:] if stored else path) or node.name


class _Builder:
    """One pass over the traced nodes."""

    def __init__(
        self, traced: fx.GraphModule, placeholders: Sequence[fx.Node], fakes: Sequence[Any], frozen: dict[int, Tensor]
    ) -> None:
        self.traced, self.placeholders, self.fakes, self.frozen = traced, placeholders, fakes, frozen
        self.graph, self.store = fx.Graph(), ParameterStore()
        self.tensors: dict[str, str] = {}
        self.inputs: list[Input] = []
        self.values: dict[fx.Node, Any] = {}
        self.positions: list[int] = []

    def run(self, writes: Mapping[str, int]) -> Captured:
        given = self.traced.graph.find_nodes(op="placeholder")
        self._placeholders(given)
        for node in self.traced.graph.nodes:
            if node.op == "get_attr":
                self._constant(node)
            elif node.op == "call_function":
                if is_higher_order(node):
                    raise Refused(f"the graph holds control flow ({node.target})")
                copied = self.graph.node_copy(node, self.values.__getitem__)
                copied.meta = {"path": path} if (path := module_path(node)) else {}
                self.values[node] = copied
        return self._outputs(given, writes)

    def _placeholders(self, given: Sequence[fx.Node]) -> None:
        sizes: dict[str, tuple[fx.Node, int]] = {}
        for i, node in enumerate(given):
            value = self.fakes[i]
            if i in self.frozen:
                name = self._fresh(_name(self.placeholders[i]))
                self.values[node] = self.graph.create_node("get_attr", name)
                self.tensors[name] = self.store.put(self.frozen[i])
            elif isinstance(value, Tensor | Counted):
                tensor = value if isinstance(value, Tensor) else value.value
                self.values[node] = self._input(i, tensor)
                for dim, size in enumerate(tensor.shape):
                    if isinstance(size, torch.SymInt):
                        sizes.setdefault(str(size.node.expr), (self.values[node], dim))
        for i, node in enumerate(given):
            value = self.fakes[i]
            if isinstance(value, Counted):
                self.values[node] = self.graph.call_function(aten.sym_size.int, (self.values[node], 0))
            elif isinstance(value, torch.SymInt):
                self.values[node] = self.graph.call_function(aten.sym_size.int, sizes[str(value.node.expr)])
            elif not isinstance(value, Tensor):
                self.values[node] = value

    def _input(self, i: int, value: Tensor) -> fx.Node:
        name = re.sub(r"\W+", "_", _name(self.placeholders[i]))
        name = name if all(j.name != name for j in self.inputs) else f"{name}_{i}"
        shape = tuple(int(s.node.hint) if isinstance(s, torch.SymInt) else int(s) for s in value.shape)
        free = {d: str(s.node.expr) for d, s in enumerate(value.shape) if isinstance(s, torch.SymInt)}
        self.inputs.append(Input(name, shape, value.dtype, free))
        self.positions.append(i)
        return self.graph.create_node("placeholder", name)

    def _constant(self, node: fx.Node) -> None:
        tensor = getattr(self.traced, str(node.target))
        if not isinstance(tensor, Tensor) or isinstance(tensor, torch._subclasses.FakeTensor):
            raise Refused(f"the graph holds {node.target}, whose value is not known")
        name = self._fresh(str(node.target))
        self.values[node] = self.graph.create_node("get_attr", name)
        self.tensors[name] = self.store.put(tensor)

    def _fresh(self, name: str) -> str:
        while name in self.tensors:
            name += "_"
        return name

    def _outputs(self, given: Sequence[fx.Node], writes: Mapping[str, int]) -> Captured:
        arguments = {node: i for i, node in enumerate(given)}
        returned = list(self.traced.graph.output_node().args[0])  # type: ignore[arg-type]
        names = {node.name: node for node in self.traced.graph.nodes}
        nodes = [names[output] for output in writes]
        outputs = [f"write{i}" for i in range(len(nodes))]
        written = {names[output]: i for output, i in writes.items()}
        results: list[tuple[str, Any]] = []
        for value in returned[len(writes) :]:
            if not isinstance(value, fx.Node):
                results.append(("constant", value))
            elif value in arguments or value in written:
                results.append(("argument", arguments.get(value, written.get(value))))
            else:
                results.append(("output", len(nodes)))
                outputs.append(f"output{len(nodes)}")
                nodes.append(value)
        self.graph.output(tuple(self.values[node] for node in nodes))
        made = ModelGraph(self.graph, self.tensors, self.store, self.inputs, outputs)
        made.prune()
        self._leave_out_unread(made)
        by_position = dict(zip(self.positions, (i.name for i in self.inputs)))
        taken = {name: by_position[i] for name, i in zip(outputs, writes.values())}
        examples = [f.value if isinstance(f := self.fakes[i], Counted) else f for i in self.positions]
        return Captured(made, self.frozen, self.positions, examples, writes=taken, results=results)

    def _leave_out_unread(self, graph: ModelGraph) -> None:
        """Numbers that nothing is computed of, such as the stride of a slice, would pass for a size that varies."""
        nodes = graph.input_nodes()
        kept = [
            k for k, i in enumerate(self.positions) if not isinstance(self.fakes[i], Counted) or nodes[self.inputs[k].name].users
        ]
        for k in {*range(len(self.inputs))} - {*kept}:
            graph.graph.erase_node(nodes[self.inputs[k].name])
        self.positions = [self.positions[k] for k in kept]
        self.inputs[:] = [self.inputs[k] for k in kept]


# --- memory that outputs share


def _sharing(graph: ModelGraph) -> set[frozenset[str]]:
    """Pairs of inputs and outputs that lie in one memory. Results are told apart by whoever writes into them."""
    graph.propagate()
    places = [(name, node) for name, node in graph.input_nodes().items()]
    places += list(zip(graph.outputs, graph.output_node.args[0]))  # type: ignore[arg-type]
    memory: dict[int, list[str]] = {}
    for name, node in places:  # type: ignore
        value = node.meta.get("val") if isinstance(node, fx.Node) else None
        if isinstance(value, Tensor):
            memory.setdefault(value.untyped_storage()._cdata, []).append(name)
    return {frozenset((a, b)) for names in memory.values() for i, a in enumerate(names) for b in names[:i]}


def _keep_apart(graph: ModelGraph, before: set[frozenset[str]]) -> None:
    """Copy outputs that share memory only since copies were taken out of the graph."""
    fresh = {name for pair in _sharing(graph) - before for name in pair}
    values = list(graph.output_node.args[0])  # type: ignore[arg-type,call-overload]
    for i, name in enumerate(graph.outputs):
        if name in fresh:
            with graph.graph.inserting_before(graph.output_node):
                values[i] = graph.graph.call_function(aten.clone.default, (values[i],))
    graph.output_node.args = (tuple(values),)
    graph.propagate()
