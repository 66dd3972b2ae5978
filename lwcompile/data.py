"""Calibration and evaluation samples: what a model is fed while it is scored, and the guard that keeps the two apart.

A `CalibrationSet` holds samples by input name and knows where they came from. Text becomes contiguous windows of
tokens, sampled by seed without overlap: same seed, same bytes. `require_disjoint` refuses an evaluation set that shares
a source or content with it. A model that takes no text gets no default: damage measured on noise means nothing.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import xxhash
from torch import Tensor

from lwcompile import readers
from lwcompile.errors import BadInput
from lwcompile.windows import describe_tokenizer, render_chat, token_windows

DEFAULT_CALIBRATION = "topics"
DEFAULT_EVALUATION = "docstrings"

NGRAM = 32
SHARED_FRACTION = 0.01
"""Above this share of common content two sets overlap. Below it lie stock phrases: a table rule, a licence header."""


@dataclass(frozen=True, eq=False)
class CalibrationSet:
    """Samples of a model's inputs. Rows of all tensors belong together: row i of each is sample i.

    samples: input name -> tensor [n, ...]; tokens are int64 [n, seq], images float32 [n, channels, height, width].
    tokenization: which tokeniser cut the text, with a hash of its vocabulary and merges; "" where there is none.
    origins: hashes of the files (or of what a function returned) that the samples were drawn from.
    """

    samples: Mapping[str, Tensor]
    modality: Literal["text", "image", "tensors", "random"]
    source: str
    tokenization: str = ""
    chat_template: bool = False
    origins: frozenset[str] = frozenset()
    seed: int = 0
    decoder_start: int | None = field(default=None)

    def __post_init__(self) -> None:
        lengths = {name: len(tensor) for name, tensor in self.samples.items()}
        if not lengths or len(set(lengths.values())) != 1 or min(lengths.values()) == 0:
            raise BadInput(f"{self.source}: the inputs need the same number of samples, at least one; got {lengths}")

    def __len__(self) -> int:
        return len(next(iter(self.samples.values())))

    @property
    def tokens(self) -> int:
        """How many tokens the windows hold; for other modalities, how many samples."""
        ids = self.samples.get("input_ids")
        return len(self) if ids is None else ids.numel()

    @cached_property
    def content_hash(self) -> str:
        """xxh3-128 over names, shapes, dtypes and bytes of the samples: equal sets, equal hash."""
        digest = xxhash.xxh3_128(f"{self.modality}\0{self.tokenization}\0{self.chat_template}\0{self.decoder_start}".encode())
        for name, tensor in sorted(self.samples.items()):
            digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()

    def take(self, n: int) -> CalibrationSet:
        """The first n samples, with the same origins."""
        return self._replace({name: tensor[:n] for name, tensor in self.samples.items()})

    def rows(self, index: Tensor) -> CalibrationSet:
        """The samples of these numbers, int64 [n], in their order, with the same origins."""
        return self._replace({name: tensor[index] for name, tensor in self.samples.items()})

    def inputs_for(self, names: Sequence[str], rows: slice = slice(None)) -> dict[str, Tensor]:
        """The tensors a model with these inputs is called with; what follows from the tokens is made here.

        attention_mask: ones (windows are full); position_ids: 0, 1, ... over the mask; token_type_ids: zeros;
        decoder_input_ids: the tokens shifted right behind the decoder's start token. int64 [rows, seq] each.
        """
        have = {name: tensor[rows] for name, tensor in self.samples.items()}
        return {name: have[name] if name in have else self._derived(name, have) for name in names}

    def batches(self, size: int, names: Sequence[str] | None = None) -> Iterator[dict[str, Tensor]]:
        """`inputs_for(names)` in batches of `size` samples, in order; the last may be smaller."""
        wanted = list(self.samples) if names is None else names
        for start in range(0, len(self), size):
            yield self.inputs_for(wanted, slice(start, start + size))

    def overlap(self, other: CalibrationSet) -> float:
        """The share of this set's content that `other` holds too, 0 to 1; 1 where both were drawn from one file.

        Content is every 32-token window of text of the same tokenisation (shorter where the sets' windows are), and
        whole rows otherwise.
        """
        if self.origins & other.origins:
            return 1.0
        if self.tokenization != other.tokenization:
            return 0.0
        n = min(NGRAM, self._width, other._width)
        mine, theirs = np.unique(self._fingerprints(n)), np.unique(other._fingerprints(n))
        return float(np.isin(mine, theirs).mean()) if mine.size else 0.0

    def overlaps(self, other: CalibrationSet) -> bool:
        return max(self.overlap(other), other.overlap(self)) > SHARED_FRACTION

    def require_disjoint(self, other: CalibrationSet) -> None:
        """`BadInput` where this (calibration) set and `other` (evaluation) share a source or content."""
        if not self.overlaps(other):
            return
        shared = max(self.overlap(other), other.overlap(self))
        raise BadInput(
            f"the calibration set ({self.source}) and the evaluation set ({other.source}) share {shared:.0%} of their "
            "content, so the measured damage would flatter the plan: name an evaluation set of its own"
        )

    def describe(self) -> dict[str, Any]:
        """What a manifest or report says about this set."""
        return {
            "source": self.source,
            "modality": self.modality,
            "samples": len(self),
            "shapes": {name: list(tensor.shape) for name, tensor in self.samples.items()},
            "tokenization": self.tokenization,
            "chat_template": self.chat_template,
            "seed": self.seed,
            "hash": self.content_hash,
        }

    @property
    def _width(self) -> int:
        ids = self.samples.get("input_ids")
        return ids.shape[1] if ids is not None and ids.ndim == 2 else NGRAM

    def _fingerprints(self, n: int) -> np.ndarray:
        """uint64 hashes: of each n-gram of tokens, or of each row where the samples are not tokens."""
        ids = self.samples.get("input_ids")
        if ids is not None and ids.ndim == 2:
            grams = np.lib.stride_tricks.sliding_window_view(ids.numpy().astype(np.uint64), n, axis=1)
            coefficients = np.random.default_rng(0).integers(1, 1 << 63, n, dtype=np.uint64) | np.uint64(1)
            varied = (grams != grams[..., :1]).any(-1)  # one repeated token (a rule of dashes, padding) is no content
            return (grams @ coefficients)[varied]
        rows = zip(*(np.ascontiguousarray(t.numpy()) for _, t in sorted(self.samples.items())))
        return np.array([xxhash.xxh3_64_intdigest(b"".join(a.tobytes() for a in row)) for row in rows], np.uint64)

    def _derived(self, name: str, have: dict[str, Tensor]) -> Tensor:
        ids = have.get("input_ids")
        mask = have.get("attention_mask")
        if ids is not None:
            match name:
                case "attention_mask":
                    return torch.ones_like(ids)
                case "position_ids" if mask is not None:
                    return (mask.cumsum(-1) - 1).clamp_min(0)
                case "position_ids":
                    return torch.arange(ids.shape[1]).expand_as(ids).contiguous()
                case "token_type_ids":
                    return torch.zeros_like(ids)
                case "decoder_input_ids":
                    start = 0 if self.decoder_start is None else self.decoder_start
                    return torch.cat([torch.full_like(ids[:, :1], start), ids[:, :-1]], dim=1)
                case "decoder_attention_mask":
                    return torch.ones_like(ids)
        raise BadInput(f"the model takes {name!r}, and {self.source} gives only {', '.join(self.samples)}: add it to the dataset")

    def _replace(self, samples: Mapping[str, Tensor]) -> CalibrationSet:
        rest = self.modality, self.source, self.tokenization, self.chat_template, self.origins, self.seed
        return CalibrationSet(samples, *rest, self.decoder_start)


def load_dataset(
    spec: str | Path | None = None,
    *,
    tokenizer: Any = None,
    samples: int = 128,
    seqlen: int = 256,
    seed: int = 0,
    order: Literal["random", "sequential"] = "random",
    examples: Mapping[str, Tensor] | None = None,
    model_dir: Path | None = None,
    decoder_start: int | None = None,
) -> CalibrationSet:
    """Samples from what the user names.

    spec: a file or folder (txt, jsonl, parquet, images, npz, safetensors), `module:function` (returns a dict of
        tensors, or texts), "topics" or "docstrings" (texts that come with Python), or "random". None means "topics"
        for a model with a tokeniser, and is refused for others.
    tokenizer: a Hugging Face tokeniser, or a callable text -> token ids; needed for text.
    order: "random" samples windows (or rows) over the whole source; "sequential" takes the first ones.
    examples: the model's example inputs, whose shapes images must have and "random" copies.
    model_dir: where preprocessor_config.json says how images are resized and normalised.
    """
    if samples < 1 or seqlen < 2:
        raise BadInput(f"samples must be at least 1 and seqlen at least 2, not {samples} and {seqlen}")
    options = _Options(tokenizer, samples, seqlen, seed, order, dict(examples or {}), model_dir, decoder_start)
    if spec is None and tokenizer is None:
        raise BadInput(
            f"this model takes {', '.join(options.examples) or 'no text'}, and there is no default dataset for it: "
            "name one with --dataset (--dataset random only tests the plumbing; damage measured on noise means nothing)"
        )
    name = DEFAULT_CALIBRATION if spec is None else str(spec)
    if name == "random":
        return options.random()
    if name in readers.BUILTIN_TEXTS:
        return options.texts(readers.BUILTIN_TEXTS[name](), name, frozenset({name}))
    if Path(name).exists():
        return options.path(Path(name))
    if ":" in name:
        return options.function(name)
    known = ", ".join(readers.BUILTIN_TEXTS)
    raise BadInput(f"there is no dataset {name!r}: name a file, a folder, module:function, {known} or random")


@dataclass(frozen=True)
class _Options:
    """The arguments of `load_dataset`, with one method for each kind of source."""

    tokenizer: Any
    samples: int
    seqlen: int
    seed: int
    order: str
    examples: dict[str, Tensor]
    model_dir: Path | None
    decoder_start: int | None

    def path(self, path: Path) -> CalibrationSet:
        if path.suffix.lower() in readers.ARRAY_SUFFIXES:
            return self.arrays(readers.read_arrays(path), str(path), frozenset({_file_hash(path)}))
        images = readers.list_files(path, readers.IMAGE_SUFFIXES)
        if images and images[0].suffix.lower() in readers.IMAGE_SUFFIXES:
            return self.images(images, str(path))
        files = readers.list_files(path, readers.TEXT_SUFFIXES | readers.TABLE_SUFFIXES)
        unique = {_file_hash(file): file for file in reversed(files)}
        if not unique:
            raise BadInput(f"{path} holds no txt, jsonl, parquet or image files")
        documents = itertools.chain.from_iterable(map(readers.read_documents, sorted(unique.values())))
        return self.texts(documents, str(path), frozenset(unique))

    def function(self, reference: str) -> CalibrationSet:
        made = readers.call_function(reference)
        if isinstance(made, CalibrationSet):
            return made
        if isinstance(made, Mapping):
            return self.arrays(made, reference, frozenset())
        if isinstance(made, str) or not isinstance(made, Iterable):
            raise BadInput(f"{reference} must return a dict of tensors or an iterable of texts")
        texts = list(made)
        if not all(isinstance(text, str | list) for text in texts):
            raise BadInput(f"{reference} must return a dict of tensors or an iterable of texts")
        return self.texts(texts, reference, frozenset({xxhash.xxh3_128_hexdigest(json.dumps(texts).encode())}))

    def texts(self, documents: Iterable[readers.Document], source: str, origins: frozenset[str]) -> CalibrationSet:
        if self.tokenizer is None:
            raise BadInput(f"{source} is text, and this model has no tokenizer: name a dataset of its own inputs (npz)")
        chat = False
        texts: list[str] = []
        for document in documents:
            if not isinstance(document, str):
                chat, document = True, render_chat(document, self.tokenizer, source)
            texts.append(document)
        ids = token_windows(
            texts,
            self.tokenizer,
            samples=self.samples,
            seqlen=self.seqlen,
            seed=self.seed,
            order=self.order,
            source=source,
        )
        described = describe_tokenizer(self.tokenizer)
        return CalibrationSet({"input_ids": ids}, "text", source, described, chat, origins, self.seed, self.decoder_start)

    def images(self, files: list[Path], source: str) -> CalibrationSet:
        wanted = self.examples.get("pixel_values")
        size = None if wanted is None else (wanted.shape[-2], wanted.shape[-1])
        settings = readers.image_settings(self.model_dir, size)
        chosen = [files[i] for i in self.choose(len(files), source, "images")]
        arrays = [readers.read_image(file, settings) for file in chosen]
        shapes = {array.shape for array in arrays}
        if len(shapes) > 1 or (wanted is not None and shapes != {tuple(wanted.shape[1:])}):
            model = "one shape" if wanted is None else f"{tuple(wanted.shape[1:])}"
            raise BadInput(f"{source}: the processed images are {sorted(shapes)}, and the model takes {model}")
        origins = frozenset(map(_file_hash, chosen))
        pixels = torch.from_numpy(np.stack(arrays))
        return CalibrationSet({"pixel_values": pixels}, "image", source, "", False, origins, self.seed)

    def arrays(self, arrays: Mapping[str, Any], source: str, origins: frozenset[str]) -> CalibrationSet:
        tensors = {str(name): _tensor(name, value, source) for name, value in arrays.items()}
        lengths = {name: len(tensor) for name, tensor in tensors.items()}
        if not tensors or len(set(lengths.values())) != 1:
            raise BadInput(f"{source}: every input needs the same number of rows, not {lengths}")
        rows = self.choose(next(iter(lengths.values())), source, "rows")
        kept = {name: tensor[rows].contiguous() for name, tensor in tensors.items()}
        return CalibrationSet(kept, "tensors", source, "", False, origins, self.seed, self.decoder_start)

    def random(self) -> CalibrationSet:
        if not self.examples:
            raise BadInput("the dataset 'random' needs the model's example inputs")
        generator = torch.Generator().manual_seed(self.seed)
        ids = [int(tensor.max()) + 1 for name, tensor in self.examples.items() if name.endswith("input_ids")]
        vocabulary = len(self.tokenizer) if hasattr(self.tokenizer, "__len__") else max(ids, default=1)
        made = {name: _noise(name, t, vocabulary, self.samples, generator) for name, t in self.examples.items()}
        return CalibrationSet(made, "random", "random", "", False, frozenset(), self.seed, self.decoder_start)

    def choose(self, available: int, source: str, what: str) -> list[int]:
        """Which of `available` items are used; in order of the file, so that equal choices are equal sets."""
        if available < self.samples:
            raise BadInput(f"{source} holds {available} {what}, and {self.samples} were asked for: lower --samples")
        if self.order == "sequential":
            return list(range(self.samples))
        return sorted(random.Random(self.seed).sample(range(available), self.samples))


def _tensor(name: Any, value: Any, source: str) -> Tensor:
    try:
        tensor = value.detach().cpu() if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value))
    except (TypeError, ValueError, RuntimeError) as error:
        raise BadInput(f"{source}: {name} is not a tensor: {error}") from None
    if tensor.ndim == 0:
        raise BadInput(f"{source}: {name} is one number, and the first dimension must count the samples")
    if tensor.is_floating_point():
        if not torch.isfinite(tensor).all():
            raise BadInput(f"{source}: {name} holds NaN or infinite values")
        return tensor.float()
    return tensor if tensor.dtype == torch.bool else tensor.long()


def _noise(name: str, example: Tensor, vocabulary: int, n: int, generator: torch.Generator) -> Tensor:
    """Values of the example's shape: normal for floats, any token for ids, ones for masks, 0, 1, ... for positions."""
    shape = n, *example.shape[1:]
    if example.is_floating_point():
        return torch.randn(shape, generator=generator, dtype=torch.float32)
    if name.endswith("mask"):
        return torch.ones(shape, dtype=example.dtype)
    if name.endswith("position_ids"):
        return torch.arange(shape[-1]).expand(shape).contiguous()
    high = vocabulary if name.endswith("input_ids") else int(example.max()) + 1
    return torch.randint(0, high, shape, generator=generator)


def _file_hash(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
