"""Inductor over a graph whose weights are the code's first inputs: what it compiles can be kept in a file and used again.

Products of a few rows with large dense weights take the form that was measured to be the fastest (`rows`). In a compressed graph,
products with packed weights read them as they are packed, and attention of one query reads its cache once, in C++ of our own,
wherever that was measured to be faster (`ways`, `attention`, `lwcompile.timings`). Numbers stay float32, and nothing is rounded that
the graph does not round, unless `activations` says so; then the first call is compared with the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx

from lwcompile.backends.inductor import attention, products, rows
from lwcompile.backends.inductor.checked import Checked
from lwcompile.backends.inductor.libraries import Libraries, noted
from lwcompile.backends.inductor.lower import lowered
from lwcompile.backends.inductor.replay import Replayed
from lwcompile.backends.inductor.ways import Choice
from lwcompile.contract import Code, Codegen
from lwcompile.graph import ModelGraph
from lwcompile.ops import is_unpacking
from lwcompile.rundir import write_atomic
from lwcompile.timings import DeviceTable

aten = torch.ops.aten


@dataclass(frozen=True)
class Inductor(Codegen):
    """torch's own compiler. Needs a C++ compiler on CPU.

    Options:
        freezing: weights become constants, packed for the processor's products: some products gain, compiling takes longer, and
            the code cannot be kept for another process.
        products: of packed weights: `measured` takes the fastest way for each shape, `packed` never a dense weight, `dense` always. Of
            dense weights, large ones by a few rows: `measured` takes the faster form, the others torch's.
        activations: `int8` lets products of 2- and 4-bit weights round their input to int8, in blocks of 32 numbers, where that is faster,
            and round what that left once more in blocks that are large in their row. It moves a product's outputs by about 0.5 % of the
            largest; the first call is compared with the graph, and the log says what it moved. `float32` rounds nothing.
        replay: calls of a graph of fixed sizes are recorded once, proven once, and made without Python from the fourth on.
    """

    name: ClassVar[str] = "inductor"
    automatic: ClassVar[int] = 10

    freezing: bool = False
    products: products.Wanted = "measured"
    activations: Literal["float32", "int8"] = "float32"
    replay: bool = True

    def unavailable(self) -> str | None:
        return missing_compiler()

    def executors(self, graph: ModelGraph) -> dict[str, str]:
        from torch._inductor.decomposition import select_decomp_table
        from torch._inductor.lowering import fallbacks, lowerings

        known = {*lowerings, *select_decomp_table()} - set(fallbacks)
        found = {n.name: _executor(n.target, known) for n in graph.graph.nodes if n.op == "call_function"}
        table = DeviceTable()
        found |= {name: str(few) for name, few in self._few(graph, table).items()}
        if graph.level() == "captured":
            return found
        own = {name: attention.words(took) for name, took in self._attentions(graph, table).items()}
        return found | own | products.executors(graph, self._products(graph, table))

    def compile(self, graph: ModelGraph, examples: Sequence[Tensor], writes: Mapping[str, str]) -> Code:
        from torch._inductor.compile_fx import compile_fx

        module = in_place(self._lowered(graph), writes)
        if self.freezing:
            with torch.no_grad():
                frozen: Any = compile_fx(module, list(examples), config_patches={"freezing": True})
            return Code(lambda values: frozen(*values))
        tensors, fakes = _lift(module), list(examples)
        mode = torch._guards.detect_fake_mode(fakes)
        fakes = [*(t if mode is None else mode.from_tensor(t, static_shapes=True) for t in tensors), *fakes]
        settings: dict[str, Any] = {}
        if (
            graph.level() != "captured"
        ):  # no check of each part of each packed weight, and no threads woken for a row's few numbers
            settings = {"size_asserts": False, "cpp.min_chunk_size": 1 << 14}
        libraries = Libraries()
        with torch.no_grad(), torch._functorch.config.patch(bundled_autograd_cache=True), _tracing(mode), libraries.noting():
            compiled: Any = compile_fx(module, fakes, config_patches=settings)
        if self.activations == "int8" and graph.level() == "quantized":
            return Code(Checked(compiled, graph, len(tensors)), tuple(tensors))
        keeps = hasattr(compiled, "serialize")
        return Code(
            lambda values: compiled(*values), tuple(tensors), (lambda path: _save(compiled, libraries, path)) if keeps else None
        )

    def seconds(self, graph: ModelGraph) -> float | None:
        if graph.level() == "captured" or self.products != "measured":
            return None
        return sum(choice.seconds.get(choice.way.name, 0.0) for _, choice in self._products(graph, DeviceTable()))

    def _lowered(self, graph: ModelGraph) -> ModelGraph:
        """With products of few rows in the form that is the fastest, and in a compressed graph with our kernels' calls."""
        table = DeviceTable()
        few = self._few(graph, table)
        if graph.level() == "captured":
            if not any(one.ours for one in few.values()):
                return graph
            made = graph.copy()
        else:
            made = lowered(graph, self._products(graph, table))
            attention.lower(made, self._attentions(graph, table))
        rows.lower(made, few)
        return made

    def _products(self, graph: ModelGraph, table: DeviceTable) -> list[tuple[products.Product, Choice]]:
        return products.choices(graph, self.products, self.activations == "int8", table)

    def _attentions(self, graph: ModelGraph, table: DeviceTable) -> dict[str, dict[str, float]]:
        return attention.chosen(graph, table) if self.products == "measured" else {}

    def _few(self, graph: ModelGraph, table: DeviceTable) -> dict[str, rows.Few]:
        """None with frozen weights, of which torch's product is another than the one measured."""
        if self.products != "measured" or self.freezing or self.unavailable() is not None:
            return {}
        return rows.chosen(graph, table)

    def load(self, path: Path) -> Callable[[Sequence[Tensor]], Sequence[Any]]:
        from torch._inductor.standalone_compile import AOTCompiledArtifact

        with noted(_places(path)):
            code = AOTCompiledArtifact.deserialize(path.read_bytes())
        return lambda values: code(*values)

    def bind(self, call: Callable[[Sequence[Tensor]], Sequence[Any]], tensors: Sequence[Tensor]) -> Callable[..., Sequence[Any]]:
        return Replayed(call, tensors) if self.replay else super().bind(call, tensors)


def _save(compiled: Any, libraries: Libraries, path: Path) -> None:
    from torch._inductor.standalone_compile import AOTCompiledArtifact

    write_atomic(path, AOTCompiledArtifact(compiled).serialize())
    libraries.save(_places(path))


def _places(path: Path) -> Path:
    """Of the libraries of the code in this file."""
    return path.with_suffix(".libraries.json")


def _tracing(mode: Any) -> Any:
    """A context of its own, which knows nothing of dynamo's graph, over the same sizes."""
    return torch._guards.tracing(torch._guards.TracingContext(mode))


def _lift(module: fx.GraphModule) -> list[Tensor]:
    """Make stored tensors the module's first inputs; their values, in order."""
    tensors: dict[str, Tensor] = {}
    inputs: dict[str, fx.Node] = {}
    first = next(n for n in module.graph.nodes if n.op != "get_attr")
    for node in module.graph.find_nodes(op="get_attr"):
        name = str(node.target)
        if name not in inputs:
            value: Any = module
            for part in name.split("."):
                value = getattr(value, part)
            with module.graph.inserting_before(first):
                inputs[name] = module.graph.placeholder(f"stored{len(inputs)}")
            inputs[name].meta.update(node.meta)
            tensors[name] = value.detach() if value.requires_grad else value
        node.replace_all_uses_with(inputs[name])
        module.graph.erase_node(node)
    module.recompile()
    module.delete_all_unused_submodules()
    return list(tensors.values())


_LIBRARY = (
    aten.linear.default,
    aten.mm.default,
    aten.bmm.default,
    aten.matmul.default,
    aten.addmm.default,
    aten.convolution.default,
)


def _executor(target: Any, known: set[Any]) -> str:
    if is_unpacking(target):
        return "nobody: computed once, when compiled"
    if target in _LIBRARY:
        return "the linear algebra library, called by Inductor's code"
    if target is aten.scaled_dot_product_attention.default:
        return "torch's attention kernel, called by Inductor's code"
    known_to = (
        target in known or getattr(target, "overloadpacket", None) in known or not isinstance(target, torch._ops.OpOverload)
    )
    composite = isinstance(target, torch._ops.OpOverload) and target._can_decompose()
    return "C++ loops by Inductor" if known_to or composite else "the operator's own kernel, called by Inductor's code"


@dataclass(frozen=True)
class Eager(Codegen):
    """The graph's own calls, one by one."""

    name: ClassVar[str] = "eager"
    automatic: ClassVar[int] = 1

    def executors(self, graph: ModelGraph) -> dict[str, str]:
        calls = [n for n in graph.graph.nodes if n.op == "call_function"]
        return {n.name: "nobody: computed once, when compiled" if is_unpacking(n.target) else "torch, one by one" for n in calls}

    def compile(self, graph: ModelGraph, examples: Sequence[Tensor], writes: Mapping[str, str]) -> Code:
        module = in_place(graph, writes)
        tensors = _lift(module)

        def run(values: Sequence[Tensor]) -> Sequence[Any]:
            with torch.no_grad():
                return module(*values)

        return Code(run, tuple(tensors))


def in_place(graph: ModelGraph, writes: Mapping[str, str]) -> fx.GraphModule:
    """The graph as a module over dense weights that writes what `writes` says into its inputs, after everything else."""
    module = graph.module(dense=True)
    output = next(iter(reversed(module.graph.nodes)))
    inputs = dict(zip((i.name for i in graph.inputs), module.graph.find_nodes(op="placeholder")))
    values = dict(zip(graph.outputs, output.args[0]))
    with module.graph.inserting_before(output):
        for name, target in writes.items():
            module.graph.call_function(aten.copy_.default, (inputs[target], values[name]))
    module.recompile()
    return module


@cache
def missing_compiler() -> str | None:
    """Why Inductor cannot compile for the processor; None if it can."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception as error:  # what it raises differs between versions
        return f"no C++ compiler was found ({str(error).strip().splitlines()[0]}); install g++ or name another codegen"
    return None
