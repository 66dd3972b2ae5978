"""What a native library prints to the process's standard output, kept from it."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def unheard() -> Iterator[None]:
    """HiGHS prints lines from its own debugging to the process's standard output, whatever `disp` says."""
    try:
        kept, library = os.dup(1), ctypes.CDLL(None)
    except (OSError, TypeError):  # no standard output, or no C library to be had by that name
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    sys.stdout.flush()
    library.fflush(None)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        library.fflush(None)
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)
