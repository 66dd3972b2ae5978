"""Triton kernels against plain PyTorch, in the interpreter. Its mode is fixed when triton is imported: hence a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels are Triton's: install lwcompile[triton]")
HERE = Path(__file__).parent
TUNING = HERE.parent / "backends" / "triton" / "tuning"


def interpreted(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment, cwd=HERE.parent)


def test_every_kernel_computes_what_plain_torch_does() -> None:
    done = interpreted("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(HERE / "triton_interpreted.py"))
    assert done.returncode == 0, done.stdout[-6000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout


def test_importing_the_kernels_asks_no_device() -> None:
    modules = ("linear", "norm", "embedding", "rotary", "attention", "linear_attention", "launch")
    code = "import torch\nasked = []\ntorch.cuda.get_device_capability = torch.cuda.is_available = lambda *a: asked.append(a)\n"
    code += "".join(f"import lwcompile.backends.triton.kernels.{name}\n" for name in modules)
    done = interpreted("-c", code + "assert not asked and not torch.cuda.is_initialized(), asked")
    assert done.returncode == 0, done.stderr


def test_without_a_gpu_and_without_the_interpreter_a_launch_says_what_to_do() -> None:
    code = "import torch\nfrom lwcompile.backends.triton.kernels.norm import Norm, normalize\n"
    code += "normalize(torch.ones(2, 4), Norm('rms', torch.ones(4), None, 1e-5))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "0"}
    )
    assert done.returncode and "TRITON_INTERPRET=1" in done.stderr


@pytest.mark.parametrize("path", sorted(TUNING.glob("*.json")), ids=lambda p: p.stem)
def test_tables_end_with_a_rule_that_always_fits(path: Path) -> None:
    table = json.loads(path.read_text(encoding="utf-8"))
    assert table["origin"], "say how the numbers were found"
    for kernel, rules in table["kernels"].items():
        assert not {"m", "n", "k", "bits"} & set(rules[-1]), f"{kernel} has sizes that no rule fits"
        for rule in rules:
            assert all(rule[key] & (rule[key] - 1) == 0 for key in rule if key.startswith("BLOCK_")), f"{kernel}: {rule}"


# --- the benchmarks, which need a GPU for all but this


def test_the_benchmark_checks_itself_anywhere() -> None:
    done = interpreted("-m", "benchmarks.gpu_kernels", "--check", "--bits", "3", "4")
    assert done.returncode == 0, done.stderr
    assert [line.partition(":")[0] for line in done.stdout.splitlines()] == ["3 bits", "4 bits"]


def test_the_benchmark_takes_its_arguments() -> None:
    from benchmarks.gpu_kernels import SHAPES, parse

    given = parse(["--rows", "1", "16", "--shapes", "2048x4096", "--rotate", "64"])
    assert (given.rows, given.shapes, given.rotate) == ([1, 16], [(2048, 4096)], 64)
    assert parse([]).shapes == list(SHAPES)
    with pytest.raises(SystemExit):
        parse(["--rotate", "8"])


# --- the tuner, likewise


def test_the_tuner_writes_rules_that_give_back_what_was_best() -> None:
    from benchmarks.gpu_tune import candidates, rules
    from lwcompile.backends.triton.kernels.launch import rule_for

    points = [("matmul", bits, m, n) for bits in (3, 4) for m in (16, 256) for n in (2048, 4096)]
    best = {point: {"BLOCK_M": 16 << i} for i, point in enumerate(points)}
    table = {"matmul": rules(best, "matmul")}
    for (_, bits, m, n), config in best.items():
        assert rule_for(table, "matmul", m=m, n=n, k=64, bits=bits) == config
    assert rule_for(table, "matmul", m=9000, n=9000, k=64, bits=8) == best[points[-1]]
    one = {"gated": rules({("gated", 4, 1, 2048): {"STAGES": 3}}, "gated")}
    assert rule_for(one, "gated", m=1, n=2048, k=64, bits=8) == {"STAGES": 3}
    assert "STAGES" not in rule_for(one, "gated", m=2, n=2048, k=64, bits=8), "more rows than one are not for gemv"
    assert all("STAGES" not in config for m in (16, 256) for config in candidates("matmul", m))


def test_the_tuner_needs_a_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import gpu_tune

    monkeypatch.setattr(gpu_tune.torch.cuda, "is_available", lambda: False)
    assert gpu_tune.main([]) == 1 and "no GPU" in capsys.readouterr().err


def test_a_whole_model_computes_what_transformers_does() -> None:
    """The package with random weights that `benchmarks.gpu_model` times, at two widths, decoding and in prefill."""
    pytest.importorskip("transformers", reason="the model is transformers': install lwcompile[hf]")
    done = interpreted("-m", "benchmarks.gpu_model", "--check", "--bits", "4/3")
    assert done.returncode == 0, done.stderr
    found = [line.partition(":")[0] for line in done.stdout.splitlines()]
    assert found == [f"lwcompile 4/3 bits, {step}" for step in
                     ("decode, batch 1, 12 tokens", "decode, batch 2, 5 tokens", "prefill, batch 1, 9 tokens",
                      "generate, batch 2, 7 tokens")]  # fmt: skip


def test_whole_models_take_widths_that_there_are() -> None:
    pytest.importorskip("transformers", reason="the model is transformers': install lwcompile[hf]")
    from benchmarks.gpu_model import parse

    assert parse(["--bits", "4", "4/3"]).bits == ["4", "4/3"]
    for wrong in ("1", "4/3/2", "four"):
        with pytest.raises(SystemExit):
            parse(["--bits", wrong])
