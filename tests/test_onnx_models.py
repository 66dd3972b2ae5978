"""Whole models through the ONNX backend: parity with the graph, dense and packed, at several sizes and from a cache."""

from __future__ import annotations

from pathlib import Path

import language_models
import numpy as np
import onnx
import onnxruntime as ort
import psutil
import pytest
import torch
from onnx_packed import pack, plain_session
from torch import Tensor, nn

from lwcompile.backends.onnx.backend import Onnx
from lwcompile.decode import derive_decode
from lwcompile.errors import VerificationError
from lwcompile.formats import NumericFormat
from lwcompile.generate import GraphStep, generate
from lwcompile.graph import ModelGraph
from lwcompile.program import Program
from lwcompile.tracing import capture_module

TOLERANCE = 2e-5


def program(graph: ModelGraph, **entries: ModelGraph) -> Program:
    return Program({"forward": graph, **entries}, graph.store, "causal-lm", "tiny")


def encoder(family: str, **options) -> tuple[nn.Module, dict[str, Tensor], dict]:
    import transformers

    torch.manual_seed(0)
    model = getattr(transformers, f"{family}Model")(getattr(transformers, f"{family}Config")(**options)).eval()
    if "image_size" in options:
        return model, {"pixel_values": torch.randn(2, 3, 32, 32)}, {"pixel_values": {0: "batch"}}
    ids = torch.randint(2, 90, (2, 16))
    example = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return model, example, {name: {0: "batch", 1: "sequence"} for name in example}


WIDTHS = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
IMAGES = {**WIDTHS, "image_size": 32, "patch_size": 8}
ENCODERS = {
    "Bert": {**WIDTHS, "vocab_size": 99},
    "Roberta": {**WIDTHS, "vocab_size": 99, "max_position_embeddings": 66},
    "DebertaV2": {**WIDTHS, "vocab_size": 99, "relative_attention": True, "pos_att_type": ["p2c"], "position_buckets": 8},
    "ViT": IMAGES,
    "Dinov2": {**IMAGES, "mlp_ratio": 2},
    "CLIPVision": IMAGES,
}


@pytest.mark.parametrize("name", language_models.NAMES)
def test_language_models_keep_their_logits(name: str, tmp_path: Path):
    graph = language_models.captured(name)
    parity = Onnx().lower(program(graph), tmp_path / "model.onnx", None)
    assert parity.worst < TOLERANCE
    inputs = language_models.batch(3, 13)
    fed = {i.name: inputs[i.name] for i in graph.inputs}
    got = np.asarray(plain_session(tmp_path / "model.onnx").run(["logits"], {k: v.numpy() for k, v in fed.items()})[0])
    with torch.no_grad():
        wanted = language_models.build(name)(**fed, use_cache=False).logits
    rows = inputs["attention_mask"].bool()
    error = (torch.from_numpy(got) - wanted)[rows].abs().max() / wanted[rows].abs().max()
    assert np.isfinite(got).all() and error < TOLERANCE


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_and_vision_models_keep_their_outputs(name: str, tmp_path: Path):
    model, example, dynamic = encoder(name, **ENCODERS[name])
    graph, _ = capture_module(model, example, dynamic)
    parity = Onnx().lower(program(graph), tmp_path / "model.onnx", None)
    assert set(parity.errors) == set(graph.outputs) and parity.worst < TOLERANCE
    other = {k: torch.cat([v, v.flip(0)[:1]]) for k, v in example.items()}
    got = Onnx().run(tmp_path / "model.onnx", other)
    with torch.no_grad():
        wanted = model(**other).last_hidden_state
    assert (got["last_hidden_state"] - wanted).abs().max() < 1e-4 * wanted.abs().max()


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_packed_models_compute_what_their_graph_does(name: str, bits: int, tmp_path: Path):
    graph = language_models.captured(name)
    pack(graph, NumericFormat(bits, 16))
    parity = Onnx().lower(program(graph), tmp_path / "model.onnx", None)
    assert parity.worst < TOLERANCE
    assert "int8 activations" in parity.note
    kinds = {n.op_type for n in onnx.load(tmp_path / "model.onnx").graph.node}
    assert {"MatMulNBits", "GatherBlockQuantized"} <= kinds


@pytest.mark.parametrize("name", ["Bert", "ViT"])
@pytest.mark.parametrize("format", [NumericFormat(4, 32), NumericFormat(6, None, "none"), NumericFormat(3, 64, "float")], ids=str)
def test_packed_encoders_compute_what_their_graph_does(name: str, format: NumericFormat, tmp_path: Path):
    graph, _ = capture_module(*encoder(name, **ENCODERS[name]))
    pack(graph, format)
    assert Onnx().lower(program(graph), tmp_path / "model.onnx", None).worst < TOLERANCE


def test_an_encoder_and_a_decoder_become_two_files_that_run_as_one(tmp_path: Path):
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    model = T5ForConditionalGeneration(config).eval()
    ids = torch.randint(2, 90, (2, 16))
    first = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    source = {0: "batch", 1: "encoder_sequence"}
    encoder_graph, _ = capture_module(model.get_encoder(), first, dict.fromkeys(first, source))
    second = {
        "decoder_input_ids": ids[:, :9],
        "encoder_hidden_states": torch.randn(2, 16, 32),
        "encoder_attention_mask": torch.ones_like(ids),
    }
    dynamic = {
        "decoder_input_ids": {0: "batch", 1: "decoder_sequence"},
        "encoder_hidden_states": source,
        "encoder_attention_mask": source,
    }
    decoder_graph, _ = capture_module(_Decoder(model), second, dynamic, store=encoder_graph.store)
    whole = Program({"encoder": encoder_graph, "decoder": decoder_graph}, encoder_graph.store)
    parity = Onnx().lower(whole, tmp_path / "model.onnx", None)
    assert parity.worst < TOLERANCE
    assert sorted(f.name for f in tmp_path.iterdir()) == ["decoder_model.onnx", "encoder_model.onnx"]
    taken = [i.name for i in plain_session(tmp_path / "decoder_model.onnx").get_inputs()]
    assert taken == ["input_ids", "encoder_hidden_states", "encoder_attention_mask"]
    mask = torch.ones(3, 7, dtype=torch.int64)
    mask[0, 5:] = 0
    inputs = {
        "input_ids": torch.randint(2, 90, (3, 7)),
        "attention_mask": mask,
        "decoder_input_ids": torch.randint(2, 90, (3, 4)),
    }
    with torch.no_grad():
        wanted = model(**inputs, use_cache=False).logits
    got = next(iter(Onnx().run(tmp_path / "model.onnx", inputs).values()))
    assert (got - wanted).abs().max() < 1e-4 * wanted.abs().max()


class _Decoder(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, decoder_input_ids: Tensor, encoder_hidden_states: Tensor, encoder_attention_mask: Tensor) -> Tensor:
        return self.model(
            encoder_outputs=(encoder_hidden_states,),
            decoder_input_ids=decoder_input_ids,
            attention_mask=encoder_attention_mask,
            use_cache=False,
        ).logits


# --- decoding


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "qwen3", "gemma3"])
def test_the_file_holds_the_decode_graph_and_generates_with_it(name: str, tmp_path: Path):
    graph = language_models.captured(name)
    decode = derive_decode(graph)
    parity = Onnx().lower(program(graph, decode=decode), tmp_path / "model.onnx", None)
    assert parity.worst < TOLERANCE
    session = plain_session(tmp_path / "model.onnx")
    assert [i.name for i in session.get_inputs()] == [i.name for i in decode.inputs]
    assert [o.name for o in session.get_outputs()] == decode.outputs
    prompts = language_models.batch(3, 9)
    step = Onnx(activations="float32").decode_step(tmp_path / "model.onnx")
    mask = prompts["attention_mask"]
    got = generate(step, prompts["input_ids"], max_new_tokens=12, attention_mask=mask)
    assert torch.equal(got, generate(GraphStep(decode), prompts["input_ids"], max_new_tokens=12, attention_mask=mask))


def test_a_query_that_may_see_nothing_stays_finite(tmp_path: Path):
    graph = language_models.captured("llama")
    Onnx().lower(program(graph), tmp_path / "model.onnx", None)
    inputs = language_models.batch(3, 12)
    outputs = Onnx().run(tmp_path / "model.onnx", {i.name: inputs[i.name] for i in graph.inputs})
    assert not inputs["attention_mask"][2, 0]
    assert torch.isfinite(outputs["logits"]).all()


def test_parity_is_proved_on_the_calibration_samples(tmp_path: Path):
    import tiny

    from lwcompile.context import Context
    from lwcompile.samples import samples

    whole, calibration = tiny.llama_program(), tiny.calibration()
    ctx = Context(calibration=calibration)
    feed = samples(whole.main, ctx)
    assert torch.equal(feed["input_ids"], calibration.samples["input_ids"][:2])
    assert Onnx().lower(whole, tmp_path / "model.onnx", ctx).worst < TOLERANCE


# --- what is written


def test_whole_operators_stand_where_the_model_had_them(tmp_path: Path):
    graph = language_models.captured("llama")
    Onnx().lower(program(graph, decode=derive_decode(graph)), tmp_path / "model.onnx", None)
    kinds = [n.op_type for n in onnx.load(tmp_path / "model.onnx").graph.node]
    layers = language_models.MODELS["llama"][1]["num_hidden_layers"]
    assert kinds.count("Attention") == layers
    assert kinds.count("RotaryEmbedding") == 2 * layers
    assert kinds.count("RMSNormalization") == 1  # the first reads the embedding; the others take the residual's sum with them
    assert kinds.count("SkipSimplifiedLayerNormalization") == 2 * layers
    assert not {"Transpose", "Neg", "Expand", "Pow", "Add"} & set(kinds)


def test_large_weights_go_into_a_file_of_their_own(tmp_path: Path):
    graph = language_models.captured("llama")
    Onnx(external_data=True).lower(program(graph), tmp_path / "model.onnx", None)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert (tmp_path / "model.onnx.data").stat().st_size > (tmp_path / "model.onnx").stat().st_size
    assert isinstance(plain_session(tmp_path / "model.onnx"), ort.InferenceSession)


def test_a_wrong_lowering_leaves_no_file(tmp_path: Path, monkeypatch):
    from lwcompile.backends.onnx import lowering

    name = "silu"
    _, nodes = lowering.TABLE[name]
    monkeypatch.setitem(lowering.TABLE, name, (lambda g, node, x: g.b.op("Sigmoid", x), nodes))
    with pytest.raises(VerificationError, match=r"logits .* away from the graph's"):
        Onnx().lower(program(language_models.captured("llama")), tmp_path / "model.onnx", None)
    assert list(tmp_path.iterdir()) == []


def test_an_older_file_survives_a_failed_export(tmp_path: Path, monkeypatch):
    (tmp_path / "model.onnx").write_bytes(b"old")
    with pytest.raises(VerificationError):
        Onnx(tolerance=0.0).lower(program(language_models.captured("llama")), tmp_path / "model.onnx", None)
    assert (tmp_path / "model.onnx").read_bytes() == b"old"


def test_an_operator_without_a_lowering_is_named_before_the_work(monkeypatch):
    from lwcompile.backends.onnx import lowering

    monkeypatch.delitem(lowering.TABLE, "silu")
    reasons = Onnx().unsupported(program(language_models.captured("llama")))
    assert len(reasons) == 1 or len({r.split(" (")[0] for r in reasons}) == 1
    assert "aten.silu.default" in reasons[0] and "mlp" in reasons[0]
    monkeypatch.undo()
    assert Onnx().unsupported(program(language_models.captured("llama"))) == []


class _Large(nn.Module):
    """2.4 GB of float32 in one table; a linear reads the rows that are looked up."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding.from_pretrained(torch.arange(600_000.0)[:, None].expand(-1, 1024).contiguous())
        self.out = nn.Linear(1024, 8)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.table(ids) / 600_000)


@pytest.mark.skipif(psutil.virtual_memory().available < 12 << 30, reason="needs 12 GB of free memory")
def test_a_file_past_two_gigabytes_has_its_weights_beside_it(tmp_path: Path):
    model = _Large().eval()
    graph, _ = capture_module(model, {"ids": torch.zeros(2, 3, dtype=torch.long)}, {"ids": {0: "batch", 1: "sequence"}})
    Onnx().lower(program(graph), tmp_path / "model.onnx", None)
    assert (tmp_path / "model.onnx").stat().st_size < 1 << 20 and (tmp_path / "model.onnx.data").stat().st_size > 2 << 30
    onnx.checker.check_model(str(tmp_path / "model.onnx"))
    ids = torch.tensor([[0, 599_999, 17, 300_000]])
    (got,) = plain_session(tmp_path / "model.onnx").run(None, {"ids": ids.numpy()})
    torch.testing.assert_close(torch.from_numpy(np.asarray(got)), model(ids), rtol=1e-5, atol=1e-6)
