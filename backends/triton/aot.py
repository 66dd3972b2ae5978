"""Every kernel compiled ahead of time, as its tuning table launches it: what a machine without a GPU can prove of one.

A kernel that compiles to a cubin is accepted by the real assembler for the real target; registers, spilled bytes and shared memory
are what that assembler says. Nothing here measures speed. Interpreted kernels cannot be compiled: run this without TRITON_INTERPRET.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lwcompile.backends.triton.kernels.attention import attention_kernel, gather_kernel
from lwcompile.backends.triton.kernels.embedding import embedding_kernel
from lwcompile.backends.triton.kernels.few import few_kernel
from lwcompile.backends.triton.kernels.launch import rule_for, table_of
from lwcompile.backends.triton.kernels.linear import finish_kernel, gemv_kernel, matmul_kernel
from lwcompile.backends.triton.kernels.linear_attention import feature_kernel, hybrid_kernel, state_kernel
from lwcompile.backends.triton.kernels.norm import norm_kernel
from lwcompile.backends.triton.kernels.rotary import rotary_kernel
from lwcompile.backends.triton.kernels.several import several_kernel
from lwcompile.errors import Refused, VerificationError

SHARED_LIMITS = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes of shared memory that one program may use, by target; triton compiles past them without a word."""

WIDTH = 4096
BITS = (2, 3, 4, 5, 6, 7, 8)
SEVERAL = {"Q": 1, "SPLIT_K": 1, "num_stages": 3}


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


def cases(target: int = 90, bits: Collection[int] = BITS) -> Iterator[Case]:
    """Every kernel at every width, with each rule of the target's table, and every way it can be combined at 4 bits."""
    table = table_of(f"sm_{target}")

    def rule(kernel: str, m: int, n: int = WIDTH, k: int = WIDTH, bits: int = 4, needs: str = "num_warps") -> dict[str, int]:
        """The table's rule of those with what `needs` names: others leave the product to another kernel. Else the default's."""
        rules = [rule for rule in (*table[kernel], *table_of("default")[kernel]) if needs in rule]
        return rule_for({kernel: rules}, kernel, m=m, n=n, k=k, bits=bits)

    plain = {"GATED": False, "BIAS": False, "RESIDUAL": False, "ACT": 0}
    gemv = {**plain, "NORM": 0, "SHIFT": False, "K2": WIDTH}
    few = {**plain, "NORM": False}
    gate, full = {"GATED": True, "ACT": 1}, {"BIAS": True, "RESIDUAL": True, "ACT": 2}
    for b in bits:
        form = _format(b)
        one = {key: value for key, value in form.items() if not key.endswith("2")}
        yield Case(f"gemv, {b} bits", gemv_kernel, gemv | form, rule("gemv", 1, bits=b, needs="STAGES"))
        gated = rule("gated", 1, bits=b, needs="STAGES")
        yield Case(f"gemv, {b} bits, RMSNorm and gate", gemv_kernel, gemv | form | gate | {"NORM": 1}, gated)
        for m in (4, 16):
            yield Case(f"few, {b} bits, M = {m}", few_kernel, few | form, rule("matmul", m, bits=b, needs="PARTS"))
        gated = rule("gated", 16, bits=b, needs="PARTS")
        yield Case(f"few, {b} bits, RMSNorm and gate, M = 16", few_kernel, few | form | gate | {"NORM": True}, gated)
        for m in (16, 64, 256):
            yield Case(f"matmul, {b} bits, M = {m}", matmul_kernel, plain | form, rule("matmul", m, bits=b, needs="BLOCK_C"))
        for m, gated in (
            ((64, {}), (128, {}), (64, gate), (128, gate)) if target == 90 else ()
        ):  # whose tensor cores take registers so
            config = SEVERAL | {"BLOCK_M": m, "WARPS": 4 if m == 64 else 8, "num_warps": 4 if m == 64 else 8}
            yield Case(f"several, {b} bits, {'gate, ' * bool(gated)}M = {m}", several_kernel, plain | form | gated, config)
        yield Case(f"embedding, {b} bits", embedding_kernel, one | {"LOOKUP": True}, rule("embedding", 1, bits=b))
        yield Case(f"dequantize, {b} bits", embedding_kernel, one | {"LOOKUP": False}, rule("dequantize", WIDTH, bits=b))
    layer, config = {"NORM": 2, "SHIFT": True}, rule("gemv", 1, needs="STAGES")
    yield Case("gemv, 4 bits, LayerNorm, bias, GELU, residual", gemv_kernel, gemv | _format(4) | full | layer, config)
    yield Case("gemv, 4 bits, groups of 24, float zero", gemv_kernel, gemv | _format(4, 24, 2), config)
    config = rule("matmul", 16, needs="PARTS")
    yield Case("few, 4 bits, bias, GELU, residual, M = 16", few_kernel, few | _format(4) | full, config)
    yield Case("few, 4 bits, groups of 24, float zero, M = 16", few_kernel, few | _format(4, 24, 2), config)
    for m in (16, 64, 256):
        config = rule("gated", m, needs="BLOCK_C")
        yield Case(f"matmul, 4 bits, gate, M = {m}", matmul_kernel, plain | _format(4) | gate, config)
    config = rule("matmul", 64, needs="BLOCK_C")
    yield Case("matmul, 4 bits, bias, GELU, residual, M = 64", matmul_kernel, plain | _format(4) | full, config)
    yield Case("finish, 8 parts, gate", finish_kernel, {**plain, **gate, "SPLIT": 8}, rule("finish", 16))
    for kind, name in ((1, "RMSNorm"), (2, "LayerNorm")):
        constants = {"KIND": kind, "ADD": True, "SHIFT": kind == 2, "K2": WIDTH, "Q": 0}
        yield Case(f"{name} with residual add", norm_kernel, constants, rule("norm", 1))
    yield Case("RMSNorm, arranged", norm_kernel, {"KIND": 1, "ADD": False, "SHIFT": False, "K2": WIDTH, "Q": 1}, rule("norm", 1))
    yield Case("rotary, heads of 128", rotary_kernel, {"HALF": 64, "HALF2": 64}, rule("rotary", 4096, 128, 128))
    for m, width, sinks in (
        (1, 128, False),
        (4096, 64, False),
        (4096, 128, False),
        (4096, 256, False),
        (1, 128, True),
        (4096, 128, True),
    ):
        constants = {
            "WIDTH": width, "WIDTH2": width, "VALUE": width, "VALUE2": width, "CAUSAL": True, "WINDOW": True, "SINKS": sinks,
            "PADDED": True, "PLACED": m == 1, "PACK": 4 if m == 1 else 1, "PARTED": m == 1,
        }  # fmt: skip
        name = f"attention{' with sinks' if sinks else ''}, S = {m}, heads of {width}"
        yield Case(name, attention_kernel, constants, rule("attention", m, width))
    yield Case("gather, 32 parts", gather_kernel, {"VALUE": 128, "VALUE2": 128, "PARTS2": 32}, rule("attention", 1, 128))
    for m, width in ((1, 128), (4096, 64), (4096, 128), (4096, 256)):  # as many features as the maps begin with
        name, sizes = f"S = {m}, heads of {width}", {"VALUE": width, "FEATURES": 2 * width, "PRECISION": "tf32", "PADDED": True}
        constants = {"WIDTH": width, "HALF": width, "HALF2": width, "PRECISION": "tf32"}
        yield Case(f"features, {name}", feature_kernel, constants, rule("features", m, width, width))
        yield Case(f"state, {name}", state_kernel, {**sizes, "STATE": True, "CHUNK": 128}, rule("state", m, width, 2 * width))
        constants = {**sizes, "WIDTH": width, "WIDTH2": width, "STATE": True, "PACK": 4 if m == 1 else 1}
        yield Case(f"linear attention, {name}", hybrid_kernel, constants, rule("hybrid", m, width))


def _format(bits: int, group: int = 64, zero: int = 1) -> dict[str, Any]:
    return {f"{name}{i}": value for i in ("", "2") for name, value in (("BITS", bits), ("GROUP", group), ("ZERO", zero))}


_TYPES = {"words": "*i32", "words2": "*i32", "ids": "*i64", "padding": "*i64", "places": "*i64", "ends": "*i32", "eps": "fp32",
          "factor": "fp32",
          "scale": "*fp16", "scale2": "*fp16", "cos": "*fp32", "sin": "*fp32", "parts2": "*fp32",
          "made": "*fp32", "tops": "*fp32", "totals": "*fp32",
          "mapped_q": "*fp32", "mapped_k": "*fp32", "state": "*fp32", "states": "*fp32"}  # fmt: skip
_SIZES = ("M", "N", "K", "CHUNKS", "SIZE", "ROW", "WIDTH")
_COUNTS = ("SPLIT_K", "heads", "times", "queries", "keys", "length", "window", "sinks", "groups", "rows", "gone", "chunks")


def _type_of(name: str, constants: dict[str, Any]) -> str:
    if name in ("zero", "zero2"):
        return "*u8" if constants[name.upper()] == 1 else "*fp16"
    if name in _SIZES or name in _COUNTS or name.endswith(_STRIDES):
        return "i32"
    if name == "parts":
        return "*fp32" if "SPLIT" in constants else "i32"
    return "*fp32" if name == "y" and constants.get("PARTED") else _TYPES.get(name, "*bf16")


_STRIDES = ("_stride", "_batch", "_head", "_row")


def compiled(case: Case, target: int) -> Any:
    """What triton makes of a case for one target, with pointers aligned and sizes divisible by 16, as a real launch has them.

    Raises:
        VerificationError: it does not compile.
    """
    options = {name: value for name, value in case.config.items() if name.startswith("num_")}
    constants = case.constants | {name: value for name, value in case.config.items() if name not in options}
    constants = {p.name: constants.get(p.name, p.default) for p in case.kernel.params if p.is_constexpr}
    signature = {n: "constexpr" if n in constants else _type_of(n, constants) for n in case.kernel.arg_names}
    runtime = {n: kind for n, kind in signature.items() if kind != "constexpr"}
    aligned = [n for n, kind in runtime.items() if kind.startswith("*") or n in _SIZES or n.endswith(_STRIDES)]
    divisible = [(case.kernel.arg_names.index(n),) for n in aligned]
    source = ASTSource(case.kernel, signature, constants, {place: [["tt.divisibility", 16]] for place in divisible})
    options["enable_fp_fusion"] = True
    try:
        return triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    except Exception as error:
        raise VerificationError(f"{case.name} does not compile for sm_{target}: {error}") from error


def compile_case(case: Case, target: int) -> Row:
    """Compile for one target.

    Raises:
        VerificationError: it does not compile, or wants more shared memory than the target has.
    """
    made = compiled(case, target)
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


def table(targets: Collection[int] = tuple(SHARED_LIMITS), bits: Collection[int] = BITS) -> list[Row]:
    """Every case for every target."""
    return [compile_case(case, target) for target in targets for case in cases(target, bits)]
