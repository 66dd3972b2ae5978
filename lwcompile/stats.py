"""What solvers know of a weight's inputs: second moments over calibration tokens, and the loss they predict."""

from __future__ import annotations

import torch
from torch import Tensor

from lwcompile.errors import BadInput
from lwcompile.formats import QuantizedTensor


class InputStats:
    """Running second moments of a linear's inputs, fed one batch at a time.

    Tokens may carry weights (RSQ, arXiv 2503.01820): only their ratios matter. Sums are kept in `dtype` on `device`;
    products are taken in float32.
    """

    def __init__(self, features: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> None:
        self.features = features
        self.tokens = 0
        self.weight = 0.0
        self._gram = torch.zeros(features, features, dtype=dtype, device=device)
        self._magnitude = torch.zeros(features, dtype=dtype, device=device)
        self._drift: Tensor | None = None

    @torch.no_grad()
    def update(self, x: Tensor, weight: Tensor | None = None, dense: Tensor | None = None) -> None:
        """Add tokens `x` [..., K]; `weight` [...] >= 0 says how much each one counts (default 1); `dense` [..., K] is what the
        dense model feeds at these tokens, of all updates or of none."""
        if x.shape[-1] != self.features:
            raise BadInput(f"these inputs have {x.shape[-1]} channels, but the weight takes {self.features}")
        x = x.reshape(-1, self.features).float()
        if weight is not None:
            weight = weight.reshape(-1, 1).to(x)
            if len(weight) != len(x):
                raise BadInput(f"{len(weight)} token weights were given for {len(x)} tokens")
        weighted = x if weight is None else x * weight
        self._gram += weighted.T @ x
        if dense is not None:
            moved = (dense.reshape(-1, self.features).float() - x).T @ weighted
            self._drift = moved.to(self._gram.dtype) if self._drift is None else self._drift + moved
        self._magnitude += weighted.abs().sum(0)
        self.weight += len(x) if weight is None else weight.double().sum().item()
        self.tokens += len(x)

    @torch.no_grad()
    def merge(self, other: InputStats) -> None:
        """Add what another has seen: the inputs of a second place that reads the same weight. Its drift counts as none."""
        self._gram += other._gram.to(self._gram)
        self._magnitude += other._magnitude.to(self._magnitude)
        self.weight += other.weight
        self.tokens += other.tokens

    def cpu(self) -> InputStats:
        """These sums on the CPU, where weights are; itself if they are there."""
        if self._gram.device.type == "cpu":
            return self
        made = InputStats(self.features, dtype=self._gram.dtype)
        made.tokens, made.weight, made._gram, made._magnitude = self.tokens, self.weight, self._gram.cpu(), self._magnitude.cpu()
        made._drift = None if self._drift is None else self._drift.cpu()
        return made

    def through(self, by: Tensor) -> InputStats:
        """The statistics of these inputs behind a matrix [k, K], or of some of their channels [k] int64; without the drift.

        A matrix leaves mean |x| unknown: the root mean square, which bounds it, stands for it.
        """
        made = InputStats(len(by), dtype=self._gram.dtype, device=self._gram.device)
        made.tokens, made.weight = self.tokens, self.weight
        if by.ndim == 1:
            made._gram, made._magnitude = self._gram[by][:, by], self._magnitude[by]
            return made
        by = by.to(self._gram)
        made._gram = by @ self._gram @ by.T
        made._magnitude = (made._gram.diagonal() * self.weight).clamp_min(0).sqrt()
        return made

    @property
    def hessian(self) -> Tensor:
        """H = (2/n) sum_t w_t x_t x_t^T, [K, K], n the sum of the token weights (arXiv 2210.17323)."""
        return self._gram * (2 / self._seen())

    @property
    def drift(self) -> Tensor | None:
        """(2/n) sum_t w_t (x_dense - x)_t x_t^T, [K, K]; None where no dense inputs were given."""
        return None if self._drift is None else self._drift * (2 / self._seen())

    @property
    def energy(self) -> Tensor:
        """The diagonal of H, [K]: twice the mean square of each channel."""
        return self._gram.diagonal() * (2 / self._seen())

    @property
    def mean_abs(self) -> Tensor:
        """Mean |x| of each channel, [K]."""
        return self._magnitude / self._seen()

    def _seen(self) -> float:
        if self.weight <= 0:
            raise BadInput("these input statistics have seen no tokens: run the calibration samples first")
        if not torch.isfinite(self._magnitude).all():
            raise BadInput("the calibration inputs of this weight hold NaN or infinity")
        return self.weight


def proxy_loss(weight: Tensor, quantized: QuantizedTensor | Tensor, stats: InputStats) -> float:
    """Expected squared output error per token, E |(W - Q) x|^2 = tr((W - Q) H (W - Q)^T) / 2."""
    dense = quantized.dequantize() if isinstance(quantized, QuantizedTensor) else quantized
    hessian = stats.hessian.float()
    loss = 0.0
    for w, q in zip(weight.split(4096), dense.split(4096)):
        error = w.float() - q.float()
        loss += (error @ hessian).mul_(error).sum(dtype=torch.float64).item()
    return loss / 2
