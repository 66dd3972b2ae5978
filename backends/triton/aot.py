"""Every kernel compiled ahead of time, as its tuning table launches it: what a machine without a GPU can prove of one.

A kernel that compiles to a cubin is accepted by the real assembler for the real target; registers, spilled bytes and shared memory
are what that assembler says. Nothing here measures speed. Interpreted kernels cannot be compiled: run this without TRITON_INTERPRET.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lwcompile.backends.triton.kernels.embedding import embedding_kernel
from lwcompile.backends.triton.kernels.launch import rule_for, table_of
from lwcompile.backends.triton.kernels.linear import gemv_kernel, matmul_kernel
from lwcompile.backends.triton.kernels.norm import norm_kernel
from lwcompile.errors import Refused, VerificationError

SHARED_LIMITS = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes of shared memory that one program may use, by target; triton compiles past them without a word."""

WIDTH = 4096
BITS = (2, 3, 4, 5, 6, 7, 8)


@dataclass(frozen=True)
class Case:
    """One way to launch a kernel: compile-time values, block sizes, warps and stages."""

    name: str
    kernel: Any
    constants: dict[str, Any]
    config: dict[str, int]


@dataclass(frozen=True)
class Row:
    """What the assembler made of a case: registers a thread, bytes spilled a thread, bytes of shared memory a program, of code."""

    case: str
    target: int
    registers: int
    spilled: int
    shared: int
    limit: int
    code: int


def cases(target: int = 90, bits: tuple[int, ...] = BITS) -> Iterator[Case]:
    """Every kernel at every width, with each rule of the target's table, and every way it can be combined at 4 bits."""
    table = table_of(f"sm_{target}")
    plain = {"GATED": False, "BIAS": False, "RESIDUAL": False, "ACT": 0}
    gemv = {**plain, "NORM": 0, "SHIFT": False, "K2": WIDTH}
    full = {"BIAS": True, "RESIDUAL": True, "ACT": 2}
    for b in bits:
        config = rule_for(table, "gemv", m=1, n=WIDTH, k=WIDTH, bits=b)
        yield Case(f"gemv {b} bits", gemv_kernel, gemv | _format(b), config)
        yield Case(f"gemv {b} bits, norm and gate", gemv_kernel, gemv | _format(b) | {"NORM": 1, "GATED": True, "ACT": 1}, config)
        for m in (16, 64, 4096):
            config = rule_for(table, "matmul", m=m, n=WIDTH, k=WIDTH, bits=b)
            yield Case(f"matmul {b} bits, M = {m}", matmul_kernel, plain | _format(b), config)
        config = rule_for(table, "embedding", m=1, n=WIDTH, k=WIDTH, bits=b)
        yield Case(f"embedding {b} bits", embedding_kernel, {k: v for k, v in _format(b).items() if not k.endswith("2")}, config)
    config = rule_for(table, "gemv", m=1, n=WIDTH, k=WIDTH, bits=4)
    layer = {"NORM": 2, "SHIFT": True}
    yield Case("gemv 4 bits, LayerNorm, bias, GELU, residual", gemv_kernel, gemv | _format(4) | full | layer, config)
    yield Case("gemv 4 bits, groups of 24, float zero", gemv_kernel, gemv | _format(4, 24, 2), config)
    for m in (64, 4096):
        config = rule_for(table, "matmul", m=m, n=WIDTH, k=WIDTH, bits=4)
        gate = {"GATED": True, "ACT": 1}
        yield Case(f"matmul 4 bits, gate, M = {m}", matmul_kernel, plain | _format(4) | gate, config | {"SPLIT_K": 1})
        yield Case(f"matmul 4 bits, bias, GELU, residual, M = {m}", matmul_kernel, plain | _format(4) | full, config | {"SPLIT_K": 1})
    for kind, name in ((1, "RMSNorm"), (2, "LayerNorm")):
        config = rule_for(table, "norm", m=1, n=WIDTH, k=WIDTH, bits=16)
        yield Case(f"{name} with residual add", norm_kernel, {"KIND": kind, "ADD": True, "SHIFT": kind == 2, "K2": WIDTH}, config)


def _format(bits: int, group: int = 64, zero: int = 1) -> dict[str, Any]:
    return {f"{name}{i}": value for i in ("", "2") for name, value in (("BITS", bits), ("GROUP", group), ("ZERO", zero))}


_INTEGERS = {"M", "N", "K", "CHUNKS"}
_TYPES = {"words": "*i32", "words2": "*i32", "ids": "*i64", "eps": "fp32"}


def _type_of(name: str, constants: dict[str, Any]) -> str:
    if name in ("zero", "zero2"):
        return "*u8" if constants.get(name.upper(), 1) == 1 else "*fp16"
    if name in _INTEGERS:
        return "i32"
    return _TYPES.get(name, "*bf16" if not name.startswith("scale") else "*fp16")


def compile_case(case: Case, target: int) -> Row:
    """Compile for one target, with pointers aligned and sizes divisible by 16, as a real launch has them.

    Raises:
        VerificationError: it does not compile, or wants more shared memory than the target has.
    """
    options = {name: value for name, value in case.config.items() if name.startswith("num_")}
    constants = case.constants | {name: value for name, value in case.config.items() if name not in options}
    signature = {n: "constexpr" if n in constants else _type_of(n, constants) for n in case.kernel.arg_names}
    divisible = [(i,) for i, n in enumerate(case.kernel.arg_names) if signature[n] not in ("constexpr", "fp32")]
    source = ASTSource(case.kernel, signature, constants, {place: [["tt.divisibility", 16]] for place in divisible})
    options["enable_fp_fusion"] = True
    try:
        made = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    except Exception as error:
        raise VerificationError(f"{case.name} does not compile for sm_{target}: {error}") from error
    shared, limit = made.metadata.shared, SHARED_LIMITS[target]
    if shared > limit:
        raise VerificationError(f"{case.name} wants {shared} bytes of shared memory, and sm_{target} has {limit}")
    registers, spilled = resources(made.asm["cubin"])
    return Row(case.name, target, registers, spilled, shared, limit, len(made.asm["cubin"]))


def resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack and local memory) a thread, as the CUDA tools that come with triton read them off a cubin."""
    found = find_spec("triton")
    tool = Path(str(found.origin)).parent / "backends" / "nvidia" / "bin" / "cuobjdump" if found else Path("cuobjdump")
    if not tool.is_file():
        raise Refused(f"this build of triton comes without {tool.name}, so registers cannot be read")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True, timeout=60).stdout
    numbers = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}
    return numbers["REG"], numbers["STACK"] + numbers["LOCAL"]


def table(targets: tuple[int, ...] = (80, 90, 100), bits: tuple[int, ...] = BITS) -> list[Row]:
    """Every case for every target."""
    return [compile_case(case, target) for target in targets for case in cases(target, bits)]
