"""One forward pass by IREE, onnxruntime and torch, and the bytes of each file, dense and with weights packed in 4 bits.

    python -m benchmarks.mlir --model minilm --rows 1 --tokens 128 --threads 1

The runtimes take turns in rounds, and each one's figure is the median of its rounds: what else the machine does meets them alike.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.models import program
from lwcompile import pipeline
from lwcompile.pipeline import folder_bytes
from lwcompile.plans import Plan
from lwcompile.program import Program
from lwcompile.registry import make
from lwcompile.site import Site
from lwcompile.spec import Spec

ROUNDS, CALLS = 9, 5


def packed(dense: Program) -> Program:
    """Every linear and embedding at 4 bits, group 64, round to nearest."""
    run = pipeline.session(dense, pipeline.Settings(recipe="fast"))
    option = Spec.parse("quantize{bits=4,group_size=64,solver=rtn}")
    sites: list[Site] = [s for s in run.structure.sites.values() if s.kind in ("linear", "embedding")]
    return run.compress(Plan({s.id: (option,) for s in sites}, run.recipe.budget))


def inputs(dense: Program, rows: int, tokens: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    made = {}
    for i in dense.main.inputs:
        shape = [(rows if d == 0 else tokens) if d in i.dynamic else n for d, n in enumerate(i.shape)]
        if i.dtype.is_floating_point:
            made[i.name] = torch.randn(shape, generator=random)
        elif i.name == "input_ids":
            made[i.name] = torch.randint(5, 20000, shape, generator=random)
        else:
            made[i.name] = torch.full(shape, int(i.name.endswith("mask")), dtype=i.dtype)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="minilm", choices=("minilm", "dinov2", "smollm2"))
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--inductor", action="store_true")
    parser.add_argument("--folder", type=Path, default=Path("lwcompile-runs/mlir"))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    _bound(options.threads)
    options.folder.mkdir(parents=True, exist_ok=True)
    dense = program(options.model)
    feed = inputs(dense, options.rows, options.tokens)
    module = dense.main.module()
    ways: dict[str, Callable[[], Any]] = {"eager": lambda: module(*feed.values())}
    if options.inductor:
        compiled = torch.compile(module)
        ways["inductor"] = lambda: compiled(*feed.values())
    rows: list[dict[str, Any]] = []
    kinds = {"IREE": ("mlir", "model.vmfb"), "onnxruntime": ("onnx", "model.onnx")}
    for label, whole in (("float32", dense), ("4 bits", packed(dense))):
        for name, (spec, file) in kinds.items():
            backend, path = make("backends", spec), options.folder / f"{options.model} {name} {label}" / file
            path.parent.mkdir(parents=True, exist_ok=True)
            started = time.perf_counter()
            parity = backend.lower(whole, path, None)
            row = {"file": f"{name}, {label}", "bytes": folder_bytes(path), "parity": parity.worst, "note": parity.note}
            rows.append({**row, "seconds": round(time.perf_counter() - started, 1)})
            print(json.dumps(rows[-1]), flush=True)
            ways[row["file"]] = lambda backend=backend, path=path: backend.run(path, feed)
    times: dict[str, list[float]] = {name: [] for name in ways}
    with torch.no_grad():
        for call in ways.values():
            call()
        for _ in range(ROUNDS):
            for name, call in ways.items():
                started = time.perf_counter()
                for _ in range(CALLS):
                    call()
                times[name].append(1e3 * (time.perf_counter() - started) / CALLS)
    figures = {name: {"ms": round(median(t), 2), "least": round(min(t), 2)} for name, t in times.items()}
    for name, figure in figures.items():
        print(f"{name:40} {figure['ms']:8.2f} ms (least {figure['least']:.2f})", flush=True)
    if options.out is not None:
        options.out.write_text(json.dumps({"files": rows, "times": figures}, indent=1))


def _bound(threads: int) -> None:
    """As many cores for every runtime: IREE and onnxruntime count those that the process may use."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


if __name__ == "__main__":
    main()
