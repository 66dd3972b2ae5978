"""Inductor over a graph whose weights are constants: it packs them for the processor's products once, when it compiles.

Packed codes are turned into dense weights when the graph is compiled, so that a quantized graph runs at the dense one's speed,
and takes its memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from lwcompile.contract import Codegen
from lwcompile.graph import ModelGraph

aten = torch.ops.aten


@dataclass(frozen=True)
class Inductor(Codegen):
    """torch's own compiler, with frozen weights. Needs a C++ compiler on CPU."""

    name: ClassVar[str] = "inductor"
    automatic: ClassVar[int] = 10

    def unavailable(self) -> str | None:
        return missing_compiler()

    def compile(
        self, graph: ModelGraph, examples: Sequence[Tensor], writes: Mapping[str, str]
    ) -> Callable[[Sequence[Tensor]], Sequence[Any]]:
        from torch._inductor.compile_fx import compile_fx

        with torch.no_grad():
            compiled: Any = compile_fx(in_place(graph, writes), list(examples), config_patches={"freezing": True})
        return lambda values: compiled(*values)


@dataclass(frozen=True)
class Eager(Codegen):
    """The graph's own calls, one by one."""

    name: ClassVar[str] = "eager"
    automatic: ClassVar[int] = 1

    def compile(
        self, graph: ModelGraph, examples: Sequence[Tensor], writes: Mapping[str, str]
    ) -> Callable[[Sequence[Tensor]], Sequence[Any]]:
        module = in_place(graph, writes)

        def run(values: Sequence[Tensor]) -> Sequence[Any]:
            with torch.no_grad():
                return module(*values)

        return run


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
