"""Weights that are part of the code: what is looked at before each call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lwcompile.backends.dynamo.still import Place, Places, Unwritten


class Frozen:
    """The arguments at these positions, and the weights that lie at these places, which are no arguments."""

    def __init__(self, arguments: Sequence[Any], positions: Sequence[int], places: Sequence[Place] = ()) -> None:
        self.positions, self.places = positions, Places(places)
        self.held: list[Tensor] = self._taken(arguments)  # so that no other tensor has the id of one of them
        self.ids, self.unwritten = [*map(id, self.held)], Unwritten([*self.held, *self.places.values])

    def changed(self, arguments: Sequence[Any]) -> bool:
        """Whether one of them is another tensor, was written to, or lies elsewhere."""
        return [*map(id, self._taken(arguments))] != self.ids or not self.places.same() or not self.unwritten.same()

    def foreign(self, arguments: Sequence[Any]) -> bool:
        """Whether all arguments are other tensors."""
        return not {*self.ids} & {*map(id, self._taken(arguments))}

    def _taken(self, arguments: Sequence[Any]) -> list[Any]:
        return [arguments[i] for i in self.positions]
