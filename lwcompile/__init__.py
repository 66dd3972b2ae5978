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
    "Artifact": "lwcompile.artifact",
    "Plan": "lwcompile.plans",
    "Program": "lwcompile.program",
    "Recipe": "lwcompile.recipe",
    "Result": "lwcompile.pipeline",
    "Spec": "lwcompile.spec",
    "capture": "lwcompile.pipeline",
    "compress": "lwcompile.pipeline",
    "export": "lwcompile.pipeline",
    "load": "lwcompile.artifact",
    "plan": "lwcompile.pipeline",
}

if TYPE_CHECKING:
    from lwcompile.artifact import Artifact, load
    from lwcompile.pipeline import Result, capture, compress, export, plan
    from lwcompile.plans import Plan
    from lwcompile.program import Program
    from lwcompile.recipe import Recipe
    from lwcompile.spec import Spec

__all__ = [
    "API_VERSION",
    "Artifact",
    "Plan",
    "Program",
    "Recipe",
    "Result",
    "Spec",
    "__version__",
    "capture",
    "compress",
    "export",
    "load",
    "plan",
]


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module 'lwcompile' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
