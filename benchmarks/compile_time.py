"""How long SmolLM2-135M-Instruct takes to compile: by a backend that does nothing, by Inductor, and by layerwise.

    python -m benchmarks.compile_time [--tokens 128] [--only layerwise]

Each is compiled in a process of its own from empty caches (cold), in another one with the caches that this left (warm), and there once
more after `torch._dynamo.reset()` (again). Figures are seconds of processor time, of the process and of the compilers that it starts,
for the first call less a later one, with one thread and one compile thread: on a shared machine, the clock says something else.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from typing import Any

NAMES = ("nothing", "inductor", "layerwise")


def spent() -> float:
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in usage)


def measure(name: str, tokens: int) -> dict[str, float]:
    """In this process: seconds of the first compilation and of one more, and the error relative to eager's largest output."""
    import torch

    from benchmarks.models import smollm2
    from lwcompile.manager import relative_error

    torch.set_num_threads(1)
    backend: Any = (lambda graph, arguments: graph.forward) if name == "nothing" else name
    model: Any = smollm2().model
    ids = torch.randint(5, 20000, (1, tokens), generator=torch.Generator().manual_seed(0))

    def call(model: Any) -> tuple[float, Any]:
        started = spent()
        made = model(input_ids=ids, use_cache=False).logits
        return spent() - started, made

    with torch.no_grad():
        call(model)
        eager, wanted = call(model)
        compiled = torch.compile(model, backend=backend)
        first, made = call(compiled)
        for _ in range(3):  # the second is recorded, the third proven (`replay`)
            call(compiled)
        steady, _ = call(compiled)
        torch._dynamo.reset()
        again, _ = call(torch.compile(model, backend=backend))
    return {
        "compile": first - steady,
        "again": again - steady,
        "call": steady,
        "eager": eager,
        "error": relative_error(wanted, made),
    }


def apart(name: str, tokens: int, cache: str) -> dict[str, float]:
    settings = dict.fromkeys(("TORCHINDUCTOR_COMPILE_THREADS", "OMP_NUM_THREADS"), "1") | {"OMP_WAIT_POLICY": "PASSIVE"}
    settings["TORCHINDUCTOR_CACHE_DIR"] = cache
    line = [sys.executable, "-m", "benchmarks.compile_time", "--here", name, "--tokens", str(tokens)]
    done = subprocess.run(line, env={**os.environ, **settings}, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--only", choices=NAMES, action="append", help="one of them; may be repeated")
    parser.add_argument("--here", choices=NAMES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.here:
        return print(json.dumps(measure(given.here, given.tokens)))
    print("| backend | cold | warm | again | a call, to eager's | error |\n|---|---|---|---|---|---|")
    for name in given.only or NAMES:
        with tempfile.TemporaryDirectory() as cache:
            cold, warm = apart(name, given.tokens, cache), apart(name, given.tokens, cache)
        seconds = f"{cold['compile']:.1f} | {warm['compile']:.1f} | {warm['again']:.1f}"
        print(f"| {name} | {seconds} | {warm['call'] / warm['eager']:.2f} | {warm['error']:.0e} |", flush=True)


if __name__ == "__main__":
    main()
