"""What stood where an approximation stands now, so that healing may go from the one to the other by degrees.

A transform leaves a `Former` on the calls that read its approximation. It is known while the program is in memory, and is no part of
its digest or of what is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor, fx

from lwcompile.graph import ModelGraph

KEY = "former"


@dataclass(frozen=True)
class Former:
    """`value`, of what the node `read` puts out, stood where the node `now` is read.

    name: of the call that is gone; calls that lost the same one share it.
    """

    name: str
    now: str
    read: str
    value: Callable[[Tensor], Tensor]


def leave(calls: Iterable[fx.Node], former: Former) -> None:
    for call in calls:
        call.meta[KEY] = former


def formers(graph: ModelGraph) -> Iterator[tuple[Former, fx.Node, list[fx.Node]]]:
    """Each former with the node that stands there now and the calls that read it, in the order of the graph.

    What was done to a reader since may have put calls between the two: any way from the one to the other counts. A former whose
    nodes are no longer all there is passed over.
    """
    nodes = {node.name: node for node in graph.graph.nodes}
    found: dict[str, tuple[Former, dict[fx.Node, None]]] = {}
    for node in nodes.values():
        former: Former | None = node.meta.get(KEY)
        if former is not None and former.now in nodes and former.read in nodes:
            reading = found.setdefault(former.name, (former, {}))[1]
            reading.update(dict.fromkeys(_reading(node, nodes[former.now])))
    for former, reading in found.values():
        if reading:
            yield former, nodes[former.now], list(reading)


def _reading(call: fx.Node, now: fx.Node) -> Iterator[fx.Node]:
    """The calls on the way from `now` to `call` that read it."""
    order = {node: i for i, node in enumerate(call.graph.nodes)}
    waiting, seen = [call], {call}
    for node in waiting:
        sources = node.all_input_nodes
        if now in sources:
            yield node
        later = [source for source in sources if order[source] > order[now] and source not in seen]
        seen.update(later)
        waiting += later
