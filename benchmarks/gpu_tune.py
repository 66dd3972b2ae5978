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
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_kernels import TOLERANCE, _copy, _versions, time_of, weight_of

Config = dict[str, int]
SHAPES = ((2048, 2048), (4096, 4096), (14336, 4096))
"""(N, K), by rising N: a rule found at one stands for all N up to it, the last for all above."""
ROWS = {
    "dequantize": (4096,), "gemv": (1,), "matmul": (4, 8, 16, 32, 64, 256, 1024, 4096), "gated": (1, 4, 16, 64, 256, 1024, 4096),
}  # fmt: skip
"""M, likewise."""
WHOLE = (4, 8)
"""Widths that are tuned at every M; the others up to `FEWER`, and take the rules of the next wider one above."""
FEWER = {"dequantize": 4096, "gemv": 1, "matmul": 64, "gated": 1}
GROUP = 64


def gemv(rows: int, chunks: int, stages: int, warps: int = 4) -> Config:
    return {"BLOCK_N": rows, "BLOCK_C": chunks, "STAGES": stages, "num_warps": warps, "num_stages": 1}


def tile(m: int, n: int, chunks: int, split: int = 1, warps: int = 4, stages: int = 3) -> Config:
    return {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_C": chunks, "SPLIT_K": split, "num_warps": warps, "num_stages": stages}


def few(m: int, n: int, parts: int, q: int, stages: int = 1) -> Config:
    return {"BLOCK_M": 8 if m <= 8 else 16, "BLOCK_N": n, "PARTS": parts, "Q": q, "num_warps": parts, "num_stages": stages}


def several(m: int, warps: int, split: int = 1, stages: int = 3, q: int = 1) -> Config:
    return {"BLOCK_M": m, "WARPS": warps, "Q": q, "SPLIT_K": split, "num_warps": warps, "num_stages": stages}


DENSE: Config = {"DENSE": 1}


ONE_ROW = [gemv(16, 16, 4), gemv(8, 64, 3), gemv(16, 32, 1)]
FEW_ROWS = ((16, 8, 2), (32, 4, 2), (16, 8, 1), (16, 4, 2), (32, 8, 1), (16, 16, 1))
SIXTEEN_ROWS = [
    *(few(16, *sizes) for sizes in ((16, 8, 1), (16, 4, 2), (64, 4, 1), (32, 8, 1), (32, 4, 1), (64, 8, 1))), several(16, 8, 4),
]  # fmt: skip
SOME_ROWS = {
    32: [several(32, 4, 2), several(32, 8, 2), several(32, 8, 4), several(32, 4, 1), several(32, 8, 1, 4)],
    64: [several(64, 8, 1), several(64, 8, 2), several(64, 8, 4), several(64, 4, 2), several(64, 8, 2, 4),
         tile(64, 64, 2, 4, 4, 4), tile(64, 128, 2, 2), DENSE],
    256: [several(128, 8, 1), several(256, 8, 1, 2), several(128, 8, 2), DENSE],
    1024: [several(128, 8, 1), several(256, 8, 1, 2), DENSE],
    4096: [several(256, 8, 1, 2), DENSE],
}  # fmt: skip
GATED_ROWS = {
    16: [*(few(16, *sizes) for sizes in ((16, 8, 1), (16, 4, 2), (32, 4, 1), (32, 8, 1)))],
    64: [several(64, 8, 1), several(64, 4, 1), several(64, 8, 2), DENSE],
    256: [several(128, 8, 1), several(64, 8, 1), DENSE],
    1024: [several(128, 8, 1), DENSE],
    4096: [DENSE],
}  # fmt: skip


def heads(rows: int, keys: int, programs: int = 0, warps: int = 4, stages: int = 2) -> Config:
    made = {"BLOCK_S": rows, "BLOCK_T": keys, "num_warps": warps, "num_stages": stages}
    return made | {"PROGRAMS": programs} if programs else made


ATTENTION = {
    1: [heads(16, t, p, w, s) for t, p, w, s in
        ((64, 256, 4, 2), (64, 512, 4, 2), (64, 128, 4, 2), (32, 512, 2, 3), (128, 256, 4, 2), (64, 256, 4, 3))],
    2048: [heads(64, 32, 0, 8), heads(64, 64), heads(128, 64, 0, 8), heads(128, 64, 0, 8, 3), heads(128, 128, 0, 8)],
}  # fmt: skip
"""By queries: decoding, whose keys are split, and a prompt, of heads of 128."""
CACHES = {1: ((1, 545), (16, 545), (1, 8192)), 2048: ((1, 512), (1, 2048))}
"""(sequences, keys) that they are timed at; one choice is for all."""


def candidates(kernel: str, m: int, bits: int = 4) -> list[Config]:
    """What is tried: a short list, since compiling takes longer than timing; for the widths between, the likeliest."""
    whole = bits in WHOLE
    if kernel == "dequantize":
        tried = ((16, 16), (8, 16), (16, 8), (64, 2))[: 4 if whole else 2]
        return [{"BLOCK_M": m, "BLOCK_C": c, "num_warps": 4, "num_stages": 1} for m, c in tried]
    if m <= 8:
        found = [few(m, *sizes) for sizes in FEW_ROWS[: 4 if kernel == "gated" else 6]]
        found = found if whole else [few(m, *sizes) for sizes in ((16, 8, 2), (32, 4, 2), (16, 8, 4))]
        return found + (ONE_ROW[: 3 if whole else 1] if m == 1 else [])
    if kernel == "gated":
        return GATED_ROWS[m]
    if m == 16:
        return SIXTEEN_ROWS if whole else [SIXTEEN_ROWS[i] for i in (0, 1, 2)]
    return SOME_ROWS[m] if whole else SOME_ROWS[m][:3]


def points(widths: list[int]) -> Iterator[tuple[str, int, int]]:
    """(kernel, bits, M), the commonest first; `dequantize` before products that may use it."""
    for bits in widths:
        for kernel, rows in ROWS.items():
            yield from ((kernel, bits, m) for m in rows if bits in WHOLE or m <= FEWER[kernel])


def use(kernel: str, config: Config) -> None:
    """Make `config` the only rule of a kernel, in this process."""
    from lwcompile.backends.triton.kernels.launch import config_for, kind_of, table_of

    table_of(kind_of(torch.device("cuda", torch.cuda.current_device())))[kernel] = [config]
    config_for.cache_clear()


def product(kernel: str, x: Any, weight: Any, other: Any = None) -> Any:
    from lwcompile.backends.triton.kernels.embedding import dequantize
    from lwcompile.backends.triton.kernels.linear import gated, linear

    if kernel == "dequantize":
        return dequantize(weight, x.dtype)
    return gated(x, weight, other or weight, "silu") if kernel == "gated" else linear(x, weight)


def attending(m: int, batch: int, keys: int, copies: int = 1) -> Any:
    """A call of attention on the i-th of some caches, and its arguments: Llama's 32 heads over 8 of 128."""
    from lwcompile.backends.triton.kernels.attention import attention

    q = torch.randn(batch, min(m, keys), 32, 128, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    held = [torch.randn(2, batch, 8, keys, 128, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
    return lambda i: attention(q, held[i % copies][0], held[i % copies][1]), (q, *held[0])


def attention_rules(right: dict[tuple[str, int, int], list[Config]], until: float) -> list[Config]:
    """The default's rules of attention, with what is fastest for decoding and for prompts of heads of 128."""
    from lwcompile.backends.triton.kernels.launch import table_of

    found = list(table_of("default")["attention"])
    for place, limits, m in ((0, {"m": 16}, 1), (2, {"n": 128}, 2048)):
        total: dict[int, float] = {}
        tried = right.get(("attention", 16, m), [])
        for batch, keys in CACHES[m]:
            copies = max(2, (96 << 20) // (batch * keys * 4096)) if m == 1 else 2
            call, _ = attending(m, batch, keys, copies)
            for i, config in enumerate(tried):
                if time.monotonic() > until:
                    return found
                use("attention", config)
                micro = time_of(call, copies, 3)
                total[i] = total.get(i, 0.0) + math.log(micro)
                print(f"attention of {min(m, keys)} queries, {batch} x {keys} keys: {micro:8.1f} us  {config}", flush=True)
        if total:
            found[place] = limits | tried[min(total, key=lambda i: total[i])]
    return found


def attempt(kernel: str, bits: int, m: int, config: Config) -> str:
    """Compile and run one candidate on a small weight: what is wrong with it, or ''. In a process of its own."""
    from lwcompile.backends.triton.kernels.attention import attention_reference
    from lwcompile.backends.triton.kernels.linear import gated_reference, linear_reference

    try:
        use(kernel, config)
        if kernel == "attention":
            call, given = attending(m, 2, 77 if m == 1 else 300)
            wanted = attention_reference(*(t.double() for t in given))
            error = float((call(0) - wanted).abs().max() / wanted.abs().max())
            return "" if error <= TOLERANCE[torch.bfloat16] else f"wrong by {error:.2g}"
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


def worker(pipe: Connection) -> None:
    """Attempt what comes, and answer with what is wrong; the last answer is that of a candidate that took the GPU's context with it."""
    os.dup2(
        os.open(os.devnull, os.O_WRONLY), 2
    )  # the compiler prints whole programs where it fails; what failed is said in a line
    healthy = True
    while healthy:
        problem = attempt(*pipe.recv())
        try:
            torch.zeros(1, device="cuda").item()
        except Exception:
            healthy = False
        pipe.send((problem, healthy))


def hired() -> tuple[Connection, Any]:
    """A worker's pipe, and its process."""
    context = multiprocessing.get_context("spawn")
    mine, other = context.Pipe()
    process = context.Process(target=worker, args=(other,), daemon=True)
    process.start()
    other.close()
    return mine, process


def attempts(widths: list[int], workers: int, until: float, hold: Path | None) -> dict[tuple[str, int, int], list[Config]]:
    """The candidates that ran and were right, by point; returns no sooner than `hold` is there."""
    jobs: list[tuple[str, int, int, Config]] = [
        ("attention", 16, m, config) for m, tried in ATTENTION.items() for config in tried
    ]
    jobs += [(*point, config) for point in points(widths) for config in candidates(point[0], point[2], point[1])]
    right: dict[tuple[str, int, int], list[Config]] = {}
    done = 0
    team = dict(hired() for _ in range(workers))
    todo, busy = iter(jobs), {}
    for pipe in [*team]:
        if (job := next(todo, None)) is not None:
            pipe.send(job)
            busy[pipe] = job
    while busy and time.monotonic() < until:
        answered: list[Any] = wait([*busy], timeout=max(0.0, until - time.monotonic()))
        for pipe in answered:
            kernel, bits, m, config = busy.pop(pipe)
            try:
                problem, healthy = pipe.recv()
            except EOFError:
                problem, healthy = "its process ended", False
            done += 1
            if problem:
                print(f"left out: {kernel}, {bits} bits, M = {m}, {config}: {problem}", flush=True)
            else:
                right.setdefault((kernel, bits, m), []).append(config)
            if not healthy:
                team.pop(pipe).kill()
                pipe, process = hired()
                team[pipe] = process
            if (job := next(todo, None)) is not None:
                pipe.send(job)
                busy[pipe] = job
    while hold is not None and not hold.exists() and time.monotonic() < until:
        time.sleep(0.2)
    for process in team.values():
        process.kill()
    found = sum(map(len, right.values()))
    print(f"{len(jobs)} candidates: {done - found} left out, {len(jobs) - done} not reached", flush=True)
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
            micro = time_of(lambda i: product(kernel, x, held[i % copies], held[(i + 1) % copies]), max(5, copies), 3)
        except Exception as problem:  # as above
            print(f"left out: {kernel}, {bits} bits, {m} x {n} x {k}, {config}: {problem}", flush=True)
            continue
        found.append((micro, config))
    if not found:
        return {}, 0.0
    said = "; ".join(f"{micro:.1f} us {' '.join(map(str, config.values()))}" for micro, config in found)
    print(f"  tried {kernel}, {bits} bits, {m} x {n} x {k}: {said}", flush=True)
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
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 8, 2, 3, 5, 6], help="in order of importance")
    parser.add_argument("--workers", type=int, default=12, help="processes that compile")
    parser.add_argument("--rotate", type=int, default=96, help="megabytes of weights in rotation")
    parser.add_argument("--write", type=Path, help="the table; by default this GPU's, beside the default one")
    parser.add_argument("--hold", type=Path, help="nothing is timed before this file is there: something else uses the GPU")
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("there is no GPU here to tune for", file=sys.stderr)
        return 1
    from lwcompile.backends.triton.kernels.launch import TABLES, kind_of

    started = time.monotonic()
    right = attempts(given.bits, given.workers, started + 0.6 * given.seconds, given.hold)
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
    kernels = {kernel: rules(best, kernel) for kernel in ROWS}
    kernels["attention"] = attention_rules(right, started + given.seconds + 10)
    table = {"origin": origin, "kernels": kernels}
    path.write_text(json.dumps(table, indent=1).replace("\n    ", " ").replace("\n   }", "}") + "\n", encoding="utf-8")
    print(f"{len(best)} rules in {path}, {time.monotonic() - started:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
