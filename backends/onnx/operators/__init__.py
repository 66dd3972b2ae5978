"""The operator table: one module per family; importing this package registers them all."""

from lwcompile.backends.onnx.operators import (  # noqa: F401
    attention,
    creation,
    elementwise,
    indexing,
    linear,
    linear_attention,
    reductions,
    relu_attention,
    rotary,
    shapes,
    sizes,
    windows,
)
