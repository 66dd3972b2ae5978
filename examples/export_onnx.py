"""Export to ONNX, and run the file in plain onnxruntime beside the model that it came from.

python examples/export_onnx.py                           a small random encoder, in seconds
python examples/export_onnx.py MODEL [--bits 4.25]       a Hugging Face folder or a .gguf file
"""

from __future__ import annotations

import argparse
from pathlib import Path

import onnxruntime
import torch

import lwcompile as lw
from lwcompile.executor import Executor
from lwcompile.manager import relative_error
from lwcompile.tiny import Encoder, token_ids

HERE = Path(__file__).resolve()
RECIPE = f"""
analyses: [measured]
options:
  linear: ["quantize{{bits=[4,8],group_size=32,solver=rtn}}"]
backend: onnx
calibration: {{dataset: "{HERE}:calibration", samples: 8}}
evaluation: {{dataset: "{HERE}:evaluation", samples: 8}}
"""


def calibration() -> dict:
    return {"input_ids": token_ids(8, 12, seed=1)}


def evaluation() -> dict:
    return {"input_ids": token_ids(8, 12, seed=2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--out", type=Path, default=Path("exported"))
    parser.add_argument("--bits", type=float)
    given = parser.parse_args()

    if given.model is None:
        free = {"input_ids": {0: "batch", 1: "sequence"}}
        program = lw.capture(Encoder(), {"input_ids": token_ids(2, 9)}, free)
        result = lw.export(program, given.out / "model.onnx", recipe=lw.Recipe.parse(RECIPE), max_bytes=90_000)
    else:
        program = lw.capture(given.model)
        result = lw.export(program, given.out / "model.onnx", recipe="fast", avg_bits=given.bits)

    assert result.path is not None
    parity = result.report.data["parity"]
    print(f"wrote {result.path}: {result.report.data['bytes']['file']:,} bytes")
    print(f"damage {result.plan.measured:.4g} {result.plan.unit}; parity with the graph {max(parity['errors'].values()):.2g}")

    session = onnxruntime.InferenceSession(result.path)
    print("inputs:", ", ".join(f"{i.name} {i.shape}" for i in session.get_inputs()))
    if given.model is None:
        ids = token_ids(3, 7)
        (found,) = session.run(None, {"input_ids": ids.numpy()})
        wanted = Executor(result.program).run({"input_ids": ids})["last_hidden_state"]
        error = relative_error(wanted, torch.from_numpy(found))
        print(f"difference at another size: {error:.2g}; the runtime rounds what 4-bit weights are multiplied with to 8 bits")


if __name__ == "__main__":
    main()
