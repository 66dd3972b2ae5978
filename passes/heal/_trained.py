"""What is trained: which stored tensors, the floats that stand for them meanwhile, and an interpreter that runs with those.

A stored tensor is known by its content, so that what is tied stays tied; but vectors of ones, or zeros, are equal by chance, and
those are told apart by name.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, fx

from lwcompile.executor import Executor, Values
from lwcompile.formats import pack_bits, unpack_bits
from lwcompile.former import formers
from lwcompile.graph import ModelGraph
from lwcompile.program import Program
from lwcompile.residual import NORMS, WEIGHTED
from lwcompile.structure import Structure

aten = torch.ops.aten
DEQUANTIZE = torch.ops.lwcompile.dequantize.default

WORDS = ("norms", "scales", "codes", "adapters", "frozen", "changed", "all")
Name = tuple[str, str]
"""Entry point and name in its graph."""


@dataclass(eq=False)
class Trained:
    """One stored tensor under training. `parameter` is float32: the tensor's values, or the positions of its codes."""

    names: list[Name]
    stored: Tensor
    parameter: Tensor
    bits: int = 0
    """Of codes that are trained straight through (arXiv 1308.3432); 0 for everything else."""

    def value(self, wide: bool = False) -> Tensor:
        """What a forward pass computes with: exactly what would be stored now, gradients passing the rounding.

        wide: in float32 whatever is stored, so that gradients are not rounded; for operators that widen it themselves.
        """
        p = self.parameter
        if self.bits:
            clamped = p.clamp(0, 2**self.bits - 1)  # as in LSQ (arXiv 1902.08153), a code past the end has no gradient
            return clamped + (clamped.round() - clamped).detach()
        if p.dtype == self.stored.dtype:
            return p
        return p + (self._rounded(p).float() - p).detach() if wide else p.to(self.stored.dtype)

    def result(self) -> Tensor:
        """To be stored: of the same shape and dtype as before."""
        p = self.parameter.detach().cpu()
        if self.bits:
            return pack_bits(p.clamp(0, 2**self.bits - 1).round().to(torch.uint8), self.bits)
        return self._rounded(p)

    def store(self, program: Program) -> None:
        """Put the result where the tensor was."""
        result = self.result()
        for entry, name in self.names:
            program.entries[entry].set_tensor(name, result)

    def _rounded(self, p: Tensor) -> Tensor:
        limit = torch.finfo(self.stored.dtype).max
        return p.detach().clamp(-limit, limit).to(self.stored.dtype)

    @property
    def size(self) -> float:
        """The root mean square that a step is a fraction of; 1e-3 at least, so that zeros move too."""
        return max(self.parameter.detach().double().square().mean().sqrt().item(), 1e-3)


# --- choosing


def stored_behind(value: Any) -> Iterator[fx.Node]:
    """The `get_attr` nodes that a value is computed from, where those are all that it is computed from."""
    if isinstance(value, fx.Node) and _is_constant(value):
        if value.op == "get_attr":
            yield value
        for source in value.all_input_nodes:
            yield from stored_behind(source)


def read_by(call: fx.Node) -> Iterator[fx.Node]:
    """The `get_attr` nodes that a call reads, directly or through arithmetic on stored tensors alone."""
    for source in call.all_input_nodes:
        yield from stored_behind(source)


def _is_constant(node: fx.Node) -> bool:
    sources = node.all_input_nodes
    return node.op == "get_attr" or (node.op == "call_function" and bool(sources) and all(map(_is_constant, sources)))


def roles(program: Program, dense: Program) -> dict[str, set[Name]]:
    """`norms`, `scales`, `codes`, `adapters`, `frozen` and `weights` -> the tensors that are such."""
    found: dict[str, set[Name]] = defaultdict(set)
    known = dense.keys()
    for entry, graph in program.entries.items():
        before = dense.entries[entry]
        gains = {str(read.target) for node in before.graph.nodes if node.target in NORMS for read in read_by(node)}
        reads = [(role, str(read.target)) for node in graph.graph.nodes for role, read in _reads(node)]
        reads += [("frozen", str(read.target)) for _, _, calls in formers(graph) for call in calls for read in read_by(call)]
        for role, name in [*reads, *(("norms", name) for name in gains & graph.tensors.keys())]:
            if role == "adapters" and graph.tensors[name] in known:
                continue
            if role == "codes" or graph.tensor(name).is_floating_point():
                found[role].add((entry, name))
    return found


def _reads(node: fx.Node) -> Iterator[tuple[str, fx.Node]]:
    if node.target in NORMS:
        yield from (("norms", read) for read in read_by(node))
    elif node.target in WEIGHTED:
        yield from (("weights", read) for read in stored_behind(node.args[1]))
        yield from (("norms", read) for read in stored_behind(node.args[2] if len(node.args) > 2 else None))
        if (first := _narrower(node)) is not None:
            yield from (("adapters", read) for pair in (first, node) for read in stored_behind(pair.args[1]))
    elif node.target is aten.embedding.default:
        yield from (("weights", read) for read in stored_behind(node.args[0]))
    elif node.target is DEQUANTIZE:
        codes, *grid = node.args[:3]
        yield from (("codes", read) for read in stored_behind(codes))
        yield from (("scales", read) for part in grid for read in stored_behind(part))


def _narrower(node: fx.Node) -> fx.Node | None:
    """The linear that feeds this one directly, through fewer features than either has on its other side."""
    first = node.args[0]
    if node.target is not aten.linear.default or not isinstance(first, fx.Node) or first.target is not aten.linear.default:
        return None
    (rank, features), out = first.args[1].meta["val"].shape, node.args[1].meta["val"].shape[0]  # type: ignore[union-attr]
    return first if rank < min(features, out) else None


def choose(
    program: Program, dense: Program, words: Sequence[str], structure: Structure, changed: Callable[[], set[Name]]
) -> set[Name]:
    """The tensors that `words` name; each is one of `WORDS`, or a glob over names of tensors and ids of sites."""
    known = roles(program, dense)
    floats = set().union(*(names for role, names in known.items() if role != "codes"))
    chosen: set[Name] = set()
    for word in words:
        if word == "all":
            chosen |= floats
        elif word == "changed":
            chosen |= floats & changed()
        elif word in WORDS:
            chosen |= known.get(word, set())
        else:
            chosen |= floats & _matching(program, structure, word)
    return chosen


def _matching(program: Program, structure: Structure, glob: str) -> set[Name]:
    found = {(entry, n) for entry, graph in program.entries.items() for n in graph.tensors if fnmatchcase(n, glob)}
    nodes = {(entry, node.name): node for entry, graph in program.entries.items() for node in graph.graph.nodes}
    for site in structure.sites.values():
        if fnmatchcase(site.id, glob) and (node := nodes.get((site.entry, site.node))) is not None:
            found |= {(site.entry, str(read.target)) for read in read_by(node)}
    return found


def made(program: Program, dense: Program, chosen: Iterable[Name], device: torch.device) -> list[Trained]:
    """A float32 copy of each chosen tensor, tied ones once, in the order of their names.

    Codes start within their rounding at the dense weight, so that those that were rounded furthest are the first to move.
    """
    by_tensor: dict[Any, list[Name]] = defaultdict(list)
    for entry, name in sorted(chosen):
        key = program.entries[entry].tensors[name]
        values = program.store[key]
        by_tensor[key, name if bool((values == values.flatten()[:1]).all()) else ""].append((entry, name))
    found = []
    for (key, by_name), names in by_tensor.items():
        for entry, graph in program.entries.items():  # tied ones are trained with it, by whatever name they were chosen
            names += [(entry, n) for n, k in graph.tensors.items() if k == key and by_name in ("", n) and (entry, n) not in names]
        stored = program.store[key]
        if stored.is_floating_point():
            found.append(Trained(names, stored, stored.float().to(device).clone().requires_grad_()))
            continue
        entry, name = names[0]
        found.append(_codes(names, program.entries[entry], dense.entries[entry], name, device))
    return found


def _codes(names: list[Name], graph: ModelGraph, dense: ModelGraph, name: str, device: torch.device) -> Trained:
    unpack = next(u for n in graph.nodes if n.op == "get_attr" and n.target == name for u in n.users if u.target is DEQUANTIZE)
    bits, group, width = unpack.args[3:]
    stored = graph.tensor(name)
    positions = unpack_bits(stored, bits, width).float()  # type: ignore[arg-type]
    if (weight := _before(unpack, dense)) is not None and weight.shape == positions.shape:
        _, scale, zero = (arg if arg is None else graph.tensor(str(arg.target)) for arg in unpack.args[:3])  # type: ignore[union-attr]
        scale, zero, columns = _grid(scale, zero, bits, group, width)  # type: ignore[arg-type]
        wanted = weight.float() / scale[:, columns] + zero[:, columns]
        positions += (wanted - positions).nan_to_num(nan=0.0).clamp(-0.49, 0.49)
    return Trained(names, stored, positions.to(device).requires_grad_(), bits)  # type: ignore[arg-type]


def _before(unpack: fx.Node, dense: ModelGraph) -> Tensor | None:
    """The weight that a call of the same name reads in the dense graph."""
    calls = {node.name: node for node in dense.graph.nodes}
    for user in unpack.users:
        if (call := calls.get(user.name)) is not None:
            read = call.args[user.args.index(unpack)]
            return dense.tensor(str(read.target)) if isinstance(read, fx.Node) and read.op == "get_attr" else None
    return None


def _grid(scale: Tensor, zero: Tensor | None, bits: int, group: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scales and zero points as float32 [rows, groups], and the group of each column."""
    if zero is None:
        zero = torch.full_like(scale, 2 ** (bits - 1))
    elif not zero.is_floating_point():
        zero = unpack_bits(zero, bits, scale.shape[1])
    return scale.float(), zero.float(), torch.arange(width, device=scale.device) // group


# --- running


class Training(Executor):
    """Runs a program whose trained tensors are what their parameters are now; what depends on none of them is computed once."""

    def __init__(self, program: Program, trained: Iterable[Trained], device: str | torch.device) -> None:
        super().__init__(program, device)
        by_name = {name: one for one in trained for name in one.names}
        entries = {id(graph): entry for entry, graph in program.entries.items()}
        self.sources: dict[fx.Node, Trained] = {}
        self._moving: set[fx.Node] = set()
        self._now: dict[Any, Tensor] = {}
        for node, graph in self._constant.items():  # in the order of the nodes
            if node.op == "get_attr" and (one := by_name.get((entries[id(graph)], str(node.target)))) is not None:
                self.sources[node] = one
            if node in self.sources or any(source in self._moving for source in node.all_input_nodes):
                self._moving.add(node)

    def start(self, inputs: Mapping[str, Tensor]) -> Values:
        self._now.clear()
        return super().start(inputs)

    def constant(self, node: fx.Node) -> Tensor:
        if node not in self._moving:
            return super().constant(node)
        if node not in self._now:
            self._now[node] = self._computed(node)
        return self._now[node]

    def _computed(self, node: fx.Node) -> Tensor:
        if node in self.sources:
            return self.sources[node].value(wide=all(user.target is DEQUANTIZE for user in node.users))
        if node.target is DEQUANTIZE and node.args[0] in self.sources:
            return self._on_grid(node)
        return self._call(node, self.constant)

    def _values(self, args: Any) -> Any:
        return fx.map_arg(args, self.constant)

    def _on_grid(self, node: fx.Node) -> Tensor:
        """What `dequantize` computes, of codes that are floats."""
        codes, *grid = self._values(node.args)
        scale, zero, columns = _grid(*grid)
        return (codes - zero[:, columns]) * scale[:, columns]
