"""What an option does to the calls of a program, as a first-order analysis needs it: weight differences, or removed branches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from lwcompile.context import Context
from lwcompile.contract import TransformPass
from lwcompile.errors import Refused
from lwcompile.executor import Executor
from lwcompile.memory import give_back
from lwcompile.program import Program
from lwcompile.site import SUBLAYER_KINDS, Site
from lwcompile.spec import Spec
from lwcompile.spill import TensorCache

aten = torch.ops.aten


@dataclass(frozen=True)
class Change:
    """At the call `key` the option `job` removes the value (no delta), or adds `scale * delta` to the weight.

    delta: the key in `Changes.deltas` of a half-precision tensor of the weight's shape, at most 1 in magnitude.
    """

    key: str
    job: int
    delta: tuple[int, str] | None = None
    scale: float = 0.0


class Changes:
    """Collects what options change in one program. Differences lie in memory up to the context's limit, then in files.

    solver: takes the place of an option's own solver, where it has one; None leaves it.
    """

    def __init__(self, program: Program, ctx: Context, solver: Spec | None) -> None:
        self.program, self.ctx, self.solver = program, ctx, solver
        self.dense = Executor(program, ctx.device)
        self.deltas = TensorCache(ctx.memory, ctx.workdir)
        self.by_key: dict[str, list[Change]] = {}

    def add(self, jobs: Sequence[tuple[int, Sequence[str]]], option: Spec) -> dict[int, str]:
        """Note what `option` changes at each of these (job, sites), and return why it was refused where it was.

        One edited copy serves all of them, since weights change independently; where it is refused somewhere, or removes
        branches, each gets a copy of its own.
        """
        transform = self.ctx.transform(option)
        if self.solver is not None and hasattr(transform, "solver"):
            option = Spec(option.name, (*(a for a in option.args if a[0] != "solver"), ("solver", self.solver)))
        if transform.replaces and not self._moves_own(option, [id for _, unit in jobs for id in unit]):
            text = f"{option} puts other weights in the place of these: too large a change for second order"
            return dict.fromkeys((job for job, _ in jobs), text)
        refused: dict[int, str] = {}
        try:
            if transform.silences and len(jobs) > 1:
                raise Refused("removed branches hide each other")
            edited = Executor(self.ctx.edited(self.program, [id for _, unit in jobs for id in unit], [option]), self.ctx.device)
        except Refused as refusal:
            if len(jobs) == 1:
                return {jobs[0][0]: refusal.reason}
            for job in jobs:
                refused |= self.add([job], option)
            return refused
        for job, unit in jobs:
            try:
                self._note(job, unit, option, edited, transform)
            except Refused as refusal:
                refused[job] = refusal.reason
        edited.release()
        give_back()
        return refused

    def _moves_own(self, option: Spec, ids: Sequence[str]) -> bool:
        """Whether what an option leaves in the place of these sublayers are their own weights, only moved or narrowed."""
        sites = self.ctx.find_structure(self.program).sites
        if any(sites[id].kind not in SUBLAYER_KINDS for id in ids):
            return False
        try:
            return all(self.ctx.transform(option).children(self.program.entries[sites[id].entry], sites[id]) for id in ids)
        except Refused:
            return True  # which applying it will say

    def _note(self, job: int, unit: Sequence[str], option: Spec, edited: Executor, transform: TransformPass) -> None:
        structure = self.ctx.find_structure(self.program)
        made: list[Change] = []
        for site in (structure.sites[id] for id in unit):
            if transform.replaces:
                made += self._moved(job, transform, site, edited)
            elif transform.silences:
                parts = [s for s in (site, *structure.children(site.id)) if s.kind in SUBLAYER_KINDS]
                made += [Change(k, job) for s in parts if (k := self.dense.key(s)) not in edited.index]
            else:
                made.append(self._difference(job, self.dense.key(site), edited, site.id))
        if not made:
            raise Refused(f"{option} neither changes a weight's values nor removes a branch", site=unit[0])
        for change in made:
            self.by_key.setdefault(change.key, []).append(change)

    def _difference(self, job: int, key: str, edited: Executor, site: str) -> Change:
        if key not in edited.index:
            raise Refused("the option replaces the layer, which is no change of its weight", site=site)
        before = self.dense.constant(weight_node(self.dense, key))
        after = weight_of(edited, key, self.dense.input_of(key))
        if before.shape != after.shape:
            raise Refused("the option changes the weight's shape", site=site)
        return self._change(job, key, before, after)

    def _moved(self, job: int, transform: TransformPass, site: Site, edited: Executor) -> list[Change]:
        """Of each of a sublayer's linears. A weight that lost columns has zeros there, and rows that left are read by nothing: the
        channels that stay are those by which the option says that what it leaves is fed."""
        left = transform.children(self.program.entries[site.entry], site)
        by = (self.ctx.derived[child.id][1] for child in left if child.id in self.ctx.derived)
        kept = next((index for index in by if index is not None and index.ndim == 1), None)
        made: list[Change] = []
        for child in (c for c in self.ctx.find_structure(self.program).children(site.id) if c.kind == "linear"):
            key = self.dense.key(child)
            before = self.dense.constant(weight_node(self.dense, key))
            after = weight_of(edited, key, self.dense.input_of(key)).float()
            narrow = [d for d in (0, 1) if after.shape[d] < before.shape[d]]
            if narrow and (kept is None or len(narrow) > 1 or len(kept) != after.shape[narrow[0]]):
                raise Refused("the option changes the weight's shape", site=child.id)
            if narrow:
                whole = before.float().clone() if narrow == [0] else torch.zeros_like(before, dtype=torch.float32)
                after = whole.index_copy_(narrow[0], kept.to(whole.device), after)  # type: ignore[union-attr]
            if not torch.equal(after, before.float()):
                made.append(self._change(job, key, before, after))
        return made

    def _change(self, job: int, key: str, before: Tensor, after: Tensor) -> Change:
        step = self.dense.steps[self.dense.position(key)]
        token = (job, step.graph.tensors[str(weight_node(self.dense, key).target)])
        difference = after.float() - before.float()
        scale = difference.abs().max().item() or 1.0
        if token not in self.deltas:
            self.deltas[token] = difference.div_(scale).half()
        return Change(key, job, token, scale)

    def delta(self, change: Change) -> Tensor:
        """The difference [out, in] over the change's scale, in half precision."""
        assert change.delta is not None
        return self.deltas[change.delta]


def is_embedding(executor: Executor, key: str) -> bool:
    return executor.steps[executor.position(key)].node.target is aten.embedding.default


def weight_of(executor: Executor, key: str, source: str) -> Tensor:
    """The weight that the calls from `source` to `key` amount to: of one linear, of linears in a row, whatever the layout between
    them, or of sums of these."""
    if key not in executor.index:
        raise Refused("the option replaces the layer by more than linears, which is no change of its weight")
    node = executor.steps[executor.position(key)].node
    if node.target in (aten.squeeze.dim, aten.unsqueeze.default):
        return weight_of(executor, executor.input_of(key), source)
    if node.target is aten.add.Tensor and len(terms := executor.reads(executor.steps[executor.position(key)])) == 2:
        return weight_of(executor, terms[0], source) + weight_of(executor, terms[1], source)
    weight, fed = executor.constant(weight_node(executor, key)), executor.input_of(key)
    return weight if fed == source else weight.float() @ weight_of(executor, fed, source).float()


def weight_node(executor: Executor, key: str) -> fx.Node:
    """What the weight of a linear or embedding is read from."""
    node = executor.steps[executor.position(key)].node
    stored = node.args[0] if node.target is aten.embedding.default else node.args[1]
    if node.target not in (aten.embedding.default, aten.linear.default) or not isinstance(stored, fx.Node):
        raise Refused(f"{node.format_node()} is neither a linear nor an embedding")
    return stored
