"""Attention transfer (LoLCATs, arXiv 2410.10254): fit a replacement to what an attention puts out in the dense program."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lwcompile.attention import Attention, slots
from lwcompile.context import Context
from lwcompile.contract import StoredTensor
from lwcompile.executor import Executor
from lwcompile.graph import ModelGraph
from lwcompile.site import Site


class Sample(NamedTuple):
    """What one call is fed and puts out; `open` is False where there is padding."""

    query: Tensor
    key: Tensor
    value: Tensor
    open: Tensor | None
    wanted: Tensor

    def error(self, found: Tensor) -> tuple[Tensor, Tensor]:
        """Summed squares of the error and of what was wanted, over what is no padding."""
        rows = self.open[:, None, :, None] if self.open is not None else torch.ones_like(self.wanted[..., :1])
        return ((found - self.wanted) * rows).square().sum(), (self.wanted * rows).square().sum().clamp(min=1e-30)


@torch.no_grad()
def samples(graph: ModelGraph, site: Site, a: Attention, ctx: Context, tokens: int) -> list[Sample]:
    """Of the dense program, batch by batch, in float32."""
    program: Any = ctx.program if ctx.program is not None else graph
    executor, padding = Executor(program, ctx.device), a.mask.padding if a.mask is not None else None
    prefix = "" if a.node.name in executor.index else f"{site.entry}/"
    keys = [prefix + node.name for node in (a.query, a.key, a.value, a.node)]
    found: list[Sample] = []
    for batch in ctx.batches(program, tokens=tokens):
        seen: dict[str, Tensor] = {}
        taps = {key: partial(seen.setdefault, key) for key in keys}
        executor.advance(executor.start(batch), 0, executor.position(keys[-1]) + 1, taps)
        query, key, value, wanted = (seen[key].float() for key in keys)
        open_ = batch[padding].to(ctx.device).bool() if padding is not None else None
        found.append(Sample(query, key, value, open_, wanted))
    executor.release()
    return found


def dtype_of(a: Attention) -> torch.dtype:
    """What an attention computes in, and its maps are stored in; they are fitted in float32."""
    return a.query.meta["val"].dtype


def stored_maps(a: Attention, *shapes: tuple[int, ...]) -> list[StoredTensor]:
    return [StoredTensor(shape, dtype=str(dtype_of(a)).removeprefix("torch.")) for shape in shapes]


def fit(
    parameters: Sequence[Tensor], attend: Callable[[Sample], Tensor], given: Sequence[Sample], steps: int, rate: float, seed: int
) -> Tensor:
    """Train the parameters in place by AdamW, a sample a step in an order that the seed gives; the error relative to what was wanted."""
    order = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.requires_grad_()
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, rate / 100)
    queue: list[int] = []
    with torch.enable_grad():
        for _ in range(steps):
            queue = queue or torch.randperm(len(given), generator=order).tolist()
            sample = given[queue.pop()]
            error, size = sample.error(attend(sample))
            optimizer.zero_grad()
            (error / size).backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        errors, sizes = zip(*(sample.error(attend(sample)) for sample in given))
    return (torch.stack(errors).sum() / torch.stack(sizes).sum()).sqrt()


def scale_of(a: Attention) -> float:
    scale = slots(a.node)["scale"]
    return float(scale) if scale is not None else a.key_width**-0.5
