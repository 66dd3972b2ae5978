"""The canonical form: exact rewrites that every capture goes through, so that passes see one spelling of each operation.

noise            assertions on metadata, dropout in eval, copies and full slices                -> gone
clone + view     `_unsafe_view(clone(x), s)`                                                    -> `reshape(x, s)`
casts            `to(...)` in its many spellings                                                -> `_to_copy(x, dtype=...)`
transposed       `addmm(b, x, W)`, `matmul(x, W)`, `mm(x, t(W))` with a stored W                -> `linear(x, W', b)`
rms_norm         `x * rsqrt(mean(x^2) + eps) * w` in any order, with or without casts and w     -> `rms_norm(x, [d], w, eps)`
constants        arithmetic that reads only stored tensors, as in a norm's `1 + w`              -> one stored tensor
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import fx

from lwcompile.attention import canonical_masks, fold_grouped_queries
from lwcompile.graph import ModelGraph, iterate_calls
from lwcompile.unfused import whole_attentions

aten = torch.ops.aten
_INT_MAX = 9223372036854775807


def canonicalize(graph: ModelGraph) -> None:
    """Rewrite in place until nothing changes; needs `meta["val"]` on every node and leaves it there."""
    graph.propagate()
    for rule in RULES:
        rule(graph)
        graph.prune()
    graph.propagate()


def _replace(node: fx.Node, value: fx.Node) -> None:
    node.replace_all_uses_with(value)
    if "path" in node.meta and value.op == "call_function":
        value.meta.setdefault("path", node.meta["path"])
    node.graph.erase_node(node)


def _val(node: object) -> torch.Tensor | None:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value if isinstance(value, torch.Tensor) else None


def _same_type(a: object, b: object) -> bool:
    x, y = _val(a), _val(b)
    return x is not None and y is not None and x.dtype == y.dtype and x.shape == y.shape


def _is_noise(node: fx.Node) -> bool:
    """Whether a call returns its first argument unchanged."""
    target = node.target
    if target in (aten.detach.default, aten.lift_fresh_copy.default, aten.alias.default, aten.contiguous.default):
        return True
    if target is aten.clone.default:
        return True
    if target in (aten._to_copy.default, aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.type_as.default):
        return _same_type(node, node.args[0])
    if target in (aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default):
        return bool(not node.args[2] or node.args[1] == 0)
    if target is aten.native_dropout.default:
        return False
    if target is aten.slice.Tensor:
        given = node.args[2:5]
        start, end, step = given + (0, _INT_MAX, 1)[len(given) :]
        return bool(start in (0, None) and end in (_INT_MAX, None) and step == 1)
    return False


def remove_noise(graph: ModelGraph) -> None:
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        name = str(node.target)
        if name.startswith(("aten._assert", "aten.sym_constrain")):
            graph.graph.erase_node(node)
        elif _is_noise(node):
            _replace(node, node.args[0])  # type: ignore[arg-type]


def plain_casts(graph: ModelGraph) -> None:
    """Every spelling of a cast becomes `_to_copy(x, dtype=...)`; devices are the runtime's business."""
    casts = (aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten._to_copy.default, aten.to.other)
    for node in iterate_calls(graph, *casts):
        if (value := _val(node)) is not None:
            node.target, node.args, node.kwargs = aten._to_copy.default, node.args[:1], {"dtype": value.dtype}


def reshape_views(graph: ModelGraph) -> None:
    """Views whose contiguity a removed copy guaranteed become reshapes, which need none."""
    for node in iterate_calls(graph, aten._unsafe_view.default, aten.view.default):
        node.target = aten.reshape.default


def fold_constants(graph: ModelGraph, limit: int = 1 << 22) -> None:
    """Evaluate calls that read only stored floating-point tensors, up to `limit` numbers."""
    plain = (aten.add.Tensor, aten.mul.Tensor, aten.sub.Tensor, aten.exp.default, aten.neg.default, aten._to_copy.default)
    for node in iterate_calls(graph, *plain, aten._weight_norm.default):
        sources = node.all_input_nodes
        value = _val(node)
        if not sources or value is None or value.numel() > limit or any(s.op != "get_attr" for s in sources):
            continue
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: graph.tensor(str(n.target)))
        name = graph.fresh_name(f"{sources[0].target}.folded")
        with graph.graph.inserting_before(node):
            constant = graph.get_attr(name, node.target(*args, **kwargs))  # type: ignore[operator]
        _replace(node, constant)


def _stored_matrix(graph: ModelGraph, node: object) -> tuple[str, bool] | None:
    """The tensor name behind a stored matrix, and whether it is read transposed."""
    transposed = False
    while isinstance(node, fx.Node) and node.op == "call_function":
        swaps = node.target in (aten.t.default, aten.numpy_T.default, aten.mT.default) or (
            node.target in (aten.transpose.int, aten.permute.default) and (v := _val(node)) is not None and v.dim() == 2
        )
        if not swaps or (node.target is aten.permute.default and list(node.args[1]) != [1, 0]):  # type: ignore[arg-type]
            return None
        transposed, node = not transposed, node.args[0]
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    name = str(node.target)
    return (name, transposed) if len(graph.store.shape(graph.tensors[name])) == 2 else None


def whole_linears(graph: ModelGraph) -> None:
    """Products with a stored matrix become `linear`; a matrix read the other way round is stored transposed, once."""
    for node in iterate_calls(graph, aten.addmm.default, aten.mm.default, aten.matmul.default):
        bias, (x, w) = (node.args[0], node.args[1:3]) if node.target is aten.addmm.default else (None, node.args[:2])
        if node.kwargs or (bias is not None and (b := _val(bias)) is not None and b.dim() != 1):
            continue
        if (found := _stored_matrix(graph, w)) is None or _stored_matrix(graph, x) is not None:
            continue
        name, transposed = found
        with graph.graph.inserting_before(node):
            weight = graph.graph.create_node("get_attr", name) if transposed else _transposed(graph, name)
            call = graph.graph.call_function(aten.linear.default, (x, weight) if bias is None else (x, weight, bias))
        call.meta.update(node.meta)
        _replace(node, call)


def _transposed(graph: ModelGraph, name: str) -> fx.Node:
    flipped = f"{name}.T"
    if flipped in graph.tensors:
        return graph.graph.create_node("get_attr", flipped)
    return graph.get_attr(flipped, graph.tensor(name).t().contiguous())


def _through_casts(node: object) -> object:
    while isinstance(node, fx.Node) and node.target is aten._to_copy.default:
        node = node.args[0]
    return node


def _is_square_of(node: object, x: object) -> bool:
    if not isinstance(node, fx.Node):
        return False
    if node.target is aten.pow.Tensor_Scalar:
        return bool(node.args[1] == 2) and _through_casts(node.args[0]) is x
    return node.target is aten.mul.Tensor and all(_through_casts(a) is x for a in node.args[:2])


def _rms_eps(node: object, x: fx.Node) -> float | None:
    """The epsilon of `rsqrt(mean(x^2, -1, keepdim) + eps)`, or None if `node` is something else."""
    if not isinstance(node, fx.Node):
        return None
    if node.target is aten.rsqrt.default or (node.target is aten.pow.Tensor_Scalar and node.args[1] == -0.5):
        total = node.args[0]
    else:
        return None
    if not isinstance(total, fx.Node) or total.target not in (aten.add.Tensor, aten.add.Scalar):
        return None
    mean, eps = total.args[0], total.args[1]
    if not isinstance(eps, float) or not isinstance(mean, fx.Node) or mean.target is not aten.mean.dim:
        return None
    dims, rank = list(mean.args[1]), len(_val(x).shape)  # type: ignore[arg-type,union-attr]
    if dims not in ([-1], [rank - 1]) or mean.args[2:3] != (True,):
        return None
    return eps if _is_square_of(mean.args[0], x) else None


def whole_rms_norms(graph: ModelGraph) -> None:
    for node in list(iterate_calls(graph, aten.mul.Tensor)):
        for x, scale in (node.args[:2], node.args[1::-1]):
            base = _through_casts(x)
            if not isinstance(base, fx.Node) or _val(base) is None or (eps := _rms_eps(scale, base)) is None:
                continue
            _fuse_rms_norm(graph, node, base, eps)
            break


def _fuse_rms_norm(graph: ModelGraph, node: fx.Node, x: fx.Node, eps: float) -> None:
    width = _val(x).shape[-1]  # type: ignore[union-attr]
    last, weight = node, None
    if len(node.users) == 1:
        user = next(iter(node.users))
        after = next(iter(user.users)) if user.target is aten._to_copy.default and len(user.users) == 1 else user
        feed = user if after is not user else node
        if after.target is aten.mul.Tensor:
            other = after.args[1] if after.args[0] is feed else after.args[0]
            value = _val(other)
            stored = isinstance(other, fx.Node) and other.op == "get_attr"
            if stored and value is not None and tuple(value.shape) == (width,):
                last, weight = after, other
    if not _same_type(last, x):
        return
    with graph.graph.inserting_before(last):
        call = graph.graph.call_function(aten.rms_norm.default, (x, [width], weight, eps))
    call.meta.update(last.meta)
    _replace(last, call)


def explicit_scales(graph: ModelGraph) -> None:
    """Give every attention its scale explicitly, so that a rewrite of the head width cannot change it silently."""
    for node in iterate_calls(graph, aten.scaled_dot_product_attention.default):
        query = _val(node.args[0])
        if query is not None and node.kwargs.get("scale") is None:
            node.kwargs = {**node.kwargs, "scale": 1.0 / math.sqrt(query.shape[-1])}


RULES: tuple[Callable[[ModelGraph], None], ...] = (
    remove_noise,
    plain_casts,
    reshape_views,
    fold_constants,
    whole_linears,
    whole_rms_norms,
    explicit_scales,
    whole_attentions,
    fold_grouped_queries,
    canonical_masks,
)
