"""lwcompile ("layerwise"): turn a pretrained PyTorch model into a smaller, faster one, layer by layer.

    import lwcompile as lw
    program = lw.capture("model_dir")
    plan = lw.plan(program, avg_bits=4.25)
    lw.export(program, "model.onnx", plan=plan)

Names load on first use, so that importing the package (and `lwcompile --help`) does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

API_VERSION = 1
"""The version of the pass contract; plugins state the one they were written for, and the registry checks it."""

_LAZY: dict[str, str] = {
    "Spec": "lwcompile.spec",
}

if TYPE_CHECKING:
    from lwcompile.spec import Spec

__all__ = ["API_VERSION", "Spec", "__version__"]


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module 'lwcompile' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
