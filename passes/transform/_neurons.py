"""The neurons of an MLP: where they are in the graph, and how much each matters to what the model predicts, without labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, fx

from lwcompile.context import Context
from lwcompile.errors import Refused
from lwcompile.executor import Executor, Tap
from lwcompile.gradients import backward
from lwcompile.graph import ModelGraph
from lwcompile.memory import give_back
from lwcompile.metric import sample_labels
from lwcompile.passes.transform._factors import only_call
from lwcompile.program import Program
from lwcompile.residual import shape_of
from lwcompile.site import Site

aten = torch.ops.aten

ELEMENTWISE = (
    aten.silu.default, aten.gelu.default, aten.relu.default, aten.sigmoid.default, aten.tanh.default, aten.mul.Tensor,
    aten.mul.Scalar, aten.add.Scalar, aten.add.Tensor, aten.pow.Tensor_Scalar, aten.div.Tensor, aten.erf.default,
    aten.hardtanh.default, aten.clamp.default, aten.leaky_relu.default, aten.elu.default, aten.softplus.default,
    aten.hardswish.default, aten.square.default, aten.clone.default, aten._to_copy.default, aten.reshape.default,
)  # fmt: skip
"""What may stand between the linears; a reshape as long as the neurons stay the last dimension."""
PASSED_ON = (aten.mul.Tensor, aten.clone.default, aten._to_copy.default, aten.reshape.default)
"""What may stand between the last linear and the residual add, such as a layer's scale."""


class Mlp(NamedTuple):
    """The linears before the neurons, the calls between, the neurons' values, and the linear behind."""

    ups: list[fx.Node]
    between: list[fx.Node]
    neurons: fx.Node
    down: fx.Node


def find_mlp(graph: ModelGraph, site: Site) -> Mlp:
    """The neurons of an MLP and the linears around them; `Refused` with what stands in the way."""
    down = next((node for node in graph.graph.nodes if node.name == site.node), None)
    while down is not None and down.target is not aten.linear.default:
        computed = [n for n in down.all_input_nodes if n.op != "get_attr" and isinstance(n.meta["val"], Tensor)]
        if down.target not in PASSED_ON or len(computed) != 1:
            raise Refused(f"its output is not that of one linear, but of {down.target}", site=site.id)
        down = computed[0]
    if down is None:
        raise Refused("it is no longer in the graph", site=site.id)
    _owned(graph, site, down)
    width = weight_shape(graph, down)[1]
    ups: list[fx.Node] = []
    between: list[fx.Node] = []
    waiting = [down.args[0]]
    while waiting:
        node = waiting.pop()
        if node in ups or node in between:
            continue
        if not isinstance(node, fx.Node) or node.op != "call_function" or shape_of(node)[-1:] != (width,):
            raise Refused(f"its neurons are no elementwise function of linears: {node}", site=site.id)
        if node.target is aten.linear.default:
            _owned(graph, site, node)
            ups.append(node)
            continue
        if node.target not in ELEMENTWISE:
            raise Refused(f"its neurons are no elementwise function of linears: {node.format_node()}", site=site.id)
        between.append(node)
        sources = [node.args[0]] if node.target is aten.reshape.default else node.all_input_nodes
        waiting += [n for n in sources if n.op != "get_attr" or n.meta["val"].numel() != 1]  # type: ignore[union-attr]
    inside = {*between, down}
    for node in (*ups, *between):
        if outside := [user for user in node.users if user not in inside]:
            raise Refused(f"its neurons are also read by {outside[0].format_node()}", site=site.id)
    return Mlp(sorted(ups), sorted(between), down.args[0], down)  # type: ignore[arg-type]


def _owned(graph: ModelGraph, site: Site, call: fx.Node) -> None:
    """`Refused` unless nothing else reads the linear's weight and bias."""
    stored = call.all_input_nodes[1:]
    if any(n.op != "get_attr" for n in stored) or call.all_input_nodes[0].op == "get_attr":
        raise Refused(f"the weight of {call.name} is computed, not stored", site=site.id)
    only_call(graph, replace(site, kind="linear", node=call.name, weight=str(stored[0].target), shape=weight_shape(graph, call)))
    for bias in stored[1:]:
        if [user for read in graph.uses(str(bias.target)) for user in read.users] != [call]:
            raise Refused(f"the bias of {call.name} is shared", site=site.id)


def weight_shape(graph: ModelGraph, call: fx.Node) -> tuple[int, int]:
    n, k = graph.store.shape(graph.tensors[str(call.args[1].target)])  # type: ignore[union-attr]
    return n, k


def taylor_scores(program: Program, channels: Mapping[str, tuple[str, str]], ctx: Context) -> dict[str, Tensor]:
    """E (sum_t h_tj g_tj)^2 over samples, float64 [F] by key, of the values that `channels` names as (entry, node).

    g is the gradient of the log-likelihood of labels drawn from the model's own distribution. A joint metric's group of samples is
    one sample here. Values that the metric does not read are left out.
    """
    executor, metric = Executor(program, ctx.device), ctx.need_metric()
    size = getattr(metric, "batch", len(ctx.need_calibration())) if metric.joint else ctx.batch_size
    batches = [b for b in ctx.batches(program, size=size) if not metric.joint or len(next(iter(b.values()))) > 2]
    generator = torch.Generator().manual_seed(ctx.seed)
    found: dict[str, Tensor] = {}
    keys = {id: name if name in executor.index else f"{entry}/{name}" for id, (entry, name) in channels.items()}
    with ctx.progress.task("scores of neurons", len(batches)) as task:
        for batch in batches:
            taps = {key: _watch(id, found, metric.joint) for id, key in keys.items()}
            with torch.enable_grad():
                log_p = metric.distribution(executor.run(batch, taps=taps), batch)
                backward(log_p.gather(1, sample_labels(log_p.detach(), generator)).sum())
            give_back()
            task.advance()
    return found


def _watch(id: str, found: dict[str, Tensor], joint: bool) -> Tap:
    def watch(value: Tensor) -> Tensor:
        value = value.requires_grad_()
        h = value.detach()

        def collect(g: Tensor) -> None:
            moved = (g.detach() * h).flatten(1, -2).sum(1).double().cpu() if h.ndim > 2 else (g.detach() * h).double().cpu()
            score = (moved.sum(0) if joint else moved).square().reshape(-1, h.shape[-1]).sum(0)
            found[id] = found[id] + score if id in found else score

        value.register_hook(collect)
        return value

    return watch
