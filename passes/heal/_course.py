"""The course of a training: AdamW over float parameters, its schedule, and its whole state as plain tensors.

Kept after every check under one key, so that a killed run goes on where it was, to the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class Course:
    """Parameters, their optimizer, and how they did on held-out samples so far.

    Steps are relative: a parameter of root mean square `size` moves by about `lr * size` (as in Adafactor, arXiv 1804.04235), so
    that one rate fits gains near 1 and scales near 0.01.
    """

    def __init__(self, parameters: Sequence[Tensor], sizes: Sequence[float], lr: float, steps: int, warmup: float, clip: float):
        self.parameters, self.steps, self.clip = list(parameters), steps, clip
        self.rates = [lr * size for size in sizes]
        self.warmup = max(1, round(warmup * steps))
        groups = [{"params": [p], "lr": rate} for p, rate in zip(self.parameters, self.rates)]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, foreach=False)
        self.step = self.kept = self.skipped = 0
        self.damages: list[tuple[int, float]] = []
        self.best = self._copies()

    def _copies(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.parameters]

    def share(self, step: int) -> float:
        """Of the full rate: linear warm-up, then half a cosine (arXiv 1608.03983) to zero behind the last step."""
        return min(1.0, (step + 1) / self.warmup) * 0.5 * (1 + math.cos(math.pi * step / self.steps))

    def gradients(self) -> list[Tensor]:
        """Of every parameter, in order; zeros where a batch did not reach one."""
        for p in self.parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        return [p.grad for p in self.parameters if p.grad is not None]

    def advance(self) -> None:
        """One step along the parameters' gradients, which are then gone. Where one is not finite, the step is left out.

        A sample whose activations run away (nothing holds them where norms are frozen) would otherwise end the whole training.
        """
        if torch.isfinite(torch.nn.utils.clip_grad_norm_(self.parameters, self.clip)):
            for group, rate in zip(self.optimizer.param_groups, self.rates):
                group["lr"] = rate * self.share(self.step)
            self.optimizer.step()
        else:
            self.skipped += 1
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1

    def keep(self) -> None:
        """The parameters as they are now are the ones to end with."""
        self.kept, self.best = self.step, self._copies()

    def judge(self, damage: float) -> None:
        """Note the damage on held-out samples at this step; the parameters are kept if it is the least so far."""
        if not self.damages or damage < min(d for _, d in self.damages):
            self.keep()
        self.damages.append((self.step, damage))

    def stalled(self, patience: int, since: int = 0) -> bool:
        """Whether the last `patience` checks, all behind the step `since`, brought nothing better."""
        return sum(step > max(self.kept, since) for step, _ in self.damages) >= patience

    @property
    def diverged(self) -> bool:
        """Whether most steps were left out, or a parameter is not finite."""
        return 2 * self.skipped > self.step or not all(torch.isfinite(p).all() for p in self.parameters)

    # --- keeping

    def state(self, finished: bool) -> dict[str, Tensor]:
        """Everything that the rest of the course depends on; of a finished one, what was kept."""
        made = {
            "counts": torch.tensor([self.step, self.kept, self.skipped, int(finished)]),
            "damages": torch.tensor(self.damages, dtype=torch.float64).reshape(-1, 2),
        }
        for i, (p, best) in enumerate(zip(self.parameters, self.best)):
            made[f"best.{i}"] = best.cpu()
            if not finished:
                made[f"now.{i}"] = p.detach().cpu()
                made |= {f"{name}.{i}": value.cpu() for name, value in self.optimizer.state.get(p, {}).items()}
        return made

    def restore(self, state: dict[str, Tensor]) -> bool:
        """Take up a course that `state` left; whether it was finished."""
        self.step, self.kept, self.skipped, finished = map(int, state["counts"])
        self.damages = [(int(step), damage) for step, damage in state["damages"].tolist()]
        with torch.no_grad():
            for i, (p, best) in enumerate(zip(self.parameters, self.best)):
                best.copy_(state[f"best.{i}"])
                p.copy_(state[f"best.{i}" if finished else f"now.{i}"])
                names = [n for n in ("step", "exp_avg", "exp_avg_sq") if f"{n}.{i}" in state]
                if names:
                    self.optimizer.state[p] = {n: state[f"{n}.{i}"].to("cpu" if n == "step" else p.device) for n in names}
        return bool(finished)

    def finish(self) -> None:
        """The parameters become what was kept."""
        with torch.no_grad():
            for p, best in zip(self.parameters, self.best):
                p.copy_(best)
