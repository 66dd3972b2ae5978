"""Fusion groups: which nodes of a graph one kernel computes. Found by operators and by who reads what, never by names.

    gated       mul(act(linear(x, A)), linear(x, B))                        the first half of a SwiGLU or GEGLU MLP
    linear      add(act(linear(x, W, b)), r), with or without act and r     a product with what follows it
    linears     linear(x, A), linear(x, B), ...: same x, one format         queries, keys and values as one product
    embedding   embedding(W, ids)
    norm        rms_norm | layer_norm, with or without the add before it    and, where one group alone reads it, part of that group
    rotary      add(mul(x, cos), mul(cat(-x2, x1), sin))                    x1, x2 the halves of x
    attention   scaled_dot_product_attention under a rule (causal, window, sinks, padding) instead of a mask
    linear_attention, absorb    softmax within a window and feature maps beyond it, and the state of what has left it

Order matters where patterns overlap: gates claim their products first, then what products end in, then shared inputs, then norms.
Everything inside a group has no reader outside of it. Products form groups where their weights are packed; what is left runs as
torch's own operators.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import fx

from lwcompile.attention import HYBRID, SDPA, find_attentions, slots
from lwcompile.graph import ModelGraph, iterate_calls
from lwcompile.residual import shape_of

aten = torch.ops.aten
Kernel = Literal["gated", "linear", "linears", "embedding", "norm", "rotary", "attention", "linear_attention", "absorb"]
DEQUANTIZE = torch.ops.lwcompile.dequantize.default
ABSORB = torch.ops.lwcompile.absorb_keys.default
HEAD_WIDTHS = range(1, 257)


@dataclass(frozen=True)
class Group:
    """One kernel's nodes in order, `root` the one whose value it makes, and its arguments: nodes, constants, tuples of nodes.

    A norm that a group begins with is `args["norm"]`; `at` is the node at whose place the kernel can run.
    """

    kernel: Kernel
    root: fx.Node
    nodes: tuple[fx.Node, ...]
    args: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""

    @property
    def at(self) -> fx.Node:
        return self.nodes[0] if self.kernel == "linears" or "total" in self.args else self.root

    @property
    def makes(self) -> tuple[fx.Node, ...]:
        """The nodes whose values it gives."""
        if self.kernel == "linears":
            return self.nodes
        return (*(n for n in (self.args.get("total"),) if n is not None), self.root)


def find_groups(graph: ModelGraph, *, dense: bool = False) -> list[Group]:
    """The groups of a graph, in the order of their roots. Needs `meta["val"]`. dense: also products whose weights are not packed yet."""
    return _Finder(graph, dense).run()


class _Finder:
    def __init__(self, graph: ModelGraph, dense: bool) -> None:
        self.graph, self.dense = graph, dense
        self.order = {node: i for i, node in enumerate(graph.graph.nodes)}
        self.groups: dict[fx.Node, Group] = {}
        self.claimed: set[fx.Node] = set()

    def run(self) -> list[Group]:
        for find in (
            self.gates,
            self.products,
            self.merge,
            self.norms,
            self.embeddings,
            self.rotaries,
            self.attentions,
            self.linear,
        ):
            find()
        return sorted(self.groups.values(), key=lambda g: self.order[g.root])

    def add(self, kernel: Kernel, root: fx.Node, nodes: tuple[fx.Node, ...], note: str = "", **args: Any) -> None:
        self.groups[root] = Group(kernel, root, tuple(sorted(nodes, key=self.order.__getitem__)), args, note)
        self.claimed.update(nodes)

    # --- products

    def products(self) -> None:
        for linear in list(iterate_calls(self.graph, aten.linear.default)):
            if linear in self.claimed or not self.is_packed(linear.args[1]):
                continue
            nodes, root, activation, residual = [linear], linear, None, None
            if (user := self.only_user(root)) is not None and (activation := _activation(user)) is not None:
                root = user
                nodes.append(user)
            user = self.only_user(root)
            if user is not None and (other := _added(user, root)) is not None and shape_of(other) == shape_of(root):
                residual, root = other, user
                nodes.append(user)
            x, weight, bias = _linear_args(linear)
            self.add("linear", root, tuple(nodes), x=x, weight=weight, bias=bias, activation=activation, residual=residual)

    def gates(self) -> None:
        for mul in list(iterate_calls(self.graph, aten.mul.Tensor)):
            for act, up in (mul.args[:2], mul.args[1::-1]):
                if not isinstance(act, fx.Node) or not isinstance(up, fx.Node) or (name := _activation(act)) is None:
                    continue
                gate = act.args[0]
                products = all(isinstance(n, fx.Node) and n.target is aten.linear.default for n in (gate, up))
                if not products or any(len(n.users) != 1 for n in (act, gate, up)):  # type: ignore
                    continue
                (x, a, bias_a), (y, b, bias_b) = _linear_args(gate), _linear_args(up)  # type: ignore
                if x is y and bias_a is bias_b is None and self.is_packed(a) and self.is_packed(b):
                    self.add("gated", mul, (gate, act, up, mul), x=x, weight=a, up=b, activation=name)  # type: ignore
                    break

    def merge(self) -> None:
        """Bare products of one input become one product, if no other call reads their weights: then they are stored as one."""
        by_input: dict[tuple[Any, ...], list[Group]] = {}
        for group in self.groups.values():
            bare = group.kernel == "linear" and group.nodes == (group.root,) and self.is_alone(group.args["weight"])
            if bare and (group.args["bias"] is None or _is_stored(group.args["bias"])):
                key = (group.args["x"], self.format_of(group.args["weight"]), group.args["bias"] is None)
                by_input.setdefault(key, []).append(group)
        for (x, *_), groups in by_input.items():
            if len(groups) < 2:
                continue
            for group in groups:
                del self.groups[group.root]
            roots = tuple(sorted((g.root for g in groups), key=self.order.__getitem__))
            weights, biases = zip(*(_linear_args(root)[1:] for root in roots))
            self.add("linears", roots[-1], roots, f"{len(roots)} products", x=x, weights=weights, biases=biases)

    def is_packed(self, weight: Any) -> bool:
        if not isinstance(weight, fx.Node) or len(shape_of(weight)) != 2:
            return False
        if weight.target is DEQUANTIZE:
            return all(n.op == "get_attr" for n in weight.all_input_nodes)
        return self.dense and weight.op == "get_attr"

    def is_alone(self, weight: fx.Node) -> bool:
        stored = weight.all_input_nodes[0] if weight.target is DEQUANTIZE else weight
        reads = self.graph.uses(str(stored.target))
        return len(reads) == 1 and len(weight.users) == 1

    def format_of(self, weight: fx.Node) -> tuple[Any, ...]:
        if weight.target is not DEQUANTIZE:
            return ("dense",)
        dtypes = tuple(None if n is None else n.meta["val"].dtype for n in weight.args[1:3])  # type: ignore[union-attr]
        return (*weight.args[3:], *dtypes)

    def only_user(self, node: fx.Node) -> fx.Node | None:
        user = next(iter(node.users), None)
        return user if len(node.users) == 1 and user is not None and user not in self.claimed else None

    # --- norms

    def norms(self) -> None:
        for node in list(iterate_calls(self.graph, aten.rms_norm.default, aten.layer_norm.default)):
            if (norm := _norm(node)) is None:
                continue
            x = node.args[0]
            readers = [g for g in self.groups.values() if g.args.get("x") is node]
            covered = {n for g in readers for n in g.nodes}
            if len(readers) == 1 and set(node.users) <= covered and readers[0].args.get("residual") is not node:
                group = readers[0]
                nodes = (
                    tuple(sorted((node, *group.nodes), key=self.order.__getitem__)) if group.kernel != "linears" else group.nodes
                )
                self.groups[group.root] = replace(group, nodes=nodes, args={**group.args, "x": x, "norm": norm})
                self.claimed.add(node)
                continue
            before = x if isinstance(x, fx.Node) and x not in self.claimed and _is_sum(x) else None
            if before is None:
                self.add("norm", node, (node,), x=x, norm=norm)
            else:
                self.add("norm", node, (before, node), x=before.args[0], branch=before.args[1], total=before, norm=norm)

    # --- the rest

    def embeddings(self) -> None:
        for node in list(iterate_calls(self.graph, aten.embedding.default)):
            if self.is_packed(node.args[0]):
                self.add("embedding", node, (node,), weight=node.args[0], ids=node.args[1])

    def rotaries(self) -> None:
        for node in list(iterate_calls(self.graph, aten.add.Tensor)):
            found = next(_rotated(node), None)
            if found is not None:
                nodes, x, cos, sin = found
                self.add("rotary", node, nodes, x=x, cos=cos, sin=sin)

    def attentions(self) -> None:
        for a in find_attentions(self.graph):
            widths = a.key_width in HEAD_WIDTHS and a.value_width in HEAD_WIDTHS
            if a.node.target is not SDPA or a.mask is None or not widths or slots(a.node)["dropout_p"]:
                continue
            padding = None if a.mask.padding is None else self.graph.input_nodes()[a.mask.padding]
            words = {"causal": a.mask.causal, f"window {a.mask.window}": a.mask.window, f"sinks {a.mask.sinks}": a.mask.sinks}
            note = ", ".join(word for word, there in words.items() if there)
            self.add(
                "attention", a.node, (a.node,), note, query=a.query, key=a.key, value=a.value, padding=padding,
                causal=a.mask.causal, window=a.mask.window, sinks=a.mask.sinks, scale=slots(a.node)["scale"],
            )  # fmt: skip

    def linear(self) -> None:
        for node in list(iterate_calls(self.graph, HYBRID, ABSORB)):
            names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
            given = dict(zip(names, node.args))
            kernel: Kernel = "linear_attention" if node.target is HYBRID else "absorb"
            self.add(kernel, node, (node,), f"window {given['window']}", **given)


# --- patterns


def _linear_args(node: fx.Node) -> tuple[Any, Any, Any]:
    return (*node.args, None)[:3] if len(node.args) < 3 else node.args[:3]  # type: ignore[return-value]


def _activation(node: object) -> str | None:
    if not isinstance(node, fx.Node):
        return None
    if node.target is aten.gelu.default:
        return {"none": "gelu", "tanh": "gelu_tanh"}[str(node.kwargs.get("approximate", "none"))]
    return {aten.silu.default: "silu", aten.relu.default: "relu"}.get(node.target)  # type: ignore[call-overload]


def _is_sum(node: fx.Node) -> bool:
    """An add of two values of one shape."""
    if node.target is not aten.add.Tensor or node.kwargs.get("alpha", 1) != 1:
        return False
    return all(isinstance(n, fx.Node) and shape_of(n) == shape_of(node) for n in node.args[:2])


def _added(node: fx.Node, value: fx.Node) -> fx.Node | None:
    """What a sum adds to `value`."""
    if not _is_sum(node):
        return None
    a, b = node.args[:2]
    other = b if a is value else a
    return other if isinstance(other, fx.Node) and other is not value else None


def _norm(node: fx.Node) -> Mapping[str, Any] | None:
    """Kind, gain, shift and epsilon of a norm over the last dimension whose gain (and shift) is stored."""
    if len(node.args[1]) != 1:  # type: ignore[arg-type]
        return None
    kind = "rms" if node.target is aten.rms_norm.default else "layer"
    given = dict(zip(("weight", "bias", "eps") if kind == "layer" else ("weight", "eps"), node.args[2:])) | dict(node.kwargs)
    gain, shift = given.get("weight"), given.get("bias")
    eps = given.get("eps", 1e-5 if kind == "layer" else None)
    if not _is_stored(gain) or not (shift is None or _is_stored(shift)) or not isinstance(eps, int | float):
        return None
    return {"kind": kind, "gain": gain, "shift": shift, "eps": float(eps)}


def _is_stored(node: object) -> bool:
    return isinstance(node, fx.Node) and node.op == "get_attr"


def _rotated(node: fx.Node) -> Iterator[tuple[tuple[fx.Node, ...], fx.Node, fx.Node, fx.Node]]:
    """(nodes, x, cos, sin) where `node` is x * cos + cat(-x2, x1) * sin."""
    for left, right in (node.args[:2], node.args[1::-1]):
        if not all(isinstance(n, fx.Node) and n.target is aten.mul.Tensor and len(n.users) == 1 for n in (left, right)):
            continue
        for turned, sin in (right.args[:2], right.args[1::-1]):  # type: ignore[union-attr]
            for x, cos in (left.args[:2], left.args[1::-1]):  # type: ignore[union-attr]
                parts = _half_turn(turned, x)
                if parts is not None and isinstance(cos, fx.Node) and isinstance(sin, fx.Node) and _broadcasts(x, cos, sin):  # type: ignore
                    yield (*parts, left, right, node), x, cos, sin  # type: ignore[misc]


def _half_turn(node: Any, x: Any) -> tuple[fx.Node, ...] | None:
    """The nodes of cat(-x[h:], x[:h]) along the last dimension, h half of its width."""
    if not isinstance(node, fx.Node) or not isinstance(x, fx.Node) or node.target is not aten.cat.default or len(node.users) != 1:
        return None
    width, (pieces, *dim) = shape_of(x)[-1], node.args
    if len(pieces) != 2 or (dim or [0])[0] not in (-1, len(shape_of(x)) - 1) or pieces[0].target is not aten.neg.default:  # type: ignore
        return None
    high, low = pieces[0].args[0], pieces[1]  # type: ignore[index]
    spans = ((high, width // 2, width), (low, 0, width // 2))
    if width % 2 or any(n.target is not aten.slice.Tensor or n.args[0] is not x or len(n.users) != 1 for n, _, _ in spans):  # type: ignore
        return None
    for piece, start, end in spans:
        axis, first, last = (*piece.args[1:], 0, 0, 1 << 62)[:3]  # type: ignore[assignment]
        if axis not in (-1, len(shape_of(x)) - 1) or first != start or not isinstance(last, int) or min(last, width) != end:
            return None
    return (high, low, pieces[0], node)  # type: ignore[index]


def _broadcasts(x: fx.Node, cos: fx.Node, sin: fx.Node) -> bool:
    """x [B, H, S, D] against cos and sin [1 or B, 1, S, D]: the form that the kernel reads."""
    shape, table = shape_of(x), shape_of(cos)
    if len(shape) != 4 or len(table) != 4 or table != shape_of(sin):
        return False
    return table[0] in (1, shape[0]) and table[1] == 1 and table[2:] == shape[2:]
