"""Code whose numbers differ from the graph's by design: its first call is compared with the graph, one that is too far is an error, and
what it differs by is logged."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lwcompile.errors import VerificationError
from lwcompile.graph import ModelGraph
from lwcompile.manager import relative_error

log = logging.getLogger("lwcompile")

INT8_TOLERANCE = 0.1
"""What int8 activations may move an output of a graph by, relative to its root mean square: past it something else is wrong. Single
positions move further: a model may be at a loss there, so that any rounding decides."""


class Checked:
    """Calls `call` with the `stored` tensors and then the inputs; dense weights are made for the first call, and let go."""

    def __init__(self, call: Callable[..., Sequence[Any]], graph: ModelGraph, stored: int) -> None:
        self.call, self.stored = call, stored
        self.unchecked: ModelGraph | None = graph

    def __call__(self, values: Sequence[Tensor]) -> Sequence[Any]:
        if self.unchecked is None:
            return self.call(*values)
        with torch.no_grad():  # before the call, which may write into its inputs
            wanted = self.unchecked.module(dense=True)(*values[self.stored :])
        made = self.call(*values)
        errors = {name: moved(a, b) for name, a, b in zip(self.unchecked.outputs, wanted, made, strict=True)}
        name, error = max(errors.items(), key=lambda pair: pair[1])
        if not error <= INT8_TOLERANCE:
            raise VerificationError(
                f"with activations in int8, {name} is {error:.1e} of its root mean square away from the graph's; leave them in float32"
            )
        log.warning("activations in int8 move %s by %.1e of its root mean square on the first inputs", name, error)
        self.unchecked = None
        return made


def moved(wanted: Tensor, made: Tensor) -> float:
    """The root mean square of the difference over that of what is wanted; infinite where one is finite and the other is not."""
    if wanted.shape != made.shape or not wanted.is_floating_point():
        return relative_error(wanted, made)
    finite = wanted.isfinite()
    if not torch.equal(finite, made.isfinite()):
        return float("inf")
    a, b = wanted[finite].double(), made[finite].double()
    return ((a - b).norm() / a.norm().clamp(min=torch.finfo(torch.float32).tiny)).item()
