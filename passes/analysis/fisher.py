"""Fisher: the damage of every option of every weight, predicted to second order from one forward and backward.

Labels y are drawn from the model's own distribution at each position, and g is the gradient of sum_t log p(y_t) at a layer's
output. A change dW of the layer's weight moves the log-likelihood of a sample by

    D = sum_t g_t . (dW x_t) = <dW, sum_t g_t x_t^T>    and    sum_t KL_t = 1/2 E[D^2] + O(dW^3)

because the scores of the labels have mean 0, are independent between positions, and have the KL's Hessian as second moment.
The square is taken after the sum over positions: one changed weight acts at all of them, and the terms between positions do not
vanish (without them, value projections come out at a third of what they do). Sites that carry one option add their D before it.

    linear      <dW, sum_t g_t x_t^T>          embedding   sum_t g_t . dW[id_t]
    dropped     -sum_t g_t . branch_t          (second order is crude for so large a change)

Source: Fisher information as the Hessian of the KL; derived above.
Cost: a forward and `draws` backwards over the samples, each with one product of every weight's size; one dot product an option.
Refuses: options that neither change a weight nor remove a branch, with a remark.

Weights are quantized by the cheap `solver` whatever the option names (none: by its own). Figures are predictions: `calibrate`
fits them to a few measured ones. The relative standard error of each is about sqrt(2 / (samples * draws)).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from lwcompile.context import Context
from lwcompile.contract import AnalysisPass, Damage, Score
from lwcompile.damage import estimate
from lwcompile.errors import BadPlan
from lwcompile.executor import Tap
from lwcompile.passes.analysis._changes import Change, Changes, is_embedding
from lwcompile.program import Program
from lwcompile.registry import load
from lwcompile.rundir import code_hash
from lwcompile.site import Site
from lwcompile.spec import Spec

PIECE = 1 << 24
"""Elements of a weight's gradient that are held at a time."""


@dataclass(frozen=True)
class Fisher(AnalysisPass):
    """Predicted damage of each option on offer; for linears without options, the trace of their Fisher information as a score."""

    name: ClassVar[str] = "fisher"
    provides: ClassVar[tuple[str, ...]] = ("damage", "fisher")

    tokens: int = 16384
    draws: int = 1
    solver: Spec | None = field(default=Spec.parse("rtn{steps=6,refits=0}"))

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.draws < 1:
            raise BadPlan(f"fisher needs at least one token and one draw, not {self.tokens} and {self.draws}")

    def run(self, program: Program, ctx: Context) -> Iterator[tuple[str, Spec, Damage] | tuple[str, Score]]:
        jobs = ctx.offers(program)
        sites = ctx.find_structure(program).of_kind("linear")
        traced = [site for site in sites if site.weight is not None and site.id not in ctx.options]
        codes = sorted({code for option in {option for _, option in jobs} for code in ctx.code_of(option)})
        codes += [code_hash(load("solvers", self.solver.name))] if self.solver is not None else []
        key = ctx.key(self, program.digest(), *codes, *jobs, *(site.id for site in traced))
        found = ctx.cached(key, lambda: _Run(self, program, ctx, traced).results(jobs))
        for (unit, option), row in zip(jobs, found["damages"]):
            if "refused" in row:
                ctx.remark(self.name, unit[0], "refused", f"{option}: {row['refused']}")
                continue
            for id, damage in ctx.shares(program, unit, Damage(**row)):
                yield id, option, damage
        for site, row in zip(traced, found["traces"]):
            yield site.id, Score(**row)


class _Run:
    """One pass over the samples. `moves[job]` collects D, one for each sample and draw."""

    def __init__(self, options: Fisher, program: Program, ctx: Context, traced: Sequence[Site]) -> None:
        self.options, self.program, self.ctx = options, program, ctx
        self.metric = ctx.need_metric()
        self.changes = Changes(program, ctx, options.solver)
        self.executor = self.changes.dense
        self.traces = {self.executor.key(site): 0.0 for site in traced}
        self.moves: defaultdict[int, list[Tensor]] = defaultdict(list)
        self.rows = 0

    def results(self, jobs: Sequence[tuple[tuple[str, ...], Spec]]) -> dict[str, Any]:
        refused: dict[int, str] = {}
        with self.ctx.progress.task(f"{self.options.name}: options", len(jobs)) as task:
            for option in dict.fromkeys(option for _, option in jobs):
                alike = [(job, unit) for job, (unit, other) in enumerate(jobs) if other == option]
                refused |= self.changes.add(alike, option)
                task.advance(len(alike))
        self._pass_over_samples()
        positions = self.rows * self.options.draws
        traces = [{"value": trace / positions, "samples": self.rows} for trace in self.traces.values()]
        return {
            "damages": [{"refused": refused[i]} if i in refused else self._damage(i, positions) for i in range(len(jobs))],
            "traces": traces,
        }

    def _damage(self, job: int, positions: int) -> dict[str, Any]:
        """The mean of 1/2 D^2 a position, over samples and draws."""
        moves = torch.cat(self.moves[job])
        made = estimate(0.5 * moves.square() * (len(moves) / positions), None, self.metric.unit, self.ctx.seed)
        return {"value": made.mean, "low": max(made.low, 0.0), "high": made.high, "samples": len(moves)}

    def _pass_over_samples(self) -> None:
        """A joint metric scores samples together, so a whole group of its size is one sample here, and a rest is left out."""
        size = self.ctx.batch_size if not self.metric.joint else getattr(self.metric, "batch", len(self.ctx.need_calibration()))
        batches = self.ctx.batches(self.program, tokens=self.options.tokens, size=size)
        if self.metric.joint and len(batches) > 1 and len(_first(batches[-1])) < size:
            batches.pop()
        generator = torch.Generator(self.ctx.device).manual_seed(self.ctx.seed)
        with self.ctx.progress.task(self.options.name, len(batches)) as task:
            for batch in batches:
                self._batch(batch, generator)
                task.advance()

    def _batch(self, batch: dict[str, Tensor], generator: torch.Generator) -> None:
        samples = 1 if self.metric.joint else len(_first(batch))
        sources = {key: self.executor.input_of(key) for key in {*self.changes.by_key, *self.traces}}
        inputs: dict[str, Tensor] = self.executor.start(batch)
        opened: dict[int, Tensor] = {}

        def tap(key: str) -> Tap:
            def watch(value: Tensor) -> Tensor:
                inputs[key] = value.detach()
                if key in sources:
                    value = value.requires_grad_()
                    value.register_hook(lambda g: self._collect(key, g, inputs[sources[key]], inputs[key], samples, opened))
                return value

            return watch

        taps = {key: tap(key) for key in {*sources, *sources.values()} if key in self.executor.index}
        with torch.enable_grad():
            log_p = self.metric.distribution(self.executor.run(batch, taps=taps), batch)
        self.rows += len(log_p)
        for draw in range(self.options.draws):
            labels = _sample(log_p.detach(), generator)
            log_p.gather(1, labels).sum().backward(retain_graph=draw + 1 < self.options.draws)
            for job, moved in opened.items():
                self.moves[job].append(moved)
            opened.clear()

    @torch.no_grad()
    def _collect(self, key: str, g: Tensor, x: Tensor, y: Tensor, samples: int, opened: dict[int, Tensor]) -> None:
        """The gradient at one call has come: add its part of D for every option that changes it."""

        def add(change: Change, moved: Tensor) -> None:
            moved, before = moved.double().cpu(), opened.get(change.job)
            if before is not None and len(before) != len(moved):
                moved, before = moved.sum(0, keepdim=True), before.sum(0, keepdim=True)
            opened[change.job] = moved if before is None else before + moved

        changes = self.changes.by_key.get(key, [])
        samples = samples if self._samples_first(key, y, samples) else 1
        for change in changes:
            if change.delta is None:
                add(change, -(g * y).reshape(samples, -1).sum(1))
        weights = [change for change in changes if change.delta is not None]
        if not weights and key not in self.traces:
            return
        g = g.reshape(samples, -1, g.shape[-1])
        if is_embedding(self.executor, key):
            for change in weights:
                rows = self.changes.delta(change)[x.reshape(samples, -1)].to(g.dtype)
                add(change, change.scale * (g * rows).sum((1, 2)))
            return
        x = x.reshape(samples, -1, x.shape[-1])
        step = max(1, PIECE // (samples * x.shape[-1]))
        for start in range(0, g.shape[-1], step):
            gradient = (g[..., start : start + step].transpose(1, 2) @ x).flatten(1)
            for change in weights:
                delta = self.changes.delta(change)[start : start + step].flatten().to(gradient.dtype)
                add(change, change.scale * (gradient @ delta))
            if key in self.traces:
                self.traces[key] += gradient.square().sum().item()

    def _samples_first(self, key: str, value: Tensor, samples: int) -> bool:
        """Whether the rows of a value lie sample by sample: not so where a router has gathered them by expert."""
        if value.shape[0] == samples:
            return True
        step = self.executor.steps[self.executor.position(key)]
        fed = step.node.all_input_nodes[0]
        before = fed.args[0].meta.get("val") if fed.target is torch.ops.aten.reshape.default else None  # type: ignore[union-attr]
        rows = step.graph.inputs[0].shape[0]
        return before is not None and before.ndim > 2 and before.shape[0] == rows and value.shape[0] % samples == 0


def _sample(log_p: Tensor, generator: torch.Generator) -> Tensor:
    """One label a row, [rows, 1], by inverting the cumulative distribution: a random number a row instead of one a class."""
    reached = log_p.double().exp().cumsum(-1)
    drawn = torch.rand(len(log_p), 1, dtype=torch.float64, device=log_p.device, generator=generator)
    return torch.searchsorted(reached, drawn * reached[:, -1:], right=True).clamp_max(log_p.shape[1] - 1)


def _first(batch: dict[str, Tensor]) -> Tensor:
    return next(iter(batch.values()))
