"""The MLIR backend: packed weights spelled out, whole models run by IREE, and deaths of the converter that name their operator."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor, fx, nn

from lwcompile import cli
from lwcompile.backends.mlir import backend as backend_module
from lwcompile.backends.mlir import child
from lwcompile.backends.mlir.backend import Mlir
from lwcompile.backends.mlir.plain import plain
from lwcompile.cli.make import with_target
from lwcompile.context import Context
from lwcompile.contract import StoredTensor
from lwcompile.decode import derive_decode
from lwcompile.errors import BadInput, BadPlan, Refused, VerificationError
from lwcompile.formats import NumericFormat, QuantizedTensor
from lwcompile.generate import GraphStep, generate
from lwcompile.graph import ModelGraph, iterate_calls
from lwcompile.passes.solve.rtn import Rtn
from lwcompile.program import Program
from lwcompile.registry import make
from lwcompile.store import ParameterStore
from lwcompile.tracing import capture_module

aten = torch.ops.aten
MIX = [
    NumericFormat(4, 16),
    NumericFormat(3, 8, "float"),
    NumericFormat(2, 32, "none"),
    NumericFormat(5, 24),
    NumericFormat(6, None),
    NumericFormat(8, 16, "none"),
]
TOLERANCE = 2e-6

converts = pytest.mark.skipif(
    not child.installed("torch_mlir"), reason="torch-mlir is not installed: pip install lwcompile[mlir]"
)
runs = pytest.mark.skipif(
    not (child.installed("torch_mlir") and child.installed("iree.compiler") and child.installed("iree.runtime")),
    reason="torch-mlir and IREE are needed: pip install lwcompile[mlir,iree]",
)


def program(graph: ModelGraph, **entries: ModelGraph) -> Program:
    return Program({"forward": graph, **entries}, graph.store, "causal-lm", "tiny")


def traced(function: Callable[[Tensor], Tensor], x: Tensor) -> Program:
    class Module(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return function(x)

    return program(capture_module(Module(), {"x": x}, {"x": {0: "batch"}})[0])


def packed(weight: Tensor, format: NumericFormat) -> dict[str, Tensor]:
    return Rtn(steps=1, refits=0).solve(weight, format, None).pack()


def dequantize(graph: ModelGraph, name: str, weight: Tensor, format: NumericFormat) -> fx.Node:
    """Packed tensors of a weight and the operator that reads them, at the insert point."""
    parts = packed(weight, format)
    reads = [graph.get_attr(f"{name}.{p}", parts[p]) if p in parts else None for p in ("codes", "scale", "zero")]
    args = (*reads, format.bits, format.group(weight.shape[1]), weight.shape[1])
    return graph.graph.call_function(torch.ops.lwcompile.dequantize.default, args)


def pack(graph: ModelGraph, formats: list[NumericFormat]) -> None:
    """Each linear's and embedding's weight in the next of the formats; tied ones share theirs."""
    chosen: dict[str, NumericFormat] = {}
    for node in list(iterate_calls(graph, aten.linear.default, aten.embedding.default)):
        place = 1 if node.target is aten.linear.default else 0
        read = node.args[place]
        assert isinstance(read, fx.Node)
        key = graph.tensors[str(read.target)]
        format = chosen.setdefault(key, formats[len(chosen) % len(formats)])
        with graph.graph.inserting_before(node):
            weight = dequantize(graph, str(read.target), graph.tensor(str(read.target)), format)
        node.args = (*node.args[:place], weight, *node.args[place + 1 :])
    graph.prune()
    graph.propagate()


# --- packed weights in plain operators


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("zero_point", ["none", "integer", "float"])
def test_plain_operators_unpack_to_the_last_bit(bits: int, zero_point, monkeypatch):
    generator = torch.Generator().manual_seed(bits)
    for columns in (1, 7, 16, 33, 100):
        for group in (None, 8, 64):
            format = NumericFormat(bits, group, zero_point)
            weight = torch.randn(5, columns, generator=generator)
            graph = ModelGraph(fx.Graph(), {}, ParameterStore(), [], ["w"])
            graph.graph.output((dequantize(graph, "w", weight, format),))
            graph.propagate()
            spelled = plain(graph)
            wanted = QuantizedTensor.unpack(format, weight.shape, packed(weight, format)).dequantize()
            assert torch.equal(spelled.module()()[0], wanted), (format, columns)
            assert spelled.level() == "captured"


def test_plain_operators_do_no_arithmetic_in_eight_bits():
    graph = tiny.llama_program().main.copy()
    pack(graph, [NumericFormat(3, 8), NumericFormat(8, None)])
    for node in plain(graph).graph.nodes:
        narrow = [n for n in node.all_input_nodes if getattr(n.meta.get("val"), "dtype", None) in (torch.int8, torch.uint8)]
        assert not narrow or node.target is aten._to_copy.default


def test_a_weight_that_two_read_is_unpacked_once():
    graph = tiny.llama_program(tied=True).main.copy()
    pack(graph, [NumericFormat(4, 16)])
    reads = len(list(iterate_calls(graph, torch.ops.lwcompile.dequantize.default)))
    ands = len(list(iterate_calls(plain(graph), aten.bitwise_and.Scalar)))
    assert ands == 2 * (reads - 1)  # codes and zero points of each, the embedding's and the head's together


# --- whole models, run by IREE


@runs
def test_a_packed_language_model_decodes_as_its_graph_does(tmp_path: Path):
    """Six widths, odd groups, free sizes, both functions in one module over one set of weights."""
    graph = tiny.llama_program(tied=True, layers=1).main.copy()
    pack(graph, MIX)
    decode = derive_decode(graph)
    whole = program(graph, decode=decode)
    ctx = Context(calibration=tiny.calibration())
    parity = Mlir().lower(whole, tmp_path / "model.vmfb", ctx)
    assert set(parity.errors) == {"forward.logits", *(f"decode.{o}" for o in decode.outputs)}
    assert parity.worst < TOLERANCE and "IREE" in parity.note and not ctx.remarks
    described = json.loads((tmp_path / "model.vmfb.json").read_text())
    assert described["forward"] == {
        "inputs": [{"name": "input_ids", "dtype": "int64", "shape": ["batch", "sequence"]}],
        "outputs": ["logits"],
    }
    ids = tiny.ids(3, 7)
    got = Mlir().run(tmp_path / "model.vmfb", {"input_ids": ids})["logits"]
    wanted = graph.module()(ids)[0]
    assert (got - wanted).abs().max() < TOLERANCE * wanted.abs().max()
    made = generate(Mlir().decode_step(tmp_path / "model.vmfb"), ids, max_new_tokens=6)
    assert torch.equal(made, generate(GraphStep(decode), ids, max_new_tokens=6))


@runs
def test_a_large_weight_is_unpacked_when_the_file_is_loaded(tmp_path: Path):
    """IREE by itself leaves in the function what grows by more than a megabyte."""
    from iree.compiler import tools

    table = nn.Embedding(3000, 256)
    graph = capture_module(table, {"input": torch.randint(0, 99, (2, 16))}, {})[0]
    pack(graph, [NumericFormat(4, 64)])
    Mlir().lower(program(graph), tmp_path / "model.mlir", None)
    stage = [*backend_module.IREE_FLAGS, "--iree-llvmcpu-target-cpu=generic", "--compile-to=dispatch-creation"]
    made = tools.compile_file(str(tmp_path / "model.mlir"), extra_args=stage)
    assert made is not None and b"util.global private @__hoisted_tensor_3000x4x64xf32" in made


def encoder(family: str) -> tuple[nn.Module, dict[str, Tensor], dict]:
    import transformers

    torch.manual_seed(0)
    widths = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    options = {"vocab_size": 99} if family == "Bert" else {"image_size": 32, "patch_size": 8}
    model = getattr(transformers, f"{family}Model")(getattr(transformers, f"{family}Config")(**widths, **options)).eval()
    if family == "ViT":
        return model, {"pixel_values": torch.randn(2, 3, 32, 32)}, {"pixel_values": {0: "batch"}}
    ids = torch.randint(2, 90, (2, 16))
    example = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return model, example, {name: {0: "batch", 1: "sequence"} for name in example}


@runs
@pytest.mark.parametrize("family", ["Bert", "ViT"])
def test_encoders_keep_their_outputs_at_other_sizes(family: str, tmp_path: Path):
    model, example, dynamic = encoder(family)
    graph, _ = capture_module(model, example, dynamic)
    assert Mlir().lower(program(graph), tmp_path / "model.vmfb", None).worst < TOLERANCE
    other = {k: torch.cat([v, v.flip(0)[:1]]) for k, v in example.items()}
    if family == "Bert":
        other = {k: v[:, :11].contiguous() for k, v in other.items()}
        other["attention_mask"][0, :4] = 0
    got = Mlir().run(tmp_path / "model.vmfb", other)["last_hidden_state"]
    with torch.no_grad():
        wanted = model(**other).last_hidden_state
    assert (got - wanted).abs().max() < 1e-5 * wanted.abs().max()


# --- the command line


@runs
def test_the_command_line_writes_a_packed_module_whose_bytes_are_as_priced(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.llama_program(layers=1).save(tmp_path / "dense")
    (tmp_path / "recipe.yaml").write_text(
        "analyses: ['fisher{tokens=64}']\n"
        "options: {linear: 'quantize{bits=[3,4],group_size=16,solver=rtn}'}\n"
        "budget: {bytes: 200000}\n"
        "calibration: {dataset: random, samples: 4, seqlen: 8}\nevaluation: {dataset: random, samples: 4, seqlen: 8}\n"
    )
    line = [
        "export",
        "out/model.mlir",
        "--target",
        "iree",
        "--model",
        "dense",
        "--recipe",
        "recipe.yaml",
        "--run-dir",
        "run",
        "--json",
    ]
    assert cli.run(line) == 0, capsys.readouterr().err
    said = json.loads(capsys.readouterr().out)
    assert said["parity"]["errors"] and max(said["parity"]["errors"].values()) < TOLERANCE
    assert (tmp_path / "out" / "model.vmfb").stat().st_size == pytest.approx(said["bytes"]["planned"], rel=0.15)
    assert (tmp_path / "out" / "model.mlir").read_bytes().startswith(b"ML\xefR")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["backend"] == "mlir" and {"model.mlir", "model.mlir.json"} <= manifest["files"].keys()
    assert Mlir().run(tmp_path / "out" / "model.vmfb", {"input_ids": tiny.ids(2, 5)})["logits"].shape == (2, 5, tiny.VOCABULARY)
    remarks = json.loads(next((tmp_path / "run").rglob("report.json")).read_text())["remarks"]
    assert any("linear: IREE, of linalg by torch-mlir" in r["text"] and r["kind"] == "note" for r in remarks)
    assert str(tmp_path).encode() not in (tmp_path / "out" / "model.mlir").read_bytes()
    assert b"/lwcompile/" not in (tmp_path / "out" / "model.mlir").read_bytes()


# --- what is written, and what is not


@converts
def test_text_and_bytecode_hold_the_weights_and_a_missing_iree_is_said(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(backend_module, "installed", lambda module: module == "torch_mlir")
    weight = torch.randn(256, 256)
    whole = traced(lambda x: torch.nn.functional.linear(x, weight), torch.randn(2, 256))
    for form, factor in (("bytecode", 1), ("text", 2)):
        backend = Mlir(form=form)  # type: ignore
        parity = backend.lower(whole, tmp_path / f"{form}.mlir", None)
        assert parity.errors == {} and "nothing was run" in parity.note and parity.worst != parity.worst
        size, stored = (tmp_path / f"{form}.mlir").stat().st_size, backend.price(StoredTensor((256, 256)))
        assert stored == factor * weight.nbytes <= size < stored + backend.overhead(whole) + 4096
    text = (tmp_path / "text.mlir").read_text()
    assert "func.func @forward(%arg0: tensor<?x256xf32>) -> tensor<?x256xf32>" in text and "linalg.matmul" in text
    assert sorted(f.name for f in tmp_path.iterdir()) == [f"{f}.mlir{s}" for f in ("bytecode", "text") for s in ("", ".json")]


@runs
def test_a_wrong_result_leaves_no_file(tmp_path: Path, monkeypatch):
    def off(graph: ModelGraph) -> ModelGraph:
        made = plain(graph)
        for node in list(iterate_calls(made, aten.tanh.default)):
            node.target = aten.sigmoid.default
        return made

    monkeypatch.setattr(backend_module, "plain", off)
    with pytest.raises(VerificationError, match=r"output0 is .* away from the graph's"):
        Mlir().lower(traced(torch.tanh, torch.randn(2, 8)), tmp_path / "model.mlir", None)
    assert list(tmp_path.iterdir()) == []


@converts
def test_an_operator_that_kills_the_converter_is_named_with_its_place():
    class Inner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x.to(torch.uint8) % 16).float()

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.deadly = Inner()

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.deadly(torch.tanh(x)))

    whole = program(capture_module(Outer(), {"x": torch.randn(4, 8)}, {"x": {0: "batch"}})[0])
    (reason,) = Mlir().unsupported(whole)
    assert reason.startswith("forward: deadly: node remainder") and "SIGSEGV" in reason and "aten.remainder" in reason


@converts
def test_an_operator_that_does_not_lower_is_named():
    (reason,) = Mlir().unsupported(traced(lambda x: torch.fft.rfft(x).abs(), torch.randn(4, 8)))
    assert "does not lower aten." in reason and ".py" not in reason


@converts
def test_an_operator_of_ours_is_named_before_what_torch_mlir_stumbles_over(tmp_path: Path):
    """Beside it even a layer_norm is refused, which converts without it."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.maps = nn.LayerNorm(6), nn.Parameter(torch.randn(4, 7, 3))
            self.kernel = nn.Parameter(torch.randn(24, 1, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(torch.ops.lwcompile.relu_attention(x, x, x, None, self.maps, self.maps, self.kernel, 0, 0))

    whole = program(capture_module(Model().eval(), {"x": torch.randn(2, 4, 12, 6)}, {"x": {0: "batch"}})[0])
    reasons = Mlir().unsupported(whole)
    assert reasons == [
        "forward: node relu_attention: lwcompile::relu_attention is an operator of ours that torch-mlir cannot take; leave it out of "
        "the plan, or export to a backend that runs it (`lwcompile inspect --executors` says who does)"
    ]
    with pytest.raises(Refused, match="lwcompile::relu_attention is an operator of ours"):
        Mlir().lower(whole, tmp_path / "model.mlir", None)
    assert Mlir().executors(whole.main) == {
        "relu_attention": "nobody: it is refused",
        "layer_norm": "IREE, of linalg by torch-mlir",
    }


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="what a process maps is read from /proc")
def test_the_converter_does_not_map_the_whole_file_for_each_weight(tmp_path: Path):
    """Its limit of memory counts every map whole: 272 weights of SmolLM2 were 272 times the file."""
    from lwcompile.backends.mlir.worker import _Traced

    tiny.llama_program(layers=1).save(tmp_path)
    traced = _Traced(Program.load(tmp_path).main)
    assert len(list(traced.buffers())) > 5
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


@converts
def test_a_job_that_takes_too_long_is_ended(tmp_path: Path):
    with pytest.raises(child.Died, match="took more than 0 s while starting"):  # no machine is fast enough to end in none
        child.Child(tmp_path, seconds=0).run("convert", out=None, form="text")


def test_a_missing_extra_is_named_before_the_work(monkeypatch):
    monkeypatch.setattr(child, "installed", lambda module: False)
    with pytest.raises(BadInput, match=r"torch_mlir is not installed; pip install 'lwcompile\[mlir\]'"):
        Mlir().unsupported(tiny.llama_program())
    monkeypatch.setattr(child, "installed", lambda module: module == "torch_mlir")
    with pytest.raises(BadInput, match=r"iree.compiler is not installed; pip install 'lwcompile\[iree\]'"):
        Mlir(target="iree").unsupported(tiny.llama_program())


def test_words_that_do_not_fit_are_refused(tmp_path: Path):
    with pytest.raises(BadPlan, match="target"):
        make("backends", "mlir{target=cuda}")
    with pytest.raises(BadPlan, match="seconds"):
        make("backends", "mlir{seconds=0}")
    with pytest.raises(BadInput, match="the backend onnx has no targets"):
        with_target(tmp_path / "model.onnx", None, "iree")
    with pytest.raises(BadInput, match="--target: mlir: option 'target' wants one of linalg, iree, and got 'tpu'"):
        with_target(tmp_path / "model.mlir", None, "tpu")
    with pytest.raises(Refused, match="not to run"):
        Mlir().run(tmp_path / "model.mlir", {})
