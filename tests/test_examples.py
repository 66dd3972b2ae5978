"""Every example runs as its first lines say, in seconds, and prints what it promises."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "examples"

EXAMPLES: dict[str, tuple[str, ...]] = {
    "python_api.py": ("quantize{bits=", "bytes ->", "nats/token (95 %:", "continued: tensor("),
    "export_onnx.py": ("wrote ", "parity with the graph", "input_ids ['batch', 'sequence']", "difference at another size"),
    "plain_module.py": (
        "blocks: block0, block1, block2, block3",
        "of held-out samples get another class",
        "scores of one sample",
    ),
    "edit_a_plan.py": ("block1.mlp: drop", "as planned:", "as edited:", "refused: plan.yaml:", "is not offered quantize{bits=7"),
    "torch_compile.py": ("exact:", "under a plan:", "from the compressed program", "after a weight has changed:"),
    "own_operator.py": (
        "opcheck: clean",
        "level quantized:",
        "saved and loaded: 0",
        "compiled:",
        "acme.signs: nobody: computed once, when compiled",
    ),
    "own_pass.py": (
        "annotations: 13 in all",
        "the sharpest weight is",
        "sparsify{fraction=0.3} at",
        "refused: its weight is read by",
    ),
}


def test_every_example_is_run_here() -> None:
    assert {path.name for path in FOLDER.glob("*.py")} == set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_does_what_it_says(name: str, tmp_path: Path) -> None:
    if name == "export_onnx.py":
        pytest.importorskip("onnxruntime", reason="the ONNX backend is not installed")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "LWCOMPILE_RUNS": str(tmp_path / "runs")}
    command = [sys.executable, str(FOLDER / name)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    for words in EXAMPLES[name]:
        assert words in done.stdout, done.stdout


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_opens_with_how_it_is_run(name: str) -> None:
    words = ast.get_docstring(ast.parse((FOLDER / name).read_text(encoding="utf-8"))) or ""
    assert f"python examples/{name}" in words
