"""Directories that transformers loads by itself: against the program that they were written from."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lwcompile import pipeline
from lwcompile.backends.hf.backend import HuggingFace
from lwcompile.backends.hf.layers import renumber
from lwcompile.budget import Budget
from lwcompile.contract import StoredTensor
from lwcompile.errors import BadPlan, InfeasibleBudget, Refused
from lwcompile.executor import Executor
from lwcompile.formats import NumericFormat
from lwcompile.plans import Plan
from lwcompile.program import Program
from lwcompile.recipe import Recipe
from lwcompile.spec import Spec

transformers = pytest.importorskip("transformers", reason="install lwcompile[hf]")
pytest.importorskip("compressed_tensors", reason="install lwcompile[hf]")

RECIPE = Recipe.parse(
    """
analyses: ["fisher{tokens=32}", "measured{only=drop,tokens=32}"]
options:
  linear: ["quantize{bits=[3,4,8],group_size=16,symmetric=true,solver=rtn}", "quantize{bits=4,group_size=none,symmetric=true,solver=rtn}"]
  block: [drop]
  attention: [drop]
calibration: {dataset: random, samples: 4}
evaluation: {samples: 4}
"""
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=67, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("qwen3")
    transformers.Qwen3ForCausalLM(config).eval().save_pretrained(folder)
    return folder


def exported(source: Path, folder: Path, choices: dict[str, str]) -> tuple[Any, Program]:
    plan = Plan({id: tuple(map(Spec.parse, line.split(" + "))) for id, line in choices.items()}, Budget())
    result = pipeline.export(
        pipeline.capture(source), folder / "out", recipe=RECIPE, backend="hf", plan=plan, run_dir=folder / "run"
    )
    return result, result.program


MIXED = {
    "block0.attention.q_proj": "quantize{bits=3,group_size=16,symmetric=true,solver=rtn}",
    "block0.attention.k_proj": "quantize{bits=3,group_size=16,symmetric=true,solver=rtn}",
    "block0.attention.v_proj": "quantize{bits=3,group_size=16,symmetric=true,solver=rtn}",
    "block0.mlp.down_proj": "quantize{bits=8,group_size=16,symmetric=true,solver=rtn}",
    "block1": "drop",
    "block2.mlp.down_proj": "quantize{bits=4,group_size=none,symmetric=true,solver=rtn}",
    "head": "quantize{bits=4,group_size=16,symmetric=true,solver=rtn}",
}


def test_transformers_alone_loads_a_mixed_plan_with_a_block_left_out(source, tmp_path):
    result, program = exported(source, tmp_path, MIXED)
    assert result.report.data["parity"]["errors"] == {"logits": pytest.approx(0, abs=1e-5)}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 2
    ids = torch.randint(0, 67, (3, 9), generator=torch.Generator().manual_seed(1))
    torch.save({"input_ids": ids}, tmp_path / "ids.pt")
    code = (
        "import sys, torch, transformers\n"
        "folder, ids, made = sys.argv[1:]\n"
        "ids = torch.load(ids, weights_only=True)['input_ids']\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()\n"
        "with torch.no_grad():\n"
        "    torch.save({'logits': model(ids).logits, 'tokens': model.generate(ids, max_new_tokens=4, do_sample=False)}, made)\n"
        "assert 'lwcompile' not in sys.modules\n"
    )
    line = [sys.executable, "-c", code, str(tmp_path / "out"), str(tmp_path / "ids.pt"), str(tmp_path / "made.pt")]
    subprocess.run(line, check=True, cwd=tmp_path, capture_output=True)
    made = torch.load(tmp_path / "made.pt", weights_only=True)
    with torch.no_grad():
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": torch.arange(9).expand(3, 9)}
        wanted = Executor(program).run({i.name: inputs[i.name] for i in program.main.inputs})["logits"]
    torch.testing.assert_close(made["logits"], wanted, rtol=1e-4, atol=1e-5)
    assert made["tokens"].shape == (3, 13)


def test_the_planned_bytes_are_the_files(source, tmp_path):
    result, _ = exported(source, tmp_path, MIXED)
    file = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert abs(result.plan.bytes - file) < 0.1 * file  # the header's names


def test_half_a_block_is_refused_before_anything_is_solved(source, tmp_path):
    with pytest.raises(Refused, match=r"model\.layers\.1 lacks .*only whole blocks"):
        exported(source, tmp_path, {"block1.attention": "drop"})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("tensor", "why"),
    [
        (StoredTensor((8, 32), NumericFormat(4, 16, "integer")), "zero points"),
        (StoredTensor((8, 32), NumericFormat(4, 24, "none")), "does not divide 32"),
        (StoredTensor((8, 32), NumericFormat(4, 16, "none"), role="embedding"), "embeddings"),
    ],
)
def test_what_the_format_cannot_hold_is_no_option(tensor, why):
    with pytest.raises(Refused, match=why):
        HuggingFace().price(tensor)


@pytest.mark.parametrize(
    ("site", "option", "why"),
    [
        ("embedding", "quantize{bits=4,group_size=16,symmetric=true,solver=rtn}", "does not load quantized embeddings"),
        ("block0.mlp.down_proj", "quantize{bits=4,group_size=16,solver=rtn}", "does not load packed zero points"),
        ("block*.mlp.down_proj", "quantize{bits=4,group_size=16,solver=rtn}", "does not load packed zero points"),
    ],
)
def test_a_plan_of_what_the_format_cannot_hold_says_so(source, tmp_path, site, option, why):
    """The recipe does not offer it, and the reader of that alone would offer it."""
    with pytest.raises(BadPlan, match=f"hf cannot hold it: .*{why}"):
        exported(source, tmp_path, {site: option})
    with pytest.raises(BadPlan, match="is not offered") as caught:
        exported(source, tmp_path, {"block0.mlp.down_proj": "quantize{bits=5,group_size=16,symmetric=true,solver=rtn}"})
    assert "cannot hold" not in str(caught.value)


def test_a_model_without_a_configuration_is_refused(tmp_path):
    from tiny import llama_program

    with pytest.raises(Refused, match=r"config\.json"):
        pipeline.export(llama_program(), tmp_path / "out", recipe=RECIPE, backend="hf", run_dir=tmp_path / "run")


def test_lists_with_an_entry_a_layer_are_cut_with_the_layers():
    expected = [f"layers.{i}.{part}.weight" for i in range(4) for part in "ab"]
    stored = [name for name in expected if not name.startswith("layers.2.")]
    config = {"num_hidden_layers": 4, "layer_types": ["w", "x", "y", "z"], "width": 4}
    made, names = renumber(config, expected, stored)
    assert made == {"num_hidden_layers": 3, "layer_types": ["w", "x", "z"], "width": 4}
    assert names["layers.3.a.weight"] == "layers.2.a.weight" and names["layers.1.b.weight"] == "layers.1.b.weight"
    with pytest.raises(Refused, match="no place"):
        renumber(config, expected, [*expected, "layers.0.a.low_rank"])


def test_a_budget_that_cannot_be_met_says_what_was_refused(source, tmp_path):
    recipe = RECIPE.with_(options={"linear": [Spec.parse("quantize{bits=4,group_size=16,solver=rtn}")]}, budget={"avg_bits": 8})
    with pytest.raises(
        InfeasibleBudget, match=r"the smallest plan is .* options were refused, \d+ of them because .*zero points"
    ):
        pipeline.export(pipeline.capture(source), tmp_path / "out", recipe=recipe, backend="hf", run_dir=tmp_path / "run")
