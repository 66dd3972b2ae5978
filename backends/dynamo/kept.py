"""Code that is kept from one process to the next, so that a model compiled before costs little more than being traced.

    key       dynamo's graph in words, its inputs' sizes and types, what the weights hold, versions, torch's settings, our code
    entry     <Inductor's cache>/lwcompile/<key>/: the code, how dynamo's arguments become its own, and folded tensors

Weights are not kept: the code takes them as they stand in the model, or turned round, and small ones that were computed from them
from the entry. Graphs with free sizes are compiled anew, since what their code assumes of the sizes has to reach dynamo's guards;
so are graphs under a plan or a recipe.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor, fx

from lwcompile.backends.dynamo.capture import Captured, source_of, stored_arguments
from lwcompile.backends.inductor.native import instructions
from lwcompile.contract import Code, Codegen
from lwcompile.registry import make, plugins
from lwcompile.rundir import content_key, versions
from lwcompile.store import tensor_key

log = logging.getLogger("lwcompile")

LIMIT = 64 << 20
"""Bytes of computed tensors past which an entry is not worth its disk."""

SOURCES = ".py", ".cpp", ".h"
"""Files that a codegen's code depends on."""

Place = tuple[str, Any]
"""Where a tensor of the code comes from: `argument` or `turned` with its position, or `kept` with its name in the entry."""

_loaded: dict[str, Callable[[Sequence[Tensor]], Sequence[Any]]] = {}


@dataclass(frozen=True)
class Entry:
    """What `Compiled` needs beside dynamo's arguments."""

    run: Callable[[Sequence[Tensor]], Sequence[Any]]
    frozen: list[int]
    numbers: dict[int, float]
    inputs: list[int]
    results: list[tuple[str, Any]]


def key(module: fx.GraphModule, arguments: Sequence[Any], codegen: str) -> str | None:
    """What the code of a graph depends on; None if it cannot be said in words."""
    import torch._inductor.config as inductor

    if inductor.force_disable_caches or (words := _words(module, arguments)) is None:
        return None
    modules = [__name__, *(p.value.partition(":")[0] for p in plugins("codegens"))]
    made_by = [codegen, *map(_sources, modules)]
    settings = [
        inductor.save_config_portable(), torch.get_num_threads(), str(torch.get_default_dtype()), torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(), torch.is_inference_mode_enabled(), torch.is_grad_enabled(),
        torch.backends.cpu.get_cpu_capability(), instructions(), torch.__version__,
    ]  # fmt: skip
    return content_key(words, made_by, settings, versions())


@cache
def _sources(module: str) -> list[str]:
    """Hashes of the files beside a module. It is not imported for it: all codegens together take as long as loading a model's code."""
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        return []
    file = Path(spec.origin)
    files = [file] if "." not in module else sorted(f for f in file.parent.rglob("*") if f.suffix in SOURCES)
    return [xxhash.xxh3_64_hexdigest(f.read_bytes()) for f in files]


def _words(module: fx.GraphModule, arguments: Sequence[Any]) -> list[Any] | None:
    numbers: dict[fx.Node, str] = {}
    lines: list[str] = []
    given, stored = iter(arguments), stored_arguments(module, arguments)
    memory: dict[int, int] = {}
    for i, node in enumerate(module.graph.nodes):
        numbers[node] = f"%{i}"
        if node.op == "placeholder":
            value = next(given)
            if not isinstance(value, Tensor | int | float) or isinstance(value, torch.SymInt):
                return None
            lines.append(f"{source_of(node)} {_about(node, value, i in stored, memory)}")
        elif node.op == "get_attr":
            value = getattr(module, str(node.target), None)
            if not isinstance(value, Tensor):
                return None
            lines.append(tensor_key(value))
        elif node.op in ("call_function", "call_method", "output"):
            args = fx.map_arg((node.args, node.kwargs), lambda n: _Word(numbers[n]))
            lines.append(f"{_called(node.target)} {args!r}")
        else:
            return None
    text = "\n".join(lines)
    return None if " at 0x" in text else [text]  # an object that has no words of its own


class _Word(str):
    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def _called(target: Any) -> str:
    if isinstance(target, str | torch._ops.OpOverload):
        return str(target)
    return f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', repr(target))}"


def _about(node: fx.Node, value: Any, stored: bool, memory: dict[int, int]) -> list[Any]:
    """Of an argument: its form, with whom it shares memory, and what it holds if the code depends on that."""
    fake = node.meta["example_value"]
    if not isinstance(value, Tensor):
        return [repr(value)]
    if any(isinstance(n, torch.SymInt) for n in (*fake.shape, *fake.stride())):
        return [object()]  # not in words
    place = memory.setdefault(value.untyped_storage()._cdata, len(memory))
    form = [list(value.shape), list(value.stride()), value.storage_offset(), value.dtype, value.device, type(value).__name__]
    holds = tensor_key(value) if stored or (value.dim() == 0 and value.device.type == "cpu") else ""
    return [*form, value.requires_grad, value.is_inference(), place, holds]


def find(key: str, arguments: Sequence[Any]) -> Entry | None:
    """The entry of this key, its code bound to the model's weights."""
    folder = _folder(key)
    try:
        how = json.loads((folder / "how.json").read_text(encoding="utf-8"))
        codegen: Codegen = make("codegens", how["codegen"])
        if key not in _loaded:
            _loaded[key] = codegen.load(folder / "code")
        kept = {}
        if any(kind == "kept" for kind, _ in how["tensors"]):
            from safetensors.torch import load_file

            kept = load_file(folder / "tensors.safetensors")
        tensors = tuple(_taken(kind, at, arguments, kept) for kind, at in how["tensors"])
    except FileNotFoundError:
        return None
    except Exception as error:  # the pieces of a cache that another version wrote, or that something cut short
        log.info("kept code in %s cannot be used: %s", folder, error)
        return None
    run = codegen.bind(_loaded[key], tensors)
    numbers = {int(at): number for at, number in how["numbers"].items()}
    return Entry(run, how["frozen"], numbers, how["inputs"], [(kind, at) for kind, at in how["results"]])


def _taken(kind: str, at: Any, arguments: Sequence[Any], kept: dict[str, Tensor]) -> Tensor:
    if kind == "kept":
        return kept[at]
    return arguments[at].detach() if kind == "argument" else arguments[at].detach().t().contiguous()


def keep(key: str, captured: Captured, codegen: Codegen, code: Code) -> None:
    """Write the entry, if code and results can be written."""
    if code.save is None or any(kind == "constant" and not isinstance(at, int | float | None) for kind, at in captured.results):
        return
    places, kept = _places(captured, code.tensors)
    if sum(t.nbytes for t in kept.values()) > LIMIT:
        return
    how = {
        "codegen": str(codegen.spec()), "tensors": places, "frozen": sorted(captured.frozen), "numbers": captured.numbers,
        "inputs": captured.inputs, "results": captured.results,
    }  # fmt: skip
    with _new(_folder(key)) as folder:
        code.save(folder / "code")
        if kept:
            from safetensors.torch import save_file

            save_file(kept, folder / "tensors.safetensors")
        (folder / "how.json").write_text(json.dumps(how), encoding="utf-8")


def _places(captured: Captured, tensors: Sequence[Tensor]) -> tuple[list[Place], dict[str, Tensor]]:
    places: list[Place] = []
    kept: dict[str, Tensor] = {}
    known = {_memory(value): i for i, value in captured.frozen.items()}
    contents = {tensor_key(value.t()): i for i, value in captured.frozen.items() if value.dim() == 2}
    for n, tensor in enumerate(tensors):
        if (i := known.get(_memory(tensor))) is not None:
            places.append(("argument", i))
        elif (i := contents.get(tensor_key(tensor))) is not None:
            places.append(("turned", i))
        else:
            places.append(("kept", str(n)))
            kept[str(n)] = tensor.contiguous().clone()
    return places, kept


def _memory(value: Tensor) -> tuple[Any, ...]:
    return value.data_ptr(), tuple(value.shape), value.stride(), value.dtype


def _folder(key: str) -> Path:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir()) / "lwcompile" / key


@contextlib.contextmanager
def _new(folder: Path) -> Iterator[Path]:
    """A folder that appears whole or not at all; what cannot be written is not kept."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=".", dir=folder.parent))
        try:
            yield made
            made.rename(folder)
        finally:
            shutil.rmtree(made, ignore_errors=True)
    except Exception as error:
        log.info("compiled code is not kept: %s", error)
