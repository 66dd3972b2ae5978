"""The pass contract: the base classes that built-in and third-party passes extend.

A pass is a frozen dataclass. Its fields are its options, validated in `__post_init__`; `name` is how recipes and plans
call it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from torch import Tensor

    from lwcompile.formats import NumericFormat, QuantizedTensor
    from lwcompile.stats import InputStats


class Solver:
    """Fills a numeric format's values for one weight. Entry-point group: `lwcompile.solvers`."""

    name: ClassVar[str]
    needs_hessian: ClassVar[bool] = False
    """Whether `solve` needs `stats`; a solver that does not may still make use of them."""

    def solve(self, weight: Tensor, format: NumericFormat, stats: InputStats | None) -> QuantizedTensor:
        """Quantize a float weight [N, K]; `stats` describe its inputs [..., K]."""
        raise NotImplementedError
