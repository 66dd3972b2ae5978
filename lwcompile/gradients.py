"""Gradients through a captured graph, whose operators need not all have a derivative."""

from __future__ import annotations

from torch import Tensor

from lwcompile.errors import Refused


def backward(value: Tensor) -> None:
    """`value.backward()`; `Refused` where an operator of the graph has no derivative."""
    try:
        value.backward()
    except RuntimeError as error:
        if "derivative for" not in str(error):
            raise
        raise Refused(f"no gradient passes through the graph ({str(error).splitlines()[0]})") from error
