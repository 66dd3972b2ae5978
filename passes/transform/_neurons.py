"""How much each hidden channel matters to what the model predicts, without labels: what `prune_mlp` ranks neurons by."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lwcompile.context import Context
from lwcompile.executor import Executor, Tap
from lwcompile.memory import give_back
from lwcompile.metric import sample_labels
from lwcompile.program import Program


def taylor_scores(program: Program, channels: Mapping[str, tuple[str, str]], ctx: Context) -> dict[str, Tensor]:
    """E (sum_t h_tj g_tj)^2 over samples, float64 [F] by key, of the values that `channels` names as (entry, node).

    g is the gradient of the log-likelihood of labels drawn from the model's own distribution. A joint metric's group of samples is
    one sample here. Values that the metric does not read are left out.
    """
    executor, metric = Executor(program, ctx.device), ctx.need_metric()
    size = getattr(metric, "batch", len(ctx.need_calibration())) if metric.joint else ctx.batch_size
    batches = [b for b in ctx.batches(program, size=size) if not metric.joint or len(next(iter(b.values()))) > 2]
    generator = torch.Generator(ctx.device).manual_seed(ctx.seed)
    found: dict[str, Tensor] = {}
    keys = {id: name if name in executor.index else f"{entry}/{name}" for id, (entry, name) in channels.items()}
    with ctx.progress.task("scores of neurons", len(batches)) as task:
        for batch in batches:
            taps = {key: _watch(id, found, metric.joint) for id, key in keys.items()}
            with torch.enable_grad():
                log_p = metric.distribution(executor.run(batch, taps=taps), batch)
                log_p.gather(1, sample_labels(log_p.detach(), generator)).sum().backward()
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
