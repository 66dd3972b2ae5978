"""Giving memory back. glibc keeps what large temporaries freed, one pool a thread: a scoring pass over a model of half a gigabyte
grew to 19 GB that way, and stays near 3 GB with a trim after each batch."""

from __future__ import annotations

import ctypes
import gc
from functools import cache
from typing import Any


@cache
def _trim() -> Any:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError):  # another C library, which has no such call and no such habit
        return None


def give_back() -> None:
    """Collect cyclic garbage (graphs are cyclic) and return freed memory to the system: some milliseconds."""
    gc.collect()
    if (trim := _trim()) is not None:
        trim(0)
