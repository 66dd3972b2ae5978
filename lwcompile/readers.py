"""What is in a dataset's files: texts, conversations, images and named arrays, before any tokeniser or model sees them.

Each reader opens one kind of file and yields plain Python or numpy values. Pickles are never read. Two texts are on
every machine that runs CPython and are used when the user names none: the language reference that `help()` shows
(`pydoc_data.topics`, about 0.5 MB of English with code) for calibration, and the docstrings of the standard library's
modules (about 0.9 MB) for evaluation. They were written apart; `lwcompile.data` checks that.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lwcompile.errors import BadInput

TEXT_SUFFIXES = {"", ".txt", ".md", ".rst", ".text"}
TABLE_SUFFIXES = {".jsonl", ".ndjson", ".parquet"}
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"}
ARRAY_SUFFIXES = {".npz", ".safetensors"}

Document = str | list[dict[str, Any]]
"""A text, or a conversation: messages with "role" and "content"."""


def topics() -> list[str]:
    """The Python language reference as `help()` prints it, one document per topic."""
    try:
        from pydoc_data.topics import topics as pages
    except ImportError:
        raise BadInput("this Python lacks pydoc_data, the default calibration text: give a text with --dataset FILE") from None
    return [pages[key] for key in sorted(pages)]


def docstrings() -> list[str]:
    """The docstrings of the standard library's top-level modules, one document per source file."""
    root = Path(ast.__file__).parent
    documents = []
    for path in sorted(root.glob("*.py")):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        kinds = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
        found = [doc for node in ast.walk(tree) if isinstance(node, kinds) and (doc := ast.get_docstring(node))]
        if found:
            documents.append("\n\n".join(found) + "\n")
    if not documents:
        raise BadInput(f"no sources in {root}, the default evaluation text: give a text with --eval-dataset FILE")
    return documents


BUILTIN_TEXTS: dict[str, Callable[[], list[str]]] = {"topics": topics, "docstrings": docstrings}


def list_files(path: Path, suffixes: set[str]) -> list[Path]:
    """`path` itself, or the files below it with one of these suffixes, sorted by name."""
    if path.is_file():
        return [path]
    return sorted(p for p in path.rglob("*") if p.is_file() and p.suffix.lower() in suffixes and p.name[0] != ".")


def read_documents(path: Path) -> Iterator[Document]:
    """The texts or conversations of one text, jsonl or parquet file."""
    match path.suffix.lower():
        case ".jsonl" | ".ndjson":
            yield from _jsonl(path)
        case ".parquet":
            yield from _parquet(path)
        case _:
            yield _text(path)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not UTF-8 text (byte {error.start}): convert it, or name another dataset") from None


def _jsonl(path: Path) -> Iterator[Document]:
    for number, line in enumerate(_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise BadInput(f"{path}:{number}: not JSON ({error.msg}, column {error.colno})") from None
        yield _document(row, f"{path}:{number}")


def _parquet(path: Path) -> Iterator[Document]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise BadInput(f"{path} needs pyarrow: pip install 'lwcompile[hf]'") from None
    try:
        table = parquet.ParquetFile(path)
        columns = [name for name in ("messages", "text") if name in table.schema_arrow.names]
        if not columns:
            raise BadInput(f"{path} has no column 'text' or 'messages', only {', '.join(table.schema_arrow.names)}")
        for batch in table.iter_batches(columns=columns):
            for number, row in enumerate(batch.to_pylist()):
                yield _document(row, f"{path}, row {number}")
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} cannot be read as parquet: {error}") from None


def _document(row: Any, where: str) -> Document:
    if isinstance(row, str):
        return row
    if isinstance(row, Mapping):
        if isinstance(text := row.get("text"), str):
            return text
        messages = row.get("messages")
        if isinstance(messages, list) and all(isinstance(m, Mapping) and "role" in m for m in messages):
            return [dict(m) for m in messages]
    raise BadInput(f"{where}: a row is a string, or has a field 'text' or 'messages' (a list of role and content)")


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The named arrays of an npz or safetensors file. Object arrays, which hold pickles, are refused."""
    try:
        if path.suffix.lower() == ".npz":
            with np.load(path, allow_pickle=False) as file:
                return {name: file[name] for name in file.files}
        from safetensors.torch import load_file

        return {name: _numpy(tensor) for name, tensor in load_file(path).items()}
    except Exception as error:
        hint = "object arrays hold pickles and are refused" if "pickle" in str(error) else str(error)
        raise BadInput(f"{path} cannot be read as arrays: {hint}") from None


def _numpy(tensor: Any) -> np.ndarray:
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()


def image_settings(model_dir: Path | None, shape: tuple[int, int] | None) -> dict[str, Any]:
    """preprocessor_config.json where the model has one; else a plain resize, scaled to [-1, 1].

    shape: (height, width) that the model takes; it wins over the file's own size.
    """
    path = None if model_dir is None else model_dir / "preprocessor_config.json"
    settings: dict[str, Any] = {}
    if path is not None and path.is_file():
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise BadInput(f"{path} is not JSON: {error}") from None
    if shape is None:
        return settings
    target = settings.get("crop_size") if settings.get("do_center_crop") else settings.get("size")
    if target is not None and _height_width(target) == shape:
        return settings
    return settings | {"size": {"height": shape[0], "width": shape[1]}, "do_center_crop": False}


def read_image(path: Path, settings: Mapping[str, Any]) -> np.ndarray:
    """One image as float32 [channels, height, width], processed as a preprocessor_config.json says.

    In its order: resize (`size`: shortest_edge, or height and width), centre crop, rescale, normalise.
    """
    try:
        from PIL import Image
    except ImportError:
        raise BadInput("images need pillow: pip install 'lwcompile[hf]'") from None
    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except OSError as error:
        raise BadInput(f"{path} cannot be read as an image: {error}") from None
    if settings.get("do_resize", True):
        image = image.resize(_target(image.size, settings.get("size")), settings.get("resample", 3))
    if settings.get("do_center_crop", False):
        height, width = _height_width(settings["crop_size"])
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    pixels = np.asarray(image, dtype=np.float32)
    if settings.get("do_rescale", True):
        pixels = pixels * np.float32(settings.get("rescale_factor", 1 / 255))
    if settings.get("do_normalize", True):
        mean, deviation = (np.asarray(settings.get(k, 0.5), np.float32) for k in ("image_mean", "image_std"))
        pixels = (pixels - mean) / deviation
    return np.ascontiguousarray(np.moveaxis(pixels, -1, 0), dtype=np.float32)


def _target(now: tuple[int, int], size: Any) -> tuple[int, int]:
    """The (width, height) that a preprocessor's `size` asks for."""
    width, height = now
    if size is None:
        return now
    if isinstance(size, Mapping) and "shortest_edge" in size:
        edge = int(size["shortest_edge"])
        return (edge, int(edge * height / width)) if width <= height else (int(edge * width / height), edge)
    height, width = _height_width(size)
    return width, height


def _height_width(size: Any) -> tuple[int, int]:
    if isinstance(size, Mapping):
        if "shortest_edge" in size:
            return int(size["shortest_edge"]), int(size["shortest_edge"])
        return int(size["height"]), int(size["width"])
    return (int(size), int(size)) if isinstance(size, int) else (int(size[0]), int(size[1]))


def load_function(reference: str) -> Any:
    """The object that `module:function` (or `path/to/file.py:function`) names; the working directory is searched."""
    module_name, _, attribute = reference.rpartition(":")
    if not module_name or not attribute.isidentifier():
        raise BadInput(f"{reference!r} is not of the form module:function")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        module = _import_file(Path(module_name)) if module_name.endswith(".py") else importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise BadInput(f"{reference}: there is no module {error.name!r} here or installed") from None
    except Exception as error:
        raise BadInput(f"{reference}: importing {module_name} raised {type(error).__name__}: {error}") from error
    if not hasattr(module, attribute):
        raise BadInput(f"{reference}: module {module_name} has no {attribute!r}")
    return getattr(module, attribute)


def call_function(reference: str) -> Any:
    """What `module:function` returns; its own exception becomes one sentence."""
    function = load_function(reference)
    if not callable(function):
        raise BadInput(f"{reference} is not a function")
    try:
        return function()
    except Exception as error:
        raise BadInput(f"{reference} raised {type(error).__name__}: {error}") from error


def _import_file(path: Path) -> Any:
    if not path.is_file():
        raise BadInput(f"there is no file {path}")
    name = f"lwcompile_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
