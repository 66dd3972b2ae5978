"""Where two programs are compared inside: the ends of the blocks that both have, and how far apart they are there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lwcompile.executor import Executor, Tap
from lwcompile.passes.heal._trained import Name, read_by
from lwcompile.program import Program
from lwcompile.structure import Structure


def common_ends(dense: Executor, compressed: Executor, structure: Structure) -> list[str]:
    """The keys of the block ends that both programs compute, in the order they run."""
    keys = {key for site in structure.of_kind("block") for key in (site.end, f"{site.entry}/{site.end}") if key in dense.index}
    return sorted(keys & compressed.index.keys(), key=compressed.position)


def distance(dense: Tensor, found: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """Mean over tokens of |h - h'|^2 / |h|^2: token by token, since a few first ones have most of the energy.

    Tokens that a mask of their shape leaves out do not count.
    """
    dense, found = dense.float(), found.float()
    apart = (dense - found).square().sum(-1) / dense.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    mask = next((m for name, m in batch.items() if name.endswith("attention_mask") and m.shape == apart.shape), None)
    return apart.mean() if mask is None else (apart * mask.to(apart)).sum() / mask.sum().clamp_min(1).to(apart)


@torch.no_grad()
def changed_tensors(
    dense: Executor, compressed: Executor, ends: Sequence[str], batch: Mapping[str, Tensor], program: Program
) -> set[Name]:
    """The tensors between two block ends where the compressed program, fed what the dense one is, errs more than the mean.

    The stretch behind the last end, up to the output, is one of them.
    """
    output = next(key for key in compressed.outputs.values() if isinstance(key, str))
    keys = list(dict.fromkeys([*ends, output]))
    wanted = dense.run(batch, ends)
    wanted[output] = next(iter(dense.run(batch).values()))
    errors: dict[str, float] = {}

    def corrected(key: str) -> Tap:
        def tap(value: Tensor) -> Tensor:
            errors[key] = distance(wanted[key], value, batch).item()
            return wanted[key]

        return tap

    compressed.run(batch, taps={key: corrected(key) for key in keys})
    limit = sum(errors.values()) / len(errors)
    entries = {id(graph): entry for entry, graph in program.entries.items()}
    found: set[Name] = set()
    start = 0
    for key in keys:
        stop = compressed.position(key) + 1
        if errors[key] >= limit and errors[key] > 0:
            for step in compressed.steps[start:stop]:
                found |= {(entries[id(step.graph)], str(read.target)) for read in read_by(step.node)}
        start = stop
    return found
