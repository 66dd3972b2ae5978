"""ZD, the z-score distribution: what part of the weights lies far above their mean.

    z = (w - mean(w)) / std(w),    zd = #{z > 1} / #w    (or |z| > 1, two_sided)

over all matrices of a block, or of a sublayer, together, and over each linear and embedding by itself. Smaller zd counts as more
important, so the score is -zd.

Source: "Layer-Wise Quantization" (arXiv 2406.17415; the published definition is one-sided).
Cost: one look at the weights, no data. Refuses: nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lwcompile.context import Context
from lwcompile.contract import AnalysisPass, Score
from lwcompile.program import Program
from lwcompile.site import SUBLAYER_KINDS


@dataclass(frozen=True)
class ZScoreDistribution(AnalysisPass):
    """Minus the part of the weights more than one standard deviation above their mean; `two_sided` also those below."""

    name: ClassVar[str] = "zd"
    provides: ClassVar[tuple[str, ...]] = ("zd",)

    two_sided: bool = False

    def run(self, program: Program, ctx: Context) -> Iterator[tuple[str, Score]]:
        structure = ctx.find_structure(program)
        weights = [s for s in structure.of_kind("linear", "embedding") if s.weight is not None and len(s.shape) == 2]
        groups = structure.of_kind("block", *SUBLAYER_KINDS)
        with ctx.progress.task(self.name, len(groups) + len(weights)) as task:
            for site in [*groups, *weights]:
                below = [w for w in weights if w.id == site.id or w.id.startswith(f"{site.id}.")]
                tensors = [program.entries[w.entry].tensor(str(w.weight)) for w in below]
                task.advance()
                if tensors:
                    yield site.id, self._score(tensors)

    def _score(self, tensors: Sequence[Tensor]) -> Score:
        """Two passes over the tensors, so that those of a block never lie in one piece."""
        count = sum(t.numel() for t in tensors)
        mean = sum(t.sum(dtype=torch.float64).item() for t in tensors) / count
        variance = sum((t.double() - mean).square_().sum().item() for t in tensors) / count
        limit = variance**0.5
        far = sum(int(((t.double() - mean).abs() if self.two_sided else t.double() - mean).gt(limit).sum()) for t in tensors)
        return Score(-far / count, count)
