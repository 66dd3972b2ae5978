"""Fisher: the damage of every option of every weight, predicted to second order from one forward and backward.

Labels y are drawn from the model's own distribution at each position, and g is the gradient of sum_t log p(y_t) at a layer's
output. A change dW of the layer's weight moves the log-likelihood of a sample by

    D = sum_t g_t . (dW x_t) = <dW, sum_t g_t x_t^T>    and    sum_t KL_t = 1/2 E[D^2] + O(dW^3)

because the scores of the labels have mean 0, are independent between positions, and have the KL's Hessian as second moment.
The square is taken after the sum over positions: one changed weight acts at all of them, and the terms between positions do not
vanish (without them, value projections come out at a third of what they do). Sites that carry one option add their D before it.

    linear      <dW, sum_t g_t x_t^T>          embedding   sum_t g_t . dW[id_t]
    dropped     -sum_t g_t . branch_t          (second order is crude for so large a change, and misses the worst: measure drops)

Source: Fisher information as the Hessian of the KL; derived above.
Cost: a forward and `draws` backwards over the samples, each with one product of every weight's size; one dot product an option.
Refuses: options that neither change a weight nor remove a branch, and those that put other weights in its place, with a remark.
Pruned neurons are columns of the linear behind them that become 0 or are refitted, and latents a change of the keys' and values'
weights.

A site's numeric formats by one solver differ in little but how much of the weight they lose, so only the one of middle width is
solved and moved (its anchor); the others' figures follow from it by sum dW_nk^2 E[g_n^2] E[x_k^2], with dW by the cheap `solver`.
`solver=none` moves each option by itself. A figure's relative standard error is about sqrt(2 / (samples * draws)).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from lwcompile.context import Context
from lwcompile.contract import AnalysisPass, Damage, Score
from lwcompile.errors import BadPlan
from lwcompile.passes.analysis._moves import Moves
from lwcompile.program import Program
from lwcompile.registry import load
from lwcompile.rundir import code_hash
from lwcompile.spec import Spec


@dataclass(frozen=True)
class Fisher(AnalysisPass):
    """Predicted damage of each option on offer; for linears without options, the trace of their Fisher information as a score.

    `only` names transforms: options of others are left to other analyses. `joint=false` passes over options that join two, each of
    which is solved by itself here; they are then taken to do what both do alone.
    """

    name: ClassVar[str] = "fisher"
    provides: ClassVar[tuple[str, ...]] = ("damage", "fisher")

    tokens: int = 16384
    draws: int | None = None  # 1, or 8 of a joint metric, whose groups are few
    solver: Spec | None = field(default=Spec.parse("rtn{steps=6,refits=0}"))
    only: str | tuple[str, ...] | None = None
    joint: bool = True

    def __post_init__(self) -> None:
        if self.tokens < 1 or (self.draws is not None and self.draws < 1):
            raise BadPlan(f"fisher needs at least one token and one draw, not {self.tokens} and {self.draws}")

    def run(self, program: Program, ctx: Context) -> Iterator[tuple[str, Spec, Damage] | tuple[str, Score]]:
        jobs = ctx.offers(program, self.only, self.joint)
        sites = ctx.find_structure(program).of_kind("linear")
        traced = [site for site in sites if site.weight is not None and site.id not in ctx.options]
        codes = sorted({code for option in {option for _, option in jobs} for code in ctx.code_of(option)})
        codes += [code_hash(load("solvers", self.solver.name))] if self.solver is not None else []
        key = ctx.key(self, program.digest(), *codes, *jobs, *(site.id for site in traced))
        found = ctx.cached(key, lambda: Moves(self, program, ctx, traced).results(jobs))
        for (unit, option), row in zip(jobs, found["damages"]):
            if "refused" in row:
                ctx.remark(self.name, unit[0], "refused", f"{option}: {row['refused']}")
                continue
            for id, damage in ctx.shares(program, unit, Damage(**row)):
                yield id, option, damage
        for site, row in zip(traced, found["traces"]):
            yield site.id, Score(**row)
