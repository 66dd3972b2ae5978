"""From what the user names to a loaded model with example inputs; tracing it is `lwcompile.tracing`'s work.

A module, a Hugging Face folder, a GGUF file, a `.pt2`, or `module:function`. Every failure is one sentence: no pickle is
loaded, no code of a model folder is run, and weights that are missing or not finite are named.
"""

from __future__ import annotations

import copy
import itertools
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
import xxhash
from torch import Tensor, nn

from lwcompile.errors import BadInput
from lwcompile.readers import call_function

Dynamic: TypeAlias = "dict[str, dict[int, str]]"
"""Input -> dimension -> the name of its size: "batch", "sequence", "encoder_sequence"."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.txt", "vocab.json")
CARRIED = (*TOKENIZER_FILES, "special_tokens_map.json", "added_tokens.json", "merges.txt", "chat_template.jinja",
           "generation_config.json", "preprocessor_config.json", "config.json", "LICENSE", "LICENSE.txt")  # fmt: skip


@dataclass(frozen=True)
class Part:
    """One entry point: a module, keyword example inputs, and which of their dimensions are free."""

    model: nn.Module
    example_kwargs: dict[str, Tensor]
    dynamic: Dynamic


@dataclass(frozen=True)
class Source:
    """A model as it was found.

    model: the whole model in float32 and eval mode; a `.pt2`'s is a GraphModule.
    example_kwargs: keyword inputs at batch 2; ids are int64 [2, 16].
    parts: what is traced: {"forward": ...}, or {"encoder": ..., "decoder": ...}.
    task: "causal-lm", "masked-lm", "seq2seq", "features", "classification", "similarity"; "unknown" for others' modules.
    outputs: "logits" or "features": what the default metric compares.
    exported: the ExportedProgram of a `.pt2`, to be used instead of tracing again.
    origin: hash of the files (or of the weights, for a module): equal sources, equal origin.
    """

    model: nn.Module
    example_kwargs: dict[str, Tensor]
    dynamic: Dynamic
    task: str = "unknown"
    outputs: str = "features"
    config: dict[str, Any] | None = None
    tokenizer_dir: Path | None = None
    gguf_file: str | None = None
    name: str = "model"
    license: str | None = None
    origin: str = ""
    parts: dict[str, Part] = field(default_factory=dict)
    exported: Any = None
    remarks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.parts:
            object.__setattr__(self, "parts", {"forward": Part(self.model, self.example_kwargs, self.dynamic)})

    def tokenizer(self) -> Any:
        """The model's tokeniser, None where it has none. Only local files are read, and none of their code is run."""
        if self.tokenizer_dir is None:
            return None
        from lwcompile.huggingface import load_tokenizer

        return load_tokenizer(self.tokenizer_dir, self.gguf_file)

    def write_assets(self, folder: Path) -> tuple[Path, ...]:
        """Put what generation needs beside the weights into `folder`: config, tokenizer, preprocessor, licence."""
        folder.mkdir(parents=True, exist_ok=True)
        if self.tokenizer_dir is not None and self.gguf_file is None:
            for name in CARRIED:
                if (self.tokenizer_dir / name).is_file():
                    shutil.copyfile(self.tokenizer_dir / name, folder / name)
        elif self.tokenizer_dir is not None:
            self.tokenizer().save_pretrained(folder)
            licence = self.tokenizer_dir / "LICENSE"
            if licence.is_file() and find_license(self.tokenizer_dir) == self.license:
                shutil.copyfile(licence, folder / "LICENSE")
        if self.config is not None and not (folder / "config.json").exists():
            (folder / "config.json").write_text(json.dumps(self.config, indent=2) + "\n", encoding="utf-8")
        return tuple(sorted(path for path in folder.iterdir() if path.is_file()))


def _name_tokenizer_for_all(path: Path) -> None:
    """transformers 5 names a class that its earlier releases, and what builds on them, do not know; all know this one."""
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        config.setdefault("model_input_names", ["input_ids", "attention_mask"])
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def open_source(
    ref: str | Path | nn.Module | Source,
    example_kwargs: Mapping[str, Tensor] | None = None,
    dynamic: Dynamic | None = None,
    *,
    task: str | None = None,
    image_size: int | None = None,
) -> Source:
    """Load what `ref` names.

    ref: a module; a Hugging Face folder (config.json and safetensors); a .gguf or .pt2 file; or `module:function`, which
        returns a `Source`, a module, or (module, example_kwargs).
    example_kwargs, dynamic: for modules; a Hugging Face model gets them by itself.
    image_size: another input size than the config's, for vision models that interpolate their positions.
    Raises `BadInput` with one sentence for anything that cannot be used.
    """
    if isinstance(ref, Source):
        return ref
    if isinstance(ref, nn.Module):
        return _from_module(ref, example_kwargs, dynamic, task, image_size)
    path = Path(ref)
    if path.is_dir():
        from lwcompile.huggingface import open_directory

        return open_directory(path, image_size=image_size)
    if path.is_file():
        return _from_file(path)
    if ":" in str(ref) and not path.exists():
        return _from_function(str(ref), dynamic, task, image_size)
    raise BadInput(f"there is no model {str(ref)!r}: name a folder with config.json, a .gguf or .pt2 file, or module:function")


def origin_of(ref: Any) -> str | None:
    """The `origin` that the source of a file or folder will have, without loading it: a second's work on a gigabyte.

    None for modules and functions, whose content is not known before they ran.
    """
    if not isinstance(ref, str | Path):
        return None
    path = Path(ref)
    if path.is_dir():
        from lwcompile.huggingface import origin_files

        return file_digest(origin_files(path))
    return file_digest([path]) if path.is_file() else None


def _from_file(path: Path) -> Source:
    match path.suffix.lower():
        case ".gguf":
            from lwcompile.huggingface import open_gguf

            return open_gguf(path)
        case ".pt2":
            return _from_pt2(path)
        case ".safetensors":
            raise BadInput(f"{path} holds weights without a model: name its folder, with config.json beside it")
        case ".bin" | ".pt" | ".pth" | ".ckpt" | ".pkl":
            raise BadInput(f"{path} is a pickle, which is never loaded: convert it to safetensors, or export a .pt2")
        case suffix:
            raise BadInput(f"{path} is no model that can be read ({suffix or 'no suffix'}): name a folder, .gguf or .pt2")


def _from_module(
    model: nn.Module,
    example_kwargs: Mapping[str, Tensor] | None,
    dynamic: Dynamic | None,
    task: str | None,
    image_size: int | None,
) -> Source:
    model = private_copy(model)
    require_finite(model, type(model).__name__)
    if example_kwargs is None:
        from lwcompile.describe import describe_model, is_pretrained

        if not is_pretrained(model):
            raise BadInput(f"{type(model).__name__} needs example inputs: give (model, {{input name: tensor}})")
        source = describe_model(model, image_size=image_size)
        return replace(source, name=type(model).__name__, origin=weights_digest(model), task=task or source.task)
    example = dict(example_kwargs)
    outputs = run(model, example)
    kind = "logits" if isinstance(outputs, Mapping) and "logits" in outputs else "features"
    return Source(
        model,
        example,
        batch_dynamic(example) if dynamic is None else dynamic,
        task=task or "unknown",
        outputs="logits" if task in ("causal-lm", "masked-lm", "seq2seq", "classification") else kind,
        name=type(model).__name__,
        origin=weights_digest(model),
    )


def _from_function(reference: str, dynamic: Dynamic | None, task: str | None, image_size: int | None) -> Source:
    made = call_function(reference)
    if isinstance(made, Source):
        return made
    model, example = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module) or not isinstance(example, Mapping | None):
        raise BadInput(f"{reference} must return a Source, a module, or (module, {{input name: tensor}})")
    return replace(_from_module(model, example, dynamic, task, image_size), name=reference.rpartition(":")[2])


def _from_pt2(path: Path) -> Source:
    from lwcompile.pt2 import load_exported

    exported = load_exported(path)
    for name, tensor in exported.state_dict.items():
        _require_finite_tensor(name, tensor, str(path))
    example, dynamic = _exported_inputs(exported, path)
    module = exported.module()
    kind = "logits" if "logits" in _output_names(exported) else "features"
    task = "causal-lm" if kind == "logits" and "input_ids" in example else "unknown"
    return Source(
        module, example, dynamic, task, kind, name=path.stem, origin=file_digest([path]), exported=exported,
        license=find_license(path.parent),
    )  # fmt: skip


def _exported_inputs(exported: Any, path: Path) -> tuple[dict[str, Tensor], Dynamic]:
    """Example tensors and free dimensions by input name; made from the signature where the archive has no samples."""
    from torch.utils._pytree import tree_leaves

    names = exported.graph_signature.user_inputs
    nodes = {node.name: node for node in exported.graph.nodes if node.op == "placeholder"}
    samples = tree_leaves(exported.example_inputs) if exported.example_inputs else [None] * len(names)
    example: dict[str, Tensor] = {}
    dynamic: Dynamic = {}
    for name, sample in zip(names, samples):
        fake = nodes[name].meta.get("val") if name in nodes else None
        if not isinstance(fake, Tensor):
            continue
        free = {d: str(size) for d, size in enumerate(fake.shape) if not isinstance(size, int)}
        if free:
            dynamic[name] = free
        sizes = [16 if d in free else int(size) for d, size in enumerate(fake.shape)]
        made = torch.zeros(sizes, dtype=fake.dtype)
        example[name] = sample if isinstance(sample, Tensor) else made
    if not example:
        raise BadInput(f"{path} takes no tensor as input, so there is nothing to compile")
    return example, dynamic


def _output_names(exported: Any) -> list[str]:
    from torch.utils._pytree import tree_unflatten

    spec = exported.call_spec.out_spec
    value = None if spec is None else tree_unflatten(list(range(spec.num_leaves)), spec)
    return list(value) if isinstance(value, Mapping) else []


def private_copy(model: nn.Module) -> nn.Module:
    """The model in float32 and eval mode, its tensors shared where they are float32; the caller's own is left alone.

    A transformers model puts out no cache any more: decoding is derived from the graph.
    """
    shared = itertools.chain(model.parameters(), model.buffers())
    memo = {id(tensor): tensor for tensor in shared if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float64)}
    try:
        clone = copy.deepcopy(model, memo)
    except Exception as error:
        raise BadInput(f"{type(model).__name__} cannot be copied ({error}): give a module that copy.deepcopy takes") from error
    for module in clone.modules():
        config: Any = getattr(module, "config", None)
        if hasattr(config, "use_cache"):
            config.use_cache = False
    return nn.Module.float(clone.eval())  # transformers' own refuses models that came from a GGUF file


def batch_dynamic(example: Mapping[str, Tensor]) -> Dynamic:
    """Dimension 0 is free where all inputs have the same size there, and it is not 1 (which tracing would fix)."""
    sizes = {tensor.shape[0] if tensor.ndim else 0 for tensor in example.values()}
    return {name: {0: "batch"} for name in example} if len(sizes) == 1 and min(sizes) > 1 else {}


def run(model: nn.Module, example: Mapping[str, Any]) -> Any:
    """The model's outputs for the example; its own exception becomes one sentence."""
    try:
        with torch.no_grad():
            return model(**example)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "no reason given"
        raise BadInput(
            f"{type(model).__name__} does not run on its example inputs {', '.join(example)}: {type(error).__name__}: {reason}"
        ) from error


def require_finite(model: nn.Module, where: str) -> None:
    """`BadInput` naming the first weight that holds NaN or infinity."""
    for name, tensor in model.state_dict().items():
        _require_finite_tensor(name, tensor, where)


def _require_finite_tensor(name: str, tensor: Any, where: str) -> None:
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.is_meta or tensor.numel() == 0:
        return
    low, high = tensor.aminmax()  # both are NaN where one value is
    if not (torch.isfinite(low) and torch.isfinite(high)):
        count = int((~torch.isfinite(tensor)).sum())
        raise BadInput(f"{where}: the weight {name} holds {count} values that are NaN or infinite; get the file again")


def weights_digest(model: nn.Module) -> str:
    """xxh3-128 over names and bytes of the state."""
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, Tensor):
            digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def file_digest(paths: list[Path]) -> str:
    """xxh3-128 over the names and bytes of files."""
    digest = xxhash.xxh3_128()
    for path in sorted(paths):
        digest.update(path.name.encode() + b"\0")
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


_LICENSES = {
    "apache-2.0": r"Apache License\s+Version 2\.0",
    "mit": r"Permission is hereby granted, free of charge, to any person obtaining a copy",
    "bsd-3-clause": r"Neither the name of .{0,80} nor the names of",
    "gpl-3.0": r"GNU GENERAL PUBLIC LICENSE\s+Version 3",
}


def find_license(folder: Path) -> str | None:
    """The licence that a README's front matter or a LICENSE file in `folder` states; None where neither does."""
    readme = folder / "README.md"
    if readme.is_file():
        front = readme.read_text(encoding="utf-8", errors="replace").partition("\n---")[0]
        if front.startswith("---") and (stated := re.search(r"^license:\s*[\"']?([\w.+-]+)", front, re.M)):
            return stated.group(1)
    for name in ("LICENSE", "LICENSE.txt", "LICENSE.md"):
        if (folder / name).is_file():
            text = (folder / name).read_text(encoding="utf-8", errors="replace")
            return next((k for k, pattern in _LICENSES.items() if re.search(pattern, text, re.S)), f"see {name}")
    return None
