"""The Triton backend: writes a Python package that runs the program with kernels for packed weights, and proves it.

    DIR/triton_model/    import it, `load("cuda", torch.bfloat16)`, call `forward`, `decode` or `generate`

The package needs torch, triton and safetensors, and nothing of this project. Which nodes a kernel takes is in `fusion`.
"""

from __future__ import annotations

import importlib.util
import math
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from lwcompile.backends.triton.emit import HERE, reasons_against, write_package
from lwcompile.backends.triton.fusion import find_groups
from lwcompile.backends.triton.packing import packed_bytes
from lwcompile.backends.triton.parity import Case, device, run_package
from lwcompile.contract import Backend, FusionGroup, Parity, StoredTensor
from lwcompile.errors import BadInput, Refused, VerificationError
from lwcompile.manager import relative_error
from lwcompile.ops import is_unpacking
from lwcompile.samples import cases

if TYPE_CHECKING:
    from lwcompile.context import Context
    from lwcompile.graph import ModelGraph
    from lwcompile.program import Program

EXTRAS = ("norm", "bias", "activation", "residual", "branch", "padding")
"""Arguments of a group that are worth a word."""

NODE_BYTES = 90
"""What a call takes in the written source."""


@dataclass(frozen=True)
class Triton(Backend):
    """Triton kernels on NVIDIA GPUs; without one, Triton's interpreter, which is for proof and not for use.

    Options:
        tolerance: the largest error relative to the largest output that parity may show, in float32.
    """

    name: ClassVar[str] = "triton"
    file: ClassVar[str] = "triton_model"
    tolerance: float = 1e-4

    def unsupported(self, program: Program) -> list[str]:
        missing = importlib.util.find_spec("triton") is None
        reasons = ["the package triton is not installed: pip install 'lwcompile[triton]'"] if missing else []
        return reasons + [f"{name}: {reason}" for name, graph in program.entries.items() for reason in reasons_against(graph)]

    def price(self, tensor: StoredTensor) -> int:
        """Bytes on file: codes in chunks of 32 at their own width, scales, and a byte for each integer zero point."""
        if tensor.format is not None:
            return packed_bytes(tensor.format, tensor.shape)
        return math.prod(tensor.shape) * getattr(torch, tensor.dtype).itemsize

    def overhead(self, program: Program) -> int:
        """The source: kernels, tables, and a line a call."""
        files = [f for part in ("kernels", "tuning", "runtime") for f in (HERE / part).iterdir() if f.is_file()]
        return sum(f.stat().st_size for f in files) + NODE_BYTES * sum(len(g.graph.nodes) for g in program.entries.values())

    def fusion(self, program: Program) -> list[FusionGroup]:
        """Products are shown as if their weights were packed: that is what makes them groups."""
        found = []
        for name, graph in program.entries.items():
            graph = graph.copy()
            graph.propagate()
            for group in find_groups(graph, dense=True):
                extras = ", ".join(word for word in EXTRAS if group.args.get(word) is not None)
                note = "; ".join(part for part in (group.note, extras and f"with {extras}") if part)
                found.append(FusionGroup(name, group.kernel, tuple(n.name for n in group.nodes), note))
        return found

    def executors(self, graph: ModelGraph) -> dict[str, str]:
        graph = graph.copy()
        graph.propagate()
        taken = {node.name: f"Triton: {group.kernel}" for group in find_groups(graph) for node in group.nodes}
        calls = (n for n in graph.graph.nodes if n.op == "call_function")
        packed = "nobody: what reads the weight takes its codes"
        return {n.name: taken.get(n.name, packed if is_unpacking(n.target) else "torch, one by one") for n in calls}

    def lower(self, program: Program, path: Path, ctx: Context | None) -> Parity:
        draft = path.parent / f".{path.name}.partial"
        shutil.rmtree(draft, ignore_errors=True)
        try:
            draft.mkdir(parents=True)
            write_package(program, draft / path.name)
            parity = self._prove(program, draft / path.name, draft)
            shutil.rmtree(path, ignore_errors=True)
            (draft / path.name).replace(path)
        except OSError as error:
            raise BadInput(f"cannot write {path}: {error.strerror or error}; name another directory") from error
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        return parity

    def _prove(self, program: Program, package: Path, scratch: Path) -> Parity:
        given: list[Case] = [(name, *case) for name, graph in program.entries.items() for case in cases(graph, None)]
        errors: dict[str, float] = {}
        for (entry, _, wanted), found in zip(given, run_package(package, given, scratch)):
            for output, value in zip(program.entries[entry].outputs, wanted):
                key = f"{entry}.{output}"
                errors[key] = max(errors.get(key, 0.0), relative_error(value, found[output]))
        for key, error in errors.items():
            if not error <= self.tolerance:
                raise VerificationError(
                    f"the package's {key} is {error:.1e} of the largest value away from the graph's, past {self.tolerance:g}; "
                    "nothing was written"
                )
        where = "on the GPU" if device() == "cuda" else "in Triton's interpreter; no GPU ran it"
        return Parity(errors, self.tolerance, f"float32, {where}")

    # --- running what was written

    def run(self, path: Path, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One forward pass; outputs by name."""
        return self._load(path).forward(**inputs)

    def decode_step(self, path: Path) -> Any:
        """What advances generation by some tokens; `Refused` if the package holds no decode graph."""
        model = self._load(path)
        if "decode" not in model.entries:
            raise Refused("this package holds no decode graph, so it cannot generate")
        return model.step

    def _load(self, path: Path) -> Any:
        name = f"_{path.name}_{abs(hash(path.resolve())):x}"
        spec = importlib.util.spec_from_file_location(name, path / "__init__.py", submodule_search_locations=[str(path)])
        if spec is None or spec.loader is None or not (path / "__init__.py").is_file():
            raise BadInput(f"{path} is no package that this backend wrote")
        if name not in sys.modules:
            sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules[name])
        return sys.modules[name].load(device())
