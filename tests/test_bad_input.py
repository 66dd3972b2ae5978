"""Bad input through the command line: one sentence, exit code 2, nothing half-written; and a run that is killed and goes on."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
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


@pytest.mark.parametrize(
    ("words", "made"),
    [
        (["export", "new/deep/m.onnx"], "new"),
        (["export", "new/model.safetensors", "--backend", "hf"], "new"),
        (["export", "old/model.safetensors", "--backend", "hf"], "old/model.safetensors"),
        (["compress", "new/out"], "new"),
    ],
)
def test_a_failure_leaves_no_empty_folder(words, made, tmp_path, monkeypatch):
    """`model.safetensors` would be a folder's name there."""
    (tmp_path / "old").mkdir()
    given = [*model(tmp_path), *recipe(tmp_path), "--max-size", "9KB", "--run-dir", str(tmp_path / "run")]
    monkeypatch.chdir(tmp_path)
    assert cli.run([*words, *given]) == 2
    assert not (tmp_path / made).exists() and (tmp_path / "old").is_dir()


def test_samples_that_are_not_there_are_said_before_the_work(tmp_path, capsys):
    """The held-out ones too, which are used last."""
    given = [*model(tmp_path), *recipe(tmp_path, "evaluation: {dataset: random", "evaluation: {dataset: none.npz")]
    assert cli.run(["compress", str(tmp_path / "out"), *given, "--run-dir", str(tmp_path / "run")]) == 2
    assert "none.npz" in capsys.readouterr().err and not list((tmp_path / "run").glob("results/*"))


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


KILLED = """
import os, signal, sys
from pathlib import Path
from lwcompile.cli import main

left, replace = int(sys.argv.pop(1)), Path.replace

def counted(self, target):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)  # a file's bytes are written, and it has no name yet
    return replace(self, target)

Path.replace = counted
main()
"""


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    """Killed amid scores, amid solved weights and amid the result, at counted writes: no machine is too fast or too slow for it."""
    run, out = tmp_path / "run", tmp_path / "out"
    given = [*model(tmp_path), *recipe(tmp_path), "--run-dir"]
    kept: dict[Path, int] = {}

    def grown() -> list[str]:
        """Which folders hold more than before; nothing that was there is computed again."""
        found = {path: path.stat().st_mtime_ns for path in run.glob("*/*.*") if not path.name.startswith(".")}
        assert {path: found.get(path) for path in kept} == kept
        new = sorted({path.parent.name for path in found.keys() - kept.keys()})
        kept.update(found)
        return new

    for write, stage in ((9, ["results"]), (24, ["results", "tensors"]), (20, ["results", "tensors"])):
        line = [sys.executable, "-c", KILLED, str(write), "compress", str(out), *given, str(run)]
        assert subprocess.run(line, capture_output=True, check=False).returncode == -signal.SIGKILL
        assert grown() == stage and not out.exists()
    assert (tmp_path / ".out.partial").is_dir()
    assert cli.run(["compress", str(out), *given, str(run)]) == 0
    assert grown() == [] and not (tmp_path / ".out.partial").exists()
    assert cli.run(["compress", str(tmp_path / "again"), *given, str(tmp_path / "other")]) == 0
    first, second = ((tmp_path / name / "plan.yaml").read_text() for name in ("out", "again"))
    assert first == second
