"""Datasets: every kind of source, windows that are deterministic and apart, and the guard against overlap."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lwcompile import readers
from lwcompile.data import CalibrationSet, load_dataset
from lwcompile.errors import BadInput
from lwcompile.windows import PIECE_CHARACTERS, cut, special_tokens, token_windows


def byte_tokens(text: str) -> list[int]:
    return list(text.encode())


def counted(n: int, start: int = 0) -> str:
    return " ".join(f"w{i}" for i in range(start, start + n))


def tokens(rows: list[list[int]], **fields) -> CalibrationSet:
    return CalibrationSet({"input_ids": torch.tensor(rows)}, "text", fields.pop("source", "a test"), **fields)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 300), min_size=1, max_size=5),
    samples=st.integers(1, 6),
    seqlen=st.integers(2, 40),
    seed=st.integers(0, 3),
    order=st.sampled_from(["random", "sequential"]),
)
def test_windows_are_apart_contiguous_and_repeatable(lengths, samples, seqlen, seed, order):
    starts = np.cumsum([0, *lengths]) + 1000
    texts = ["".join(chr(int(s) + i) for i in range(n)) for s, n in zip(starts, lengths)]

    def tokenizer(text: str) -> list[int]:
        return [ord(c) for c in text]

    def windows() -> torch.Tensor:
        return token_windows(texts, tokenizer, samples=samples, seqlen=seqlen, seed=seed, order=order)

    if sum(lengths) // seqlen < samples:
        with pytest.raises(BadInput, match="lower --samples"):
            windows()
        return
    first = windows()
    assert first.shape == (samples, seqlen) and first.dtype == torch.int64
    assert torch.equal(first, windows())
    assert first.unique().numel() == first.numel()  # each token of these texts occurs once: no window shares one
    if order == "sequential":
        assert torch.equal(first.flatten(), torch.arange(samples * seqlen) + 1000)
    else:
        inside = [int(a) + n for a, n in zip(starts, lengths)]
        broken = (first[:, 1:] - first[:, :-1] != 1).nonzero()
        assert all(int(first[r, c]) + 1 in inside for r, c in broken)  # only at the end of a text


def test_long_texts_are_cut_at_line_ends_and_lose_nothing():
    text = "line of text\n" * (PIECE_CHARACTERS // 5)
    pieces = list(cut(text))
    assert "".join(pieces) == text and len(pieces) > 2 and all(p.endswith("\n") for p in pieces)


class FakeTokenizer:
    """Bytes, with [CLS]=256 and [SEP]=257 around a text, as a Hugging Face tokeniser would put them."""

    eos_token_id: int | None = None
    chat_template = "yes"

    def __call__(self, text, add_special_tokens=True, verbose=True):
        body = list(text.encode())
        return {"input_ids": [256, *body, 257] if add_special_tokens else body}

    def convert_ids_to_tokens(self, ids):
        return ids

    def apply_chat_template(self, messages, tokenize):
        return "".join(f"<{m['role']}>{m['content']}\n" for m in messages)

    def __len__(self):
        return 258


def test_special_tokens_stand_around_every_window():
    assert special_tokens(FakeTokenizer()) == ([256], [257])
    ids = token_windows([counted(300)], FakeTokenizer(), samples=4, seqlen=16)
    assert (ids[:, 0] == 256).all() and (ids[:, -1] == 257).all() and (ids[:, 1:-1] < 256).all()


def test_end_of_text_joins_documents():
    tokenizer = FakeTokenizer()
    tokenizer.eos_token_id = 7
    ids = token_windows(["aaaa", "bbbb"], tokenizer, samples=1, seqlen=11, order="sequential")
    assert ids.tolist() == [[256, *b"aaaa", 7, *b"bbbb"[:4], 257]]


def test_a_text_file_and_a_folder_agree(tmp_path):
    (tmp_path / "a.txt").write_text(counted(400))
    (tmp_path / "copy.txt").write_text(counted(400))  # the same bytes count once
    (tmp_path / "ignored.bin").write_bytes(b"\0")
    file = load_dataset(tmp_path / "a.txt", tokenizer=byte_tokens, samples=8, seqlen=16)
    folder = load_dataset(tmp_path, tokenizer=byte_tokens, samples=8, seqlen=16)
    assert file.content_hash == folder.content_hash and file.origins == folder.origins
    assert file.content_hash != load_dataset(tmp_path, tokenizer=byte_tokens, samples=8, seqlen=16, seed=1).content_hash
    assert file.modality == "text" and not file.chat_template and file.tokens == 128


def test_jsonl_and_parquet_give_the_same_windows(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"text": counted(80, start)} for start in range(0, 800, 80)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    made = [load_dataset(tmp_path / f"a.{kind}", tokenizer=byte_tokens, samples=5, seqlen=32) for kind in ("jsonl", "parquet")]
    assert made[0].content_hash == made[1].content_hash


def test_conversations_go_through_the_chat_template(tmp_path):
    file = tmp_path / "chat.jsonl"
    rows = [{"messages": [{"role": "user", "content": counted(40)}, {"role": "assistant", "content": "yes"}]}]
    file.write_text("\n".join(map(json.dumps, rows)))
    made = load_dataset(file, tokenizer=FakeTokenizer(), samples=1, seqlen=30, order="sequential")
    assert made.chat_template and bytes(made.samples["input_ids"][0, 1:-1].tolist()).startswith(b"<user>w0 w1")
    with pytest.raises(BadInput, match="no chat template"):
        load_dataset(file, tokenizer=byte_tokens, samples=1, seqlen=30)


def test_arrays_keep_names_and_rows_together(tmp_path):
    from safetensors.numpy import save_file

    arrays = {"x": np.arange(20, dtype=np.float64).reshape(10, 2), "i": np.arange(10, dtype=np.int32)}
    np.savez(tmp_path / "a.npz", **arrays)
    save_file(arrays, tmp_path / "a.safetensors")
    for path in (tmp_path / "a.npz", tmp_path / "a.safetensors"):
        made = load_dataset(path, samples=4)
        assert made.samples["x"].dtype == torch.float32 and made.samples["i"].dtype == torch.int64
        assert torch.equal(made.samples["x"][:, 0], 2.0 * made.samples["i"])
    assert load_dataset(tmp_path / "a.npz", samples=3, order="sequential").samples["i"].tolist() == [0, 1, 2]


def test_pickled_arrays_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.array([{"a": 1}], dtype=object))
    with pytest.raises(BadInput, match="pickles"):
        load_dataset(tmp_path / "a.npz", samples=1)


def test_images_are_processed_as_the_preprocessor_says(tmp_path):
    pil = pytest.importorskip("PIL.Image")
    folder, model = tmp_path / "images", tmp_path / "model"
    folder.mkdir()
    model.mkdir()
    generator = np.random.default_rng(0)
    pictures = [generator.integers(0, 256, (8, 8, 3), dtype=np.uint8) for _ in range(3)]
    for i, picture in enumerate(pictures):
        pil.fromarray(picture).save(folder / f"{i}.png")
    config = {"do_resize": False, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7]}
    (model / "preprocessor_config.json").write_text(json.dumps(config))
    example = {"pixel_values": torch.zeros(2, 3, 8, 8)}
    made = load_dataset(folder, samples=3, examples=example, model_dir=model)
    wanted = (np.stack(pictures) / 255 - [0.1, 0.2, 0.3]) / [0.5, 0.6, 0.7]
    np.testing.assert_allclose(made.samples["pixel_values"].numpy(), wanted.transpose(0, 3, 1, 2), rtol=1e-5, atol=1e-6)
    resized = load_dataset(folder, samples=2, examples={"pixel_values": torch.zeros(2, 3, 14, 14)})
    assert resized.samples["pixel_values"].shape == (2, 3, 14, 14)
    assert made.overlaps(load_dataset(folder, samples=3, examples=example, model_dir=model))


def test_image_sizes_follow_transformers(tmp_path):
    pil = pytest.importorskip("PIL.Image")
    transformers = pytest.importorskip("transformers")
    slow = getattr(transformers, "ViTImageProcessorPil", None) or getattr(transformers, "ViTImageProcessor", None)
    if slow is None:
        pytest.skip("this transformers has no pillow image processor")
    picture = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    pil.fromarray(picture).save(tmp_path / "a.png")
    size = {"size": {"height": 16, "width": 16}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2}
    try:
        processor = slow(**size)
        wanted = processor(picture, return_tensors="np")["pixel_values"][0]
    except ImportError as error:
        pytest.skip(f"the reference cannot run here: {error}")
    np.testing.assert_allclose(readers.read_image(tmp_path / "a.png", size), wanted, atol=1e-5)


def test_module_function(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mydata_for_test.py").write_text(
        "import numpy as np\n"
        "def arrays(): return {'x': np.ones((4, 2), np.float32)}\n"
        "def texts(): return [f'text number {i} ' * 9 for i in range(9)]\n"
        "def broken(): raise ValueError('no network')\n"
    )
    assert load_dataset("mydata_for_test:arrays", samples=4).samples["x"].shape == (4, 2)
    assert load_dataset("mydata_for_test:texts", tokenizer=byte_tokens, samples=4, seqlen=8).modality == "text"
    assert load_dataset("mydata_for_test.py:arrays", samples=2).samples["x"].shape == (2, 2)
    for reference, message in {
        "mydata_for_test:broken": "ValueError: no network",
        "mydata_for_test:absent": "no 'absent'",
        "no_such_module_anywhere:f": "no module",
    }.items():
        with pytest.raises(BadInput, match=message):
            load_dataset(reference, samples=1)


def test_default_texts_are_present_and_apart():
    calibration = load_dataset(None, tokenizer=byte_tokens, samples=400, seqlen=256)
    evaluation = load_dataset("docstrings", tokenizer=byte_tokens, samples=400, seqlen=256)
    assert calibration.source == "topics" and not calibration.overlaps(evaluation)
    calibration.require_disjoint(evaluation)


def test_overlap_counts_shared_ngrams():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randint(0, 1000, (2, 50, 100), generator=generator)
    half = b.clone()
    half[:25] = a[:25]
    left, right, mixed = (tokens(t.tolist()) for t in (a, b, half))
    assert left.overlap(right) == 0 and left.overlap(mixed) == pytest.approx(0.5)
    left.require_disjoint(right)
    with pytest.raises(BadInput, match="share 50% of their content"):
        left.require_disjoint(mixed)


def test_overlap_sees_text_shifted_against_the_windows():
    text = torch.randint(0, 1000, (2000,), generator=torch.Generator().manual_seed(1))
    shifted = tokens(text[17 : 17 + 1900].reshape(19, 100).tolist())
    assert tokens(text.reshape(20, 100).tolist()).overlaps(shifted)


def test_repeated_tokens_are_no_content():
    padded = [[0] * 60 + list(range(s, s + 40)) for s in (100, 200)]
    assert not tokens(padded[:1]).overlaps(tokens([[0] * 100]))


def test_one_file_for_both_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text(counted(4000))
    halves = [load_dataset(tmp_path / "a.txt", tokenizer=byte_tokens, samples=2, seqlen=64, seed=s) for s in (0, 5)]
    with pytest.raises(BadInput, match="share 100%"):
        halves[0].require_disjoint(halves[1])


def test_derived_inputs():
    made = tokens([[5, 6, 7], [8, 9, 10]], decoder_start=1)
    names = ["input_ids", "attention_mask", "position_ids", "token_type_ids", "decoder_input_ids"]
    got = {name: t.tolist() for name, t in made.inputs_for(names).items()}
    assert got == {
        "input_ids": [[5, 6, 7], [8, 9, 10]],
        "attention_mask": [[1] * 3] * 2,
        "position_ids": [[0, 1, 2]] * 2,
        "token_type_ids": [[0] * 3] * 2,
        "decoder_input_ids": [[1, 5, 6], [1, 8, 9]],
    }
    masked = CalibrationSet(
        {"input_ids": torch.ones(1, 4, dtype=torch.long), "attention_mask": torch.tensor([[0, 0, 1, 1]])}, "tensors", "x"
    )
    assert masked.inputs_for(["position_ids"])["position_ids"].tolist() == [[0, 0, 0, 1]]
    with pytest.raises(BadInput, match="takes 'pixel_values'"):
        made.inputs_for(["pixel_values"])


def test_batches_cover_the_set_once():
    made = tokens([[i, i] for i in range(7)])
    batches = list(made.batches(3, ["input_ids", "attention_mask"]))
    assert [len(b["input_ids"]) for b in batches] == [3, 3, 1]
    assert torch.equal(torch.cat([b["input_ids"] for b in batches]), made.samples["input_ids"])
    assert len(made.take(2)) == 2


def test_random_only_when_asked_for():
    examples = {"pixel_values": torch.zeros(2, 3, 4, 4), "input_ids": torch.full((2, 5), 9)}
    with pytest.raises(BadInput, match="damage measured on noise means nothing"):
        load_dataset(None, examples={"pixel_values": torch.zeros(2, 3, 4, 4)})
    examples |= {"attention_mask": torch.zeros(2, 5).long(), "position_ids": torch.zeros(2, 5).long()}
    made = load_dataset("random", examples=examples, samples=50)
    assert made.modality == "random" and made.samples["pixel_values"].shape == (50, 3, 4, 4)
    assert made.samples["input_ids"].min() == 0 and made.samples["input_ids"].max() == 9
    assert made.samples["attention_mask"].all() and made.samples["position_ids"][3].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.txt", None, "no dataset"),
        ("short.txt", b"few words", "holds 0 windows"),
        ("latin.txt", b"caf\xe9 " * 999, "not UTF-8"),
        ("bad.jsonl", b'{"text": "a"}\n{oops', "bad.jsonl:2: not JSON"),
        ("rows.jsonl", b'{"body": "a"}', "'text' or 'messages'"),
        ("bad.npz", b"PK\x03\x04junk", "cannot be read as arrays"),
        ("bad.safetensors", b"\x10\0\0\0\0\0\0\0{", "cannot be read as arrays"),
        ("bad.parquet", b"PAR1", "cannot be read as parquet"),
        ("bad.png", b"\x89PNG", "cannot be read as an image"),
    ],
)
def test_bad_files_are_one_sentence(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=message) as caught:
        load_dataset(tmp_path / name, tokenizer=byte_tokens, samples=1, seqlen=64)
    assert "\n" not in str(caught.value)


def test_rows_must_agree_and_be_finite(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.ones((4, 2)), y=np.ones((3, 2)))
    with pytest.raises(BadInput, match="same number of rows"):
        load_dataset(tmp_path / "a.npz", samples=2)
    np.savez(tmp_path / "b.npz", x=np.array([[np.nan]]))
    with pytest.raises(BadInput, match="x holds NaN"):
        load_dataset(tmp_path / "b.npz", samples=1)
