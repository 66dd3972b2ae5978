"""The real models, where their wheels can be had: dropping against modules edited by hand, and files run by plain onnxruntime."""

from __future__ import annotations

import copy
import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from test_drop import Nothing, Same, drop, outputs_differ
from torch import Tensor

from lwcompile import cli, demo, pipeline
from lwcompile.errors import BadInput
from lwcompile.executor import Executor
from lwcompile.plans import Plan
from lwcompile.program import Program
from lwcompile.sources import Source, open_source
from lwcompile.spec import Spec

pytest.importorskip("transformers", reason="the models are transformers': install lwcompile[hf]")

WHEELS: dict[str, Any] = {"smollm2": demo.demo_model, "minilm": demo.demo_encoder, "dinov2": demo.demo_vision}
RECIPE = pipeline.Settings(recipe="fast").resolved().with_(
    analyses=[Spec.parse("fisher{tokens=512}")],
    options={"linear": [Spec.parse("quantize{bits=[4,8],group_size=64,solver=rtn}")]},
    budget={"avg_bits": 20}, calibration={"samples": 32, "seqlen": 16},
)  # fmt: skip


def _path(name: str) -> Path:
    try:
        return WHEELS[name]()
    except BadInput as error:
        pytest.skip(str(error))


@cache
def _opened(name: str) -> Source:
    return open_source(_path(name), image_size=84) if name == "dinov2" else open_source(_path(name))


def real(name: str) -> Source:
    """A copy, whose module a test may edit: reading a file takes as long as many tests."""
    return copy.deepcopy(_opened(name))


@cache
def real_program(name: str) -> Program:
    """For tests that leave it as it is; captured by whichever process comes first."""
    folder = Path(os.environ["LWCOMPILE_TESTS"]) / name
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            source = _opened(name) if name == "dinov2" else _path(name)  # from its folder, with the tokenizer
            pipeline.capture(source).save(folder)
    return Program.load(folder)


def example(source: Source, rows: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    if "pixel_values" in source.example_kwargs:
        return {"pixel_values": torch.randn(rows, 3, 84, 84, generator=generator)}
    ids = torch.randint(5, 20000, (rows, 24), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    return {"input_ids": ids, "attention_mask": mask}


def by_hand(name: str, model: Any, attention: int, mlp: int) -> None:
    """Take the attention of one layer and the MLP of another out of the module."""
    if name == "smollm2":
        model.model.layers[attention].self_attn, model.model.layers[mlp].mlp = Nothing(2), Nothing()
    elif name == "minilm":
        model.encoder.layer[attention].attention = Same(2)
        model.encoder.layer[mlp].feed_forward_chunk = lambda attention_output: attention_output
    else:
        layers: Any = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 12)
        tuple_ = isinstance(layers[attention].attention(torch.randn(1, 4, model.config.hidden_size)), tuple)
        layers[attention].attention, layers[mlp].mlp = Nothing(2 if tuple_ else 1), Nothing()


@pytest.mark.parametrize("name", WHEELS)
def test_dropping_equals_the_real_module_with_it_removed(name):
    source = real(name)
    program, inputs = real_program(name), example(source)
    dropped = drop(program, ["block4.attention", "block2.mlp"])
    assert isinstance(source.model, torch.nn.Module)
    by_hand(name, source.model, 4, 2)
    given = {**inputs, "use_cache": False} if name == "smollm2" else inputs
    assert outputs_differ(dropped, source.model, _in_order(dropped, given)) < 1e-5
    assert outputs_differ(program, source.model, _in_order(program, given)) > 1e-4


def _in_order(program: Program, given: dict[str, Any]) -> dict[str, Any]:
    missing = [i.name for i in program.main.inputs if i.name not in given]
    extra = {name: torch.zeros_like(given["input_ids"]) for name in missing}  # token types
    return {**given, **extra}


@pytest.mark.parametrize("name", ["minilm", "dinov2"])
def test_a_real_encoder_comes_back_from_its_file(name, tmp_path):
    """Weights at 4 and 8 bits, run by plain onnxruntime at shapes that were not traced, against the program."""
    ort = pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    source = real(name)
    program = real_program(name)
    inputs, recipe = example(source, rows=3), RECIPE
    if name == "dinov2":
        from safetensors.torch import save_file

        for part, seed in (("calibration", 0), ("evaluation", 1)):
            noise = torch.randn(64, 3, 84, 84, generator=torch.Generator().manual_seed(seed))
            save_file({"pixel_values": noise}, tmp_path / f"{part}.safetensors")
            recipe = recipe.with_(**{part: {"dataset": str(tmp_path / f"{part}.safetensors"), "samples": 32}})
    exact = "onnx{activations=float32}"
    result = pipeline.export(program, tmp_path / "out" / "model.onnx", recipe=recipe, backend=exact, run_dir=tmp_path / "run")
    assert result.path is not None and result.report.data["parity"]["errors"]
    onnx.checker.check_model(str(result.path))
    run = ort.InferenceSession(str(result.path), providers=["CPUExecutionProvider"])
    feeds = {i.name: _in_order(program, inputs)[i.name].numpy() for i in run.get_inputs()}
    with torch.no_grad():
        wanted = Executor(result.program).run(_in_order(program, inputs))
    for output, made in zip(run.get_outputs(), run.run(None, feeds)):
        reference = wanted[output.name].numpy()
        assert np.abs(made - reference).max() < 1e-4 * np.abs(reference).max()
    assert {p.name for p in Path(tmp_path / "out").iterdir()} >= {
        "model.onnx",
        "manifest.json",
        "README.md",
        "LICENSE",
        "plan.yaml",
    }


def test_chat_compares_the_real_compressed_model_with_the_dense_one(tmp_path, capsys):
    """The dense answer is transformers' own, the compressed one is what `generate` says, and the first difference is theirs."""
    source, path = real("smollm2"), str(WHEELS["smollm2"]())
    coarse = (Spec.parse("quantize{bits=2,group_size=64,solver=rtn}"),)
    plan = Plan({f"block{i}.mlp.down_proj": coarse for i in range(0, 30, 3)})
    recipe = RECIPE.with_(analyses=[Spec.parse("fisher{tokens=64}")], options=dict(plan.choices), evaluation={"samples": 4})
    pipeline.compress(real_program("smollm2"), tmp_path / "small", plan=plan, recipe=recipe, run_dir=tmp_path / "run")
    line = ["chat", str(tmp_path / "small"), "--compare", path, "--prompt", "What is a compiler?", "--max-tokens", "12", "--json"]
    assert cli.run(line) == 0
    said = json.loads(capsys.readouterr().out)
    small, dense = (row["tokens"] for row in said["replies"])
    loaded = pipeline.load(tmp_path / "small")
    template = [{"role": "user", "content": "What is a compiler?"}]
    text = loaded.tokenizer.apply_chat_template(template, add_generation_prompt=True, tokenize=False)
    ids = loaded.tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    model: Any = source.model
    assert dense == model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :].tolist()
    assert small == loaded.generate(ids, max_new_tokens=12)[0, ids.shape[1] :].tolist()
    assert small != dense, "the plan changed no token, so the comparison shows nothing"
    assert said["diverges_at"] == next((k for k, (a, b) in enumerate(zip(small, dense)) if a != b), None)
