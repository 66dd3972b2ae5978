"""Round to nearest: w [N, K] -> the nearest code of a grid whose range is searched, group by group.

Source: the range search of GPTQ and AWQ (arXiv 2210.17323, 2306.00978), with squared error weighted by each input channel's energy
when input statistics are given, and least-squares refits of scale and zero point.
Cost: `steps` passes over the weight; milliseconds for 576x1536, about 3 s for 49152x576 on 2 cores.
Refuses: NaN or infinite weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lwcompile.contract import Solver
from lwcompile.formats import NumericFormat, QuantizedTensor
from lwcompile.passes.solve._grid import check_search, checked, fit_grid
from lwcompile.stats import InputStats


@dataclass(frozen=True)
class Rtn(Solver):
    """Round to nearest with an error-minimising clip search.

    `steps` ranges are tried per group, down to `shrink` of the full one, then `refits` least-squares refits;
    `steps=1, refits=0` is plain min-max.
    """

    name: ClassVar[str] = "rtn"
    steps: int = 20
    shrink: float = 0.4
    refits: int = 2

    def __post_init__(self) -> None:
        check_search(self.steps, self.shrink, self.refits)

    def solve(self, weight: Tensor, format: NumericFormat, stats: InputStats | None) -> QuantizedTensor:
        weight = checked(weight)
        importance = None if stats is None else stats.energy
        grid = fit_grid(weight, format, importance, self.steps, self.shrink, self.refits)
        return QuantizedTensor.nearest(weight, format, *grid)
