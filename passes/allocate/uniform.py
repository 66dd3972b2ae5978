"""Uniform: removals spread evenly over the depth, whatever they do: the baseline that every other order has to beat.

Before -> after: every site kept -> `drop_sublayers` sublayers removed, in whole blocks where those are on offer. The first and the
last stay, and those that stay stand as evenly as they can: the i-th of K kept of n is the one at i (n - 1) / (K - 1), rounded.

Source: Unified Layer Skipping (arXiv 2404.06954), there fine-tuned with the skipping active.
Cost: none; neither damages nor samples are looked at.
Refuses: a budget that names more than a number of sublayers, and a number that even removals cannot make.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from lwcompile.budget import Budget
from lwcompile.contract import Allocator
from lwcompile.errors import BadPlan, InfeasibleBudget
from lwcompile.passes.allocate.beam import Removal, removals, together
from lwcompile.plans import Plan
from lwcompile.table import OptionTable


@dataclass(frozen=True)
class Uniform(Allocator):
    """Remove evenly over depth: of the topmost sites on offer, all but the first and last may go."""

    name: ClassVar[str] = "uniform"

    def allocate(self, table: OptionTable, budget: Budget, oracle: Callable[[Plan], float] | None = None) -> Plan:
        if budget.drop_sublayers is None or budget.sized or budget.max_damage is not None:
            raise BadPlan(f"uniform removes a number of sublayers and knows no other limit; the budget is {budget}")
        found = {step.sublayers: step for step in reversed(removals(table))}  # the first option of the topmost site
        steps = [s for s in reversed(found.values()) if not any(s.sublayers < other.sublayers for other in found.values())]
        count = next((k for k in range(len(steps)) if len(together(_spread(steps, k))[1]) == budget.drop_sublayers), None)
        if count is None or (count and count > len(steps) - 2):
            raise InfeasibleBudget(
                f"even removals of {len(steps)} sites, the first and last kept, do not take exactly {budget.drop_sublayers} "
                "sublayers; ask for another number, or offer removal at other sites"
            )
        return Plan.of(table, together(_spread(steps, count))[0], budget, allocator=str(self.spec()))


def _spread(steps: list[Removal], count: int) -> list[Removal]:
    """`count` of them, the others left as evenly as they can be."""
    kept = len(steps) - count
    stay = {math.floor(i * (len(steps) - 1) / max(kept - 1, 1) + 0.5) for i in range(kept)}
    return [step for i, step in enumerate(steps) if i not in stay]
