"""Windowed masks read back from the formula that `masks.build` writes, for runtimes that compute near keys only."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten


@dataclass(frozen=True)
class Band:
    """Each of the last S of T positions reads keys fewer than `window` away, and the `sinks` first ones.

    causal: none after its own. first: int64 [batch, 1], where each row's sinks begin; None for 0. open_: bool [batch, T], where
    there is no padding; None without.
    """

    window: int
    causal: bool
    sinks: int = 0
    first: fx.Node | None = None
    open_: fx.Node | None = None


def read_band(mask: fx.Node) -> Band | None:
    """The band of a mask; None where it has no window, or is no such formula."""
    outer = _args(mask, aten.logical_and.default)
    open_ = _twice_unsqueezed(outer[1]) if outer else None
    inner = outer[0] if outer and open_ is not None else mask
    both = _args(inner, aten.logical_and.default)
    if both and not _args(both[0], aten.le.Tensor):
        return None
    near, sunk = both[1] if both else inner, []
    while either := _args(near, aten.logical_or.default):
        near = either[0]
        sunk.append(either[1])
    window = _args(near, aten.lt.Scalar)
    distance = window[0] if window and both else next(iter(_args(window[0], aten.abs.default)), None) if window else None
    position, key = _args(distance, aten.sub.Tensor) or (None, None)
    if not window or not _counts(position, key) or (both and _args(both[0], aten.le.Tensor) != (key, position)):
        return None
    sinks, first = 0, None
    if sunk:
        end = (_args(sunk[-1], aten.lt.Scalar) or _args(sunk[-1], aten.lt.Tensor) or (None, None))[1]
        first, sinks = (None, end) if isinstance(end, int) else _args(_twice_unsqueezed(end), aten.add.Scalar) or (None, 0)
        if not sinks:
            return None
    return Band(int(window[1]), bool(both), sinks, first, open_)


def _counts(position: object, key: object) -> bool:
    """Whether these are the last S of T positions, as a column, and all T of them."""
    column, keys = _args(position, aten.unsqueeze.default), _args(key, aten.arange.default)
    rows = _args(column[0], aten.arange.start) if column else ()
    start = _args(rows[0], operator.sub) if rows else ()
    return len(rows) == 2 and len(keys) == 1 and rows[1] is keys[0] and bool(start) and start[0] is keys[0]


def _args(node: object, target: object) -> tuple[Any, ...]:
    return node.args if isinstance(node, fx.Node) and node.target is target else ()


def _twice_unsqueezed(node: object) -> fx.Node | None:
    """x of `unsqueeze(unsqueeze(x, 1), 1)`."""
    inner = (_args(node, aten.unsqueeze.default) or (None,))[0]
    return (_args(inner, aten.unsqueeze.default) or (None,))[0]
