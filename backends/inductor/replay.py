"""Calls of compiled code made again without Python: what CUDA graphs are to a GPU.

One token of a small model is some 300 calls of small kernels, and Python takes longer over each than many of them do. So a graph's
second call is recorded: the kernels that Inductor compiled, by their addresses, and every operator that passes torch's dispatcher,
with where their arguments came from. The third is made both ways and compared, on copies of what it may write to and with the tape's
buffers spoiled before, so that nothing can pass that is not computed anew. From the fourth on C++ makes the calls (tape.cpp).

Where arguments come in another form than those recorded, or another thread is in the middle of a call, Python makes it as before.
What cannot be recorded is left as it is, and the log says why: numbers read out of tensors, lists of tensors, many buffers.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from lwcompile.backends.inductor.tape import Tape, unavailable
from lwcompile.manager import relative_error

log = logging.getLogger("lwcompile")

TOLERANCE = 1e-5
"""What a replayed call may differ by, relative to the largest output: sums may be parted in another way where memory is aligned
differently."""

_recording, _building = threading.Lock(), threading.Lock()


class Replayed:
    """`call` of `stored` tensors and then the inputs, bound to the stored ones; from its fourth time on without Python, where it can be."""

    def __init__(self, call: Callable[[Sequence[Tensor]], Sequence[Any]], stored: Sequence[Tensor]) -> None:
        self.call, self.stored = call, list(stored)
        self.next: Callable[[Sequence[Any]], Sequence[Any]] = self._first
        self.replays = False

    def __call__(self, values: Sequence[Any]) -> Sequence[Any]:
        return self.next(values)

    def _plain(self, inputs: Sequence[Any]) -> Sequence[Any]:
        return self.call([*self.stored, *inputs])

    def _first(self, inputs: Sequence[Any]) -> Sequence[Any]:
        self.next = self._record
        return self._plain(inputs)

    def _record(self, inputs: Sequence[Any]) -> Sequence[Any]:
        if (why := built()) is not None:
            if why != BUILDING:
                self._leave(why)
            return self._plain(inputs)
        if not _recording.acquire(blocking=False):
            return self._plain(inputs)
        with contextlib.ExitStack() as stack:
            stack.callback(_recording.release)
            tape = Tape(self.stored, inputs)
            made = tape.record(partial(self._plain, inputs))
        self._leave(tape.refused) if tape.refused else self._go(partial(self._prove, tape))
        return made

    def _prove(self, tape: Tape, inputs: Sequence[Any]) -> Sequence[Any]:
        copies = [v.clone() for v in inputs]
        tape.spoil()
        found = tape.run(copies)
        made = self._plain(inputs)
        if found is None:
            self._leave("its inputs change their form")
        elif not (error := _error([*found, *copies], [*made, *inputs])) <= TOLERANCE:
            self._leave(f"replayed, it differs by {error:.1e}")
        else:
            log.info("calls of a graph are made without Python from here on: %s", tape)
            self._go(partial(self._replay, tape))
            self.replays = True
        return made

    def _replay(self, tape: Tape, inputs: Sequence[Any]) -> Sequence[Any]:
        found = tape.run(inputs)
        return self._plain(inputs) if found is None else found

    def _go(self, following: Callable[[Sequence[Any]], Sequence[Any]]) -> None:
        self.next = following

    def _leave(self, why: str) -> None:
        log.info("calls of a graph stay Python's: %s", why)
        self.next = self._plain


_builder: list[threading.Thread] = []
BUILDING = "its library is being built"


def built() -> str | None:
    """Why nothing can be replayed, or not yet: what is built once on a machine is built beside the calls, which do not wait for it."""
    with _building:
        if not _builder:
            _builder.append(threading.Thread(target=unavailable, name="lwcompile: the tape's library"))
            _builder[0].start()
            _builder[0].join(0.1)  # enough where it is only loaded
    return BUILDING if _builder[0].is_alive() else unavailable()


def _error(found: Sequence[Any], wanted: Sequence[Any]) -> float:
    """The largest difference of two lists of tensors, each relative to its largest value."""
    pairs = [(a, b) for a, b in zip(found, wanted, strict=True) if isinstance(a, Tensor) and isinstance(b, Tensor)]
    return max((relative_error(b, a) for a, b in pairs), default=0.0)
