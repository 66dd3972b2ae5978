"""Finds the fastest configuration of each packed product on this GPU, and writes them as its tuning table.

    python -m benchmarks.gpu_tune --seconds 150

Candidates are compiled by processes side by side, each of which also compares its product with plain PyTorch; those that do not
compile, do not run or are wrong are counted and left out. Then each is timed over weights in rotation, so that no cache answers
(`gpu_kernels.time_of`), one point of kernel, bits, M and (N, K) after the other, the commonest first. When the time is up, what was
found is written; where nothing was, the default table's rules stand.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_kernels import TOLERANCE, _copy, _versions, time_of, weight_of

Config = dict[str, int]
SHAPES = ((2048, 2048), (4096, 4096), (14336, 4096))
"""(N, K), by rising N: a rule found at one stands for all N up to it, the last for all above."""
ROWS = {"dequantize": (4096,), "gemv": (1,), "matmul": (4, 16, 64, 256, 1024, 4096), "gated": (1, 4, 16, 256, 4096)}
"""M, likewise."""
GROUP = 64


def gemv(rows: int, chunks: int, stages: int, warps: int = 4) -> Config:
    return {"BLOCK_N": rows, "BLOCK_C": chunks, "STAGES": stages, "num_warps": warps, "num_stages": 1}


def tile(m: int, n: int, chunks: int, split: int = 1, warps: int = 4, stages: int = 3) -> Config:
    return {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_C": chunks, "SPLIT_K": split, "num_warps": warps, "num_stages": stages}


def few(m: int, n: int, parts: int, q: int, stages: int = 1) -> Config:
    return {"BLOCK_M": 8 if m <= 8 else 16, "BLOCK_N": n, "PARTS": parts, "Q": q, "num_warps": parts, "num_stages": stages}


ONE_ROW = [gemv(16, 16, 4), gemv(32, 16, 3), gemv(8, 64, 3), gemv(8, 32, 4), gemv(16, 32, 3), gemv(8, 64, 1), gemv(16, 32, 1)]
FEW_ROWS = ((16, 8, 1), (16, 8, 2), (32, 8, 1), (32, 8, 2), (16, 4, 2), (32, 4, 2), (16, 16, 1), (32, 16, 1), (16, 8, 1, 3))
SIXTEEN_ROWS = [few(16, 64, 4, 1), few(16, 64, 8, 1), tile(16, 64, 4, 4, 4, 4), tile(16, 32, 8, 4, 4, 4)]
SOME_ROWS = [*(tile(64, 64, 2, split, 4, 4) for split in (1, 2, 4)), tile(64, 128, 2), tile(64, 128, 2, 2)]
MANY_ROWS = [tile(128, 128, 2, 1, 8), {"DENSE": 1}]


def candidates(kernel: str, m: int) -> list[Config]:
    """What is tried: a short list, since compiling takes longer than timing."""
    if kernel == "dequantize":
        return [{"BLOCK_M": m, "BLOCK_C": c, "num_warps": 4, "num_stages": 1} for m, c in ((8, 16), (16, 8), (16, 16), (64, 2))]
    if m <= 16:
        found = [few(m, *sizes) for sizes in (FEW_ROWS[:6] if kernel == "gated" else FEW_ROWS)]
        return found + (SIXTEEN_ROWS if m == 16 else [few(m, 16, 8, 4), *(ONE_ROW if m == 1 else [])])
    if kernel == "gated":
        return [tile(128, 64, 2, 1, 8), {"DENSE": 1}]
    return {64: SOME_ROWS, 256: [tile(64, 128, 2, 2), *MANY_ROWS]}.get(m, MANY_ROWS)


def points(widths: list[int]) -> Iterator[tuple[str, int, int]]:
    """(kernel, bits, M), the commonest first; `dequantize` before products that may use it."""
    for bits in widths:
        yield from ((kernel, bits, m) for kernel in ("dequantize", "gemv", "matmul") for m in ROWS[kernel])
    yield from (("gated", bits, m) for bits in widths for m in ROWS["gated"])


def use(kernel: str, config: Config) -> None:
    """Make `config` the only rule of a kernel, in this process."""
    from lwcompile.backends.triton.kernels.launch import config_for, kind_of, table_of

    table_of(kind_of(torch.device("cuda", torch.cuda.current_device())))[kernel] = [config]
    config_for.cache_clear()


def product(kernel: str, x: Any, weight: Any) -> Any:
    from lwcompile.backends.triton.kernels.embedding import dequantize
    from lwcompile.backends.triton.kernels.linear import gated, linear

    if kernel == "dequantize":
        return dequantize(weight, x.dtype)
    return gated(x, weight, weight, "silu") if kernel == "gated" else linear(x, weight)


def attempt(kernel: str, bits: int, m: int, config: Config) -> str:
    """Compile and run one candidate on a small weight: what is wrong with it, or ''. In a process of its own."""
    from lwcompile.backends.triton.kernels.linear import gated_reference, linear_reference

    try:
        use(kernel, config)
        weight = weight_of(512, 2048, bits, GROUP, "cuda")
        x = torch.randn(m, 2048, device="cuda", dtype=torch.bfloat16)
        found = product(kernel, x, weight).float()
        exact = x.float()
        wanted = (
            weight.dequantize() if kernel == "dequantize" else
            gated_reference(exact, weight, weight, "silu") if kernel == "gated" else linear_reference(exact, weight)
        )  # fmt: skip
        error = float((found - wanted).abs().max() / wanted.abs().max())
    except Exception as problem:  # a candidate that does not run is a result
        return f"{type(problem).__name__}: {problem}"[:200]
    return "" if error <= TOLERANCE[torch.bfloat16] else f"wrong by {error:.2g}"


def quiet() -> None:
    """The compiler prints whole programs where it fails; what failed is said in a line."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def attempts(widths: list[int], workers: int, until: float) -> dict[tuple[str, int, int], list[Config]]:
    """The candidates that ran and were right, by point."""
    jobs = [(*point, config) for point in points(widths) for config in candidates(point[0], point[2])]
    right: dict[tuple[str, int, int], list[Config]] = {}
    wrong = 0
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), initializer=quiet)
    running = {pool.submit(attempt, *job): job for job in jobs}
    waiting = set(running)
    while waiting and time.monotonic() < until:
        done, waiting = wait(waiting, timeout=max(0.0, until - time.monotonic()), return_when=FIRST_COMPLETED)
        for future in done:
            kernel, bits, m, config = running[future]
            if problem := str(future.exception() or future.result()):
                wrong += 1
                print(f"left out: {kernel}, {bits} bits, M = {m}, {config}: {problem}", flush=True)
            else:
                right.setdefault((kernel, bits, m), []).append(config)
    pool.shutdown(wait=False, cancel_futures=True)
    print(f"{len(jobs)} candidates: {wrong} left out, {len(waiting)} not reached", flush=True)
    return right


def fastest(kernel: str, bits: int, m: int, n: int, k: int, tried: list[Config], megabytes: int) -> tuple[Config, float]:
    """The fastest of the candidates, and its microseconds."""
    weight = weight_of(n, k, bits, GROUP, "cuda")
    copies = max(2, -(-(megabytes << 20) // (weight.words.nbytes + 3 * weight.zero.nbytes)))
    held = [weight, *(_copy(weight) for _ in range(copies - 1))]
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    found = []
    for config in tried:
        use(kernel, config)
        try:
            micro = time_of(lambda i: product(kernel, x, held[i % copies]), max(5, copies), 3)
        except Exception as problem:  # as above
            print(f"left out: {kernel}, {bits} bits, {m} x {n} x {k}, {config}: {problem}", flush=True)
            continue
        found.append((micro, config))
    if not found:
        return {}, 0.0
    micro, best = min(found, key=lambda pair: pair[0])
    use(kernel, best)
    return best, micro


def rules(best: dict[tuple[str, int, int, int], Config], kernel: str) -> list[dict[str, int]]:
    """A kernel's rules: each limited to the bits, M and N it was found at; the largest of each is the limit of nothing."""
    from lwcompile.backends.triton.kernels.launch import table_of

    mine = {point[1:]: config for point, config in best.items() if point[0] == kernel}
    largest = [max((point[i] for point in mine), default=0) for i in range(3)]
    made = []
    for point in sorted(mine):
        limits = {
            name: size for name, size, top in zip(("bits", "m", "n"), point, largest) if size < top or (name == "m" and size == 1)
        }
        made.append({**limits, **mine[point]})
    ends = made and not {"bits", "m", "n"} & set(made[-1])
    return made if ends else [*made, *table_of("default")[kernel]]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=150, help="for all of it; what was found by then is written")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 8, 3, 2], help="in order of importance")
    parser.add_argument("--workers", type=int, default=12, help="processes that compile")
    parser.add_argument("--rotate", type=int, default=96, help="megabytes of weights in rotation")
    parser.add_argument("--write", type=Path, help="the table; by default this GPU's, beside the default one")
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("there is no GPU here to tune for", file=sys.stderr)
        return 1
    from lwcompile.backends.triton.kernels.launch import TABLES, kind_of

    started = time.monotonic()
    right = attempts(given.bits, given.workers, started + 0.6 * given.seconds)
    best: dict[tuple[str, int, int, int], Config] = {}
    for (kernel, bits, m), (n, k) in itertools.product(points(given.bits), SHAPES):
        tried = right.get((kernel, bits, m))
        if not tried or time.monotonic() - started > given.seconds:
            continue
        config, micro = fastest(kernel, bits, m, n, k, tried, given.rotate)
        if config:
            best[kernel, bits, m, n] = config
            print(f"{kernel:6} {bits} bits  M {m:4}  N, K {n} {k}  {micro:8.1f} us  {config}", flush=True)
    device, versions = torch.cuda.get_device_name(), ", ".join(f"{name} {number}" for name, number in _versions().items())
    origin = f"benchmarks/gpu_tune.py on one {device}, {versions}, {datetime.date.today()}; groups of {GROUP}, bfloat16"
    path = given.write or TABLES / f"{kind_of(torch.device('cuda', torch.cuda.current_device()))}.json"
    table = {"origin": origin, "kernels": {kernel: rules(best, kernel) for kernel in ROWS}}
    path.write_text(json.dumps(table, indent=1).replace("\n    ", " ").replace("\n   }", "}") + "\n", encoding="utf-8")
    print(f"{len(best)} rules in {path}, {time.monotonic() - started:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
