"""Graphs of small models, traced once a process: tracing one takes longer than most of what is tested of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lwcompile.graph import ModelGraph
from lwcompile.rundir import content_key
from lwcompile.store import tensor_key
from lwcompile.tracing import capture_module

_made: dict[str, ModelGraph] = {}


def captured_module(model: nn.Module, example: Mapping[str, Any], dynamic: Mapping[str, Mapping[int, str]]) -> ModelGraph:
    """A copy of what `capture_module` makes of a transformers model, known by its class, configuration, tensors and example."""
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    held = {name: [tensor_key(value), str(value.dtype)] for name, value in tensors.items()}
    given = {name: tensor_key(value) if isinstance(value, Tensor) else repr(value) for name, value in example.items()}
    free = {name: dict(sizes) for name, sizes in dynamic.items()}
    key = content_key(type(model).__qualname__, str(model), str(model.config), model.training, held, given, repr(free))
    if key not in _made:
        _made[key] = capture_module(model, dict(example), free)[0]
    return _made[key].copy()
