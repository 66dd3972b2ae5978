"""Running a program piece by piece over many batches: resume an edited copy from its first difference, or edit as you go.

`PrefixCache` serves the measurement of many single edits; `Cursor` the compression of one layer after another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lwcompile.errors import BadInput, InternalError
from lwcompile.executor import Executor
from lwcompile.graph import ModelGraph
from lwcompile.program import Program
from lwcompile.spill import TensorCache

OUTPUTS = "(outputs)"


class PrefixCache:
    """Live values of a program at cuts, for every batch, so that an edited copy runs only from its first difference on.

    Values are kept up to `memory` bytes and in files under `folder` beyond, and so is what `keep(outputs, batch)` makes of
    the program's own outputs. cuts: keys of the calls to keep live values before; by default `choose_cuts`.
    """

    def __init__(
        self,
        program: Program | ModelGraph,
        batches: Iterable[Mapping[str, Tensor]],
        *,
        cuts: Sequence[str] | None = None,
        memory: int = 2 << 30,
        folder: Path | None = None,
        keep: Callable[[dict[str, Tensor], Mapping[str, Tensor]], Tensor] | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        self.executor = Executor(program, device)
        self.batches = [dict(batch) for batch in batches]
        if not self.batches:
            raise BadInput("there are no calibration samples to run the model on")
        self._signatures = [self.executor.signature(step) for step in self.executor.steps]
        self._cache = TensorCache(memory, folder)
        self._numbers: dict[tuple[int, str], Any] = {}
        given = None if cuts is None else sorted({0, *map(self.executor.position, cuts)})
        self.cuts = given if given is not None else choose_cuts(self.executor, self.batches[0])
        self._live = {cut: self.executor.needed(cut) for cut in self.cuts}
        self._fill(keep)

    @torch.no_grad()
    def _fill(self, keep: Callable[[dict[str, Tensor], Mapping[str, Tensor]], Tensor] | None) -> None:
        for i, batch in enumerate(self.batches):
            values = self.executor.start(batch)
            for cut, following in zip(self.cuts, [*self.cuts[1:], None]):
                for key in self._live[cut] & values.keys():
                    self._keep((i, key), values[key])
                self.executor.advance(values, cut, following)
            if keep is not None:
                self._cache[i, OUTPUTS] = keep(self.executor.results(values), batch)

    def _keep(self, key: tuple[int, str], value: Any) -> None:
        if not isinstance(value, Tensor):
            self._numbers[key] = value
        elif key not in self._cache:
            self._cache[key] = value

    def _get(self, key: tuple[int, str]) -> Any:
        return self._cache[key] if key in self._cache else self._numbers[key]

    def kept(self, batch: int) -> Tensor:
        """What `keep` made of the program's own outputs for a batch."""
        return self._cache[batch, OUTPUTS]

    def resume_at(self, edited: Executor) -> int:
        """The last cut before the first difference at which all that the edited program needs is kept."""
        pairs = zip(self._signatures, edited.steps)
        same = next((i for i, (a, step) in enumerate(pairs) if a != edited.signature(step)), len(edited.steps))
        given = {key for key, name in edited._inputs.items() if name in self.batches[0]}
        for cut in reversed(self.cuts):
            if cut <= same and edited.needed(cut) <= self._live[cut] | given:
                return cut
        return 0

    @torch.no_grad()
    def suffix_outputs(self, program: Program | ModelGraph) -> Iterator[dict[str, Tensor]]:
        """The outputs of an edited copy of the program, batch after batch."""
        edited = Executor(program, self.executor.device)
        cut = self.resume_at(edited)
        for i, batch in enumerate(self.batches):
            values = edited.start(batch)
            if cut:
                values.update({key: self._get((i, key)) for key in self._live[cut] if key not in values})
            results = edited.results(edited.advance(values, cut))
            self.executor.calls, edited.calls = self.executor.calls + edited.calls, 0
            yield results


@torch.no_grad()
def choose_cuts(executor: Executor, batch: Mapping[str, Tensor], most: int = 64) -> list[int]:
    """Positions worth keeping: where few bytes are live (the boundaries of blocks), at most `most`, the start among them.

    A program whose live values swell in its middle still gets a cut in each sixteenth of its work.
    """
    values, live, work = executor.start(batch), [], [0.0]
    for i, step in enumerate(executor.steps):
        live.append(sum(t.numel() * t.element_size() for t in tree_leaves(values) if isinstance(t, Tensor)))
        executor.advance(values, i, i + 1)
        sizes = [n.meta["val"].numel() for n in step.node.all_input_nodes if n in executor._constant and "val" in n.meta]
        gathers = step.node.target is torch.ops.aten.embedding.default
        work.append(work[-1] + 1 + (0 if gathers else sum(sizes)))
    total = work[-1]
    slices = [[i for i in range(len(live)) if k * total / 16 <= work[i] < (k + 1) * total / 16] for k in range(16)]
    least = [min(s, key=live.__getitem__) for s in slices if s]
    usual = sorted(live[i] for i in least)[len(least) // 2]
    small = [*least, *(i for i, b in enumerate(live) if b <= 1.1 * usual)]
    chosen, gap = [0], total / (most + 1)
    for i in sorted(set(small)):
        if work[i] - work[chosen[-1]] >= gap or (i == max(small) and i > chosen[-1]):
            chosen.append(i)
    return chosen


class Cursor:
    """All batches advanced through a program together, once, while what lies ahead may still be edited.

    This is the order of sequential compression: ask for the inputs of the next layers, replace their weights, go on; later
    layers see what the compressed earlier ones put out. Edits behind the position are an error.
    """

    def __init__(
        self, program: Program | ModelGraph, batches: Iterable[Mapping[str, Tensor]], device: str | torch.device = "cpu"
    ) -> None:
        self.program, self.device = program, device
        self.executor = Executor(program, device)
        self.states = [self.executor.start(batch) for batch in batches]
        self.calls = 0
        self._done: list[str] = []

    def inputs_at(self, nodes: Sequence[str]) -> dict[str, list[Tensor]]:
        """For each of these calls the tensor it is fed, one a batch, having run all that comes before the first of them.

        Raises `InternalError` for a call that was passed already, one whose input depends on another in the list, and
        edits behind the position.
        """
        executor = self._renew()
        stop = min(executor.position(node) for node in nodes)
        if stop < len(self._done):
            raise InternalError(f"the cursor has passed {executor.steps[stop].key!r}; ask for layers in the order they run")
        self._advance(stop)
        return {node: self._read(executor.input_of(node)) for node in nodes}

    def values_of(self, key: str) -> list[Tensor]:
        """The value of a call or input, one a batch, having run all up to it; it must still be needed by what lies ahead."""
        executor = self._renew()
        self._advance(max(executor.index.get(key, -1) + 1, len(self._done)))
        return self._read(key)

    def _renew(self) -> Executor:
        self.executor = Executor(self.program, self.device)
        if [step.key for step in self.executor.steps[: len(self._done)]] != self._done:
            raise InternalError("the program was edited behind the cursor; start a new one")
        return self.executor

    @torch.no_grad()
    def _advance(self, stop: int) -> None:
        for values in self.states:
            self.executor.advance(values, len(self._done), stop)
        self.calls += (stop - len(self._done)) * len(self.states)
        self._done = [step.key for step in self.executor.steps[:stop]]

    def _read(self, key: str) -> list[Tensor]:
        if any(key not in values for values in self.states):
            where = "not computed yet" if self.executor.index.get(key, -1) >= len(self._done) else "no longer needed"
            raise InternalError(f"the value {key!r} is {where} at the cursor's position; ask for layers in the order they run")
        return [values[key] for values in self.states]
