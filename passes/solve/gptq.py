"""GPTQ: w [N, K] -> codes that keep the layer's output: argmin_Q tr((W - Q) H (W - Q)^T), H = E[2 x x^T].

Columns are rounded one at a time, and each takes up the errors of those before it (arXiv 2210.17323), written as LDLQ
(QuIP, arXiv 2307.13304, theorem 6), which gives the same codes without inverting H: with
H = (A + I) D (A + I)^T and A strictly upper triangular, column k rounds w_k + (W - Q)_{<k} A_{<k,k}.
Three things differ from the original, each measured to help on unseen text. The range search weighs column k by D_k, the
part of its error that no later column can take up. H is damped channel by channel too. And `rounds` of coordinate descent
follow: each group's scale, then each code, moves to its optimum given all the others. Weights of dead channels (H_kk = 0)
are rounded, not zeroed.

Two more take the whole model into account. Tokens count by how much the model's outputs depend on them (`importance`;
GuidedQuant, arXiv 2505.07004). And behind compressed layers a weight is first moved to make up for the drift d of its inputs,
W <- W + drift W E[d x^T] H^-1, which is the least-squares fit to the dense model's output (GPTAQ, arXiv 2504.02692).

Source: as named.
Cost: a float64 Cholesky of K x K, a solve with it, and (1 + 2 rounds) N K^2 multiply-adds.
Refuses: no input statistics; NaN or infinite weights; an H that is not positive definite at any damping.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from lwcompile.contract import Solver, Wanted
from lwcompile.errors import BadInput, BadPlan
from lwcompile.formats import NumericFormat, QuantizedTensor
from lwcompile.passes.solve._grid import check_search, checked, fit_grid
from lwcompile.stats import InputStats

ROWS = 4096
"""Rows solved at a time (they are independent), so that a block of errors stays in cache."""


@dataclass(frozen=True)
class Gptq(Solver):
    """Rounding with error feedback.

    `damp` times the mean of H's diagonal is added to it (ten times as much while H is not positive definite), and
    `channel_damp` times each channel's own energy: correlations seen on few tokens are trusted less. `act_order` takes
    columns by falling energy; `block` columns share one update of the rest; `steps`, `shrink` and `refits` are the range
    search of round-to-nearest; `rounds` of coordinate descent polish the result. `importance` is the power of the tokens'
    weights (0: all alike), `drift` the share of the drift that is made up for.
    """

    name: ClassVar[str] = "gptq"
    needs_hessian: ClassVar[bool] = True
    damp: float = 0.01
    channel_damp: float = 0.05
    act_order: bool = True
    block: int = 128
    steps: int = 20
    shrink: float = 0.4
    refits: int = 2
    rounds: int = 2
    importance: float = 0.5
    drift: float = 0.5

    def __post_init__(self) -> None:
        check_search(self.steps, self.shrink, self.refits)
        if not 0 < self.damp <= 1 or self.channel_damp < 0 or self.block < 1 or self.rounds < 0:
            raise BadPlan(f"gptq needs 0 < damp <= 1, channel_damp >= 0, block >= 1 and rounds >= 0, not {self}")
        if not (0 <= self.importance <= 1 and 0 <= self.drift <= 1):
            raise BadPlan(f"gptq takes importance and drift between 0 and 1, not {self.importance:g} and {self.drift:g}")

    @property
    def wanted(self) -> Wanted:
        return Wanted(self.importance, self.drift > 0)

    def solve(self, weight: Tensor, format: NumericFormat, stats: InputStats | None) -> QuantizedTensor:
        weight = checked(weight)
        if stats is None:
            raise BadInput("gptq needs statistics of the weight's inputs: give calibration samples, or use hqq or rtn")
        if stats.features != weight.shape[1]:
            raise BadInput(f"the input statistics have {stats.features} channels, the weight takes {weight.shape[1]}")
        given = self.damp, self.channel_damp, self.act_order
        order, hessian, feedback, pivots = _factors(stats, stats.weight, *given, weight.device)
        if stats.drift is not None and self.drift:
            weight = weight + self.drift * weight @ _makeup(stats, stats.weight, hessian, order)
        importance = torch.empty_like(pivots)
        importance[order] = pivots
        scale, zero = fit_grid(weight, format, importance, self.steps, self.shrink, self.refits)
        zeros = torch.full_like(scale, format.center) if zero is None else zero
        codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
        columns_of = order // format.group(len(order))
        for start in range(0, len(weight), ROWS):
            rows = slice(start, start + ROWS)
            grid = _Grid(format, columns_of, scale[rows].T.contiguous(), zeros[rows].T.contiguous())
            w = weight[rows].T[order]
            q = grid.round_with_feedback(w, feedback, self.block)
            for _ in range(self.rounds):
                grid.refit_scales(w, hessian, q)
                grid.refit_codes(w, hessian, q, self.block)
            codes[rows, order] = q.T.to(torch.uint8)
            scale[rows] = grid.scale.T
        return QuantizedTensor.of(format, codes, scale, zero)


@dataclass(frozen=True)
class _Grid:
    """The grids of some rows, laid out for columns: `scale` and `zero` [G, n]; `group` [K] is the row of each column.

    Weights and codes are [K, n] float32 in the order of solving, so that a column's values are contiguous.
    """

    format: NumericFormat
    group: Tensor
    scale: Tensor
    zero: Tensor

    def round_with_feedback(self, w: Tensor, feedback: Tensor, block: int) -> Tensor:
        codes, error = torch.empty_like(w), torch.empty_like(w)
        group, scale, zero = self.group.tolist(), self.scale.unbind(), self.zero.unbind()
        for start in range(0, len(w), block):
            stop = min(start + block, len(w))
            target = torch.addmm(w[start:stop], feedback[:start, start:stop].T, error[:start])
            for k in range(start, stop):
                x, s, z = target[k - start], scale[group[k]], zero[group[k]]
                x.addmv_(error[start:k].T, feedback[start:k, k])
                torch.div(x, s, out=codes[k]).add_(z).round_().clamp_(0, self.format.top)
                torch.sub(w[k], torch.sub(codes[k], z, out=x).mul_(s), out=error[k])
        return codes

    def refit_codes(self, w: Tensor, hessian: Tensor, codes: Tensor, block: int) -> None:
        """One sweep over the columns, in place: each code to the best one given all the others."""
        error = w - self._values(codes)
        group, scale = self.group.tolist(), self.scale.unbind()
        diagonal = hessian.diagonal().tolist()
        for start in range(0, len(w), block):
            stop = min(start + block, len(w))
            gradient = hessian[start:stop] @ error
            change = torch.empty_like(gradient)
            for k in range(start, stop):
                x, s = gradient[k - start], scale[group[k]]
                x.addmv_(change[: k - start].T, hessian[start:k, k])
                before = codes[k].clone()
                x.div_(s).mul_(1 / diagonal[k]).add_(before).round_().clamp_(0, self.format.top)
                codes[k] = x
                torch.sub(before, x, out=change[k - start]).mul_(s)
            error[start:stop] += change

    def refit_scales(self, w: Tensor, hessian: Tensor, codes: Tensor) -> None:
        """One sweep over the groups, in place: each scale to the best one, as stored, given all the others."""
        error = w - self._values(codes)
        for g in range(len(self.scale)):
            columns = (self.group == g).nonzero().squeeze(1)
            steps = codes[columns] - self.zero[g]
            gradient = (steps * (hessian[columns] @ error)).sum(0)
            curvature = (steps * (hessian[columns][:, columns] @ steps)).sum(0)
            best = self.scale[g] + gradient / curvature
            usable = torch.isfinite(best) & (best * self.scale[g] > 0)
            scale = torch.where(usable, self.format.round_scale(best), self.scale[g])
            error[columns] -= steps * (scale - self.scale[g])
            self.scale[g] = scale

    def _values(self, codes: Tensor) -> Tensor:
        return (codes - self.zero[self.group]).mul_(self.scale[self.group])


@lru_cache(maxsize=2)  # q, k and v share their inputs, as do all the formats tried on one weight
def _factors(
    stats: InputStats, seen: float, damp: float, channel_damp: float, act_order: bool, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The order of columns, and the damped H, A and D in that order; `seen` tells updated statistics from older ones."""
    hessian = stats.hessian.to(device).double()
    energy = hessian.diagonal()
    order = energy.argsort(descending=True, stable=True) if act_order else torch.arange(len(energy), device=energy.device)
    return order, *factorize(hessian[order][:, order], damp, channel_damp)


@lru_cache(maxsize=2)
def _makeup(stats: InputStats, seen: float, hessian: Tensor, order: Tensor) -> Tensor:
    """E[d x^T] H^-1 [K, K] float32, with the damped H in that order of columns; d is the dense inputs less the present ones."""
    assert stats.drift is not None
    back = order.argsort()
    damped = hessian[back][:, back].double()
    return torch.linalg.solve(damped, stats.drift.to(damped).T).T.float().contiguous()


def factorize(hessian: Tensor, damp: float, channel_damp: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """H [K, K] float64 -> the damped H and A, float32, and D [K] float64, with damped H = (A + I) D (A + I)^T."""
    if not torch.isfinite(hessian).all():
        raise BadInput("the input statistics hold NaN or infinity")
    energy = hessian.diagonal()
    hessian = hessian + torch.diag(channel_damp * energy)
    ridge = torch.diag(torch.full_like(energy, energy.mean().clamp_min(torch.finfo(torch.float32).tiny).item()))
    while damp <= 1:
        damped = hessian + damp * ridge
        lower, info = torch.linalg.cholesky_ex(damped.flip(0, 1))  # from the last column, as A is upper triangular
        if not info.item():
            upper = lower.flip(0, 1)
            root = upper.diagonal()
            return damped.float(), (upper / root).triu_(1).float(), root.square()
        damp *= 10
    raise BadInput("the inputs' second moments are not positive definite at any damping: give more calibration samples")
