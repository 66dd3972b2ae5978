"""Speed of the packed products on a GPU, beside what the machine can do at most and what others reach.

    python -m benchmarks.gpu_kernels --write gpu.json
    TRITON_INTERPRET=1 python -m benchmarks.gpu_kernels --check        correctness on a tiny shape, anywhere

Weights are rotated: as many copies as fill `--rotate` megabytes are read in turn, so that no cache answers. A time is the median of
repeats between CUDA events, after warming up. Each is given in microseconds, as the bytes of weights and activations a second over
the measured bandwidth of a copy, and as the time of cuBLAS's bf16 product over it. torch's own int4 kernel and GemLite are timed
beside it where they are installed; what cannot be timed is listed with the reason. Every product is compared with plain PyTorch
before it is timed.
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
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lwcompile.backends.triton.packing import packed_bytes, repack
from lwcompile.formats import NumericFormat, QuantizedTensor

ROWS = (1, 4, 16, 64, 256, 1024, 4096)
SHAPES = ((2048, 2048), (4096, 4096), (4096, 14336), (14336, 4096), (8192, 8192))
"""(N, K) of the weights."""
BITS = (2, 3, 4, 5, 6, 8)
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
    """A random packed weight [n, k]."""
    from lwcompile.backends.triton.kernels.packed import Packed

    random = torch.Generator().manual_seed(seed)
    format = NumericFormat(bits, group)
    groups = format.groups(k)
    codes = torch.randint(0, 2**bits, (n, k), generator=random, dtype=torch.uint8)
    zero = torch.randint(0, 2**bits, (n, groups), generator=random, dtype=torch.uint8)
    scale = (torch.rand(n, groups, generator=random) + 0.5) / (2**bits * math.sqrt(k))
    stored = QuantizedTensor.of(format, codes, scale, zero).pack()
    words, unpacked = repack(stored["codes"], stored["zero"], bits, k, groups)
    return Packed(words, stored["scale"], unpacked, bits, group, k).to(device)


def check(weight: Any, m: int, dtype: torch.dtype) -> float:
    """The error of a product relative to its largest value. `SystemExit` past what the dtype's rounding explains."""
    from lwcompile.backends.triton.kernels.linear import linear, linear_reference

    x = torch.randn(m, weight.in_features, generator=torch.Generator().manual_seed(m)).to(weight.words.device, dtype)
    wanted = linear_reference(x.float(), weight)
    error = float((linear(x, weight).float() - wanted).abs().max() / wanted.abs().max())
    if not error <= TOLERANCE[dtype]:
        raise SystemExit(
            f"{weight.bits} bits, M = {m}, N, K = {weight.rows}, {weight.in_features}: wrong by {error:.2g} in {dtype}"
        )
    return error


def time_of(call: Callable[[int], Any], repeats: int = 50, warm: int = 10) -> float:
    """Median microseconds of `call(i)` after `warm` calls, i counting up so that it can rotate what it reads."""
    for i in range(warm):
        call(i)
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for i, (start, end) in enumerate(events):
        start.record()
        call(warm + i)
        end.record()
    torch.cuda.synchronize()
    return 1000 * statistics.median(start.elapsed_time(end) for start, end in events)


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

    def copies(self, nbytes: int) -> int:
        return max(2, -(-self.rotate // nbytes))

    def timing(self, what: str, bits: int, m: int, call: Callable[[int], Any], nbytes: int, dense: float | None) -> Timing:
        micro = time_of(call)
        moved = nbytes + 2 * m * (self.n + self.k)
        return Timing(what, bits, m, self.n, self.k, micro, moved / (micro * 1e-6) / self.bandwidth, dense and dense / micro)

    def run(self, rows: tuple[int, ...], widths: tuple[int, ...]) -> Iterator[Timing]:
        inputs = {m: torch.randn(m, self.k, device="cuda", dtype=torch.bfloat16) for m in rows}
        dense: dict[int, float] = {}
        for made in self.cublas(inputs):
            dense[made.m] = made.microseconds
            yield made
        for bits in widths:
            yield from self.ours(bits, inputs, dense)
        for name, others in (("torch int4", self.torch_int4), ("GemLite 4 bits", self.gemlite)):
            try:
                yield from others(inputs, dense)
            except Exception as error:  # another's kernel that does not run here is a fact to note, not a reason to stop
                self.missing[f"{name}, N, K = {self.n}, {self.k}"] = f"{type(error).__name__}: {error}"

    def cublas(self, inputs: dict[int, Tensor]) -> Iterator[Timing]:
        nbytes = 2 * self.n * self.k
        held = [torch.randn(self.n, self.k, device="cuda", dtype=torch.bfloat16) for _ in range(self.copies(nbytes))]
        for m, x in inputs.items():
            call = lambda i: torch.nn.functional.linear(x, held[i % len(held)])  # noqa: B023, E731
            yield self.timing("cuBLAS bf16", 16, m, call, nbytes, None)

    def ours(self, bits: int, inputs: dict[int, Tensor], dense: dict[int, float]) -> Iterator[Timing]:
        from lwcompile.backends.triton.kernels.linear import linear

        nbytes = packed_bytes(NumericFormat(bits, self.group), (self.n, self.k))
        first = weight_of(self.n, self.k, bits, self.group, "cuda")
        held = [first, *(_copy(first) for _ in range(self.copies(nbytes) - 1))]
        for m, x in inputs.items():
            check(first, m, torch.bfloat16)
            yield self.timing("lwcompile", bits, m, lambda i: linear(x, held[i % len(held)]), nbytes, dense[m])  # noqa: B023

    def torch_int4(self, inputs: dict[int, Tensor], dense: dict[int, float]) -> Iterator[Timing]:
        nbytes = self.n * self.k // 2 + 4 * self.n * self.k // self.group
        codes = torch.randint(0, 256, (self.n, self.k // 2), dtype=torch.uint8, device="cuda")
        packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
        grid = torch.randn(self.k // self.group, self.n, 2, dtype=torch.bfloat16, device="cuda")
        held = [packed, *(packed.clone() for _ in range(self.copies(nbytes) - 1))]
        for m, x in inputs.items():
            call = lambda i: torch.ops.aten._weight_int4pack_mm(x, held[i % len(held)], self.group, grid)  # noqa: B023, E731
            yield self.timing("torch int4", 4, m, call, nbytes, dense[m])

    def gemlite(self, inputs: dict[int, Tensor], dense: dict[int, float]) -> Iterator[Timing]:
        if importlib.util.find_spec("gemlite") is None:
            self.missing["GemLite"] = "not installed"
            return
        from gemlite.core import DType, GemLiteLinear  # type: ignore[import-not-found]

        def made() -> Any:
            layer = GemLiteLinear(4, group_size=self.group, in_features=self.k, out_features=self.n,
                                  input_dtype=DType.BF16, output_dtype=DType.BF16)  # fmt: skip
            codes = torch.randint(0, 16, (self.n, self.k), dtype=torch.uint8, device="cuda")
            grid = torch.rand(self.n, self.k // self.group, dtype=torch.bfloat16, device="cuda")
            layer.pack(codes, grid, grid)
            return layer

        nbytes = self.n * self.k // 2 + 4 * self.n * self.k // self.group
        held = [made() for _ in range(self.copies(nbytes))]
        for m, x in inputs.items():
            yield self.timing("GemLite", 4, m, lambda i: held[i % len(held)](x), nbytes, dense[m])  # noqa: B023


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
    parser.add_argument("--write", type=Path, help="a JSON file for the results")
    parser.add_argument("--check", action="store_true", help="only compare with plain PyTorch on small shapes, in float32")
    given = parser.parse_args(arguments)
    if given.rotate < 64:
        parser.error("--rotate must be 64 or more, or the cache answers")
    given.shapes = [tuple(map(int, shape.split("x"))) for shape in given.shapes]
    return given


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
    bandwidth = copy_bandwidth()
    result: dict[str, Any] = {
        "date": datetime.date.today().isoformat(), "device": torch.cuda.get_device_name(), "versions": _versions(),
        "copy_bytes_per_second": bandwidth, "group": given.group, "rotated_megabytes": given.rotate, "timings": [], "missing": {},
    }  # fmt: skip
    for n, k in given.shapes:
        bench = Bench(n, k, given.group, given.rotate << 20, bandwidth)
        for made in bench.run(tuple(given.rows), tuple(given.bits)):
            result["timings"].append(asdict(made))
            share = f"{made.speedup:.2f} x cuBLAS bf16" if made.speedup else ""
            speed = f"{made.microseconds:9.1f} us  {made.bandwidth:5.1%} of a copy  {share}"
            print(f"{made.what:12} {made.bits:2} bits  M {made.m:5}  N, K {n} {k}  {speed}")
        result["missing"] |= bench.missing
    if given.write is not None:
        given.write.write_text(json.dumps(result, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
