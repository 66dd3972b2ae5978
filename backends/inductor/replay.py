"""Calls of compiled code made again without Python: what CUDA graphs are to a GPU.

One token of a small model is some 300 calls of small kernels, and Python takes longer over each than many of them do. So a graph's
second call is recorded: the kernels that Inductor compiled, by their addresses, and every operator that passes torch's dispatcher,
with where their arguments came from. The third is made both ways and compared, on copies of what it may write to and with the tape's
buffers spoiled before, so that nothing can pass that is not computed anew. From the fourth on C++ makes the calls (tape.cpp).

Where arguments come in another form than those recorded, or another thread is in the middle of a call, Python makes it as before.
What cannot be recorded is left as it is, and the log says why: numbers read out of tensors, lists of tensors, many bytes.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from lwcompile.backends.inductor.native import BUILDING, beside
from lwcompile.backends.inductor.tape import SOURCE, Tape
from lwcompile.manager import relative_error

log = logging.getLogger("lwcompile")

TOLERANCE = 1e-5
"""What a replayed call may differ by, relative to the largest output: sums may be parted in another way where memory is aligned
differently."""

_alone = threading.Lock()


class Replayed:
    """`call` of `stored` tensors and then the inputs, bound to the stored ones; from its fourth time on without Python, where it can be."""

    def __init__(self, call: Callable[[Sequence[Tensor]], Sequence[Any]], stored: Sequence[Tensor]) -> None:
        self.call, self.stored = call, list(stored)
        self.next: Callable[[Sequence[Any]], Sequence[Any]] = self._first
        self.tape: Tape | None = None

    def __call__(self, inputs: Sequence[Any]) -> Sequence[Any]:
        return self.next(inputs)

    @property
    def replays(self) -> bool:
        return self.next == self._replay

    def _plain(self, inputs: Sequence[Any]) -> Sequence[Any]:
        return self.call([*self.stored, *inputs])

    def _first(self, inputs: Sequence[Any]) -> Sequence[Any]:
        self.next = self._record
        return self._plain(inputs)

    def _record(self, inputs: Sequence[Any]) -> Sequence[Any]:
        if (why := beside(SOURCE)) is not None:
            if why != BUILDING:
                self._leave(why)
            return self._plain(inputs)
        return self._by_one_thread(self._record, self._recorded, inputs)

    def _prove(self, inputs: Sequence[Any]) -> Sequence[Any]:
        return self._by_one_thread(self._prove, self._proven, inputs)

    def _by_one_thread(self, stage: Any, step: Callable[[Sequence[Any]], Sequence[Any]], inputs: Sequence[Any]) -> Sequence[Any]:
        """The step, unless a thread takes one already, or took this one while we came here: a tape in use must not be spoiled."""
        if not _alone.acquire(blocking=False):
            return self._plain(inputs)
        try:
            return step(inputs) if self.next == stage else self._plain(inputs)
        finally:
            _alone.release()

    def _recorded(self, inputs: Sequence[Any]) -> Sequence[Any]:
        tape = Tape(self.stored, inputs)
        made = tape.record(partial(self._plain, inputs))
        if tape.refused is not None:
            self._leave(tape.refused)
        else:
            self.tape, self.next = tape, self._prove
        return made

    def _proven(self, inputs: Sequence[Any]) -> Sequence[Any]:
        assert self.tape is not None
        copies = [v.clone() for v in inputs]
        try:
            self.tape.spoil()
            found = self.tape.run(copies)
        except Exception as error:  # the call's own, which it raises again below, or what a wrong tape ran into
            self._leave(f"replayed, it raises {type(error).__name__}")
            return self._plain(inputs)
        made = self._plain(inputs)
        if found is None:
            self._leave("its inputs change their form")
        elif not (error := _error([*found, *copies], [*made, *inputs])) <= TOLERANCE:
            self._leave(f"replayed, it differs by {error:.1e}")
        else:
            log.info("calls of a graph are made without Python from here on: %s", self.tape)
            self.next = self._replay
        return made

    def _replay(self, inputs: Sequence[Any]) -> Sequence[Any]:
        assert self.tape is not None
        found = self.tape.run(inputs)
        return self._plain(inputs) if found is None else found

    def _leave(self, why: str) -> None:
        log.info("calls of a graph stay Python's: %s", why)
        self.next, self.tape = self._plain, None


def _error(found: Sequence[Any], wanted: Sequence[Any]) -> float:
    """The largest difference of two lists of tensors, each relative to its largest value."""
    pairs = [(a, b) for a, b in zip(found, wanted, strict=True) if isinstance(a, Tensor) and isinstance(b, Tensor)]
    return max((relative_error(b, a) for a, b in pairs), default=0.0)
