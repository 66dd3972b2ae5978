"""How much each calibration token matters at each layer: the energy of the score at the layer's output, E |g_t|^2.

Labels are drawn from the model's own distribution and g is the gradient of their log-likelihood, so that a token whose error
nothing reads (a patch behind the last attention, a prompt's first position) weighs next to nothing. Weighting the second moments
that a solver sees with it turns its layer-wise error into a diagonal Fisher estimate of the whole model's damage.

Source: GuidedQuant (arXiv 2505.07004) with one group of output channels; token weights as in RSQ (arXiv 2503.01820).
Cost: one forward and backward over the calibration samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lwcompile.errors import Refused
from lwcompile.executor import Executor, Tap
from lwcompile.gradients import backward
from lwcompile.memory import give_back
from lwcompile.metric import sample_labels
from lwcompile.rundir import code_hash, content_key, versions

if TYPE_CHECKING:
    from lwcompile.context import Context
    from lwcompile.program import Program
    from lwcompile.site import Site


def token_importance(program: Program, sites: Iterable[Site], ctx: Context) -> dict[str, Tensor]:
    """E |g_t|^2 of every calibration token at each linear, float32 [tokens] by site id.

    Linears that are fed one tensor get the sum of theirs. Sites whose output the metric does not read are left out. Tokens are
    in the order of the samples; those of a joint metric's incomplete last group get the mean.

    Raises:
        Refused: an operator of the graph has no derivative.
    """
    executor, metric = Executor(program, ctx.device), ctx.need_metric()
    keys = {executor.key(site): site.id for site in sites}
    size = getattr(metric, "batch", len(ctx.need_calibration())) if metric.joint else ctx.batch_size
    batches = ctx.batches(program, size=size)
    generator = torch.Generator().manual_seed(ctx.seed)
    found: dict[str, list[Tensor]] = {id: [] for id in keys.values()}
    rows: dict[str, int] = dict.fromkeys(found, 0)
    with ctx.progress.task("importance of tokens", len(batches)) as task:
        for batch in batches:
            seen: dict[str, Tensor] = {}
            counts: dict[str, int] = {}
            taps = {key: _watch(id, seen, counts) for key, id in keys.items()}
            whole = not metric.joint or len(next(iter(batch.values()))) > 2
            with torch.set_grad_enabled(whole):
                outputs = executor.run(batch, taps=taps)
            if whole:
                with torch.enable_grad():
                    log_p = metric.distribution(outputs, batch)
                backward(log_p.gather(1, sample_labels(log_p.detach(), generator)).sum())
            for id, count in counts.items():
                rows[id] += count
                if id in seen:
                    found[id].append(seen[id])
            give_back()
            task.advance()
    made = {id: _filled(torch.cat(parts), rows[id]) for id, parts in found.items() if parts}
    fed: dict[tuple[str, int], list[str]] = {}
    for key, id in keys.items():
        if id in made:
            fed.setdefault((executor.input_of(key), len(made[id])), []).append(id)
    return {id: torch.stack([made[other] for other in ids]).sum(0) for ids in fed.values() for id in ids}


def _watch(id: str, seen: dict[str, Tensor], counts: dict[str, int]) -> Tap:
    def watch(value: Tensor) -> Tensor:
        counts[id] = value.numel() // value.shape[-1]
        if not torch.is_grad_enabled():
            return value
        value = value.requires_grad_()

        def collect(g: Tensor) -> None:
            seen[id] = g.detach().square().sum(-1).flatten().float().cpu()

        value.register_hook(collect)
        return value

    return watch


def _filled(values: Tensor, tokens: int) -> Tensor:
    return torch.cat([values, values.mean().expand(tokens - len(values))])


def weights_of(ctx: Context, site: Site, power: float, shapes: Sequence[Sequence[int]]) -> Sequence[Tensor | None]:
    """How much each calibration token counts at a linear, [...] for each of these shapes [...] of its input's batches.

    Linears that are fed one tensor share their importance, summed. None where all tokens count alike: at power 0, and, with a
    note, where the metric reads nothing of the layer, knows no distribution to draw labels from, no gradient passes through the
    graph, or a router gathers the tokens.
    """
    alike = [None] * len(shapes)
    if power == 0 or ctx.program is None or ctx.metric is None:
        return alike
    if not ctx.metric.predicts:
        ctx.note("importance", "", f"{ctx.metric!r} has no distribution to draw labels from: calibration tokens count alike")
        return alike
    if not (energies := importance_of(ctx, ctx.program)):
        return alike
    origin, _ = ctx.derived.get(site.id, (site, None))  # a factor's tokens matter as those of the weight it came from do
    found = energies.get(origin.id)
    sizes = [math.prod(shape) for shape in shapes]
    taken = sum(shape[0] for shape in shapes) / len(ctx.need_calibration())  # of the samples, from the first on
    if found is None:
        ctx.note("importance", site.id, "the metric reads nothing of it: its tokens count alike")
        return alike
    if len(found) != sum(sizes) and len(found) * taken != sum(sizes):
        ctx.note("importance", site.id, "its tokens are not those of the samples (a router gathers them): they count alike")
        return alike
    weights = token_weights(found[: sum(sizes)], power)
    return [part.view(*shape) for part, shape in zip(weights.split(sizes), shapes)]


def importance_of(ctx: Context, program: Program) -> Mapping[str, Tensor]:
    """The importance of the calibration tokens at each linear of the dense program, by site id; computed once a run."""
    if ctx.energies is None:
        code, given = code_hash(token_importance), ctx.need_calibration().content_hash
        key = content_key("importance", code, program.digest(), given, repr(ctx.metric), ctx.seed, versions())
        sites = ctx.find_structure(program).of_kind("linear")
        try:
            ctx.energies = ctx.cached_tensors(key, lambda: token_importance(program, sites, ctx))
        except Refused as refusal:
            ctx.note("importance", "", f"{refusal}: calibration tokens count alike")
            ctx.energies = {}
    return ctx.energies


def token_weights(importance: Tensor, power: float) -> Tensor:
    """Weights of mean about 1 [tokens]; the least is a ten-thousandth of the mean importance, to the power."""
    return (importance / importance.mean().clamp_min(torch.finfo(torch.float32).tiny)).clamp_min(1e-4) ** power
