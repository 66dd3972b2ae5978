"""A device that is only pretended: its tensors say "gpu", hold their values in the CPU's memory, and refuse to meet those that don't.

What runs under `Pretend` with `device="gpu"` finds the places that forget to move a tensor, on a machine without any accelerator.
Tensors without dimensions may meet any device, as on a real one; copies and `x[indices]` may cross.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

NAME = "gpu"
CROSSES = ("aten::copy_", "aten::_to_copy", "aten::index.", "aten::index_put")


def install() -> None:
    """Make torch know the name, once a process."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    if not hasattr(torch, NAME):
        _setup_privateuseone_for_python_backend(NAME)


class Far(torch.Tensor):
    """A tensor on the pretended device. inner: its values, on the CPU."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Far:
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            layout=inner.layout, device=torch.device(NAME, 0),
        )  # fmt: skip

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Far({self.inner!r})"

    def tolist(self) -> Any:
        return self.inner.tolist()

    def untyped_storage(self) -> Any:
        return self.inner.untyped_storage()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError(f"a tensor on {NAME} has no numpy array: move it to the CPU first")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class Pretend(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    far = [x for x in given if isinstance(x, Far)]
    near = [x for x in given if not isinstance(x, Far) and x.dim()]
    name = str(func._schema).partition("(")[0]
    if far and near and not name.startswith(CROSSES):
        raise RuntimeError(f"{name}: tensors {[tuple(x.shape) for x in near]} are not on {NAME}, as its others are")
    given_args, given_kwargs = tree_map(_inner, (args, kwargs))
    made = func(*given_args, **given_kwargs)
    if not func._schema.returns:
        return None
    if any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.returns):
        return kwargs["out"] if "out" in kwargs else args[0]
    device = kwargs.get("device")
    goes = torch.device(device).type == NAME if device is not None else bool(far)
    return tree_map(lambda x: Far(x) if goes and isinstance(x, torch.Tensor) else x, made)


def _inner(x: Any) -> Any:
    if isinstance(x, torch.device):
        return torch.device("cpu") if x.type == NAME else x
    return x.inner if isinstance(x, Far) else x
