"""Sources: what is opened computes what was saved, and whatever cannot be used is one sentence."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lwcompile.describe import describe_model
from lwcompile.errors import BadInput
from lwcompile.pipeline import capture
from lwcompile.sources import Source, find_license, open_source, origin_of, private_copy, weights_digest

transformers = pytest.importorskip("transformers")

WIDE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 97}
SEQ = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 97, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 2, "forced_eos_token_id": 2, "max_position_embeddings": 64,
}  # fmt: skip
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 97}
IMAGE = {**WIDE, "image_size": 32, "patch_size": 8}
WHISPER = {**SEQ, "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 40}
DINO = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28, "patch_size": 14}


def tiny(architecture: str, config: str, /, **options):
    torch.manual_seed(0)
    for key in ("bos_token_id", "eos_token_id"):
        options.setdefault(key, 1)
    return getattr(transformers, architecture)(getattr(transformers, config)(**options)).eval()


def saved(folder: Path, model) -> Path:
    model.save_pretrained(folder)
    return folder


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


LLAMA = ("LlamaForCausalLM", "LlamaConfig", {**WIDE, "num_key_value_heads": 2})
BERT = ("BertModel", "BertConfig", WIDE)
MODELS = {
    "llama": (*LLAMA, "causal-lm", ["input_ids", "attention_mask", "position_ids"]),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 97}, "causal-lm",
             ["input_ids", "attention_mask", "position_ids"]),
    "bert": (*BERT, "features", ["input_ids", "attention_mask", "token_type_ids"]),
    "bert mlm": ("BertForMaskedLM", "BertConfig", WIDE, "masked-lm", ["input_ids", "attention_mask", "token_type_ids"]),
    "bert classes": ("BertForSequenceClassification", "BertConfig", WIDE, "classification",
                     ["input_ids", "attention_mask", "token_type_ids"]),
    "vit": ("ViTForImageClassification", "ViTConfig", IMAGE, "classification", ["pixel_values"]),
    "dinov2": ("Dinov2Model", "Dinov2Config", DINO, "features", ["pixel_values"]),
    "clip": ("CLIPModel", "CLIPConfig", {"text_config": WIDE, "vision_config": IMAGE, "projection_dim": 16}, "similarity",
             ["input_ids", "attention_mask", "pixel_values"]),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5, "seq2seq", ["input_ids", "attention_mask", "decoder_input_ids"]),
    "t5 untied": ("T5ForConditionalGeneration", "T5Config", {**T5, "tie_word_embeddings": False}, "seq2seq",
                  ["input_ids", "attention_mask", "decoder_input_ids"]),
    "bart": ("BartForConditionalGeneration", "BartConfig", SEQ, "seq2seq", ["input_ids", "attention_mask", "decoder_input_ids"]),
    "whisper": ("WhisperForConditionalGeneration", "WhisperConfig", WHISPER, "seq2seq", ["input_features", "decoder_input_ids"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", MODELS)
def test_a_saved_model_opens_as_it_was(tmp_path, kind):
    architecture, config, options, task, names = MODELS[kind]
    model = tiny(architecture, config, **options)
    source = open_source(saved(tmp_path / "model", model))
    assert source.task == task and list(source.example_kwargs) == names
    assert source.outputs == ("features" if task in ("features", "similarity") else "logits")
    assert all(len(t) == 2 for t in source.example_kwargs.values()) and set(source.dynamic) == set(names)
    with torch.no_grad():
        got, wanted = source.model(**source.example_kwargs), model(**source.example_kwargs)
    same(got[0], wanted[0])
    assert "past_key_values" not in got or task == "seq2seq"
    assert source.config and source.config["architectures"] == [architecture]
    assert source.origin == origin_of(tmp_path / "model") and source.name == "model"


@pytest.mark.parametrize("kind", [k for k in MODELS if MODELS[k][3] == "seq2seq"])
def test_encoder_and_decoder_compute_the_whole(kind):
    """At other sizes than the example's, with padding where the encoder reads text."""
    architecture, config, options, _, names = MODELS[kind]
    model = tiny(architecture, config, **options)
    source = open_source(model)
    encoder, decoder = source.parts["encoder"], source.parts["decoder"]
    assert "encoder_hidden_states" in decoder.dynamic and set(source.parts) == {"encoder", "decoder"}
    target = torch.randint(3, 97, (3, 7))
    if "input_ids" in names:
        mask = torch.tensor([[1] * 11, [1] * 6 + [0] * 5, [1] * 9 + [0] * 2])
        inputs = {"input_ids": torch.randint(3, 97, (3, 11)), "attention_mask": mask}
    else:
        mask, inputs = None, {"input_features": torch.randn(3, 8, 40)}
    with torch.no_grad():
        hidden = encoder.model(**inputs)["last_hidden_state"]
        given = {"encoder_hidden_states": hidden} | ({} if mask is None else {"encoder_attention_mask": mask})
        same(decoder.model(decoder_input_ids=target, **given)["logits"], model(**inputs, decoder_input_ids=target).logits)
    held = {id(p) for p in decoder.model.parameters()}
    own = {id(p) for name, p in encoder.model.named_parameters() if "layer" in name or "block" in name}
    assert own and not own & held  # the decoder does not carry the encoder's weights


def test_the_callers_model_is_left_alone():
    model = tiny(*LLAMA[:2], **LLAMA[2]).train().to(torch.bfloat16)
    source = open_source(model)
    assert model.training and model.config.use_cache and model.lm_head.weight.dtype == torch.bfloat16
    assert not source.model.training and next(source.model.parameters()).dtype == torch.float32
    shared = private_copy(plain := nn.Linear(2, 2))
    assert shared is not plain and shared.weight is plain.weight  # float32 costs no second copy


def test_tied_weights_stay_tied():
    source = open_source(tiny("GPT2LMHeadModel", "GPT2Config", n_embd=32, n_layer=1, n_head=4, vocab_size=97))
    assert source.model.lm_head.weight is source.model.transformer.wte.weight


def test_image_size_can_be_chosen():
    model = tiny("Dinov2Model", "Dinov2Config", **DINO)
    assert open_source(model).example_kwargs["pixel_values"].shape == (2, 3, 28, 28)
    assert describe_model(model, image_size=56).example_kwargs["pixel_values"].shape == (2, 3, 56, 56)


def test_half_precision_weights_become_float32(tmp_path):
    model = tiny(*BERT[:2], **BERT[2])
    source = open_source(saved(tmp_path / "m", model.half()))
    assert all(p.dtype == torch.float32 for p in source.model.parameters())


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_part_without_weights_goes_if_the_model_runs_without_it(tmp_path):
    model = tiny(*BERT[:2], **BERT[2])
    folder = saved(tmp_path / "m", model)
    rewrite(folder, lambda t: [t.pop(k) for k in list(t) if k.startswith("pooler")])
    source = open_source(folder)
    with torch.no_grad():
        same(source.model(**source.example_kwargs)[0], model(**source.example_kwargs)[0])
    assert not any("pooler" in name for name, _ in source.model.named_parameters())


def config_of(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def drop_a_weight(folder: Path) -> None:
    rewrite(folder, lambda t: t.pop("encoder.layer.1.output.dense.weight"))


def put_nan(folder: Path) -> None:
    rewrite(folder, lambda t: t["encoder.layer.0.output.dense.weight"][0].fill_(torch.nan))


def put_infinity(folder: Path) -> None:
    rewrite(folder, lambda t: t["encoder.layer.1.output.dense.bias"].__setitem__(3, -torch.inf))


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def truncate_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:40])


def pickle_weights(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def lose_a_shard(folder: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


BREAKAGES = {
    "missing weight": (drop_a_weight, "lacks weights that the model needs: encoder.layer.1.output.dense.weight"),
    "NaN": (put_nan, "encoder.layer.0.output.dense.weight holds 64 values that are NaN or infinite"),
    "infinity": (put_infinity, "encoder.layer.1.output.dense.bias holds 1 values"),
    "truncated": (truncate, "truncated: it has"),
    "truncated header": (truncate_header, "truncated: its header"),
    "pickled": (pickle_weights, "only pickled weights .pytorch_model.bin."),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no model.safetensors"),
    "no shard": (lose_a_shard, "lacks model-00001-of-00002.safetensors"),
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "bad config": (lambda f: (f / "config.json").write_text("{"), "not JSON"),
    "unknown": (lambda f: config_of(f, architectures=["NoSuchModel"]), "architecture NoSuchModel"),
    "unnamed": (lambda f: config_of(f, architectures=None), "architecture none"),
    "own code": (lambda f: config_of(f, architectures=["My"], auto_map={"AutoModel": "my.My"}), "its own code is not run"),
    "quantized": (lambda f: config_of(f, quantization_config={"quant_method": "gptq"}), "quantized already .gptq."),
}  # fmt: skip


@pytest.mark.parametrize("name", BREAKAGES)
def test_broken_folders_are_one_sentence(tmp_path, name):
    folder = saved(tmp_path / "m", tiny(*BERT[:2], **BERT[2]))
    change, message = BREAKAGES[name]
    change(folder)
    with pytest.raises(BadInput, match=message) as caught:
        open_source(folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent", "no model"),
        ("m.bin", "pickle"),
        ("m.safetensors", "config.json beside"),
        ("m.txt", "no model that can"),
    ],
)
def test_wrong_files_are_one_sentence(tmp_path, name, message):
    if name != "absent":
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(BadInput, match=message):
        open_source(tmp_path / name)


# --- modules and functions


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(4, 6)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> dict[str, Tensor]:
        y = self.inner(x)
        return {"logits": y if scale is None else y * scale}


def test_a_module_with_example_inputs():
    source = open_source(Mlp(), {"x": torch.randn(3, 4)}, task="classification")
    assert source.dynamic == {"x": {0: "batch"}} and source.outputs == "logits" and source.tokenizer() is None
    assert open_source(Mlp(), {"x": torch.randn(1, 4)}).dynamic == {}
    assert source.origin == weights_digest(Mlp()) and open_source(source) is source
    with pytest.raises(BadInput, match="needs example inputs"):
        open_source(Mlp())
    with pytest.raises(BadInput, match="does not run on its example inputs"):
        open_source(Mlp(), {"x": torch.randn(3, 5)})


def test_module_function(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mysource_for_test.py").write_text(
        "import torch\n"
        "def pair(): return torch.nn.Linear(4, 2), {'input': torch.randn(2, 4)}\n"
        "def alone(): return torch.nn.Linear(4, 2)\n"
        "def wrong(): return 3\n"
        "def broken(): raise OSError('no disk')\n"
    )
    source = open_source("mysource_for_test:pair")
    assert isinstance(source, Source) and source.name == "pair" and list(source.parts) == ["forward"]
    for name, message in {"alone": "example inputs", "wrong": "must return", "broken": "no disk", "nothing": "has no"}.items():
        with pytest.raises(BadInput, match=message):
            open_source(f"mysource_for_test:{name}")


# --- .pt2


@pytest.fixture
def archive(tmp_path) -> Path:
    batch = torch.export.Dim("batch", min=1)
    example = {"x": torch.randn(3, 4), "scale": torch.ones(1)}
    exported = torch.export.export(Mlp(), (), example, dynamic_shapes={"x": {0: batch}, "scale": None}, strict=False)
    torch.export.save(exported, tmp_path / "mlp.pt2")
    return tmp_path / "mlp.pt2"


def test_an_exported_program(archive):
    source = open_source(archive)
    assert list(source.example_kwargs) == ["x", "scale"] and list(source.dynamic) == ["x"] and source.exported is not None
    assert source.example_kwargs["x"].shape == (3, 4) and source.outputs == "logits" and source.name == "mlp"
    x = torch.randn(5, 4)
    same(source.model(x=x, scale=torch.tensor([2.0]))["logits"], 2 * Mlp().inner(x))


def edit(path: Path, changes: dict[str, bytes | None]) -> None:
    """Rewrite a zip archive: entries by the end of their name, None takes one out, others are added."""
    with zipfile.ZipFile(path) as file:
        entries = {name: file.read(name) for name in file.namelist()}
    root = next(iter(entries)).partition("/")[0]
    for name, content in changes.items():
        key = next((k for k in entries if k.endswith(name)), f"{root}/{name}")
        if content is None:
            del entries[key]
        else:
            entries[key] = content
    with zipfile.ZipFile(path, "w") as file:
        for name, content in entries.items():
            file.writestr(name, content)


class Trap:
    """A pickle that leaves a file behind when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def poisoned(mark: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save({"x": Trap(mark)}, buffer)
    return buffer.getvalue()


def replaced(path: Path, name: str, old: str, new: str) -> dict[str, bytes | None]:
    with zipfile.ZipFile(path) as file:
        text = file.read(next(n for n in file.namelist() if n.endswith(name))).decode()
    assert old in text
    return {name: text.replace(old, new).encode()}


POISONS = {
    "sample inputs": (lambda p, m: {"sample_inputs/model.pt": poisoned(m)}, "sample inputs"),
    "weights": (
        lambda p, m: replaced(p, "weights_config.json", '"use_pickle": false', '"use_pickle": true') | {"weight_0": poisoned(m)},
        "pickled tensors",
    ),
    "legacy weights": (lambda p, m: {"data/weights/model.pt": poisoned(m)}, "pickled entry"),
    "object": (lambda p, m: {"data/constants/opaque_obj_0": pickle.dumps(Trap(m))}, "pickled entry"),
    "compiled": (lambda p, m: {"data/aotinductor/model/a.so": b"\x7fELF"}, "compiled code"),
    "expression": (
        lambda p, m: replaced(p, "models/model.json", '"expr_str": "', f'"expr_str": "open({str(m)!r}, chr(119)) + '),
        "not plain arithmetic",
    ),
    "no program": (lambda p, m: {"models/model.json": None}, "no exported program"),
    "not JSON": (lambda p, m: {"models/model.json": b"{"}, "not JSON"),
}


@pytest.mark.parametrize("name", POISONS)
def test_archives_that_would_run_code_are_refused(archive, tmp_path, name):
    make, message = POISONS[name]
    mark = tmp_path / "mark"
    edit(archive, make(archive, mark))
    with pytest.raises(BadInput, match=message) as caught:
        open_source(archive)
    assert not mark.exists() and "\n" not in str(caught.value)


def test_other_files_called_pt2(tmp_path, archive):
    torch.save(nn.Linear(1, 1), tmp_path / "saved.pt2")
    with pytest.raises(BadInput, match="is a pickle"):
        open_source(tmp_path / "saved.pt2")
    archive.write_bytes(archive.read_bytes()[:-300])
    with pytest.raises(BadInput, match="truncated"):
        open_source(archive)


def test_nan_in_an_archive_is_named(tmp_path):
    model = Mlp()
    nn.init.constant_(model.inner.bias, torch.nan)
    torch.export.save(torch.export.export(model, (torch.randn(3, 4),), strict=False), tmp_path / "nan.pt2")
    with pytest.raises(BadInput, match=r"inner\.bias holds 6 values"):
        open_source(tmp_path / "nan.pt2")


# --- GGUF


def write_gguf(path: Path) -> dict[str, Tensor]:
    """A Llama of one block in float32, with a tokeniser of single bytes; returns its tensors under GGUF's names."""
    gguf = pytest.importorskip("gguf")
    torch.manual_seed(0)
    shapes = {
        "token_embd": (260, 32),
        "output_norm": (32,),
        "output": (260, 32),
        "blk.0.attn_norm": (32,),
        "blk.0.ffn_norm": (32,),
    }
    shapes |= {"blk.0.attn_q": (32, 32), "blk.0.attn_k": (16, 32), "blk.0.attn_v": (16, 32), "blk.0.attn_output": (32, 32)}
    shapes |= {"blk.0.ffn_gate": (64, 32), "blk.0.ffn_up": (64, 32), "blk.0.ffn_down": (32, 64)}
    tensors = {f"{name}.weight": torch.randn(shape) for name, shape in shapes.items()}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_license("mit")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(260)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{i}" for i in range(260)])
    writer.add_token_merges(["t 1"])
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def test_a_gguf_file(tmp_path):
    tensors = write_gguf(tmp_path / "m.gguf")
    source = open_source(tmp_path / "m.gguf")
    assert source.task == "causal-lm" and source.license == "mit" and source.gguf_file == "m.gguf"
    assert source.config is not None and "quantization_config" not in source.config and source.config["num_key_value_heads"] == 2
    state = source.model.state_dict()
    assert torch.equal(state["model.layers.0.mlp.down_proj.weight"], tensors["blk.0.ffn_down.weight"])
    assert torch.equal(state["lm_head.weight"], tensors["output.weight"])
    with torch.no_grad():
        assert source.model(**source.example_kwargs).logits.shape == (2, 16, 260)


def test_broken_gguf_files_are_one_sentence(tmp_path):
    write_gguf(tmp_path / "m.gguf")
    whole = (tmp_path / "m.gguf").read_bytes()
    for content, message in {
        whole[:-64]: "is truncated: the tensor",
        whole[:900]: "truncated or damaged",
        b"GGML" + whole[4:]: "not a GGUF file",
        b"": "is empty",
        whole[:4] + b"\x09" + whole[5:]: "GGUF version 9",
    }.items():
        (tmp_path / "m.gguf").write_bytes(content)
        with pytest.raises(BadInput, match=message) as caught:
            open_source(tmp_path / "m.gguf")
        assert "\n" not in str(caught.value)


def test_the_gguf_header_agrees_with_the_reference_reader(tmp_path):
    gguf = pytest.importorskip("gguf")
    from lwcompile.gguf_header import read_gguf_header

    write_gguf(tmp_path / "m.gguf")
    header, reference = read_gguf_header(tmp_path / "m.gguf"), gguf.GGUFReader(tmp_path / "m.gguf")
    assert header.data_offset == reference.data_offset
    assert [name for name, *_ in header.tensors] == [t.name for t in reference.tensors]
    assert [header.data_offset + offset for *_, offset in header.tensors] == [t.data_offset for t in reference.tensors]
    assert header.metadata["llama.block_count"] == reference.fields["llama.block_count"].contents() == 1


# --- what comes along


def test_licences(tmp_path):
    assert find_license(tmp_path) is None
    (tmp_path / "LICENSE").write_text("                Apache License\n           Version 2.0, January 2004\n")
    assert find_license(tmp_path) == "apache-2.0"
    (tmp_path / "README.md").write_text("---\nlanguage: en\nlicense: mit\n---\n# A model\n")
    assert find_license(tmp_path) == "mit"


def test_assets_are_carried(tmp_path):
    folder = saved(tmp_path / "m", tiny(*BERT[:2], **BERT[2]))
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "world"]))
    (folder / "LICENSE").write_text("mine")
    source = open_source(folder)
    names = {path.name for path in source.write_assets(tmp_path / "out")}
    assert {"config.json", "vocab.txt", "LICENSE"} <= names and "model.safetensors" not in names
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == source.config
    shutil.rmtree(tmp_path / "out")


def test_equal_models_have_equal_origins(tmp_path):
    a, b = (saved(tmp_path / name, tiny(*BERT[:2], **BERT[2])) for name in ("a", "b"))
    assert origin_of(a) == origin_of(b) == open_source(a).origin
    rewrite(b, lambda t: t["encoder.layer.0.output.dense.bias"].add_(1))
    assert origin_of(a) != origin_of(b) and origin_of("module:function") is None


def test_a_language_model_with_inputs_of_its_own_puts_out_no_cache():
    from tiny import llama

    model, ids = llama(), torch.ones(2, 9, dtype=torch.long)
    assert capture(model, {"input_ids": ids}).main.outputs == ["logits"]
    assert model.config.use_cache, "the caller's own is left alone"


def test_a_size_that_one_input_fixes_is_fixed_in_all():
    class Steps(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            state = x[:, 0]
            for t in range(1, x.shape[1]):  # unrolled, as a recurrent model's trace is
                state = state * 0.5 + x[:, t]
            return state + y.sum(1)

    given = {name: torch.randn(2, 6) for name in ("x", "y")}
    program = capture(Steps(), given, {name: {0: "batch", 1: "sequence"} for name in given})
    assert [i.dynamic for i in program.main.inputs] == [{0: "batch"}, {0: "batch"}]
    assert any("sequence" in remark for remark in program.remarks)
