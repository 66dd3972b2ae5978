"""The written package: its groups, its source, its bytes, and that it computes what the graph does, without this project."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from language_models import captured
from onnx_packed import pack
from safetensors.torch import load_file, save_file
from tiny import ids, llama, llama_program

import lwcompile as lw
from lwcompile import cli, pipeline
from lwcompile.backends.triton import backend as backend_module
from lwcompile.backends.triton.backend import Triton
from lwcompile.backends.triton.emit import Function, Stored, write_package
from lwcompile.backends.triton.fusion import find_groups
from lwcompile.backends.triton.parity import run_package
from lwcompile.backends.triton.runtime.decoding import Decoding
from lwcompile.contract import StoredTensor
from lwcompile.decode import derive_decode
from lwcompile.errors import VerificationError
from lwcompile.executor import run
from lwcompile.formats import NumericFormat
from lwcompile.generate import GraphStep, generate
from lwcompile.graph import ModelGraph
from lwcompile.program import Program
from lwcompile.tracing import capture_module

needs_triton = pytest.mark.skipif(
    backend_module.importlib.util.find_spec("triton") is None, reason="the package runs on triton: install lwcompile[triton]"
)
FORMAT = NumericFormat(3, 16)
RECIPE = """
description: a small one
options: {{linear: "quantize{{bits=[3,4],group_size=16,solver=rtn}}", embedding: "quantize{{bits=[3,4],group_size=16,solver=rtn}}"}}
analyses: ["fisher{{tokens=64}}"]
budget: {{avg_bits: 100}}
calibration: {{dataset: {folder}/calibration.safetensors, samples: 16, seqlen: 12}}
evaluation: {{dataset: {folder}/evaluation.safetensors, samples: 8, seqlen: 12}}
"""


def kernels(graph: ModelGraph, dense: bool = False) -> Counter[str]:
    graph = graph.copy()
    graph.propagate()
    return Counter(group.kernel for group in find_groups(graph, dense=dense))


@pytest.fixture(scope="module")
def packed() -> Program:
    """A tiny Llama of two layers: head and embedding of one tensor at 4 bits, the rest at 3, with its decode graph."""
    program = llama_program(layers=2)
    graph = program.entries["forward"]
    pack(graph, FORMAT)
    return Program({"forward": graph, "decode": derive_decode(graph, check=False)}, graph.store, "causal-lm", "tiny")


@pytest.fixture(scope="module")
def written(packed: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("artifact") / "triton_model"
    parity = Triton().lower(packed, path, None)
    assert parity.worst < 1e-5 and set(parity.errors) >= {"forward.logits", "decode.logits", "decode.present.1.value"}
    return path


# --- groups


def test_groups_of_a_llama(packed: Program) -> None:
    """Of each layer: q, k and v as one product, two rotations, attention, o and down with their adds, the gate; norms inside."""
    each = {"linears": 1, "rotary": 2, "attention": 1, "linear": 2, "gated": 1}
    wanted = Counter({name: 2 * n for name, n in each.items()}) + Counter({"embedding": 1, "linear": 1})
    assert kernels(packed.entries["forward"]) == kernels(packed.entries["decode"]) == wanted
    graph = packed.entries["forward"].copy()
    graph.propagate()
    groups = find_groups(graph)
    assert sum("norm" in g.args for g in groups) == 5
    assert sum(g.args.get("residual") is not None for g in groups) == 4
    assert all(g.args["causal"] and g.args["window"] is None for g in groups if g.kernel == "attention")


def test_dense_products_form_groups_only_when_asked() -> None:
    graph = llama_program(layers=2).main
    assert not {"linear", "linears", "gated", "embedding"} & set(kernels(graph))
    assert kernels(graph, dense=True)["gated"] == 2


def test_norms_read_by_others_stand_alone() -> None:
    """Four products of one norm, of which two differ in format, cannot be one product: the norm is computed once, by itself."""
    graph = captured("llama")
    first = next(n for n in graph.graph.nodes if n.target is torch.ops.aten.linear.default)
    pack(graph, FORMAT)
    before = kernels(graph)
    call = next(n for n in graph.graph.nodes if n.name == first.name)
    call.args[1].args = (*call.args[1].args[:4], 32, *call.args[1].args[5:])
    after = kernels(graph)
    assert after["norm"] == before["norm"] + 1 and after["linear"] == before["linear"] + 1


def test_a_window_is_found_in_the_mask() -> None:
    graph = captured("mistral")
    graph.propagate()
    windows = {g.args["window"] for g in find_groups(graph) if g.kernel == "attention"}
    assert windows == {6}


@pytest.mark.parametrize("name", ["gpt2", "gemma3", "phi"])
def test_groups_hold_no_node_that_is_read_outside(name: str) -> None:
    graph = captured(name)
    graph.propagate()
    groups = find_groups(graph, dense=True)
    assert len({n for g in groups for n in g.nodes}) == sum(len(g.nodes) for g in groups), "a node stands in two groups"
    for group in groups:
        for node in set(group.nodes) - set(group.makes):
            assert set(node.users) <= set(group.nodes), f"{node} of {group.kernel} is read outside"


def test_inspect_shows_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llama_program(layers=2).save(tmp_path / "dense")
    assert cli.run(["inspect", str(tmp_path / "dense"), "--fusion"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"forward +gated +2 +5 +with norm, activation", shown), shown
    assert cli.run(["inspect", str(tmp_path / "dense"), "--fusion", "--json"]) == 0
    groups = json.loads(capsys.readouterr().out)["triton"]
    assert Counter(g["kernel"] for g in groups)["attention"] == 2


# --- the package


@needs_triton
def test_the_source_is_python_that_knows_nothing_of_this_project(written: Path) -> None:
    for file in written.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        ast.parse(text)
        assert "lwcompile" not in text, file.name
    source = (written / "graph_decode.py").read_text(encoding="utf-8")
    assert "# --- model.layers.1" in source and "gated(" in source and "dense_linear(" not in source.split("def decode")[1]


@needs_triton
def test_packed_weights_take_the_bytes_that_were_priced(packed: Program, written: Path) -> None:
    held = load_file(written / "weights.safetensors")
    forms = json.loads((written / "model.json").read_text(encoding="utf-8"))["packed"]
    for name in forms:
        rows, width = held[f"{name}.words"].shape[0], forms[name]["in_features"]
        stored = sum(held[f"{name}.{part}"].nbytes for part in ("words", "scale", "zero"))
        assert stored == Triton().price(StoredTensor((rows, width), FORMAT))
    assert sum("self_attn.q_proj" in name for name in forms) == 2 and len(forms) == 2 * 5 + 1


@needs_triton
def test_it_runs_at_other_sizes_and_in_half_precision(packed: Program, written: Path, tmp_path: Path) -> None:
    inputs = {"input_ids": ids(3, 5)}
    wanted = run(packed.main, inputs)["logits"]
    found = run_package(written, [("forward", inputs, [])], tmp_path)[0]["logits"]
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()
    halved = run_package(written, [("forward", inputs, [])], tmp_path, torch.float16)[0]["logits"]
    assert (halved - wanted).abs().max() < 0.02 * wanted.abs().max()


@needs_triton
def test_it_decodes_the_tokens_that_the_graph_does(packed: Program, written: Path, tmp_path: Path) -> None:
    """By the package's own `decode`, step by step from an empty cache."""
    prompt = ids(1, 4)
    wanted = generate(GraphStep(packed.entries["decode"]), prompt, max_new_tokens=3)
    step = GraphStep(packed.entries["decode"])
    _, cache = step(wanted[:, :-1], torch.ones_like(wanted[:, :-1]), torch.arange(6)[None], None)
    described = json.loads((written / "model.json").read_text(encoding="utf-8"))["entries"]["decode"]
    roles = described["roles"]
    named = {roles["tokens"]: wanted[:, -1:], roles["padding"]: torch.ones_like(wanted), roles["positions"]: torch.tensor([[6]])}
    pasts = [i["name"] for i in described["inputs"] if i["name"].startswith("past_key_values.")]
    given = {name: value for name, value in (named | dict(zip(pasts, cache))).items() if name}
    found = run_package(written, [("decode", given, [])], tmp_path)[0]
    logits, longer = step(wanted[:, -1:], torch.ones_like(wanted), torch.tensor([[6]]), cache)
    assert (found["logits"][:, -1] - logits).abs().max() < 1e-5 * logits.abs().max()
    assert (found["present.0.key"] - longer[0]).abs().max() < 1e-5 * longer[0].abs().max()


DECODING = """
import importlib, json, sys, torch
folder, name, lead, new = sys.argv[1:]
sys.path.insert(0, folder)
model = importlib.import_module(name).load("cpu", torch.float32)
mask = (torch.arange(6) >= torch.tensor(json.loads(lead))[:, None]).long()
ids = torch.tensor(json.loads(sys.stdin.read()))
said = {"why": model.why_growing, "errors": [], "tokens": model.generate(ids, int(new), mask).tolist()}
if model.why_growing is None:
    Decoding = importlib.import_module(name + ".decoding").Decoding
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits, cache = model.step(ids, mask, positions, None)
    tokens, positions = logits.argmax(-1, keepdim=True), positions[:, -1:] + 1
    fixed = Decoding(model.advance, cache, 16)
    fixed.start(tokens, mask, positions, cache)
    for held in fixed.caches:
        held[:, :, 6:] = torch.nan
    for _ in range(int(new) - 1):
        mask = torch.cat([mask, torch.ones_like(tokens)], 1)
        logits, cache = model.step(tokens, mask, positions, cache)
        tokens, positions = logits.argmax(-1, keepdim=True), positions + 1
        assert torch.equal(fixed.step(), tokens)
        said["errors"].append(float((fixed.logits - logits).abs().max() / logits.abs().max()))
print(json.dumps(said))
"""


def decoded(package: Path, prompts: torch.Tensor, lead: list[int], new: int) -> dict[str, Any]:
    """What a package generates behind prompts whose rows begin with `lead` columns of padding, in the interpreter."""
    words = [str(package.parent), package.name, json.dumps(lead), str(new)]
    done = subprocess.run(
        [sys.executable, "-c", DECODING, *words], input=json.dumps(prompts.tolist()), capture_output=True, text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"}, cwd=package.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def masked(layers: int) -> ModelGraph:
    """The tiny Llama with a mask and positions, packed."""
    example = {
        "input_ids": ids(2, 9),
        "attention_mask": torch.ones(2, 9, dtype=torch.int64),
        "position_ids": torch.arange(9).expand(2, 9),
    }
    free = {name: {0: "batch", 1: "sequence"} for name in example}
    graph, _ = capture_module(llama(layers=layers), example | {"use_cache": False}, free)
    pack(graph, FORMAT)
    return graph


@needs_triton
@pytest.mark.parametrize("lead", [[0], [0, 2, 4]], ids=["one", "padded"])
def test_caches_written_in_place_decode_as_growing_ones(tmp_path: Path, lead: list[int]) -> None:
    """The same logits as by `step`, whatever lies in the room that is left, and the tokens that the graph makes."""
    graph = masked(2)
    decode = derive_decode(graph, check=False)
    write_package(Program({"forward": graph, "decode": decode}, graph.store, "causal-lm", "tiny"), tmp_path / "packed")
    prompts, mask = ids(len(lead), 6), (torch.arange(6) >= torch.tensor(lead)[:, None]).long()
    found = decoded(tmp_path / "packed", prompts, lead, 5)
    assert found["why"] is None and len(found["errors"]) == 4 and max(found["errors"]) < 1e-5
    assert found["tokens"] == generate(GraphStep(decode), prompts, mask, max_new_tokens=5).tolist()


@needs_triton
def test_where_positions_are_counted_from_the_cache_it_grows(packed: Program, written: Path) -> None:
    found = decoded(written, ids(1, 6), [0], 3)
    assert re.fullmatch(r"\w+ reads past_key_values_0_key, which is as long as the sequence", found["why"])
    assert found["tokens"] == generate(GraphStep(packed.entries["decode"]), ids(1, 6), max_new_tokens=3).tolist()


def test_caches_that_roll_grow() -> None:
    decode = derive_decode(captured("mistral"), check=False)
    decode.propagate()
    function = Function(decode, Stored())
    source = function.source("decode", "tiny")
    assert function.growing == "past_key_values.0.key is more than appended to" and "append(" not in source


@pytest.mark.skipif(torch.cuda.is_available(), reason="a graph can be made here")
def test_a_step_that_becomes_no_graph_is_said_and_taken_call_by_call() -> None:
    def advance(tokens: torch.Tensor, *_: object) -> tuple[torch.Tensor, list[torch.Tensor]]:
        return torch.nn.functional.one_hot((tokens[:, 0] + 1) % 9, 9).float(), []

    decoding = Decoding(advance, [torch.empty(2, 1, 0, 4)], 8)
    with pytest.warns(UserWarning, match="no CUDA graph of a decoding step"):
        decoding._replay = decoding._captured()
    decoding.start(torch.tensor([[3], [5]]), torch.ones(2, 1), torch.ones(2, 1), [torch.zeros(2, 1, 1, 4)])
    assert [decoding.step().tolist() for _ in range(2)] == [[[4], [6]], [[5], [7]]] and decoding.places.item() == 3


@needs_triton
def test_a_package_that_differs_is_not_left_behind(packed: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = backend_module.run_package

    def wrong(*given: object) -> list:
        return [{name: value * 1.01 for name, value in found.items()} for found in real(*given)]  # type: ignore[arg-type]

    monkeypatch.setattr(backend_module, "run_package", wrong)
    with pytest.raises(VerificationError, match=r"forward\.logits is .* away from the graph's"):
        Triton().lower(Program({"forward": packed.main}, packed.store), tmp_path / "triton_model", None)
    assert not list(tmp_path.iterdir())


def test_without_triton_it_says_what_to_install(packed: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_module.importlib.util, "find_spec", lambda name: None)
    assert Triton().unsupported(packed) == ["the package triton is not installed: pip install 'lwcompile[triton]'"]


@needs_triton
def test_export_makes_the_folder_loadable(tmp_path: Path) -> None:
    """A backend that writes a folder is given the folder around it: `export DIR --backend triton`."""
    save_file({"input_ids": ids(48, 12)}, tmp_path / "calibration.safetensors")
    save_file({"input_ids": ids(24, 12, seed=5)}, tmp_path / "evaluation.safetensors")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(folder=tmp_path), encoding="utf-8")
    result = pipeline.export(
        llama_program(layers=1), tmp_path / "out", recipe=recipe, backend="triton", run_dir=tmp_path / "run"
    )  # fmt: skip
    assert result.path is not None and result.path == tmp_path / "out" / "triton_model"
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text(encoding="utf-8"))
    assert (manifest["backend"], manifest["model"]) == ("triton", "triton_model")
    assert {"triton_model/graph_forward.py", "triton_model/kernels/linear.py", "plan.yaml"} <= set(manifest["files"])
    assert result.report.data["bytes"]["file"] > (result.path / "weights.safetensors").stat().st_size
    assert "no GPU" in manifest["parity"]["note"] or torch.cuda.is_available()
    artifact = lw.load(tmp_path / "out")
    assert artifact.manifest["model"] == "triton_model"
