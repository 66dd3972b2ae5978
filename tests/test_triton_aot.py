"""Every Triton kernel becomes a cubin for real GPUs, on a machine without one, within each target's shared memory."""

from __future__ import annotations

import os
from dataclasses import replace
from importlib.metadata import version

import pytest

pytest.importorskip("triton", reason="the kernels are Triton's: install lwcompile[triton]")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1 makes kernels interpreted, which do not compile", allow_module_level=True)

from lwcompile.backends.triton.aot import BITS, SHARED_LIMITS, Case, cases, compile_case, compiled
from lwcompile.errors import VerificationError

HARDEST = (
    "gemv, 3 bits, RMSNorm and gate",
    "few, 3 bits, M = 16",
    "few, 3 bits, RMSNorm and gate, M = 16",
    "several, 3 bits, gate, M = 64",
    "matmul, 3 bits, M = 16",
    "matmul, 4 bits, gate, M = 256",
    "finish, 8 parts, gate",
    "embedding, 3 bits",
    "dequantize, 3 bits",
    "LayerNorm with residual add",
    "rotary, heads of 128",
    "attention, S = 1, heads of 128",
    "attention, S = 4096, heads of 128",
    "attention with sinks, S = 4096, heads of 128",
    "gather, 32 parts",
    "features, S = 4096, heads of 128",
    "state, S = 4096, heads of 128",
    "linear attention, S = 1, heads of 128",
    "linear attention, S = 4096, heads of 128",
)


def case_of(name: str, target: int) -> Case:
    return next(case for case in cases(target, (3,)) if case.name == name)


@pytest.mark.parametrize("name,target", [(n, t) for n in HARDEST for t in SHARED_LIMITS if t == 90 or "several" not in n])
def test_a_kernel_becomes_a_cubin(name: str, target: int) -> None:
    row = compile_case(case_of(name, target), target)
    assert row.code > 1000 and 0 < row.registers <= 255 and row.shared <= row.limit
    assert row.spilled == 0, f"{name} spills {row.spilled} bytes on sm_{target}: choose smaller blocks"


@pytest.mark.parametrize("name", ["matmul, 4 bits, M = 16", "matmul, 4 bits, M = 256", "gemv, 4 bits", "dequantize, 4 bits"])
def test_memory_is_read_and_written_16_bytes_at_a_time(name: str) -> None:
    """It hangs on the order of loads (`load_tile`): tiles once went to shared memory two bytes at a time."""
    text = compiled(next(case for case in cases(90, (4,)) if case.name == name), 90).asm["ptx"]
    assert any(words in text for words in ("ld.global.v4.b32", "cp.async.cg.shared.global"))
    assert "st.shared.b16" not in text or name.startswith("gemv"), "but for scales of one row"
    assert not name.startswith("matmul") or ("st.shared.v4.b32" in text and text.count("fma.rn.bf16x2") >= 16)


@pytest.mark.skipif(
    tuple(map(int, version("triton").split(".")[:2])) > (3, 6),
    reason="triton lays out loads otherwise from 3.7 on: packed words pass through shared memory first, and what that costs is not known",
)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_few_rows_are_multiplied_where_they_were_widened(bits: int) -> None:
    """The compiler puts lanes where `few` wants them: until the parts are added up, no value moves from one to another."""
    way = {"BLOCK_M": 16, "BLOCK_N": 32, "PARTS": 4, "Q": 2, "num_warps": 4, "num_stages": 1}
    case = next(case for case in cases(90, (bits,)) if case.name == f"few, {bits} bits, M = 16")
    loop = compiled(replace(case, config=way), 90).asm["ptx"].rpartition("mma.sync.aligned.m16n8k16")[0]
    assert loop.count("mma.sync.aligned.m16n8k16") == 63 and loop.count("ld.global.v4.b32") >= 16
    assert not any(word in loop for word in ("st.shared", "ld.shared", "ldmatrix", "shfl"))


def test_large_tiles_are_multiplied_by_warp_groups() -> None:
    text = compiled(next(case for case in cases(90, (4,)) if case.name == "matmul, 4 bits, M = 256"), 90).asm["ptx"]
    assert "wgmma.mma_async.sync.aligned.m64n128k16" in text


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.skipif(
    tuple(map(int, version("triton").split(".")[:2])) > (3, 6),
    reason="triton lays out loads otherwise from 3.7 on: what that costs is not known",
)
def test_several_rows_are_multiplied_from_registers(bits: int) -> None:
    text = compiled(next(case for case in cases(90, (bits,)) if case.name == f"several, {bits} bits, M = 128"), 90).asm["ptx"]
    assert text.count("wgmma.mma_async.sync.aligned.m64n128k16") == 8
    loop = text.rpartition("wgmma.mma_async")[0]
    assert not any(word in loop for word in ("st.shared", "ldmatrix", "shfl"))


def test_the_hardest_cases_are_of_every_kernel() -> None:
    every = {case.kernel for case in cases(90)}
    assert {case_of(name, 90).kernel for name in HARDEST} == every


def test_shared_memory_past_the_target_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """triton itself compiles past what a target has."""
    monkeypatch.setitem(SHARED_LIMITS, 80, 1)
    with pytest.raises(VerificationError, match=r"wants \d+ bytes of shared memory, and sm_80 has 1"):
        compile_case(case_of("LayerNorm with residual add", 80), 80)


@pytest.mark.slow
@pytest.mark.parametrize("target,bits", [(80, (2, 5, 8)), (90, (4, 7)), (100, (3, 6))])
def test_every_case_compiles(target: int, bits: tuple[int, ...]) -> None:
    """Each for one target; every kernel becomes a cubin for all of them above, and every case of every target's has its row in
    `python -m benchmarks.triton_aot`, and here with LWCOMPILE_WHOLE=1."""
    every, of_no_width = list(cases(target, bits)), list(cases(target, ()))
    mine = every[: len(every) - len(of_no_width)] + of_no_width[list(SHARED_LIMITS).index(target) :: len(SHARED_LIMITS)]
    for case in cases(target, BITS) if os.environ.get("LWCOMPILE_WHOLE") == "1" else mine:
        compile_case(case, target)


def test_every_width_is_compiled() -> None:
    widths = [mark.args[1] for mark in test_every_case_compiles.pytestmark if mark.name == "parametrize"]  # type: ignore[attr-defined]
    assert sorted(b for _, bits in widths[0] for b in bits) == sorted(BITS)
