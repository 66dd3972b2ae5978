"""Bad input through the command line: one sentence, exit code 2, nothing half-written; and a run that is killed and goes on."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_sources import write_gguf
from tiny import llama, llama_program

from lwcompile import cli

RECIPE = """
analyses: [measured]
options:
  linear: ["quantize{bits=[3,4],group_size=32,solver=rtn}"]
  embedding: ["quantize{bits=8,group_size=32,solver=rtn}"]
budget: {avg_bits: 20}
allocator: integer_program
calibration: {dataset: random, samples: 8, seqlen: 16}
evaluation: {dataset: random, samples: 8, seqlen: 16}
"""
Case = Callable[[Path], list[str]]


def model(folder: Path) -> list[str]:
    llama_program().save(folder / "model")
    return ["--model", str(folder / "model")]


def recipe(folder: Path, old: str = "", new: str = "") -> list[str]:
    assert old in RECIPE
    (folder / "r.yaml").write_text(RECIPE.replace(old, new) if old else RECIPE)
    return ["--recipe", str(folder / "r.yaml")]


def truncated_gguf(folder: Path) -> list[str]:
    write_gguf(folder / "m.gguf")
    (folder / "m.gguf").write_bytes((folder / "m.gguf").read_bytes()[:-64])
    return ["--model", str(folder / "m.gguf")]


def hugging_face(folder: Path) -> Path:
    whole: Any = llama()
    whole.save_pretrained(folder / "hf")
    return next((folder / "hf").glob("*.safetensors"))


def truncated_safetensors(folder: Path) -> list[str]:
    weights = hugging_face(folder)
    weights.write_bytes(weights.read_bytes()[:-64])
    return ["--model", str(folder / "hf")]


def nan_weights(folder: Path) -> list[str]:
    broken: Any = llama()
    kept = broken.model.norm.weight.detach().clone()
    with torch.no_grad():
        broken.model.norm.weight[0] = torch.nan
    broken.save_pretrained(folder / "hf")
    with torch.no_grad():
        broken.model.norm.weight.copy_(kept)  # the model is shared between tests
    return ["--model", str(folder / "hf")]


def pickled_pt2(folder: Path) -> list[str]:
    torch.save({"x": llama()}, folder / "m.pt2")
    return ["--model", str(folder / "m.pt2")]


BAD: dict[str, tuple[Case, str]] = {
    "missing file": (lambda f: ["--model", str(f / "none.gguf"), *recipe(f)], "none.gguf"),
    "truncated gguf": (lambda f: [*truncated_gguf(f), *recipe(f)], "is truncated"),
    "truncated safetensors": (lambda f: [*truncated_safetensors(f), *recipe(f)], "truncated"),
    "pickled pt2": (lambda f: [*pickled_pt2(f), *recipe(f)], "pickle"),
    "nan weights": (lambda f: [*nan_weights(f), *recipe(f)], "model.norm.weight holds 1 value"),
    "wrong recipe key": (
        lambda f: [*model(f), *recipe(f, "budget:", "bugdet:")],
        "r.yaml:6: unknown key 'bugdet' (did you mean",
    ),
    "unknown pass": (lambda f: [*model(f), *recipe(f, "[measured]", "[mesured]")], "r.yaml:2: unknown pass 'mesured'"),
    "impossible budget": (lambda f: [*model(f), *recipe(f), "--max-size", "9KB"], "the smallest plan"),
    "unknown plan file": (lambda f: [*model(f), *recipe(f), "--plan", str(f / "none.yaml")], "none.yaml"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence_and_leaves_nothing(name, tmp_path, capsys):
    make, said = BAD[name]
    out = tmp_path / "out"
    assert cli.run(["compress", str(out), *make(tmp_path), "--run-dir", str(tmp_path / "run")]) == 2
    printed = capsys.readouterr()
    assert said in printed.err and "Traceback" not in printed.err
    lines = printed.err.strip().splitlines()
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
    assert not out.exists() and not list(tmp_path.glob(".out*"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_unwritable_directory_is_refused_before_the_work(tmp_path, capsys):
    (tmp_path / "locked").mkdir()
    (tmp_path / "locked").chmod(stat.S_IRUSR | stat.S_IXUSR)
    assert cli.run(["export", str(tmp_path / "locked" / "m.onnx"), *model(tmp_path), *recipe(tmp_path)]) == 2
    assert "cannot write into" in capsys.readouterr().err


def test_a_file_in_place_of_the_directory_is_refused_before_the_work(tmp_path, capsys):
    (tmp_path / "taken").write_text("")
    assert cli.run(["export", str(tmp_path / "taken" / "m.onnx"), *model(tmp_path), *recipe(tmp_path)]) == 2
    assert "cannot write into" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["analysis", "transform"])
def test_a_plugin_that_raises_is_named_and_what_was_scored_is_kept(kind, tmp_path, capsys, monkeypatch):
    from lwcompile.passes.analysis.measured import Measured
    from lwcompile.passes.transform.quantize import Quantize

    def fail(*_: object) -> None:
        raise ValueError("no luck")

    given = [*model(tmp_path), *recipe(tmp_path), "--run-dir", str(tmp_path / "run")]
    if kind == "analysis":
        monkeypatch.setattr(Measured, "run", fail)
    else:
        assert cli.run(["analyze", *given]) == 0
        capsys.readouterr()
        monkeypatch.setattr(Quantize, "apply", fail)
    before = set((tmp_path / "run" / "results").glob("*.json"))
    assert cli.run(["compress", str(tmp_path / "out"), *given]) == 2
    said = capsys.readouterr().err
    assert "no luck" in said and ("measured" if kind == "analysis" else "quantize") in said and "Traceback" not in said
    assert before <= set((tmp_path / "run" / "results").glob("*.json")) and not (tmp_path / "out").exists()


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    run, results = tmp_path / "run", tmp_path / "run" / "results"
    given = [*model(tmp_path), *recipe(tmp_path), "--run-dir", str(run)]
    line = [sys.executable, "-c", "from lwcompile.cli import main; main()", "compress", str(tmp_path / "out"), *given]
    started = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while len(list(results.glob("*.json"))) < 5 and started.poll() is None and time.monotonic() < until:
        time.sleep(0.001)
    started.send_signal(signal.SIGKILL)
    assert started.wait() == -signal.SIGKILL and not (tmp_path / "out").exists()
    kept = {path: path.stat().st_mtime_ns for path in results.glob("*.json")}
    assert len(kept) >= 5
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in kept} == kept  # nothing that was there is computed again
    fresh = [str(tmp_path / "other") if part == str(run) else part for part in line]
    fresh[fresh.index(str(tmp_path / "out"))] = str(tmp_path / "again")
    assert subprocess.run(fresh, capture_output=True, check=False).returncode == 0
    first, second = ((tmp_path / name / "plan.yaml").read_text() for name in ("out", "again"))
    assert first == second
