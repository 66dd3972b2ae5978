"""A third party's distribution, installed by pip into a fresh virtual environment and used from a recipe."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lwcompile.tiny import VOCABULARY

PLUGIN = Path(__file__).parent / "plugin"

RECIPE = """
analyses: ["kurtosis{tokens=64}", "measured{tokens=96}"]
options:
  linear: ["half", "quantize{bits=8,group_size=32,solver=rtn}"]
  embedding: ["half", "half{dtype=bfloat16}"]
allocator: integer_program
budget: {avg_bits: 22}  # the text of a graph this small takes 8 of them
backend: program
calibration: {dataset: calibration.npz, samples: 8, seqlen: 12}
evaluation: {dataset: evaluation.npz, samples: 4, seqlen: 12}
"""

SCRIPT = """
import json, torch
import lwcompile as lw
from lwcompile.pipeline import Settings, session
from lwcompile.tiny import Decoder, token_ids

torch.manual_seed(0)
ids = token_ids(2, 9)
program = lw.capture(Decoder(), {"input_ids": ids}, {"input_ids": {0: "batch", 1: "sequence"}})
result = lw.compress(program, "small", recipe="recipe.yaml")
run = session(program, Settings(recipe="recipe.yaml"))
run.damages
loaded = lw.load("small")
print(json.dumps({
    "kurtosis": {site: score.value for site, score in run.dense.annotations["kurtosis"].items()},
    "plan": {site: [str(spec) for spec in specs] for site, specs in result.plan.choices.items()},
    "bytes": result.program.nbytes(), "dense": program.nbytes(), "measured": result.plan.measured,
    "same": torch.equal(loaded.run(input_ids=ids)["logits"], result.program.main.module()(ids)[0]),
}))
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment's Python that sees this one's packages, with the plugin installed by pip beside them."""
    root = tmp_path_factory.mktemp("environment")
    venv.create(root / "venv", with_pip=False, symlinks=os.name != "nt")
    scripts = "Scripts" if os.name == "nt" else "bin"
    found = root / "venv" / scripts / ("python.exe" if os.name == "nt" else "python")
    own = sysconfig.get_path("purelib", vars={"base": str(root / "venv"), "platbase": str(root / "venv")})
    (Path(own) / "outer.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    source = shutil.copytree(PLUGIN, root / "source", ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__"))
    install = [sys.executable, "-m", "pip", "--python", str(found), "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*install, "--no-index", "--disable-pip-version-check", str(source)], check=True, timeout=300)
    return found


def call(python: Path, *arguments: str, cwd: Path, status: int = 0) -> str:
    """stdout of a run in the environment; stderr if it was to fail."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "LWCOMPILE_RUNS": str(cwd / "runs"), "PYTHONPATH": ""}
    done = subprocess.run([str(python), *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == status, done.stderr
    return done.stdout if status == 0 else done.stderr


@pytest.fixture(scope="module")
def used(python: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the script prints: a model compressed by a recipe that names both of the plugin's passes."""
    folder = tmp_path_factory.mktemp("use")
    generator = np.random.default_rng(0)
    for name, rows in (("calibration", 8), ("evaluation", 4)):
        np.savez(folder / f"{name}.npz", input_ids=generator.integers(0, VOCABULARY, (rows, 12)))
    (folder / "recipe.yaml").write_text(RECIPE)
    return json.loads(call(python, "-c", SCRIPT, cwd=folder))


def test_the_plugin_is_not_installed_here() -> None:
    from lwcompile.registry import plugins

    assert not [p for p in plugins() if p.distribution == "lwcompile-example-plugin"], "the environment is not the tests' own"


def test_its_analysis_runs_from_a_recipe(used: dict[str, Any]) -> None:
    assert len(used["kurtosis"]) == 13
    assert all(value >= 1 for value in used["kurtosis"].values()), "a fourth moment is at least the square of the second"


def test_its_transform_is_planned_priced_and_applied(used: dict[str, Any]) -> None:
    chosen = {spec for specs in used["plan"].values() for spec in specs}
    assert "half" in chosen, used["plan"]
    assert used["bytes"] < used["dense"] / 2 * 1.05
    assert 0 <= used["measured"] < 0.1
    assert used["same"]


def test_the_command_line_lists_it_with_its_distribution(python: Path, tmp_path: Path) -> None:
    out = call(python, "-c", "from lwcompile.cli import main; main()", "passes", "--json", cwd=tmp_path)
    listed = {row["name"]: row["distribution"] for row in json.loads(out)}
    assert listed["kurtosis"] == listed["half"] == "lwcompile-example-plugin"
    assert listed["drop"] == "lwcompile"
