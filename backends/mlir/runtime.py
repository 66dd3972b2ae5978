"""Running what IREE compiled, by the names that the description beside it gives to inputs and outputs."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lwcompile.errors import BadInput, Refused
from lwcompile.generate import Roles
from lwcompile.graph import Input, ModelGraph
from lwcompile.samples import PAST
from lwcompile.serialize import torch_value


def description(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def describe(entries: Mapping[str, ModelGraph], fixed: Mapping[str, list[str]]) -> dict[str, Any]:
    """Functions with their inputs and outputs in order; a dimension is a number, or the name of a free length."""
    return {
        name: {
            "inputs": [
                {"name": i.name, "dtype": str(i.dtype).removeprefix("torch."), "shape": _shape(i, fixed.get(name, []))}
                for i in graph.inputs
            ],
            "outputs": list(graph.outputs),
        }
        for name, graph in entries.items()
    }


def _shape(item: Input, fixed: list[str]) -> list[int | str]:
    return [item.dynamic[d] if d in item.dynamic and item.dynamic[d] not in fixed else n for d, n in enumerate(item.shape)]


class Module:
    """A compiled module. Its functions take and give tensors by name."""

    def __init__(self, path: Path) -> None:
        from iree import runtime

        if not path.is_file() or not description(path).is_file():
            raise BadInput(f"there is no compiled model with its description at {path}")
        self.functions: dict[str, Any] = json.loads(description(path).read_text(encoding="utf-8"))
        config = runtime.Config("local-task")
        self.module = runtime.load_vm_module(runtime.VmModule.mmap(config.vm_instance, str(path)), config)

    @staticmethod
    def of(path: Path) -> Module:
        """The module of a file, kept open between calls as long as the file does not change."""
        return _opened(path, path.stat().st_mtime_ns if path.is_file() else 0)

    def inputs(self, function: str) -> list[Input]:
        return [
            Input(
                i["name"],
                tuple(n if isinstance(n, int) else 1 for n in i["shape"]),
                torch_value("dtype", i["dtype"]),
                {d: n for d, n in enumerate(i["shape"]) if isinstance(n, str)},
            )
            for i in self.functions[function]["inputs"]
        ]

    def call(self, function: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        names = [i["name"] for i in self.functions[function]["inputs"]]
        if missing := [name for name in names if name not in inputs]:
            raise BadInput(f"the model takes {missing[0]!r}, which was not given")
        made = self.module[function](*(inputs[name].contiguous().numpy() for name in names))
        made = made if isinstance(made, tuple | list) else (made,)
        values = (torch.from_numpy(np.array(value.to_host())) for value in made)
        return dict(zip(self.functions[function]["outputs"], values, strict=True))

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A pass through the functions in order (an encoder's first output feeds a decoder), the decoding one left out."""
        given, outputs = dict(inputs), {}
        for name in [n for n in self.functions if n != "decode"]:
            outputs = self.call(name, given)
            given.setdefault("encoder_hidden_states", next(iter(outputs.values())))
        return outputs

    def speed(self, tokens: int = 128, seconds: float = 1.0) -> dict[str, float]:
        """Median milliseconds of a pass over `tokens` positions, and of one position behind as many cached ones."""
        first = next(iter(self.functions))
        found = {"prefill_ms": self._median(first, self._feed(first, tokens, 0), seconds)}
        if "decode" in self.functions:
            found["decode_ms"] = self._median("decode", self._feed("decode", 1, tokens), seconds)
        return found

    def _feed(self, function: str, tokens: int, past: int) -> dict[str, Tensor]:
        made = {}
        for i in self.inputs(function):
            lengths = {"past": past, "total": past + tokens}
            shape = [(lengths.get(i.dynamic[d], tokens) if d else 1) if d in i.dynamic else n for d, n in enumerate(i.shape)]
            if i.dtype.is_floating_point:
                made[i.name] = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(i.dtype)
            elif "position" in i.name:
                made[i.name] = torch.arange(past, past + shape[-1]).expand(shape).contiguous().to(i.dtype)
            else:
                made[i.name] = torch.ones(shape, dtype=i.dtype)
        return made

    def _median(self, function: str, feed: Mapping[str, Tensor], seconds: float) -> float:
        self.call(function, feed)
        times, end = [], time.perf_counter() + seconds
        while not times or (time.perf_counter() < end and len(times) < 200):
            start = time.perf_counter()
            self.call(function, feed)
            times.append(time.perf_counter() - start)
        return 1e3 * float(np.median(times))


class IreeStep:
    """A `DecodeStep` (see `lwcompile.generate`) over a module; its cache is the past keys and values by name."""

    def __init__(self, module: Module) -> None:
        if "decode" not in module.functions:
            raise Refused("the file has no function that takes cached keys and values, so it cannot continue a sequence")
        self.module = module
        self.roles = Roles.of_inputs(module.inputs("decode"))

    def __call__(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
        roles = self.roles
        if roles.padding is None and not attention_mask.all():
            raise BadInput("this model has no attention mask, so it cannot take padded prompts; generate one at a time")
        feed = {roles.tokens: input_ids, roles.padding: attention_mask, roles.positions: position_ids}
        feed |= cache or {i.name: torch.zeros(len(input_ids), i.shape[1], 0, i.shape[3], dtype=i.dtype) for i in roles.pasts}
        made = self.module.call("decode", {name: value for name, value in feed.items() if name is not None})
        logits = next(iter(made.values()))
        return logits[:, -1].float(), {i.name: made["present." + i.name.removeprefix(PAST)] for i in roles.pasts}


@lru_cache(maxsize=2)
def _opened(path: Path, stamp: int) -> Module:
    return Module(path)
