"""The samples that a healing sees, in batches by number, and those it holds back: drawn by seed, from everywhere in the text."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lwcompile.data import CalibrationSet
from lwcompile.errors import Refused


class Samples:
    """`size` samples make a batch; `share` of all, and at least `least` of them unless it is 0, are `held`."""

    def __init__(self, given: CalibrationSet, names: Sequence[str], size: int, share: float, least: int, seed: int) -> None:
        self.names, self.size, self.seed = names, size, seed
        self._orders: dict[int, Tensor] = {}
        count = 0 if share == 0 else max(least, round(share * len(given)))
        if len(given) - count < size:
            raise Refused(f"{len(given)} samples are too few for a batch of {size} beside {count} held out: raise --samples")
        order = torch.randperm(len(given), generator=torch.Generator().manual_seed(seed))
        self.trained = given.rows(order[count:].sort().values)
        self.held = given.rows(order[:count].sort().values) if count else None

    def batch(self, number: int) -> dict[str, Tensor]:
        """The batch of this number: the samples pass in an order that is drawn anew each time around."""
        places = range(number * self.size, (number + 1) * self.size)
        rows = torch.stack([self._order(place // len(self.trained))[place % len(self.trained)] for place in places])
        return self.trained.rows(rows).inputs_for(self.names)

    def _order(self, round: int) -> Tensor:
        if round not in self._orders:  # a batch may span two or more: the last are kept
            self._orders = dict(list(self._orders.items())[-1:])
            generator = torch.Generator().manual_seed(self.seed + 1 + round)
            self._orders[round] = torch.randperm(len(self.trained), generator=generator)
        return self._orders[round]
