"""Kurtosis: how heavy the tails of each linear's inputs are. A few huge values cost all the others their precision.

Source: the fourth standardised moment, over all tokens and channels. A normal distribution has 3.
Cost: one forward. Refuses: nothing.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from lwcompile.context import Context
from lwcompile.contract import AnalysisPass, Score
from lwcompile.program import Program


@dataclass(frozen=True)
class Kurtosis(AnalysisPass):
    """Input kurtosis of each linear, over about `tokens` tokens."""

    name: ClassVar[str] = "kurtosis"
    provides: ClassVar[tuple[str, ...]] = ("kurtosis",)

    tokens: int = 16384

    def run(self, program: Program, ctx: Context) -> Iterator[tuple[str, Score]]:
        linears = ctx.find_structure(program).of_kind("linear")
        for site, x in ctx.activations(program, linears, self.tokens):
            x = x.double() - x.double().mean()
            yield site.id, Score(((x**4).mean() / (x**2).mean() ** 2).item(), samples=len(x))
