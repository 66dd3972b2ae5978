"""The pass over the samples behind `fisher`: per-sample moves of the log-likelihood for every option."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from lwcompile.context import Context
from lwcompile.damage import estimate
from lwcompile.executor import Tap
from lwcompile.gradients import backward
from lwcompile.memory import give_back
from lwcompile.metric import sample_labels
from lwcompile.passes.analysis._anchors import Jobs, find_anchors, losses
from lwcompile.passes.analysis._changes import Change, Changes, is_embedding
from lwcompile.program import Program
from lwcompile.site import Site
from lwcompile.spec import Spec


class Options(Protocol):
    """What the pass is asked for; `fisher`'s fields."""

    name: ClassVar[str]

    @property
    def tokens(self) -> int: ...
    @property
    def draws(self) -> int | None: ...
    @property
    def solver(self) -> Spec | None: ...


PIECE = 1 << 24
"""Elements of a weight's gradient that are held at a time."""


class Moves:
    """One pass over the samples. `moves[job]` collects D, one for each sample and draw."""

    def __init__(self, options: Options, program: Program, ctx: Context, traced: Sequence[Site]) -> None:
        self.options, self.program, self.ctx = options, program, ctx
        self.metric = ctx.need_metric()
        self.changes = Changes(program, ctx, None)
        self.executor = self.changes.dense
        self.traces = {self.executor.key(site): 0.0 for site in traced}
        self.moves: defaultdict[int, list[Tensor]] = defaultdict(list)
        self.energy: dict[tuple[str, str], Tensor] = {}
        self.rows = 0
        self.draws = options.draws or (8 if self.metric.joint else 1)

    def results(self, jobs: Jobs) -> dict[str, Any]:
        cheap = self.options.solver
        anchors = find_anchors(jobs, self.ctx) if cheap is not None else {job: job for job in range(len(jobs))}
        moved = sorted(set(anchors.values()))
        refused: dict[int, str] = {}
        with self.ctx.progress.task(f"{self.options.name}: options", len(moved)) as task:
            for option in dict.fromkeys(jobs[job][1] for job in moved):
                alike = [(job, jobs[job][0]) for job in moved if jobs[job][1] == option]
                refused |= self.changes.add(alike, option)
                task.advance(len(alike))
        self._pass_over_samples()
        positions = self.rows * self.draws
        traces = [{"value": trace / positions, "samples": self.rows} for trace in self.traces.values()]
        damages = {job: self._damage(job, positions) for job in moved if job not in refused}
        if cheap is not None:
            refused |= self._spread(jobs, anchors, damages, refused, cheap)
        return {"damages": [damages.get(job) or {"refused": refused[job]} for job in range(len(jobs))], "traces": traces}

    def _damage(self, job: int, positions: int) -> dict[str, Any]:
        """The mean of 1/2 D^2 a position, over samples and draws; 0 where the metric reads nothing of what changes."""
        if not self.moves[job]:
            return {"value": 0.0, "low": 0.0, "high": 0.0, "samples": positions}
        moves = torch.cat(self.moves[job])
        made = estimate(0.5 * moves.square() * (len(moves) / positions), None, self.metric.unit, self.ctx.seed)
        return {"value": made.mean, "low": max(made.low, 0.0), "high": made.high, "samples": len(moves)}

    def _spread(
        self, jobs: Jobs, anchors: dict[int, int], damages: dict[int, dict[str, Any]], refused: dict[int, str], cheap: Spec
    ) -> dict[int, str]:
        """Add the jobs that an anchor stands for to `damages`; return why those that cannot be were refused."""
        led = [job for job, anchor in anchors.items() if job != anchor]
        needed = sorted({*led, *(anchors[job] for job in led)})
        loss = losses(self.program, self.ctx, jobs, needed, cheap, self.energy)
        reasons: dict[int, str] = {}
        for job in led:
            anchor = anchors[job]
            if anchor in refused or job not in loss or anchor not in loss:
                reasons[job] = refused.get(anchor, "the cheap solver does not take it")
                continue
            ratio = loss[job] / loss[anchor] if loss[anchor] > 0 else 1.0
            row = damages[anchor]
            damages[job] = {**row, **{key: row[key] * ratio for key in ("value", "low", "high")}}
        return reasons

    def _pass_over_samples(self) -> None:
        """A joint metric scores samples together, so a whole group of its size is one sample here, and a rest is left out."""
        size = self.ctx.batch_size if not self.metric.joint else getattr(self.metric, "batch", len(self.ctx.need_calibration()))
        batches = self.ctx.batches(self.program, tokens=self.options.tokens, size=size)
        if self.metric.joint and len(batches) > 1 and len(_first(batches[-1])) < size:
            batches.pop()
        generator = torch.Generator().manual_seed(self.ctx.seed)
        with self.ctx.progress.task(self.options.name, len(batches)) as task:
            for batch in batches:
                self._batch(batch, generator)
                give_back()
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
        for draw in range(self.draws):
            labels = sample_labels(log_p.detach(), generator)
            backward(log_p.gather(1, labels).sum(), again=draw + 1 < self.draws)
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
            self._count(
                key, torch.bincount(x.flatten(), minlength=self.changes.delta(weights[0]).shape[0]), g.square().sum((0, 1))
            )
            for change in weights:
                rows = self.changes.delta(change)[x.reshape(samples, -1)].to(g.dtype)
                add(change, change.scale * (g * rows).sum((1, 2)))
            return
        x = x.reshape(samples, -1, x.shape[-1])
        self._count(key, g.square().sum((0, 1)), x.square().sum((0, 1)))
        step = max(1, PIECE // (samples * x.shape[-1]))
        for start in range(0, g.shape[-1], step):
            gradient = (g[..., start : start + step].transpose(1, 2) @ x).flatten(1)
            for change in weights:
                delta = self.changes.delta(change)[start : start + step].flatten().to(gradient.dtype)
                add(change, change.scale * (gradient @ delta))
            if key in self.traces:
                self.traces[key] += gradient.square().sum().item()

    def _count(self, key: str, rows: Tensor, columns: Tensor) -> None:
        """Add to the second moments that go with the rows and columns of a weight."""
        for side, moment in (("rows", rows), ("columns", columns)):
            self.energy[key, side] = self.energy.get((key, side), torch.zeros(())) + moment.float()

    def _samples_first(self, key: str, value: Tensor, samples: int) -> bool:
        """Whether the rows of a value lie sample by sample: not so where a router has gathered them by expert."""
        if value.shape[0] == samples:
            return True
        step = self.executor.steps[self.executor.position(key)]
        fed = step.node.all_input_nodes[0]
        before = fed.args[0].meta.get("val") if fed.target is torch.ops.aten.reshape.default else None  # type: ignore[union-attr]
        rows = step.graph.inputs[0].shape[0]
        return before is not None and before.ndim > 2 and before.shape[0] == rows and value.shape[0] % samples == 0


def _first(batch: dict[str, Tensor]) -> Tensor:
    return next(iter(batch.values()))
