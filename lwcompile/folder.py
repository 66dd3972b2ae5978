"""The project's own form as a backend: what `lwcompile compress` writes, and what it costs.

Weights are stored exactly as their numeric format packs them, so 3 bits take 3 bits. Dense tensors keep their dtype.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from lwcompile.context import Context
from lwcompile.contract import Backend, Parity, StoredTensor
from lwcompile.errors import VerificationError
from lwcompile.manager import relative_error
from lwcompile.program import Program


@dataclass(frozen=True)
class ProgramFolder(Backend):
    """A folder with program.json and weights.safetensors, which `lwcompile.load` runs."""

    name: ClassVar[str] = "program"
    file: ClassVar[str] = "program.json"

    def price(self, tensor: StoredTensor) -> int:
        if tensor.format is not None:
            return tensor.format.stored_bytes(tensor.shape)
        return math.prod(tensor.shape) * getattr(torch, tensor.dtype).itemsize

    def overhead(self, program: Program) -> int:
        """The graph's own text."""
        return sum(len(json.dumps(graph.to_json(), indent=1)) for graph in program.entries.values())

    def lower(self, program: Program, path: Path, ctx: Context) -> Parity:
        folder = path.parent
        program.save(folder)
        read, errors = Program.load(folder), {}
        for name, graph in program.entries.items():
            for inputs in ctx.probes(graph):
                with torch.no_grad():
                    wanted, found = graph.module()(*inputs), read.entries[name].module()(*inputs)
                errors |= {f"{name}.{o}": relative_error(a, b) for o, a, b in zip(graph.outputs, wanted, found)}
        parity = Parity(errors, 0.0, "the same operators over the same bytes")
        if parity.worst > parity.tolerance:
            raise VerificationError(f"{path} computes something else than the program ({parity.worst:.2g}); report this")
        return parity
