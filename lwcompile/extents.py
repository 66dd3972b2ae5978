"""Which sizes in a graph are fixed and which follow its inputs.

The graph is propagated twice with fake tensors, each symbol at another size both times. A size that came out the same is
fixed; one that did not is `Free`, and two free sizes that agree both times are one size. No symbolic algebra is needed:
the sizes per symbol are primes, so equal pairs mean equal expressions in practice, and parity proves the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from lwcompile.errors import Refused, VerificationError
from lwcompile.graph import Input, ModelGraph


class Free(NamedTuple):
    """A size that follows the inputs: its value in the first and in the second propagation."""

    first: int
    second: int


Dim = int | Free


@dataclass(frozen=True)
class Extents:
    """The dtype and sizes of every tensor node, the value of every size node, and the symbols of the inputs."""

    dims: Mapping[fx.Node, tuple[Dim, ...]]
    dtypes: Mapping[fx.Node, torch.dtype]
    sizes: Mapping[fx.Node, Any]
    symbols: Mapping[Free, str]

    def symbol(self, dim: Dim) -> int | str | None:
        """A size as a model file writes it: a number, an input's symbol, or None for an expression of symbols."""
        return dim if isinstance(dim, int) else self.symbols.get(dim)


def free_symbols(inputs: Sequence[Input]) -> list[str]:
    """The symbols of the inputs, in order of appearance."""
    return list(dict.fromkeys(symbol for item in inputs for symbol in item.dynamic.values()))


def example_sizes(inputs: Sequence[Input]) -> dict[str, int]:
    return {symbol: item.shape[dim] for item in inputs for dim, symbol in item.dynamic.items()}


def sums(inputs: Sequence[Input]) -> dict[str, tuple[str, str]]:
    """Lengths that are two others' sum in the example, as a mask's is a cache's and the new tokens'. They may be free all the same."""
    examples = example_sizes(inputs)
    batches = {item.dynamic[0] for item in inputs if 0 in item.dynamic}
    lengths = [s for s in examples if s not in batches]
    found: dict[str, tuple[str, str]] = {}
    for total, a, b in product(lengths, repeat=3):
        parts_are_free = a not in found and b not in found and total not in {p for pair in found.values() for p in pair}
        if len({total, a, b}) == 3 and examples[total] == examples[a] + examples[b] and parts_are_free:
            found.setdefault(total, (a, b))
    return found


def summed(inputs: Sequence[Input], sizes: Mapping[str, int]) -> dict[str, int]:
    """The sizes, with those that are sums following their parts."""
    return {**sizes, **{total: sizes[a] + sizes[b] for total, (a, b) in sums(inputs).items()}}


def shape_at(item: Input, sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(sizes[item.dynamic[d]] if d in item.dynamic else size for d, size in enumerate(item.shape))


def extents(graph: ModelGraph) -> Extents:
    """Propagate twice and compare. `Refused` if the graph runs at no other size than its example's."""
    symbols = free_symbols(graph.inputs)
    reasons: list[str] = []
    for first, second in _candidates(graph, symbols):
        try:
            runs = [_propagated(graph, sizes) for sizes in (first, second)]
        except (VerificationError, RuntimeError) as error:
            reasons.append(str(error).strip().splitlines()[-1])
            continue
        return _compared(graph, *runs)
    raise Refused(f"the graph runs at no other sizes of {', '.join(symbols)} than the example's ({reasons[-1]})")


_PRIMES = (5, 11, 17, 23, 29, 37, 43, 47, 61, 71, 79, 97), (7, 13, 19, 3, 31, 41, 53, 59, 67, 73, 83, 101)


def _candidates(graph: ModelGraph, symbols: list[str]) -> Iterator[tuple[dict[str, int], dict[str, int]]]:
    example = example_sizes(graph.inputs)
    first, second = dict(zip(symbols, _PRIMES[0])), dict(zip(symbols, _PRIMES[1]))
    yield first, second
    if sums(graph.inputs):
        yield summed(graph.inputs, first), summed(graph.inputs, second)
    yield {s: v + i for i, (s, v) in enumerate(example.items())}, {s: v + 5 * i + 3 for i, (s, v) in enumerate(example.items())}
    yield {s: 2 * v for s, v in example.items()}, {s: (3 + i) * v for i, (s, v) in enumerate(example.items())}


def _propagated(graph: ModelGraph, sizes: Mapping[str, int]) -> ModelGraph:
    probe = graph.copy()
    probe.inputs = [replace(item, shape=shape_at(item, sizes)) for item in graph.inputs]
    probe.propagate()
    return probe


def _compared(graph: ModelGraph, first: ModelGraph, second: ModelGraph) -> Extents:
    dims: dict[fx.Node, tuple[Dim, ...]] = {}
    dtypes: dict[fx.Node, torch.dtype] = {}
    sizes: dict[fx.Node, Any] = {}
    for node, a, b in zip(graph.nodes, first.nodes, second.nodes, strict=True):
        x, y = a.meta.get("val"), b.meta.get("val")
        if isinstance(x, Tensor) and isinstance(y, Tensor):
            dims[node] = tuple(int(m) if m == n else Free(int(m), int(n)) for m, n in zip(x.shape, y.shape, strict=True))
            dtypes[node] = x.dtype
        elif isinstance(x, int | float | bool):
            sizes[node] = x if x == y else Free(x, y)  # type: ignore[arg-type]
    nodes, symbols = graph.input_nodes(), {}
    for item in graph.inputs:
        for dim, symbol in sorted(item.dynamic.items()):
            extent = dims[nodes[item.name]][dim]
            if isinstance(extent, Free):
                symbols.setdefault(extent, symbol)
    return Extents(dims, dtypes, sizes, symbols)
