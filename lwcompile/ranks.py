"""Several processes on one run, as torchrun starts them: who this one is, and what they tell each other.

Every process does the same things in the same order; what one of them can do for all, such as scoring, the first does alone and the
others then find in the run directory. Only the first writes and prints. Alone, everything here is free.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from lwcompile.errors import InternalError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
WAIT = timedelta(days=7)
"""The others wait for the first as long as a long analysis takes; torchrun ends them if it fails."""

_opened = False


def prepared() -> bool:
    """Whether a process group is open here, or torchrun has prepared one."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        return True
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "TORCHELASTIC_RUN_ID" in os.environ  # schedulers set the first too


def rank() -> int:
    """This process's number; 0 is the first, and the only one that writes."""
    return join()[0] if prepared() else 0


def join() -> tuple[int, int]:
    """This process's rank and the number of ranks: of the open process group, or of the one that torchrun prepared."""
    if not prepared():
        return 0, 1
    import torch.distributed as dist

    global _opened
    if not dist.is_initialized():
        dist.init_process_group(timeout=WAIT)
        _opened = True
    return dist.get_rank(), dist.get_world_size()


def leave() -> None:
    """Close the process group, if it was opened here."""
    global _opened
    if _opened:
        import torch.distributed as dist

        dist.destroy_process_group()
        _opened = False


def told(value: T) -> T:
    """What the first process says; the others' values do not count."""
    me, count = join()
    if count == 1:
        return value
    import torch.distributed as dist

    box = [value if me == 0 else None]
    dist.broadcast_object_list(box, src=0)
    return box[0]  # type: ignore[return-value]


def require_same(value: object, what: str) -> None:
    """`InternalError` in a process that has another value here than the first."""
    if value != told(value):
        raise InternalError(f"process {rank()} does not have the {what} of the first one: give all of them one run directory")


@contextmanager
def first_alone() -> Iterator[None]:
    """The first process runs what stands below before the others do, and leaves them its results in the run directory."""
    me, _ = join()
    if me:
        told(None)
    try:
        yield
    finally:
        if not me:
            told(None)


def add_up(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its sum over the ranks, in place."""
    if join()[1] == 1:
        return
    import torch
    import torch.distributed as dist

    flat = torch.cat([t.reshape(-1) for t in tensors])
    dist.all_reduce(flat)
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors])):
        tensor.copy_(part.view_as(tensor))
