"""Scale and zero point per group by search: what round-to-nearest and GPTQ share.

Each group tries `steps` ranges, from its full range down to `shrink` of it, and keeps the one with the least weighted
squared error sum_k h_k (w_k - q_k)^2; then `refits` rounds of least squares move scale and zero point to the optimum
for the codes at hand, as long as that lowers the error. Always against the values that will be stored.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lwcompile.errors import BadInput, BadPlan
from lwcompile.formats import NumericFormat, row_chunks


def checked(weight: Tensor) -> Tensor:
    """The weight as float32 [N, K], or `BadInput`."""
    if weight.ndim != 2 or not weight.is_floating_point() or not weight.numel():
        raise BadInput(f"a weight to quantize is a float matrix [out, in], not {weight.dtype} {tuple(weight.shape)}")
    if not torch.isfinite(weight).all():
        raise BadInput(f"a weight of shape {tuple(weight.shape)} holds NaN or infinity: it cannot be quantized")
    return weight.detach().float()


def check_search(steps: int, shrink: float, refits: int) -> None:
    if steps < 1 or refits < 0 or not 0 < shrink <= 1:
        raise BadPlan(f"a range search needs steps >= 1, 0 < shrink <= 1 and refits >= 0, not {steps}, {shrink}, {refits}")


def fit_grid(
    weight: Tensor, format: NumericFormat, importance: Tensor | None, steps: int, shrink: float, refits: int
) -> tuple[Tensor, Tensor | None]:
    """The grid of a float32 weight [N, K]: scale [N, G] and zero [N, G] or None, rounded as they will be stored.

    `importance` [K] >= 0 weighs the input channels; None: all alike. `steps=1, refits=0` is plain min-max.
    """
    importance = torch.ones(weight.shape[1], device=weight.device) if importance is None else importance.to(weight)
    return solve_groups(weight, format, importance, lambda w, h: _search(w, h, format, steps, shrink, refits))


def solve_groups(
    weight: Tensor, format: NumericFormat, importance: Tensor, solve: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor | None]:
    """Run `solve` on some rows at a time: (w [n, G, g], importance [G, g]) -> (scale [n, G], zero [n, G]).

    A partial last group is filled with copies of its last column, of importance 0: they add no range and no error.
    """
    rows, in_features = weight.shape
    group, groups = format.group(in_features), format.groups(in_features)
    pad = groups * group - in_features
    h = F.pad(importance, (0, pad)).view(groups, group)
    scale = torch.empty(rows, groups, device=weight.device)
    zero = torch.empty_like(scale)
    for chunk in row_chunks(weight.shape):
        w = weight[chunk]
        if pad:
            w = torch.cat([w, w[:, -1:].expand(-1, pad)], 1)
        scale[chunk], zero[chunk] = solve(w.unflatten(1, (groups, group)), h)
    return scale, None if format.zero_point == "none" else zero


def _search(w: Tensor, h: Tensor, format: NumericFormat, steps: int, shrink: float, refits: int) -> tuple[Tensor, Tensor]:
    low, high = w.amin(-1), w.amax(-1)
    # Symmetric codes reach one step further below than above: past 1, the extreme weight moves to the shorter side.
    widest = format.center / (format.center - 1) if format.zero_point == "none" and steps > 1 else 1.0
    scale, zero = range_grid(low, high, 1.0, format)
    error = _error(w, h, scale, zero, format)
    best = (scale, zero, error)
    for factor in torch.linspace(widest, shrink, steps).tolist() if steps > 1 else ():
        _keep_better(w, h, format, best, *range_grid(low, high, factor, format))
    for _ in range(refits):
        _keep_better(w, h, format, best, *_refit(w, h, scale, zero, format))
        for shift in (-1, 1) if format.zero_point == "integer" else ():
            moved = (zero + shift).clamp_(0, format.top)
            _keep_better(w, h, format, best, _best_scale(w, h, scale, moved, format), moved)
    return scale, zero


def range_grid(low: Tensor, high: Tensor, factor: float, format: NumericFormat) -> tuple[Tensor, Tensor]:
    """The stored grid over a range that is `factor` times [low, high]."""
    if format.zero_point == "none":
        extreme = torch.where(high > -low, high, low)  # the code 0, at -center steps, takes it: its sign is the scale's
        scale = format.round_scale(extreme * (-factor / format.center))
        return scale, torch.full_like(scale, format.center)
    if format.zero_point == "integer":  # the range holds 0, or the zero point would not be a code
        low, high = low.clamp(max=0) * factor, high.clamp(min=0) * factor
    else:
        flat = low == high  # a constant group has no range of its own: take it from 0
        low, high = torch.where(flat, low.clamp(max=0), low), torch.where(flat, high.clamp(min=0), high)
        low, high = low + (high - low) * ((1 - factor) / 2), high - (high - low) * ((1 - factor) / 2)
    scale = format.round_scale((high - low) / format.top)
    return scale, format.round_zero(-low / scale)


def _refit(w: Tensor, h: Tensor, scale: Tensor, zero: Tensor, format: NumericFormat) -> tuple[Tensor, Tensor]:
    """Weighted least squares for w ~ (code - zero) * scale with the codes that the present grid gives."""
    codes = nearest_codes(w, scale, zero, format)
    if format.zero_point != "none":
        mass = h.sum(-1).clamp_min(torch.finfo(h.dtype).tiny)
        mean_w, mean_q = (w * h).sum(-1) / mass, (codes * h).sum(-1) / mass
        centered = (codes - mean_q.unsqueeze(-1)) * h
        slope = (centered * w).sum(-1) / (centered * codes).sum(-1)
        slope = torch.where((slope > 0) & torch.isfinite(slope), slope, scale)
        if format.zero_point == "float":
            slope = format.round_scale(slope)
            return slope, format.round_zero(mean_q - mean_w / slope)
        zero = format.round_zero(mean_q - mean_w / slope)
    return _best_scale(w, h, scale, zero, format), zero


def _best_scale(w: Tensor, h: Tensor, scale: Tensor, zero: Tensor, format: NumericFormat) -> Tensor:
    """Weighted least squares for the scale alone."""
    steps = nearest_codes(w, scale, zero, format) - zero.unsqueeze(-1)
    slope = (steps * w * h).sum(-1) / (steps.square() * h).sum(-1)
    return format.round_scale(torch.where(torch.isfinite(slope) & (slope * scale > 0), slope, scale))


def nearest_codes(w: Tensor, scale: Tensor, zero: Tensor, format: NumericFormat) -> Tensor:
    return (w / scale.unsqueeze(-1)).add_(zero.unsqueeze(-1)).round_().clamp_(0, format.top)


def _error(w: Tensor, h: Tensor, scale: Tensor, zero: Tensor, format: NumericFormat) -> Tensor:
    rounded = nearest_codes(w, scale, zero, format).sub_(zero.unsqueeze(-1)).mul_(scale.unsqueeze(-1))
    return rounded.sub_(w).square_().mul_(h).sum(-1)


def _keep_better(
    w: Tensor, h: Tensor, format: NumericFormat, best: tuple[Tensor, Tensor, Tensor], scale: Tensor, zero: Tensor
) -> None:
    """Take, in place, a candidate grid where its error is strictly less; `best` is (scale, zero, error)."""
    error = _error(w, h, scale, zero, format)
    better = error < best[2]
    for kept, new in zip(best, (scale, zero, error)):
        torch.where(better, new, kept, out=kept)
