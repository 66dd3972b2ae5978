"""hf: a compressed program as a directory that transformers loads without this package.

    quantized linear             ->  compressed-tensors, `pack-quantized`: one config group a format, 2 to 8 bits
    dropped block                ->  fewer layers in config.json, the later ones renumbered
    anything else dense          ->  the tensor under its own name

Source: the compressed-tensors format (`weight_packed`, `weight_scale`, `weight_shape`), packed by its own library.
Cost: a model is built without weights, and loaded once for the parity check.
Refuses: models that did not come with a configuration, several entry points, half a dropped block, zero points, groups that do not
divide the weight, quantized embeddings (and the heads tied to them), and tensors that the architecture has no name for.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import torch
from torch import Tensor

from lwcompile.backends.hf.layers import renumber
from lwcompile.backends.hf.packed import compressed, scheme
from lwcompile.context import Context
from lwcompile.contract import Backend, Parity, StoredTensor
from lwcompile.errors import BadInput, Refused, VerificationError
from lwcompile.formats import NumericFormat
from lwcompile.graph import ModelGraph
from lwcompile.manager import relative_error
from lwcompile.packed import packed_weights
from lwcompile.program import Program

CONFIG = "config.json"


@dataclass(frozen=True)
class HuggingFace(Backend):
    """`model.safetensors` and `config.json`, loadable by `from_pretrained`. `tolerance`: of parity, relative to the largest output."""

    name: ClassVar[str] = "hf"
    file: ClassVar[str] = "model.safetensors"
    writes: ClassVar[tuple[str, ...]] = (CONFIG,)

    tolerance: float = 1e-4

    def unsupported(self, program: Program) -> list[str]:
        try:
            self._checkpoint(program)
        except (Refused, BadInput) as error:
            return [error.reason if isinstance(error, Refused) else str(error)]
        return []

    def price(self, tensor: StoredTensor) -> int:
        """Codes as 32-bit words, the scales in float16 or float32, and the shape."""
        if tensor.format is None:
            return math.prod(tensor.shape) * getattr(torch, tensor.dtype).itemsize
        if tensor.role == "embedding":
            raise Refused("transformers 5 does not load quantized embeddings")
        format, (rows, columns) = tensor.format, tensor.shape
        scheme(format, columns)
        words = rows * -(-columns * format.bits // 32)
        return 4 * words + rows * format.groups(columns) * format.dtype.itemsize + 16

    def overhead(self, program: Program) -> int:
        """The header of the file: name, dtype, shape and place of each tensor."""
        return 120 * len(program.main.tensors)

    def lower(self, program: Program, path: Path, ctx: Context) -> Parity:
        from safetensors.torch import save_file

        tensors, config = self._checkpoint(program)
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".lwcompile-", dir=path.parent) as scratch:
            draft = Path(scratch)
            try:
                save_file(tensors, draft / path.name, metadata={"format": "pt"})
                (draft / CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")
            except OSError as error:
                raise BadInput(f"cannot write {path}: {error.strerror or error}; free some space") from error
            parity = self._parity(program.main, draft, ctx)
            if not parity.worst <= self.tolerance:
                raise VerificationError(
                    f"what transformers loads is {parity.worst:.1e} of the largest value away from the graph, past {self.tolerance:g}; "
                    "nothing was written"
                )
            for name in (path.name, CONFIG):
                (draft / name).chmod(0o644)
                (draft / name).replace(path.parent / name)
        return parity

    def run(self, path: Path, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One forward pass of the directory, by transformers; outputs by name."""
        model = load_model(path.parent)
        with torch.no_grad():
            made = model(**inputs)
        return {name: value for name, value in made.items() if isinstance(value, Tensor)}

    # --- the checkpoint

    def _checkpoint(self, program: Program) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Every tensor under the name that the architecture has for it, and the configuration that goes with them."""
        if set(program.entries) - {"decode"} != {"forward"}:
            raise Refused(f"it has the entry points {', '.join(program.entries)}, and a directory here holds one model")
        graph, config = program.main, configuration(program)
        found = list(packed_weights(graph))
        packed = {weight.name: weight.read(graph) for weight in found}
        parts = {part for weight in found for part in (weight.codes, weight.scale, weight.zero)}
        dense = {name: graph.tensor(name) for name in graph.tensors if name not in parts}
        expected = state_names(config)
        config, names = renumber(config, expected, {*dense, *packed})
        tensors = {names[name]: value.contiguous() for name, value in dense.items() if name in names}
        groups: dict[NumericFormat, list[str]] = {}
        for weight, quantized in packed.items():
            module = names[weight].removesuffix(".weight")
            groups.setdefault(quantized.format, []).append(module)
            tensors |= {f"{module}.{part}": value for part, value in compressed(quantized).items()}
        if groups:
            named = {"re:^(" + "|".join(map(re.escape, modules)) + ")$": format for format, modules in groups.items()}
            config["quantization_config"] = {
                "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed", "ignore": [],
                "config_groups": {
                    f"group_{i}": {"targets": [target], "weights": scheme(format, None), "format": "pack-quantized"}
                    for i, (target, format) in enumerate(named.items())
                },
            }  # fmt: skip
        return _one_each(tensors), config

    def _parity(self, graph: ModelGraph, folder: Path, ctx: Context) -> Parity:
        model, found = load_model(folder), dict.fromkeys(graph.outputs, 0.0)
        dense = graph.module()
        for inputs in ctx.probes(graph):
            with torch.no_grad():
                wanted = dense(*inputs)
                made = model(**{i.name: value for i, value in zip(graph.inputs, inputs)})
            for name, value in zip(graph.outputs, wanted):
                if name not in made:
                    raise VerificationError(f"the model that transformers loads has no output {name!r}")
                found[name] = max(found[name], relative_error(value, made[name]))
        return Parity(found, self.tolerance, "loaded by transformers")


def configuration(program: Program) -> dict[str, Any]:
    """The source's config.json; `Refused` if it came without one, or names no architecture that transformers has."""
    path = program.asset_dir / CONFIG if program.asset_dir is not None else None
    if path is None or not path.is_file():
        raise Refused("it did not come with a Hugging Face configuration (config.json)")
    config = json.loads(path.read_text(encoding="utf-8"))
    _architecture(config)
    return config


def _architecture(config: Mapping[str, Any]) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise BadInput("this backend needs transformers: pip install 'lwcompile[hf]'") from error
    name = next(iter(config.get("architectures") or ()), None)
    if name is None or not hasattr(transformers, name):
        raise Refused(
            f"its configuration names the architecture {name!r}, which transformers {transformers.__version__} does not have"
        )
    return getattr(transformers, name)


def state_names(config: Mapping[str, Any]) -> list[str]:
    """Every name in a checkpoint of this configuration."""
    from transformers import AutoConfig

    settings = {key: value for key, value in config.items() if key != "model_type"}
    with torch.device("meta"):
        model = _architecture(config)._from_config(AutoConfig.for_model(config["model_type"], **settings))
    return list(model.state_dict())


def load_model(folder: Path) -> Any:
    """What transformers makes of the directory, in float32."""
    from transformers.utils import logging

    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return _architecture(config).from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    except (ImportError, OSError, RuntimeError, ValueError, KeyError) as error:
        raise VerificationError(f"transformers does not load {folder}: {str(error).splitlines()[0]}") from error
    finally:
        logging.set_verbosity(before)


def _one_each(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tied tensors once, under their first name: loading ties them again."""
    kept: dict[tuple[int, tuple[int, ...]], str] = {}
    for name, value in tensors.items():
        kept.setdefault((value.data_ptr(), tuple(value.shape)), name)
    return {name: tensors[name] for name in kept.values()}
