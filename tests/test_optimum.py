"""Optimum's ORTModelForCausalLM loads what `export` writes, and generates the same tokens as we do.

Optimum wants an older transformers than ours, so it runs in an environment of its own:

    python3 -m venv optimum && optimum/bin/pip install optimum-onnx==0.1.0 'transformers<4.58' onnxruntime
    LWCOMPILE_OPTIMUM_PYTHON=optimum/bin/python python -m pytest tests/test_optimum.py
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

import lwcompile as lw

PYTHON = os.environ.get("LWCOMPILE_OPTIMUM_PYTHON")

GENERATE = """
import json, sys, torch
from optimum.onnxruntime import ORTModelForCausalLM
model = ORTModelForCausalLM.from_pretrained(sys.argv[1])
ids, mask = (torch.tensor(x) for x in json.loads(sys.argv[2]))
made = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)
print("IDS", json.dumps(made.tolist()))
"""


@pytest.mark.skipif(PYTHON is None, reason="LWCOMPILE_OPTIMUM_PYTHON names no environment with optimum-onnx")
def test_optimum_generates_the_same_tokens(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="install lwcompile[onnx]")
    from tiny import llama

    model = tmp_path / "dense"
    llama().save_pretrained(model)  # type: ignore[operator]
    recipe = lw.Recipe.named("fast").with_(
        options={"linear": ("quantize{bits=8,group_size=32,solver=rtn}",)}, backend="onnx{activations=float32}",
        analyses=("fisher{tokens=64}",), calibration={"dataset": "random", "samples": 8, "seqlen": 16},
        evaluation={"dataset": "random", "samples": 4, "seqlen": 16}, budget={"avg_bits": 24.0},
    )  # fmt: skip
    lw.export(lw.capture(model), tmp_path / "out" / "model.onnx", recipe=recipe, run_dir=tmp_path / "run")
    ids = torch.tensor([[5, 9, 17, 3], [0, 0, 8, 21]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    ours = lw.load(tmp_path / "out").generate(ids, max_new_tokens=12, attention_mask=mask)
    command = [str(PYTHON), "-c", GENERATE, str(tmp_path / "out"), json.dumps([ids.tolist(), mask.tolist()])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = json.loads(done.stdout.split("IDS")[-1])
    assert theirs == ours.tolist()
