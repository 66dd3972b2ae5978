"""Loading Hugging Face folders and GGUF files strictly: local files, no pickle, no foreign code, nothing missing or NaN."""

from __future__ import annotations

import contextlib
import functools
import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lwcompile.describe import describe_model
from lwcompile.errors import BadInput
from lwcompile.sources import TOKENIZER_FILES, Source, file_digest, find_license, require_finite


def open_directory(path: Path, *, image_size: int | None = None) -> Source:
    """A folder with config.json and safetensors, in float32."""
    config = _read_config(path)
    files = _weight_files(path)
    for file in files:
        _require_whole(file)
    if (method := (config.get("quantization_config") or {}).get("quant_method")) is not None:
        raise BadInput(f"{path} is quantized already ({method}): name the full-precision model")
    transformers = _transformers()
    name = next((a for a in config.get("architectures") or [] if hasattr(transformers, a)), None)
    if name is None:
        named = ", ".join(config.get("architectures") or []) or "none"
        own = ", and its own code is not run" if "auto_map" in config else ""
        raise BadInput(f"{path}: config.json names the architecture {named}, which transformers does not have{own}")
    model = _load(getattr(transformers, name), path)
    source = describe_model(model, image_size=image_size, config=config)
    return _located(source, path.resolve().name, path, origin_files(path), None)


def origin_files(path: Path) -> list[Path]:
    """The files of a folder that make the model what it is: weights and configuration."""
    return [*_weight_files(path), path / "config.json"] if (path / "config.json").is_file() else []


def open_gguf(path: Path) -> Source:
    """A GGUF file, dequantized to float32, with the tokeniser inside it."""
    from lwcompile.gguf_header import read_gguf_header

    transformers = _transformers()
    try:
        header = read_gguf_header(path)
    except ImportError:
        raise BadInput(f"{path} needs gguf: pip install 'lwcompile[hf]'") from None
    with _parsed_once():
        model = _load(transformers.AutoModelForCausalLM, path.parent, gguf_file=path.name)
    source = _located(describe_model(model), path.stem, path.parent, [path], path.name)
    return replace(source, license=header.metadata.get("general.license") or source.license)


def load_tokenizer(folder: Path, gguf_file: str | None = None) -> Any:
    """The tokeniser of a folder, or of a GGUF file in it."""
    transformers = _transformers()
    with quiet(transformers):
        try:
            extra = {} if gguf_file is None else {"gguf_file": gguf_file}
            return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, **extra)
        except Exception as error:
            raise BadInput(f"{folder}: the tokenizer cannot be loaded: {_first_line(error)}") from error


def _load(kind: Any, folder: Path, **extra: Any) -> Any:
    """`from_pretrained`, strictly: local files, no pickle, no foreign code, float32, nothing missing, nothing NaN."""
    transformers = _transformers()
    where = folder / extra["gguf_file"] if "gguf_file" in extra else folder
    strict = {} if "gguf_file" in extra else {"use_safetensors": True}
    with quiet(transformers):
        for attention in ("sdpa", "eager"):
            try:
                model, info = kind.from_pretrained(
                    folder, local_files_only=True, trust_remote_code=False, dtype=torch.float32,
                    attn_implementation=attention, output_loading_info=True, **strict, **extra,
                )  # fmt: skip
                break
            except Exception as error:
                if attention == "sdpa" and "scaled_dot_product_attention" in str(error):
                    continue
                raise BadInput(f"{where} cannot be loaded: {type(error).__name__}: {_first_line(error)}") from error
    require_finite(model, str(where))
    if missing := sorted(info["missing_keys"]):
        _require_unused(model, missing, where)
    return model


def _require_unused(model: Any, missing: list[str], where: Path) -> None:
    """Weights that the file lacks would be random: refuse, unless the model runs without the part that holds them."""
    parts = {name.split(".")[0] for name in missing}
    owned = {name.split(".")[0]: [] for name, _ in model.named_parameters()}
    for name, _ in model.named_parameters():
        owned[name.split(".")[0]].append(name)
    whole = all(set(owned.get(part, [])) <= set(missing) for part in parts)
    if whole:
        for part in parts:
            setattr(model, part, None)
        with contextlib.suppress(Exception):
            describe_model(model)
            return
    named = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
    raise BadInput(f"{where} lacks weights that the model needs: {named}; get the whole model")


def _read_config(path: Path) -> dict[str, Any]:
    file = path / "config.json"
    if not file.is_file():
        raise BadInput(f"{path} holds no config.json: name a Hugging Face model folder, a .gguf or .pt2 file")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadInput(f"{file} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise BadInput(f"{file} is not a model's configuration")
    return config


def _weight_files(path: Path) -> list[Path]:
    index = path / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise BadInput(f"{index} is damaged: get the model again") from None
        for name in names:
            if not (path / name).is_file():
                raise BadInput(f"{path} lacks {name}, which {index.name} names: get the whole model")
        return [path / name for name in names]
    if (path / "model.safetensors").is_file():
        return [path / "model.safetensors"]
    pickles = sorted(p.name for p in path.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickles:
        raise BadInput(f"{path} holds only pickled weights ({pickles[0]}), which are never loaded: convert them to safetensors")
    raise BadInput(f"{path} holds no model.safetensors: get the whole model")


def _require_whole(file: Path) -> None:
    """A safetensors file is as long as its header says."""
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > size - 8:
                raise BadInput(f"{file} is truncated: its header does not fit in its {size} bytes; get the file again")
            header = json.loads(stream.read(length))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise BadInput(f"{file} is no safetensors file: its header cannot be read") from None
    wanted = 8 + length + max(ends, default=0)
    if size < wanted:
        raise BadInput(f"{file} is truncated: it has {size} of {wanted} bytes; get the file again")


def _located(source: Source, name: str, folder: Path, files: list[Path], gguf_file: str | None) -> Source:
    has_tokenizer = gguf_file is not None or any((folder / name).is_file() for name in TOKENIZER_FILES)
    return replace(
        source, name=name, tokenizer_dir=folder if has_tokenizer else None, gguf_file=gguf_file,
        license=find_license(folder), origin=file_digest(files),
    )  # fmt: skip


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise BadInput("Hugging Face models need transformers: pip install 'lwcompile[hf]'") from None
    return transformers


@contextlib.contextmanager
def _parsed_once() -> Iterator[None]:
    """transformers parses a GGUF file twice and builds its table of names once a layer: half of 20 s for 135 M parameters."""
    import gguf

    names = ("GGUFReader", "get_tensor_name_map")
    originals = {name: getattr(gguf, name) for name in names}
    for name, original in originals.items():
        setattr(gguf, name, functools.lru_cache(maxsize=1)(original))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(gguf, name, original)


@contextlib.contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """No progress bars and no advice from transformers while it loads."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # the bar of GGUF conversion has no switch
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
