"""Proof of a written package: it runs in a process of its own, which imports nothing of this project, on a GPU if there is one and
else in Triton's interpreter; its outputs are compared with the graph's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lwcompile.errors import VerificationError

Case = tuple[str, Mapping[str, Tensor], Sequence[Tensor]]
"""(entry point, inputs by name, the graph's outputs in order)."""

SCRIPT = """
import importlib, json, sys
folder, name, cases, results, device, dtype = sys.argv[1:]
sys.path.insert(0, folder)
import torch
from safetensors.torch import load_file, save_file
model = importlib.import_module(name).load(device, getattr(torch, dtype))
assert "lwcompile" not in sys.modules
found = {}
given = load_file(cases)
for number, entry in enumerate(json.loads(sys.stdin.read())):
    inputs = {key.split("/", 1)[1]: value for key, value in given.items() if key.split("/", 1)[0] == str(number)}
    for output, value in model.run(entry, inputs).items():
        found[f"{number}/{output}"] = value.float().cpu().contiguous()
save_file(found, results)
"""


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def run_package(
    package: Path, cases: Sequence[Case], scratch: Path, dtype: torch.dtype = torch.float32
) -> list[dict[str, Tensor]]:
    """The package's outputs by name, float32, for each case. `VerificationError` with what it said if it does not run."""
    given = {f"{n}/{name}": value.clone() for n, (_, inputs, _) in enumerate(cases) for name, value in inputs.items()}
    save_file(given, scratch / "cases.safetensors")
    environment = {**os.environ, "TRITON_INTERPRET": "0" if device() == "cuda" else "1"}
    scratch = scratch.resolve()
    words = [
        str(package.resolve().parent),
        package.name,
        str(scratch / "cases.safetensors"),
        str(scratch / "results.safetensors"),
        device(),
    ]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *words, str(dtype).removeprefix("torch.")],
        input=json.dumps([entry for entry, _, _ in cases]), capture_output=True, text=True, env=environment, cwd=scratch,
    )  # fmt: skip
    if done.returncode:
        raise VerificationError(f"the package that was written does not run:\n{done.stderr.strip()[-2000:]}")
    found = load_file(scratch / "results.safetensors")
    return [{k.split("/", 1)[1]: v for k, v in found.items() if k.split("/", 1)[0] == str(n)} for n in range(len(cases))]
