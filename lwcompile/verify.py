"""The verifier: what every transform's result must still be, whatever the transform says of itself.

lint             FX's own well-formedness, and operators of a known namespace only
signature        the same inputs and outputs, by name
shapes           under fake tensors, equal shapes and dtypes at the outputs and at the residual stream's surviving nodes
bindings         every stored tensor read, every read bound; no call whose result nobody reads
sharing          calls that read one tensor before read one tensor (or one packed form of it) after
contents         no stored tensor written in place
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, fx

from lwcompile.errors import Refused, VerificationError
from lwcompile.graph import ModelGraph, surroundings
from lwcompile.serialize import target_name
from lwcompile.site import Site

_PRODUCTS = (torch.ops.aten.linear.default, torch.ops.aten.embedding.default)


def verify(before: ModelGraph, after: ModelGraph, sites: Iterable[Site] = ()) -> None:
    """Raise `VerificationError` for the first promise that `after` does not keep, the nodes around it shown."""
    _lint(after)
    _signature(before, after)
    _bindings(after)
    _shapes(before, after, sites)
    _sharing(before, after)
    after.store.check(after.tensors.values())


def _lint(graph: ModelGraph) -> None:
    try:
        graph.graph.lint()
    except Exception as error:
        raise VerificationError(f"the graph is not well formed: {error}") from error
    for node in graph.nodes:
        if node.op not in ("placeholder", "get_attr", "call_function", "output"):
            raise VerificationError(f"a {node.op} node, which no backend lowers, at\n{surroundings(node)}")
        schema = getattr(node.target, "_schema", None)
        if schema is not None and schema.is_mutable:
            raise VerificationError(f"an operator that writes its inputs, in a functional graph, at\n{surroundings(node)}")
        if node.op == "call_function":
            try:
                target_name(node.target)
            except Refused as error:
                raise VerificationError(f"{error}, at\n{surroundings(node)}") from error


def _signature(before: ModelGraph, after: ModelGraph) -> None:
    placeholders = [str(node.target) for node in after.nodes if node.op == "placeholder"]
    wanted = [i.name for i in before.inputs]
    if [i.name for i in after.inputs] != wanted or placeholders != wanted:
        raise VerificationError(f"the inputs were {wanted} and are now {placeholders}")
    if after.outputs != before.outputs or len(after.output_node.args[0]) != len(before.outputs):  # type: ignore[arg-type]
        raise VerificationError(f"the outputs were {before.outputs} and are now {after.outputs}")


def _bindings(graph: ModelGraph) -> None:
    read: set[str] = set()
    for node in graph.nodes:
        if node.op == "get_attr":
            read.add(str(node.target))
            if str(node.target) not in graph.tensors:
                raise VerificationError(f"a read of {node.target!r}, which is bound to no tensor, at\n{surroundings(node)}")
            if graph.tensors[str(node.target)] not in graph.store:
                raise VerificationError(f"{node.target!r} is bound to a tensor that the store lacks")
        elif node.op == "call_function" and not node.users:
            raise VerificationError(f"a call whose result nobody reads at\n{surroundings(node)}")
    if dangling := sorted(set(graph.tensors) - read):
        raise VerificationError(f"{len(dangling)} stored tensors that nothing reads, such as {dangling[0]!r}; call prune()")


def _facts(node: object) -> object:
    value = node.meta.get("val") if isinstance(node, fx.Node) else node
    return (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else value


def _shapes(before: ModelGraph, after: ModelGraph, sites: Iterable[Site]) -> None:
    if any("val" not in node.meta for node in before.nodes):
        before.propagate()
    after.propagate()
    for name, old, new in zip(before.outputs, before.output_node.args[0], after.output_node.args[0]):  # type: ignore[arg-type]
        if _facts(old) != _facts(new):
            raise VerificationError(f"output {name!r} was {_facts(old)} and is now {_facts(new)} at\n{surroundings(new)}")
    stream = {name for site in sites for name in (site.skip, site.end) if name}
    old_nodes = {node.name: node for node in before.nodes if node.name in stream}
    for node in after.nodes:
        if (old := old_nodes.get(node.name)) is not None and _facts(old) != _facts(node):
            raise VerificationError(f"the residual stream was {_facts(old)} and is now {_facts(node)} at\n{surroundings(node)}")


def _weight_keys(graph: ModelGraph, node: fx.Node) -> tuple[str, ...]:
    """The stored tensors behind the weight of a linear or embedding, through whatever unpacks them."""
    stored = node.args[1] if node.target is torch.ops.aten.linear.default else node.args[0]
    if not isinstance(stored, fx.Node):
        return ()
    sources = [stored] if stored.op == "get_attr" else stored.all_input_nodes
    return tuple(graph.tensors.get(str(s.target), "") for s in sources if s.op == "get_attr")


def _sharing(before: ModelGraph, after: ModelGraph) -> None:
    surviving = {node.name: node for node in after.nodes if node.target in _PRODUCTS}
    groups: dict[tuple[str, ...], list[fx.Node]] = {}
    for node in before.nodes:
        if node.target in _PRODUCTS and (keys := _weight_keys(before, node)) and node.name in surviving:
            groups.setdefault(keys, []).append(surviving[node.name])
    for nodes in groups.values():
        now = {_weight_keys(after, node) for node in nodes}
        if len(now) > 1:
            names = ", ".join(node.name for node in nodes)
            raise VerificationError(f"{names} read one tensor before and {len(now)} now; sharing must stay intact")
