"""Speed of the packed products on a GPU, beside what the machine can do at most and what others reach.

    python -m benchmarks.gpu_kernels --write gpu.json
    TRITON_INTERPRET=1 python -m benchmarks.gpu_kernels --check        correctness on a tiny shape, anywhere

Weights are rotated: as many copies as fill `--rotate` megabytes are read in turn, so that no cache answers. A time is the median of
replays of a CUDA graph of all of them, between CUDA events and after warming up. Each is given in microseconds, as the bytes of
weights and activations a second over the measured bandwidth of a copy, and as the time of cuBLAS's bf16 product over it. torch's own
int4 kernel and GemLite are timed beside it where they are installed; what cannot be timed is listed with the reason. Every product
of ours is compared with plain PyTorch in float64 before it is timed. The likeliest to be asked for come first: `--seconds` may cut.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lwcompile.backends.triton.packing import packed_bytes
from lwcompile.formats import NumericFormat

ROWS = (1, 4, 16, 64, 256, 1024, 4096)
SHAPES = ((2048, 2048), (4096, 4096), (4096, 14336), (14336, 4096), (8192, 8192))
"""(N, K) of the weights."""
BITS = (2, 3, 4, 5, 6, 8)
CUBLAS, OURS, INT4, GEMLITE = WHATS = ("cuBLAS bf16", "lwcompile", "torch int4", "GemLite")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Timing:
    """One product. bandwidth: bytes moved a second over a copy's. speedup: cuBLAS bf16's time over this one's; None if not run."""

    what: str
    bits: int
    m: int
    n: int
    k: int
    microseconds: float
    bandwidth: float
    speedup: float | None


def weight_of(n: int, k: int, bits: int, group: int, device: str, seed: int = 0) -> Any:
    """A random packed weight [n, k], made on the device: any words are codes."""
    from lwcompile.backends.triton.kernels.packed import CHUNK, Packed

    random = torch.Generator(device).manual_seed(seed)
    groups = NumericFormat(bits, group).groups(k)
    shape = (n, bits * -(-k // CHUNK))
    words = torch.randint(-(2**31), 2**31, shape, generator=random, device=device, dtype=torch.int64).to(torch.int32)
    zero = torch.randint(0, 2**bits, (n, groups), generator=random, device=device, dtype=torch.uint8)
    scale = (torch.rand(n, groups, generator=random, device=device) + 0.5) / (2**bits * math.sqrt(k))
    return Packed(words, scale.half(), zero, bits, group, k)


def check(weight: Any, m: int, dtype: torch.dtype, dense: Tensor | None = None) -> float:
    """The error of a product relative to its largest value. `SystemExit` past what the dtype's rounding explains.

    dense: the weight in float64, if it is there already.
    """
    from lwcompile.backends.triton.kernels.linear import linear

    device = weight.words.device
    x = torch.randn(m, weight.in_features, generator=torch.Generator(device).manual_seed(m), device=device).to(dtype)
    wanted = x.double() @ (weight.dequantize().double() if dense is None else dense).T
    error = float((linear(x, weight).double() - wanted).abs().max() / wanted.abs().max())
    if not error <= TOLERANCE[dtype]:
        raise SystemExit(
            f"{weight.bits} bits, M = {m}, N, K = {weight.rows}, {weight.in_features}: wrong by {error:.2g} in {dtype}"
        )
    return error


def time_of(call: Callable[[int], Any], calls: int = 20, rounds: int = 7) -> float:
    """Microseconds of `call(i)`, i counting up to `calls` so that it can rotate what it reads: the median of rounds of them all.

    The calls are replayed from a CUDA graph. Launched one by one, short kernels would be timed at the speed of Python.
    """
    for i in range(3):
        call(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            call(i)
    graph.replay()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(rounds)]
    for start, end in events:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return 1000 * statistics.median(start.elapsed_time(end) for start, end in events) / calls


def copy_bandwidth(megabytes: int = 1024) -> float:
    """Bytes read and written a second by a copy on the device."""
    source = torch.empty(megabytes << 20, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / (time_of(lambda i: target.copy_(source)) * 1e-6)


class Bench:
    """Products of one weight shape: ours at every width, cuBLAS, and others' where they are to be had."""

    def __init__(self, n: int, k: int, group: int, rotate: int, bandwidth: float) -> None:
        self.n, self.k, self.group, self.rotate, self.bandwidth = n, k, group, rotate, bandwidth
        self.missing: dict[str, str] = {}
        self.dense: dict[int, float] = {}  # cuBLAS's microseconds by M

    def copies(self, nbytes: int) -> int:
        return max(2, -(-self.rotate // nbytes))

    def timing(self, what: str, bits: int, m: int, call: Callable[[int], Any], nbytes: int, rounds: int = 7) -> Timing:
        micro = time_of(call, max(10, self.copies(nbytes)), rounds)
        moved = nbytes + 2 * m * (self.n + self.k)
        if what == CUBLAS:
            self.dense[m] = micro
        dense = None if what == CUBLAS else self.dense.get(m)
        return Timing(what, bits, m, self.n, self.k, micro, moved / (micro * 1e-6) / self.bandwidth, dense and dense / micro)

    def run(self, what: str, rows: list[int], bits: int) -> Iterator[Timing]:
        inputs = {m: torch.randn(m, self.k, device="cuda", dtype=torch.bfloat16) for m in rows}
        if what == CUBLAS:
            yield from self.cublas(inputs)
        elif what == OURS:
            yield from self.ours(bits, inputs)
        else:
            try:
                yield from (self.torch_int4 if what == INT4 else self.gemlite)(inputs)
            except Exception as error:  # another's kernel that does not run here is a fact to note, not a reason to stop
                self.missing[f"{what}, N, K = {self.n}, {self.k}"] = f"{type(error).__name__}: {str(error)[:200]}"

    def cublas(self, inputs: dict[int, Tensor]) -> Iterator[Timing]:
        nbytes = 2 * self.n * self.k
        held = [torch.randn(self.n, self.k, device="cuda", dtype=torch.bfloat16) for _ in range(self.copies(nbytes))]
        for m, x in inputs.items():
            yield self.timing(CUBLAS, 16, m, lambda i: torch.nn.functional.linear(x, held[i % len(held)]), nbytes)  # noqa: B023

    def ours(self, bits: int, inputs: dict[int, Tensor]) -> Iterator[Timing]:
        from lwcompile.backends.triton.kernels.linear import linear

        nbytes = packed_bytes(NumericFormat(bits, self.group), (self.n, self.k))
        first = weight_of(self.n, self.k, bits, self.group, "cuda")
        held = [first, *(_copy(first) for _ in range(self.copies(nbytes) - 1))]
        dense = first.dequantize().double()
        for m, x in inputs.items():
            check(first, m, torch.bfloat16, dense)
            yield self.timing(OURS, bits, m, lambda i: linear(x, held[i % len(held)]), nbytes)  # noqa: B023

    def torch_int4(self, inputs: dict[int, Tensor]) -> Iterator[Timing]:
        nbytes = self.n * self.k // 2 + 4 * self.n * self.k // self.group
        codes = torch.randint(0, 256, (self.n, self.k // 2), dtype=torch.uint8, device="cuda")
        packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
        grid = torch.randn(self.k // self.group, self.n, 2, dtype=torch.bfloat16, device="cuda")
        held = [packed, *(packed.clone() for _ in range(self.copies(nbytes) - 1))]
        for m, x in inputs.items():
            call = lambda i: torch.ops.aten._weight_int4pack_mm(x, held[i % len(held)], self.group, grid)  # noqa: B023, E731
            yield self.timing(INT4, 4, m, call, nbytes, 3)

    def gemlite(self, inputs: dict[int, Tensor]) -> Iterator[Timing]:
        if importlib.util.find_spec("gemlite") is None:
            self.missing[GEMLITE] = "not installed"
            return
        from gemlite.core import DType, GemLiteLinear  # type: ignore[import-not-found]

        codes = torch.randint(0, 16, (self.n, self.k), dtype=torch.uint8, device="cuda")
        zero = torch.randint(0, 16, (self.n, self.k // self.group), device="cuda").to(torch.bfloat16)
        scale = torch.rand(zero.shape, dtype=torch.bfloat16, device="cuda") / 16

        def made() -> Any:
            layer = GemLiteLinear(4, group_size=self.group, in_features=self.k, out_features=self.n,
                                  input_dtype=DType.BF16, output_dtype=DType.BF16)  # fmt: skip
            layer.pack(codes.clone(), scale.clone(), zero.clone())
            return layer

        nbytes = self.n * self.k // 2 + 4 * self.n * self.k // self.group
        held = [made() for _ in range(self.copies(nbytes))]
        each = torch.arange(self.k, device="cuda") // self.group
        weight = (codes.float() - zero.float()[:, each]) * scale.float()[:, each]
        for m, x in inputs.items():
            wanted = x.float() @ weight.T
            error = float((held[0](x).float() - wanted).abs().max() / wanted.abs().max())
            if not error <= TOLERANCE[torch.bfloat16]:
                raise ValueError(f"wrong by {error:.2g} at M = {m}: not what this calls it for")
            yield self.timing(GEMLITE, 4, m, lambda i: held[i % len(held)](x), nbytes)  # noqa: B023


def _copy(weight: Any) -> Any:
    zero = None if weight.zero is None else weight.zero.clone()
    return type(weight)(weight.words.clone(), weight.scale.clone(), zero, weight.bits, weight.group, weight.in_features)


def _versions() -> dict[str, str]:
    names = ("torch", "triton", "gemlite", "lwcompile")
    return {name: importlib.metadata.version(name) for name in names if importlib.util.find_spec(name) is not None}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS), help="M, the number of activations' rows")
    parser.add_argument("--shapes", nargs="+", default=[f"{n}x{k}" for n, k in SHAPES], help="NxK of the weights")
    parser.add_argument("--bits", type=int, nargs="+", default=list(BITS))
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--rotate", type=int, default=256, help="megabytes of weights in rotation, at least 64")
    parser.add_argument("--only", nargs="+", choices=WHATS, default=list(WHATS), help="what is timed")
    parser.add_argument("--seconds", type=float, default=math.inf, help="what was not begun by then is left out")
    parser.add_argument("--write", type=Path, help="a JSON file for the results")
    parser.add_argument("--check", action="store_true", help="only compare with plain PyTorch on small shapes, in float32")
    given = parser.parse_args(arguments)
    if given.rotate < 64:
        parser.error("--rotate must be 64 or more, or the cache answers")
    given.shapes = [tuple(map(int, shape.split("x"))) for shape in given.shapes]
    return given


def parts(given: argparse.Namespace, benches: list[Bench]) -> Iterator[tuple[Bench, str, list[int], int]]:
    """What is timed, in order: 4 bits beside cuBLAS, the others' kernels, the other widths at few rows and at many."""
    rows, fewer = given.rows, [m for m in given.rows if m <= 16]
    first = 4 if 4 in given.bits else given.bits[0]
    rest = [bits for bits in given.bits if bits != first]
    order = [(CUBLAS, rows, 16), (OURS, rows, first), (GEMLITE, rows, 4), (INT4, [m for m in rows if m <= 256], 4)]
    yield from ((bench, *each) for each in order[:2] for bench in benches if each[0] in given.only)
    if OURS in given.only:
        yield from ((bench, OURS, fewer, bits) for bits in rest for bench in benches)
    yield from ((bench, *each) for each in order[2:] for bench in benches if each[0] in given.only)
    if OURS in given.only:
        yield from ((bench, OURS, [m for m in rows if m not in fewer], bits) for bits in rest for bench in benches)


def main(arguments: list[str] | None = None) -> int:
    given = parse(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if given.check:
        for bits in given.bits:
            weight = weight_of(24, 80, bits, min(given.group, 32), device)
            print(f"{bits} bits: errors {', '.join(f'{check(weight, m, torch.float32):.1e}' for m in (1, 3))}")
        return 0
    if device == "cpu":
        print("there is no GPU here; --check compares with plain PyTorch anywhere, with TRITON_INTERPRET=1", file=sys.stderr)
        return 1
    started, bandwidth = time.monotonic(), copy_bandwidth()
    result: dict[str, Any] = {
        "date": datetime.date.today().isoformat(), "device": torch.cuda.get_device_name(), "versions": _versions(),
        "copy_bytes_per_second": bandwidth, "group": given.group, "rotated_megabytes": given.rotate, "timings": [], "missing": {},
    }  # fmt: skip
    benches = [Bench(n, k, given.group, given.rotate << 20, bandwidth) for n, k in given.shapes]
    for bench, what, rows, bits in parts(given, benches):
        if time.monotonic() - started > given.seconds:
            left = f"{what}, {bits} bits, N, K = {bench.n}, {bench.k}, M = {', '.join(map(str, rows))}"
            result["missing"][left] = "the time was up"
            continue
        for made in bench.run(what, rows, bits):
            result["timings"].append(asdict(made))
            share = f"{made.speedup:.2f} x {CUBLAS}" if made.speedup else ""
            speed = f"{made.microseconds:9.1f} us  {made.bandwidth:5.1%} of a copy  {share}"
            print(f"{made.what:12} {made.bits:2} bits  M {made.m:5}  N, K {made.n} {made.k}  {speed}", flush=True)
            if given.write is not None:  # after each: what is known by then outlives what comes
                given.write.write_text(json.dumps(result, indent=1), encoding="utf-8")
        result["missing"] |= bench.missing
    if given.write is not None:
        given.write.write_text(json.dumps(result, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
