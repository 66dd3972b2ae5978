"""The ways to compute a product with a packed weight, and the fastest of them by the device table.

    dense     the weight is made when the graph is compiled, and multiplied by the linear algebra library
    in place  codes are multiplied where they lie in their words: few rows of x
    by parts  a part of the weight at a time is made in the processor's first cache: many rows of x
    int8      only where the codegen's option allows it: x is rounded to bytes by blocks of 32, and what is left again where a block
              is large in its row, which moves an output by about 0.5 % of the largest

A way is compared with the dense product before it is timed. Ways that lost everywhere are not kept: see "Products with packed
weights" in the benchmarks.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from itertools import cycle

import torch
import torch.nn.functional as F

from lwcompile.backends.inductor.native import code_of
from lwcompile.backends.inductor.packed import INT8_BITS, PANEL, SOURCE, Panels
from lwcompile.formats import NumericFormat, QuantizedTensor
from lwcompile.manager import relative_error
from lwcompile.timings import DeviceTable, least_seconds

log = logging.getLogger("lwcompile")

TOLERANCE, INT8_TOLERANCE = 1e-5, 0.03
"""What a packed product may differ by from the dense one, relative to the largest output: float32 sums in another order, or x in 127
steps a block."""

BUCKETS = (1, 2, 4, 8, 16, 32, 128)
"""Numbers of rows that are measured; in between, the next larger one speaks, and above all the last."""

MEASURED = 1 << 22
"""Numbers of a weight that are measured at most, by leaving rows out; time is in proportion to them."""

WORTH_DENSE = 0.9
"""What a dense weight must bring the time down to, since it takes several times the memory."""

SPREAD = 48 << 20
"""Bytes of weights in rotation while measuring, so that the processor's cache does not answer."""


@dataclass(frozen=True)
class Way:
    """How one product is computed. `few`: up to how many rows of x the packed operator multiplies in place; None is dense."""

    name: str
    few: int | None
    int8: bool = False


DENSE, IN_PLACE, BY_PARTS, INT8 = Way("dense", None), Way("in place", 1 << 30), Way("by parts", 0), Way("int8", 0, True)
BY_ROWS = Way("in place or by parts", 16)
"""What is taken where nothing was measured: by the number of rows that it is called with."""


@dataclass(frozen=True)
class Choice:
    """A way, and the seconds of all ways that it was chosen by, if it was."""

    way: Way
    seconds: dict[str, float] = field(default_factory=dict)


def choose(
    format: NumericFormat,
    shape: tuple[int, int],
    rows: int | None,
    int8: bool,
    table: DeviceTable,
    dtype: torch.dtype = torch.float32,
) -> Choice:
    """The fastest way for `rows` of x, or for any number of them, by a weight [N, K] of this format; dense if that is worth it.

    dtype: of x and of a dense weight. Packed ones are multiplied in float32 whatever it is, and measured so.
    """
    measured = (min(shape[0], max(PANEL, MEASURED // shape[1] // PANEL * PANEL)), shape[1])
    ways = [DENSE, IN_PLACE, BY_PARTS, *([INT8] if int8 and format.bits in INT8_BITS else [])]
    if rows is None:
        return Choice(_for_any(ways[1:], format, measured, table))
    bucket = next((b for b in BUCKETS if b >= rows), BUCKETS[-1])
    scale = shape[0] / measured[0] * rows / bucket
    seconds = {way.name: scale * _seconds(way, format, measured, bucket, table, dtype) for way in ways}
    best = min(ways[1:], key=lambda way: seconds[way.name])
    return Choice(DENSE if seconds[DENSE.name] < WORTH_DENSE * seconds[best.name] else best, seconds)


def _for_any(ways: list[Way], format: NumericFormat, shape: tuple[int, int], table: DeviceTable) -> Way:
    """A packed way; int8 if it wins at few rows and at many, else float32 with the number of rows up to which it multiplies in place."""

    def fastest(rows: int) -> Way:
        return min(ways, key=lambda way: _seconds(way, format, shape, rows, table))

    if INT8 in ways and fastest(1) == fastest(128) == INT8:
        return INT8
    few = max(
        (
            rows
            for rows in (8, 16, 32)
            if _seconds(IN_PLACE, format, shape, rows, table) < _seconds(BY_PARTS, format, shape, rows, table)
        ),
        default=4,
    )
    return Way(BY_ROWS.name, few)


def _seconds(
    way: Way,
    format: NumericFormat,
    shape: tuple[int, int],
    rows: int,
    table: DeviceTable,
    dtype: torch.dtype = torch.float32,
) -> float:
    about = f"{format.bits} bits, groups of {format.group(shape[1])}, zero {format.zero_point}, {format.scale_dtype} scales"
    how = str(dtype).removeprefix("torch.") if way == DENSE else f"{about}, code {code_of(SOURCE)}"
    return table.get(f"{way.name}, {shape[0]}x{shape[1]} by {rows}, {how}", lambda: _measure(way, format, shape, rows, dtype))


def _measure(way: Way, format: NumericFormat, shape: tuple[int, int], rows: int, dtype: torch.dtype) -> float:
    weight, x = example(format, shape), torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(1))
    dense = weight.dequantize()
    if way.few is None:
        given, whole = x.to(dtype), dense.to(dtype)
        weights = cycle([whole, *(whole.clone() for _ in range(SPREAD // whole.nbytes))])
        return least_seconds(lambda: F.linear(given, next(weights)))
    few, int8, panels = way.few, way.int8, Panels.of(weight)
    error = relative_error(F.linear(x.double(), dense.double()), panels.multiply(x, None, few, int8))
    if not error <= (INT8_TOLERANCE if int8 else TOLERANCE):
        log.warning(
            "a packed product, %s, %s by %s rows, is %.1e away from the dense one: not used", way.name, shape, rows, error
        )
        return math.inf
    packs = cycle([panels, *(panels.clone() for _ in range(SPREAD // panels.nbytes))])
    return least_seconds(lambda: next(packs).multiply(x, None, few, int8))


def example(format: NumericFormat, shape: tuple[int, int]) -> QuantizedTensor:
    """Random codes [N, K] on a grid like a trained weight's."""
    random = torch.Generator().manual_seed(0)
    grid = (shape[0], format.groups(shape[1]))
    codes = torch.randint(0, format.top + 1, shape, generator=random, dtype=torch.uint8)
    scale = 0.01 + 0.01 * torch.rand(grid, generator=random)
    zero = None if format.zero_point == "none" else format.center + torch.randint(-1, 2, grid, generator=random).float()
    return QuantizedTensor.of(format, codes, format.round_scale(scale), zero)
