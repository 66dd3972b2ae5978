"""Giving memory back. glibc keeps what large temporaries freed, one pool a thread: a scoring pass over a model of half a gigabyte
grew to 19 GB that way, and stays near 3 GB with a trim after each batch."""

from __future__ import annotations

import ctypes
import gc
import time
from functools import cache
from typing import Any

SHARE = 0.05
"""Of the running time, what full collections may take: each walks every object of the imported libraries."""

_next_full = 0.0


@cache
def _trim() -> Any:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError):  # another C library, which has no such call and no such habit
        return None


def give_back() -> None:
    """Collect cyclic garbage (graphs are cyclic) and return freed memory to the system: some milliseconds.

    Young objects each time, all of them once the last full collection's cost is `SHARE` of the time since.
    """
    global _next_full
    started = time.monotonic()
    if started < _next_full:
        gc.collect(1)
    else:
        gc.collect()
        ended = time.monotonic()
        _next_full = ended + (ended - started) / SHARE
    if (trim := _trim()) is not None:
        trim(0)
