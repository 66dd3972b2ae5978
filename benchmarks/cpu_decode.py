"""SmolLM2-135M-Instruct on the processor, one sequence: what we write and compile, llama.cpp, onnxruntime's own quantizer, Inductor.

    python -m benchmarks.cpu_decode [--file model.onnx] [--llama llama/bin/python] [--threads 2] [--rounds 9]

Prefill is one pass over 128 tokens, decode one token behind 128; of decoding, `STEPS` tokens a round are timed. Every way is timed
once a round, in turn, so that whatever else the machine does meets all of them, and steps after some that are not timed, since the
other ways have had the memory meanwhile. Ours is what `lw.load(folder).generate` calls.
Without `--file` it is written here: 4 bits, groups of 64, round to nearest, embedding and head included. What torch.compile
makes decodes in a static cache of 256, behind 128 tokens and more: ours under the same plan, with activations in float32 and in int8 and,
for what replaying gains, with every call by Python; and each a second time while dynamo leaves out the guards that do not tell its
graphs apart.

Threads that wait do so awake for a while, and then sleep: GOMP_SPINCOUNT is the 300,000 turns that it is where nobody sets it and
no other process wants the cores; llama.cpp's threads are awake as long as it computes.

Columns: milliseconds (median and least over the rounds), processor milliseconds (least; all threads together, so with one thread
what a quiet machine would take), tokens a second by the median, bytes of weights that a token reads, what part of the bandwidth of a
plain read that is, the median over rounds of the time over llama.cpp's, and the least processor time over its least.

llama.cpp compiles for minutes, so it runs in an environment of its own (`python -m venv llama && llama/bin/pip install
llama-cpp-python`), on the Q4_1 file that SmolLM2 comes as; it computes the logits of the last position only, the others those of all.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "300000")

import torch

from benchmarks.models import program, smollm2
from benchmarks.onnx_quality import quantized_by_onnxruntime
from lwcompile.apply import apply_plan
from lwcompile.backends.onnx.backend import Onnx
from lwcompile.backends.onnx.parity import open_session
from lwcompile.backends.onnx.runtime import OnnxStep
from lwcompile.context import Context
from lwcompile.decode import derive_decode
from lwcompile.demo import demo_model
from lwcompile.generate import DecodeStep
from lwcompile.pipeline import folder_bytes
from lwcompile.plans import Plan
from lwcompile.program import Program
from lwcompile.spec import Spec
from lwcompile.structure import find_structure

TOKENS, STEPS = 128, 8
FORMAT = "quantize{bits=4,group_size=64,solver=rtn}"

CODEGENS = {
    "float32": "inductor",
    "int8": "inductor{activations=int8}",
    "int8, calls by Python": "inductor{activations=int8,replay=false}",
}
"""Of ours under torch.compile."""

Timing = tuple[float, float]
"""Seconds by the clock, and seconds of processor time."""

LLAMA = """
import json, sys, time
from llama_cpp import Llama
path, threads, tokens, steps = sys.argv[1], *map(int, sys.argv[2:5])
model = Llama(path, n_ctx=512, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False)
ids = [5 + 37 * i % 20000 for i in range(tokens)]
def timed(call):
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - cpu
for line in sys.stdin:
    if line.strip() == "prefill":
        model.reset()
        took = timed(lambda: model.eval(ids))
    else:
        model.n_tokens = tokens
        model.eval(ids[:1])
        model.n_tokens = tokens
        took = timed(lambda: [model.eval(ids[:1]) for _ in range(steps)])
    print(json.dumps(took), flush=True)
"""


@dataclass
class Way:
    """One way to run the model: `run` takes "prefill" or "decode" and gives what one pass took."""

    name: str
    run: Callable[[str], Timing]
    nbytes: int
    times: dict[str, list[Timing]] = field(default_factory=lambda: {"prefill": [], "decode": []})


def timed(call: Callable[[], object], count: int = 1) -> Timing:
    wall, processor = time.perf_counter(), time.process_time()
    for _ in range(count):
        call()
    return (time.perf_counter() - wall) / count, (time.process_time() - processor) / count


def by_step(name: str, step: DecodeStep, nbytes: int) -> Way:
    ids, mask = torch.arange(5, 5 + TOKENS)[None], torch.ones(1, TOKENS + STEPS, dtype=torch.int64)
    state: list[Any] = []

    def prefill() -> None:
        state[:] = step(ids, mask[:, :TOKENS], torch.arange(TOKENS)[None], None)[1:]

    def decode() -> None:
        cache = state[0]
        for at in range(TOKENS, TOKENS + STEPS):
            _, cache = step(ids[:, :1], mask[:, : at + 1], torch.tensor([[at]]), cache)

    def run(what: str) -> Timing:
        if what == "prefill":
            return timed(prefill)
        decode()
        wall, processor = timed(decode)
        return wall / STEPS, processor / STEPS

    return Way(name, run, nbytes)


def by_llama(python: str, threads: int) -> Way:
    path = demo_model()
    command = [python, "-c", LLAMA, str(path), str(threads), str(TOKENS), str(STEPS)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert child.stdin is not None and child.stdout is not None
    asks, answers = child.stdin, child.stdout

    def run(what: str) -> Timing:
        asks.write(what + "\n")
        asks.flush()
        wall, processor = json.loads(answers.readline())
        count = STEPS if what == "decode" else 1
        return wall / count, processor / count

    return Way("llama.cpp, Q4_1", run, path.stat().st_size)


def by_compile(name: str, model: Any, compiled: Any, nbytes: int, unguarded: bool = False) -> Way:
    """`compiled` is what torch.compile made of `model`. unguarded: dynamo only looks at what tells its graphs apart before a call, by
    torch's own `torch.compiler.set_stance`, which its user answers for."""
    from transformers import StaticCache

    ids = torch.arange(5, 5 + TOKENS)[None]
    cache, left = StaticCache(config=model.config, max_cache_len=256), 0

    def run(what: str) -> Timing:
        nonlocal left
        if what == "prefill":
            return timed(lambda: compiled(input_ids=ids, use_cache=False))
        if left == 0:  # filling it in eager mode takes seconds
            cache.reset()
            model(input_ids=ids, past_key_values=cache)
            left = (256 - TOKENS) // (1 + STEPS)
        left -= 1
        compiled(input_ids=ids[:, :1], past_key_values=cache)
        with torch.compiler.set_stance(skip_guard_eval_unsafe=unguarded):
            return timed(lambda: compiled(input_ids=ids[:, :1], past_key_values=cache), STEPS)

    return Way(name, run, nbytes)


def by_inductor() -> Way:
    model: Any = smollm2().model.bfloat16()
    nbytes = sum(p.numel() * p.element_size() for p in model.parameters())
    return by_compile("Inductor, bf16", model, torch.compile(model), nbytes)


def by_layerwise() -> list[Way]:
    """torch.compile(backend="layerwise") under the plan that `packed` applies."""
    dense = program("smollm2")
    plan, nbytes = Plan({site: (Spec.parse(FORMAT),) for site in packed_sites(dense)}), packed(dense).main.nbytes()
    ways = []
    for said, codegen in CODEGENS.items():
        model = smollm2().model
        options = {"plan": plan, "codegen": codegen}
        compiled = torch.compile(model, backend="layerwise", options=options)
        name = f"ours under torch.compile, 4 bits, {said}"
        ways += [
            by_compile(name, model, compiled, nbytes),
            by_compile(f"{name}, unguarded", model, compiled, nbytes, unguarded=True),
        ]
    return ways


def packed_sites(dense: Program) -> list[str]:
    return [s.id for s in find_structure(dense).sites.values() if s.kind in ("linear", "embedding")]


def packed(dense: Program) -> Program:
    """Every linear and embedding in one format, with a decode graph."""
    structure, option = find_structure(dense), Spec.parse(FORMAT)
    made = apply_plan(
        dense, {id: (option,) for id in packed_sites(dense)}, structure, Context(structure=structure, program=dense)
    )
    return continued(made)


def continued(whole: Program) -> Program:
    """The program with its decode graph."""
    return replace(whole, entries={**whole.entries, "decode": derive_decode(whole.main, check=False)})


def files(folder: Path) -> dict[str, Path]:
    """Our file, and what onnxruntime's quantizer makes of the dense one; written if they are not there."""
    ours, dense, theirs = (folder / name / "model.onnx" for name in ("ours", "dense", "onnxruntime"))
    for path, make in ((ours, packed), (dense, continued)):
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            parity = Onnx().lower(make(program("smollm2")), path, None)
            print(f"{path}: parity {parity.worst:.1e}", file=sys.stderr, flush=True)
    if not theirs.is_file():
        quantized_by_onnxruntime(dense, theirs)
    return {"ours, 4 bits": ours, "onnxruntime's quantizer, 4 bits": theirs, "ours, float32": dense}


def bandwidth() -> float:
    """Bytes a second of a plain read, the best of ten."""
    block = torch.ones(1 << 26)
    return max(block.nbytes / timed(block.sum)[0] for _ in range(10))


def llama_python(given: str | None) -> str | None:
    """A python that imports llama_cpp; None, with the reason on stderr, if there is none."""
    python = given or sys.executable
    done = subprocess.run([python, "-c", "import llama_cpp"], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        print(f"llama.cpp is left out: {reason}; name a python that has llama-cpp-python with --llama", file=sys.stderr)
    return None if done.returncode else python


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, help="a file that lwcompile export wrote, instead of the one written here")
    parser.add_argument("--llama", help="a python that has llama-cpp-python")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--folder", type=Path, default=Path("lwcompile-runs/cpu-decode"))
    parser.add_argument("--no-inductor", action="store_true", help="leave out what torch.compile compiles for minutes")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    paths = files(options.folder)
    if options.file is not None:
        paths["ours, 4 bits"] = options.file
    ways = [by_step(name, OnnxStep(open_session(path, options.threads)), folder_bytes(path)) for name, path in paths.items()]
    if (python := llama_python(options.llama)) is not None:
        ways.append(by_llama(python, options.threads))
    if not options.no_inductor:
        ways += [*by_layerwise(), by_inductor()]
    with torch.no_grad():
        run(ways, options.rounds)
    report(ways, bandwidth())


def run(ways: list[Way], rounds: int) -> None:
    for way in ways:
        for what in way.times:
            way.run(what)
    for _ in range(rounds):
        for way in ways:
            for what, found in way.times.items():
                found.append(way.run(what))


def report(ways: list[Way], peak: float) -> None:
    print(f"a plain read: {peak / 1e9:.1f} GB/s\n")
    print(
        "| | | ms | least | processor ms | tokens/s | MB a token | share of a plain read | over llama.cpp | processor, over it |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    other = next((w for w in ways if w.name.startswith("llama.cpp")), None)
    for what, tokens in (("decode", 1), ("prefill", TOKENS)):
        for way in ways:
            wall, processor = ([t[i] for t in way.times[what]] for i in (0, 1))
            middle = median(wall)
            share = f"{way.nbytes / middle / peak:.0%}" if what == "decode" else ""
            ratio = " | "
            if other is not None:
                theirs = other.times[what]
                ratio = f"{median(a / b[0] for a, b in zip(wall, theirs)):.2f} | {min(processor) / min(b[1] for b in theirs):.2f}"
            numbers = f"{1e3 * middle:.1f} | {1e3 * min(wall):.1f} | {1e3 * min(processor):.1f} | {tokens / middle:.0f}"
            print(f"| {what} | {way.name} | {numbers} | {way.nbytes / 1e6:.1f} | {share} | {ratio} |", flush=True)


if __name__ == "__main__":
    main()
