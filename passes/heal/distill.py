"""Distill: tensors of the compressed program are trained until its outputs are near the dense program's again.

    loss = output * damage(dense, compressed)                       the metric's own: KL of logits, of features' similarities
         + hidden * mean over blocks of |h - h'|^2 / |h|^2          at the block ends that both programs have, token by token
         + tail   * the same at the last of them alone

Codes stay as they are unless `train` names them; scales, norms and biases are what is left to move. Each tensor moves by about `lr`
of its root mean square a step. The tensors kept are the best on held-out calibration samples, checked every `every` steps; the
start counts too, so damage never grows there. On text of another kind it may, the more so the higher `lr`. Under torchrun, or in an
open process group, the batches of a step are shared out and their gradients summed.

With `blend`, what reads a frozen norm reads share * x / constant + (1 - share) * x / deviation(x) during training. The share rises
from 0 at the first step to 1 after `blend` of all steps: from the norms' own statistics to what the program computes.

Source: distillation (arXiv 1503.02531); hidden states as in TinyBERT (arXiv 1909.10351), the last ones as in FoldGPT (arXiv
2407.00928); norms alone as in Norm Tweaking (arXiv 2309.02784), scales with frozen codes as in EfficientQAT (arXiv 2407.11062); a norm
that fades as in SLAB (arXiv 2405.11582).
Cost: `steps` * `batch` * `accumulate` samples, each forward twice and backward once; 16 bytes a trained number.
Refuses: nothing to train; a metric without gradients; fewer samples than one batch beside the held-out ones; batches that do not
go evenly to the processes.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lwcompile import ranks
from lwcompile.context import Context
from lwcompile.contract import Healing, HealPass
from lwcompile.damage import DamageMeter
from lwcompile.errors import Refused
from lwcompile.executor import Executor
from lwcompile.gradients import backward
from lwcompile.memory import give_back
from lwcompile.passes.heal._blend import Blend
from lwcompile.passes.heal._course import Course
from lwcompile.passes.heal._ends import changed_tensors, common_ends, distance
from lwcompile.passes.heal._samples import Samples
from lwcompile.passes.heal._trained import Training, choose, made
from lwcompile.program import Program

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Distill(HealPass):
    """Train `train` against the dense program on the calibration samples, for `steps` steps.

    train: `norms` (and biases), `scales` (and float zero points), `codes` (straight through), `adapters` (low-rank factors that
    the dense program lacks), `frozen` (what frozen norms were folded into), `changed` (all of the blocks that the plan changed more
    than most), `all` (everything but codes), or globs over ids of sites and names of tensors.
    batch: samples that run together; by default the metric's group, or 4. accumulate: batches a step.
    blend: share of the steps over which frozen norms come to be that; held-out samples see them frozen throughout.
    held_out: share of the calibration samples; 0 trains on all and keeps the last step. patience: checks without a gain.
    """

    name: ClassVar[str] = "distill"

    train: str | tuple[str, ...] = ("norms", "scales")
    lr: float = 2e-3
    output: float = 1.0
    hidden: float = 0.0
    tail: float = 0.0
    batch: int | None = None
    accumulate: int = 2
    warmup: float = 0.1
    clip: float = 1.0
    blend: float = 0.0
    held_out: float = 0.125
    every: int = 20
    patience: int = 4
    precision: Literal["auto", "float32", "bfloat16"] = "auto"

    def __post_init__(self) -> None:
        for field in ("steps", "accumulate", "every", "patience", "batch"):
            if (value := getattr(self, field)) is not None and value < 1:
                raise ValueError(f"{field} is at least 1, not {value}")
        for field in ("lr", "clip"):
            if not getattr(self, field) > 0:
                raise ValueError(f"{field} is above 0, not {getattr(self, field)}")
        if min(self.output, self.hidden, self.tail) < 0 or self.output + self.hidden + self.tail == 0:
            raise ValueError("output, hidden and tail are weights of the loss: none below 0, and not all 0")
        if not (0 <= self.held_out < 1 and 0 <= self.warmup < 1 and 0 <= self.blend < 1):
            raise ValueError("held_out, warmup and blend are shares, at least 0 and below 1")
        if not self.words:
            raise ValueError("train names what may change, such as norms or scales")

    @property
    def words(self) -> tuple[str, ...]:
        return (self.train,) if isinstance(self.train, str) else self.train

    def forwards(self, samples: int) -> float:
        held = 2.0 * self.held_out * samples * (2 + self.steps / self.every)
        return 4.0 * self.steps * self.accumulate * (self.batch or 4) + held

    def heal(self, program: Program, dense: Program, ctx: Context) -> Healing:
        run = _Run(self, program, dense, ctx)
        key = ctx.key(self, program.digest(), dense.digest(), len(run.blend.parts), torch.device(ctx.device).type)
        ranks.require_same(key, "program and samples to heal")
        stored = ranks.told(ctx.rundir.get_tensors(key) if ctx.rundir is not None and not run.rank else None)
        finished = run.course.restore(stored) if stored is not None else False
        with ctx.progress.task(f"healing {run.count:,} numbers", self.steps) as task:
            task.advance(run.course.step)
            while not finished:
                if run.due():
                    finished = run.check() or run.course.step == self.steps
                    if ctx.rundir is not None and not run.rank:
                        ctx.rundir.put_tensors(key, run.course.state(finished))
                if not finished:
                    run.advance()
                    task.advance()
                    give_back()
        run.finish()
        for one in run.trained:
            one.store(program)
        return Healing(run.course.step, run.course.kept, run.count, tuple(run.course.damages))


class _Run:
    """One healing under way: both programs, the samples, and the course."""

    def __init__(self, given: Distill, program: Program, dense: Program, ctx: Context) -> None:
        self.given, self.ctx, self.metric = given, ctx, ctx.need_metric()
        self.dense, device = Executor(dense, ctx.device), torch.device(ctx.device)
        self.rank, self.ranks = ranks.join()
        if given.accumulate % self.ranks:
            raise Refused(f"{given.accumulate} batches a step do not go evenly to {self.ranks} processes: set accumulate")
        size = given.batch or (getattr(self.metric, "batch", ctx.batch_size) if self.metric.joint else ctx.batch_size)
        least = 3 if self.metric.joint else 1
        self.samples = Samples(ctx.need_calibration(), self.dense.inputs(), size, given.held_out, least, ctx.seed)
        structure = ctx.find_structure(dense)
        before = Executor(program, ctx.device)
        self.ends = common_ends(self.dense, before, structure)
        few = self.samples.batch(0)
        chosen = choose(
            program, dense, given.words, structure, lambda: changed_tensors(self.dense, before, self.ends, few, program)
        )
        before.release()
        if (given.hidden or given.tail) and not self.ends:
            raise Refused("no end of a block is left in both programs to compare at: set hidden and tail to 0")
        if not chosen:
            raise Refused(f"there is nothing to train: {', '.join(given.words)} names no tensor of the compressed program")
        self.trained = made(program, dense, chosen, device)
        self.count = sum(one.parameter.numel() for one in self.trained)
        self.blend = Blend(program, round(given.blend * given.steps), ctx)
        self.student = Training(self.blend.program, self.trained, ctx.device)
        parameters, sizes = zip(*((one.parameter, one.size) for one in self.trained))
        self.course = Course(parameters, sizes, given.lr, given.steps, given.warmup, given.clip)
        able = device.type == "cuda" and torch.cuda.is_bf16_supported()
        fast = given.precision == "bfloat16" or (given.precision == "auto" and able)
        self._fast = lambda: torch.autocast(device.type, torch.bfloat16) if fast else nullcontext()

    def advance(self) -> None:
        """One step; each rank takes its share of the batches."""
        given, course = self.given, self.course
        self.blend.at(course.step)
        for i in range(self.rank, given.accumulate, self.ranks):
            loss = self._loss(self.samples.batch(course.step * given.accumulate + i)) / given.accumulate
            if not loss.requires_grad:
                raise Refused(f"{self.metric!r} gives no gradient for what is trained: set output=0 and hidden or tail above it")
            backward(loss)
        ranks.add_up(course.gradients())
        course.advance()

    def _loss(self, batch: Batch) -> Tensor:
        given = self.given
        watched = self.ends if given.hidden else self.ends[-1:] if given.tail else []
        with self._fast():
            with torch.no_grad():
                dense = self.dense.run(batch, watched)
            found = self.student.run(batch, watched)
        terms: list[Tensor] = []
        if given.output:
            outputs = [{name: made[name] for name in self.student.outputs if name in made} for made in (dense, found)]
            terms.append(given.output * self.metric.compare(outputs[0], outputs[1], batch).mean())
        apart = [distance(dense[key], found[key], batch) for key in watched]
        if given.hidden:
            terms.append(given.hidden * torch.stack(apart).mean())
        if given.tail:
            terms.append(given.tail * apart[-1])
        return torch.stack([term.float() for term in terms]).sum()

    def due(self) -> bool:
        """Whether to check now; what a killed run has checked is not checked again."""
        step, given = self.course.step, self.given
        return step not in dict(self.course.damages) and (step % given.every == 0 or step == given.steps)

    def check(self) -> bool:
        """Measure the held-out damage with all that is frozen frozen, and say whether it is time to stop."""
        if self.samples.held is None:
            self.course.keep()
            return False
        self.blend.at(self.blend.over)
        self.course.judge(ranks.told(self._damage() if self.rank == 0 else 0.0))
        return self.course.stalled(self.given.patience, self.blend.over)

    def finish(self) -> None:
        """Leave what was kept in the parameters; `Refused` if the training ran away and nothing held it back."""
        self.course.finish()
        self.dense.release()
        self.student.release()
        if self.course.diverged:
            raise Refused("the training diverged: lower lr, or hold samples back")
        if skipped := self.course.skipped:
            self.ctx.note("distill", "", f"{skipped} of {self.course.step} steps had no finite gradient and were left out")

    @torch.no_grad()
    def _damage(self) -> float:
        assert self.samples.held is not None
        meter = DamageMeter(self.metric, self.ctx.seed)
        for batch in self.samples.held.batches(self.ctx.batch_size, self.dense.inputs()):
            with self._fast():
                dense, found = self.dense.run(batch), self.student.run(batch)
            meter.update(dense, found, batch)
        return meter.result().mean
