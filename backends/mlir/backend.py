"""The MLIR backend: a program as linalg on tensors, and IREE to compile it and prove it.

    model.mlir, model.mlirbc   a module with a function an entry point, over one set of weights
    model.vmfb                 the same, compiled by IREE for this machine's processor
    <file>.json                the functions' inputs and outputs by name, in order

Dimensions that are free in the graph stay free. Packed weights stay packed on file, with the integer operators that unpack
them; IREE unpacks them once, when the file is loaded: small on disk, and in memory and speed what the dense model is.
"""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from lwcompile.backends.mlir.child import Child, Died, Failed, compile_with_iree, convert, installed, require
from lwcompile.backends.mlir.plain import plain
from lwcompile.backends.mlir.runtime import IreeStep, Module, describe, description
from lwcompile.contract import Backend, Parity, StoredTensor
from lwcompile.errors import BadInput, Refused, VerificationError
from lwcompile.manager import relative_error
from lwcompile.ops import is_unpacking
from lwcompile.samples import cases

if TYPE_CHECKING:
    from lwcompile.context import Context
    from lwcompile.graph import ModelGraph
    from lwcompile.program import Program

NODE_BYTES = 120
"""What a node of the graph takes in a module; measured at 70 to 130."""

MODULE_BYTES, CODE_BYTES = 130_000, 600
"""What any compiled module takes, and each node in it once weights are packed: measured at 119 to 133 kB, and 530 to 620; 140 where they
are dense."""

IREE_FLAGS = (
    "--iree-hal-target-device=local",
    "--iree-hal-local-target-device-backends=llvm-cpu",
    "--iree-opt-const-eval=false",  # else the file would hold packed weights unpacked
    f"--iree-opt-const-expr-max-size-increase-threshold={1 << 40}",  # else what grows by a megabyte is unpacked at every call
)
TILED = "--iree-opt-data-tiling"
"""Weights laid out for the processor's registers. Tried first: of some shapes with free lengths IREE 3.13 makes invalid code then."""


@dataclass(frozen=True)
class Mlir(Backend):
    """linalg on tensors by torch-mlir; with IREE, a compiled module for CPUs.

    Options:
        target: "linalg", or "iree" for a compiled module too, as model.vmfb beside model.mlir; a file named .vmfb is that alone.
        form: a module as MLIR bytecode, which MLIR's tools tell by its first bytes, or as text, where weights are hexadecimal
            and take twice the bytes.
        cpu: the processor that IREE compiles for: "host", "generic", or a name that LLVM knows.
        tolerance: the largest error relative to the largest output that parity may show.
        seconds: the longest that converting, compiling or running may take, each.
    """

    name: ClassVar[str] = "mlir"
    suffixes: ClassVar[tuple[str, ...]] = (".mlir", ".mlirbc", ".vmfb")
    target: Literal["linalg", "iree"] = "linalg"
    form: Literal["bytecode", "text"] = "bytecode"
    cpu: str = "host"
    tolerance: float = 1e-4
    seconds: int = 1800

    def __post_init__(self) -> None:
        if self.seconds < 1 or not self.tolerance >= 0:
            raise ValueError(f"seconds is at least 1 and tolerance at least 0, not {self.seconds} and {self.tolerance:g}")

    # --- before it starts

    def unsupported(self, program: Program) -> list[str]:
        """Operators of this project's that have no plain form; else what a trial of the whole program stumbles over: the operator
        that torch-mlir refuses, or dies of."""
        self._require(self.target)
        with _workshop() as folder:
            try:
                convert(Child(folder, self.seconds), _plain(program), None, self.form)
            except Refused as refusal:
                return [str(refusal)]
        return []

    def price(self, tensor: StoredTensor) -> int:
        """Bytes on file: codes, scales and zero points as the format packs them; in text each byte is two digits."""
        if tensor.format is not None:
            stored = tensor.format.stored_bytes(tensor.shape)
        else:
            stored = math.prod(tensor.shape) * getattr(torch, tensor.dtype).itemsize
        return stored * (2 if self.target == "linalg" and self.form == "text" else 1)

    def overhead(self, program: Program) -> int:
        """The functions themselves; with the target iree, as compiled: model.vmfb is then the file that a budget is for."""
        nodes = sum(len(graph.graph.nodes) for graph in _entries(program).values())
        return MODULE_BYTES + CODE_BYTES * nodes if self.target == "iree" else NODE_BYTES * nodes

    def executors(self, graph: ModelGraph) -> dict[str, str]:
        def who(target: object) -> str:
            if is_unpacking(target):
                return "IREE, once, when the file is loaded"
            return "nobody: it is refused" if _is_foreign(target) else "IREE, of linalg by torch-mlir"

        return {n.name: who(n.target) for n in graph.graph.nodes if n.op == "call_function"}

    def _require(self, target: str) -> None:
        require("torch_mlir", "mlir")
        if target == "iree":
            require("iree.compiler", "iree")
            require("iree.runtime", "iree")

    # --- lowering

    def lower(self, program: Program, path: Path, ctx: Context | None) -> Parity:
        alone = path.suffix == ".vmfb"
        target = "iree" if alone else self.target
        self._require(target)
        source = _plain(program)
        with _workshop(path.parent) as folder:
            child = Child(folder, self.seconds)
            module, compiled = folder / "module.mlir", folder / "module.vmfb"
            fixed = convert(child, source, module, "bytecode" if alone else self.form)
            for name, symbols in fixed.items():
                if symbols and ctx is not None:
                    ctx.remark(self.name, name, "note", f"its {', '.join(symbols)} cannot change: the trace fixed them")
            words = json.dumps(describe(source.entries, fixed), indent=1)
            if not (installed("iree.compiler") and installed("iree.runtime")):
                parity = Parity({}, self.tolerance, "nothing was run: IREE is not installed (pip install 'lwcompile[iree]')")
            else:
                description(compiled).write_text(words, encoding="utf-8")
                flags = [*IREE_FLAGS, f"--iree-llvmcpu-target-cpu={self.cpu}"]
                tiled = compile_with_iree(child, module, compiled, [[*flags, TILED], flags]) == 0
                parity = self._proved(child, program, compiled, ctx, "" if tiled else ", compiled without data tiling")
            made = {} if alone else {path: module}
            if target == "iree":
                made[path.with_suffix(".vmfb")] = compiled
            for place, file in made.items():
                description(place).write_text(words, encoding="utf-8")
                file.replace(place)
        return parity

    def _proved(self, child: Child, program: Program, compiled: Path, ctx: Context | None, how: str) -> Parity:
        """Run every function in the child, and compare with the graphs that the program had before packed weights were spelled out."""
        from safetensors.torch import load_file, save_file

        entries, wanted = _entries(program), []
        for name, graph in entries.items():
            for feed, outputs in cases(graph, ctx):
                save_file({k: v.contiguous() for k, v in feed.items()}, child.folder / f"case-{len(wanted)}.safetensors")
                wanted.append((name, outputs))
        try:
            child.run("run", module=str(compiled), cases=[name for name, _ in wanted])
        except (Died, Failed) as failure:
            raise VerificationError(f"what IREE compiled does not run: {failure}; nothing was written") from failure
        errors: dict[str, float] = {}
        for k, (name, outputs) in enumerate(wanted):
            made = load_file(child.folder / f"made-{k}.safetensors")
            prefix = f"{name}." if len(entries) > 1 else ""
            for output, value in zip(entries[name].outputs, outputs):
                errors[prefix + output] = max(errors.get(prefix + output, 0.0), relative_error(value, made[output]))
        for output, error in errors.items():
            if not error <= self.tolerance:
                raise VerificationError(
                    f"the compiled {output} is {error:.1e} of the largest value away from the graph's, past {self.tolerance:g}; "
                    "nothing was written"
                )
        return Parity(errors, self.tolerance, f"run by IREE on this machine's processor{how}")

    # --- running what was written

    def run(self, path: Path, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One forward pass of a compiled module; outputs by name."""
        return self._module(path).run(inputs)

    def decode_step(self, path: Path) -> IreeStep:
        """What advances generation by some tokens; `Refused` if the module cannot decode."""
        return IreeStep(self._module(path))

    def speed(self, path: Path) -> dict[str, float] | None:
        """Milliseconds of a compiled module's forward pass over 128 tokens, and of one more token behind 128."""
        return Module.of(path).speed() if path.suffix == ".vmfb" else None

    def _module(self, path: Path) -> Module:
        if path.suffix != ".vmfb":
            raise Refused(f"{path.name} is a module to compile, not to run; export model.vmfb to run it with IREE")
        require("iree.runtime", "iree")
        return Module.of(path)


def _entries(program: Program) -> dict[str, ModelGraph]:
    return {name: graph for name, graph in program.entries.items() if name != "prefill"}


def _is_foreign(target: object) -> bool:
    """Whether a call is of an operator of the project's that `plain` does not spell out, so that torch-mlir cannot know it."""
    return getattr(target, "namespace", None) == "lwcompile" and target is not torch.ops.lwcompile.dequantize.default


def _require_known(program: Program) -> None:
    """Raise `Refused` for the first such operator, before torch-mlir blames what it meets before it."""
    for entry, graph in _entries(program).items():
        for node in graph.graph.nodes:
            if node.op == "call_function" and _is_foreign(node.target):
                path = f"{node.meta['path']}: " if node.meta.get("path") else ""
                raise Refused(
                    f"{node.target.name()} is an operator of ours that torch-mlir cannot take; leave it out of the plan, or export to "  # type: ignore[union-attr]
                    "a backend that runs it (`lwcompile inspect --executors` says who does)",
                    site=f"{entry}: {path}node {node.name}",
                )


def _plain(program: Program) -> Program:
    """The program without operators of the project's, and without files that the child has no use for; `Refused` for an operator of
    the project's that has no plain form."""
    _require_known(program)
    return dataclasses.replace(program, entries={n: plain(g) for n, g in _entries(program).items()}, assets=())


@contextmanager
def _workshop(parent: Path | None = None) -> Iterator[Path]:
    """A folder that goes away; beside the file to write, so that moving it there is one step."""
    try:
        folder = tempfile.TemporaryDirectory(prefix=".lwcompile-", dir=parent)
    except OSError as error:
        raise BadInput(f"cannot write into {parent}: {error.strerror or error}; name another directory") from error
    with folder as name:
        yield Path(name)
