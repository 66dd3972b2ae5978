"""Gradients through a captured graph, whose operators need not all have a derivative."""

from __future__ import annotations

from torch import Tensor

from lwcompile.errors import Refused


def backward(value: Tensor, again: bool = False) -> None:
    """`value.backward()`, with the graph kept for another one if `again`; `Refused` where an operator has no derivative."""
    try:
        value.backward(retain_graph=again)
    except RuntimeError as error:
        if "derivative for" not in str(error):
            raise
        raise Refused(f"no gradient passes through the graph ({str(error).splitlines()[0]})") from error
