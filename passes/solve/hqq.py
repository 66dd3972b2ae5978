"""HQQ: w [N, K] -> codes on min-max scales with zero points that minimise sum |w - q|_p^p, p < 1, without any data.

Source: half-quadratic quantization (Badri and Shaji, 2023). It alternates a shrinkage that lets outliers be,
e = sign(r) relu(|r| - |r|^(p-1) / beta) of the residual r = w - q, with the zero point that is best for the rest,
z = mean(code - (w - e) / scale); beta grows by kappa. Where the zero point is a code, or absent, rounding would undo most
of that, so the scale is optimised along with it, by the same steps. Each group keeps its best iterate.
Cost: `iters` passes over the weight; about 0.2 s for 576x1536 and 6 s for 49152x576 on one core.
Refuses: NaN or infinite weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lwcompile.contract import Solver
from lwcompile.errors import BadPlan
from lwcompile.formats import NumericFormat, QuantizedTensor
from lwcompile.passes.solve._grid import checked, nearest_codes, range_grid, solve_groups
from lwcompile.stats import InputStats


@dataclass(frozen=True)
class Hqq(Solver):
    """Half-quadratic quantization. A group keeps its min-max grid where the optimised one, as stored, is no better."""

    name: ClassVar[str] = "hqq"
    p: float = 0.7
    beta: float = 10.0
    kappa: float = 1.01
    iters: int = 20

    def __post_init__(self) -> None:
        if not 0 < self.p <= 1 or self.beta <= 0 or self.kappa < 1 or self.iters < 1:
            raise BadPlan(
                "hqq needs 0 < p <= 1, beta > 0, kappa >= 1 and iters >= 1, "
                f"not {self.p}, {self.beta}, {self.kappa} and {self.iters}"
            )

    def solve(self, weight: Tensor, format: NumericFormat, stats: InputStats | None) -> QuantizedTensor:
        weight = checked(weight)
        present = torch.ones(weight.shape[1], device=weight.device)
        grid = solve_groups(weight, format, present, lambda w, h: self._solve_groups(w, h, format))
        return QuantizedTensor.nearest(weight, format, *grid)

    def _solve_groups(self, w: Tensor, present: Tensor, format: NumericFormat) -> tuple[Tensor, Tensor]:
        first = range_grid(w.amin(-1), w.amax(-1), 1.0, format)
        scale, zero = best = first
        least, beta = torch.full_like(scale, torch.inf), self.beta
        for _ in range(self.iters):
            codes = nearest_codes(w, scale, zero, format)
            residual = w - (codes - zero.unsqueeze(-1)) * scale.unsqueeze(-1)
            error = (residual.abs() * present).sum(-1)
            better = error < least
            if not better.any():
                break
            best = torch.where(better, scale, best[0]), torch.where(better, zero, best[1])
            least = torch.minimum(error, least)
            target = w - self._shrink(residual, beta)
            if format.zero_point != "none":
                zero = ((codes - target / scale.unsqueeze(-1)) * present).sum(-1) / present.sum(-1)
            if format.zero_point != "float":
                zero = format.round_zero(zero)
                steps = (codes - zero.unsqueeze(-1)) * present
                slope = (steps * target).sum(-1) / (steps * steps).sum(-1)
                scale = torch.where(torch.isfinite(slope) & (slope * scale > 0), slope, scale)
            beta *= self.kappa
        scale, zero = format.round_scale(best[0]), format.round_zero(best[1])
        better = self._error(w, present, scale, zero, format) < self._error(w, present, *first, format)
        return torch.where(better, scale, first[0]), torch.where(better, zero, first[1])

    def _shrink(self, x: Tensor, beta: float) -> Tensor:
        magnitude = x.abs()
        return (magnitude - magnitude.clamp_min(1e-12) ** (self.p - 1) / beta).relu_().copysign_(x)

    def _error(self, w: Tensor, present: Tensor, scale: Tensor, zero: Tensor, format: NumericFormat) -> Tensor:
        codes = nearest_codes(w, scale, zero, format)
        residual = w - (codes - zero.unsqueeze(-1)) * scale.unsqueeze(-1)
        return (residual.abs() ** self.p * present).sum(-1)
