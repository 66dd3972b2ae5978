"""A plan in a graph that was not captured for it: sites are found by their ids, packed weights by the modules they belong to.

    structure   the plan's structural options, applied here as there
    weights     from the compressed program where there is one: whatever stands at a linear's or embedding's weight there
                (dequantized codes, a narrower type), and every stored tensor of the same name; else solved here, without samples

Refuses: a graph without all of the plan's sites, or one that begins in the middle of the model.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn

from lwcompile.apply import apply_plan
from lwcompile.budget import suggest
from lwcompile.context import Context, Remark
from lwcompile.errors import BadInput, BadPlan, Refused, VerificationError
from lwcompile.graph import ModelGraph
from lwcompile.plans import Plan
from lwcompile.program import Program
from lwcompile.registry import make
from lwcompile.structure import Structure, find_structure

aten = torch.ops.aten
NAMED = 3
"""How many sites of a plan that a graph lacks are named."""
_WEIGHT = {aten.linear.default: 1, aten.embedding.default: 0}


@dataclass
class Given:
    """A plan, and the compressed program that was made from it. `memo` keeps what was solved, for the model's other graphs.

    Attributes:
        weights: for each model that was compiled under it, its weights by where they are, with their versions and addresses.
    """

    plan: Plan
    program: Program | None = None
    memo: dict[Any, Any] = field(default_factory=dict)
    weights: WeakKeyDictionary[nn.Module, dict[str, tuple[int, int, Tensor]]] = field(default_factory=WeakKeyDictionary)

    def require_same(self, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        """Raise `Changed` where another graph of this model was compiled with other weights: packed ones are not made anew."""
        known = self.weights.setdefault(model, {})
        for name, value in weights.items():
            version, address, tensor = known.setdefault(name, (value._version, value.data_ptr(), value))
            if tensor is not value or (value._version, value.data_ptr()) != (version, address):
                raise Changed("a weight")


class Changed(VerificationError):
    """A part of the code is not what it was."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what} was changed after the model was compiled under a plan; compress the model again if it was a weight, then call "
            "torch._dynamo.reset() and compile"
        )


def apply(given: Given, program: Program) -> tuple[Program, list[Remark]]:
    """The program under the plan, and remarks.

    Raises:
        Refused: the plan's sites are not all here.
        BadPlan: a solver needs samples.
    """
    structure = find_structure(program)
    _require_whole(given.plan, structure, program)
    ctx = Context(structure=structure, program=program, memo=given.memo)
    choices = given.plan.choices
    if given.program is None:
        try:
            return apply_plan(program, choices, structure, ctx), ctx.remarks
        except BadInput as error:
            raise BadPlan(
                f"{error} Here there are none: name the folder that `lwcompile compress` wrote, which holds the solved weights, "
                "or a solver that does without samples"
            ) from error
    structural = {id: tuple(s for s in options if make("passes", s).structural) for id, options in choices.items()}
    compressed = apply_plan(program, {id: options for id, options in structural.items() if options}, structure, ctx)
    silenced = [id for id, options in structural.items() if any(make("passes", s).silences for s in options)]
    _transplant(given.program.main, compressed.main, tuple(structure.sites[id].path for id in silenced))
    return compressed, ctx.remarks


def _require_whole(plan: Plan, structure: Structure, program: Program) -> None:
    if missing := [id for id in plan.choices if id not in structure.sites]:
        named = ", ".join(missing[:NAMED]) + (f" and {len(missing) - NAMED} more" if len(missing) > NAMED else "")
        raise Refused(
            f"the plan names {named}, which this graph does not hold{suggest(missing[0], list(structure.sites))}: mend an id that is "
            "mistyped (`lwcompile inspect` lists them); a model that torch compiles in parts takes no plan (fullgraph=True says "
            "where it breaks)"
        )
    for stream in structure.streams:
        first = structure.sites.get(f"{stream.prefix}block0")
        number = re.search(r"(?:^|\.)(\d+)$", first.path) if first is not None else None
        if stream.start.op == "placeholder" and number is not None and int(number[1]) > 0 and plan.choices:
            raise Refused(f"it begins at {first.path}, in the middle of the model")  # type: ignore[union-attr]


# --- weights


def _calls(graph: ModelGraph) -> dict[tuple[str, Any, int], fx.Node]:
    """Linears and embeddings by module path, operator, and number among those of one module."""
    found: dict[tuple[str, Any, int], fx.Node] = {}
    seen = Counter[tuple[str, Any]]()
    for node in graph.graph.nodes:
        if node.op == "call_function" and node.target in _WEIGHT:
            place = (node.meta.get("path", ""), node.target)
            found[*place, seen[place]] = node
            seen[place] += 1
    return found


def _transplant(source: ModelGraph, graph: ModelGraph, gone: tuple[str, ...]) -> None:
    """Give `graph` the weights of `source`, which computes the same with the same modules.

    Below the module paths that are `gone`, what still stands fills a cache that nothing reads: it keeps its own weights.
    """
    theirs, copied = _calls(source), dict[fx.Node, fx.Node]()
    first = next(n for n in graph.graph.nodes if n.op != "placeholder")
    calls = _calls(graph)
    for place, node in calls.items():
        if place not in theirs and any(place[0].startswith(f"{path}.") for path in gone):
            continue
        if place not in theirs:
            raise Refused(f"the compressed program has no {place[1]} at {place[0] or 'its top'}: it was made of another model")
        at = _WEIGHT[place[1]]
        weight, mine = theirs[place].args[at], node.args[at]
        if not _is_stored(weight) or not _is_stored(mine):
            continue
        if weight.meta["val"].shape != mine.meta["val"].shape:  # type: ignore[union-attr]
            raise Refused(f"the compressed program's weight at {place[0]} has another shape: it was made of another model")
        with graph.graph.inserting_before(first):
            node.update_arg(at, _copy(source, graph, weight, copied))  # type: ignore[arg-type]
    for name in set(graph.tensors) & set(source.tensors):
        if graph.store.shape(graph.tensors[name]) == source.store.shape(source.tensors[name]):
            graph.set_tensor(name, source.tensor(name))
    graph.prune()
    graph.propagate()


def _is_stored(node: object) -> bool:
    """Whether a node is a stored tensor, or made of stored tensors alone."""
    if not isinstance(node, fx.Node) or node.op not in ("get_attr", "call_function"):
        return False
    return node.op == "get_attr" or (bool(node.all_input_nodes) and all(map(_is_stored, node.all_input_nodes)))


def _copy(source: ModelGraph, graph: ModelGraph, node: fx.Node, copied: dict[fx.Node, fx.Node]) -> fx.Node:
    if node not in copied:
        if node.op == "get_attr":
            copied[node] = graph.get_attr(str(node.target), source.tensor(str(node.target)))
        else:
            for needed in node.all_input_nodes:
                _copy(source, graph, needed, copied)
            copied[node] = graph.graph.node_copy(node, copied.__getitem__)
    return copied[node]
