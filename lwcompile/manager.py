"""The manager: runs passes under the contract. A pass that breaks a promise leaves the program as it was.

1. what it requires is there, or the error names the missing annotation and who provides it
2. it runs on a copy; if it raises, or anything below fails, the program is what it was
3. an analysis that changed the program's digest fails, stored tensors hashed again
4. annotations that a transform does not declare preserved are dropped
5. the verifier runs on the result
6. an EXACT pass matches on probe inputs; past the limit on cumulative damage, a LOSSY pass is rolled back
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lwcompile.contract import AnalysisPass, Annotation, Damage, Healing, HealPass, TransformPass
from lwcompile.errors import LwError, PluginError, Refused, VerificationError
from lwcompile.program import Program
from lwcompile.registry import providers
from lwcompile.site import Site
from lwcompile.spec import Spec
from lwcompile.verify import verify

if TYPE_CHECKING:
    from lwcompile.context import Context
    from lwcompile.graph import ModelGraph

EXACT_TOLERANCE = 1e-5
"""Relative to the largest output, in float32: what an EXACT pass promises."""

Step = tuple[Site, TransformPass]
Found = dict[str, Annotation | dict[Spec, Damage]]


class Manager:
    """Runs passes over a program. `measure` gives a program's damage against the dense one; `limit` is on what it returns."""

    def __init__(self, ctx: Context, measure: Callable[[Program], float] | None = None, limit: float | None = None) -> None:
        self.ctx, self.measure, self.limit = ctx, measure, limit
        self.damage: float | None = None
        self.seconds: dict[str, float] = {}

    def analyze(self, program: Program, analysis: AnalysisPass) -> Found:
        """Run an analysis; its findings are kept in the program's annotations under each key it provides."""
        self._require(program, analysis)
        digest, started = program.digest(), time.perf_counter()
        found: Found = {}
        try:
            for id, *rest in analysis.run(program, self.ctx):
                if len(rest) == 1:
                    found[id] = rest[0]  # type: ignore[assignment]
                else:
                    found.setdefault(id, {})[rest[0]] = rest[1]  # type: ignore[index]
        except LwError:
            raise
        except Exception as error:
            raise PluginError(f"the analysis {analysis.name} ({type(analysis).__module__}) failed: {_say(error)}") from error
        self.seconds[analysis.name] = time.perf_counter() - started
        if program.digest() != digest:
            raise VerificationError(f"the analysis {analysis.name} edited the program; an analysis only annotates")
        self._check_contents(program, analysis.name)
        for key in analysis.provides or (analysis.name,):
            program.annotations[key] = dict(found)
        return found

    def heal(self, program: Program, dense: Program, healer: HealPass) -> Healing | None:
        """Run a healer as one transaction; None, with a remark, where it refuses. Annotations are dropped: they are of before."""
        digest, draft, started = dense.digest(), program.copy(), time.perf_counter()
        try:
            healing = healer.heal(draft, dense, self.ctx)
        except Refused as refusal:
            self.ctx.remark(healer.name, "", "refused", refusal.reason)
            return None
        except LwError:
            raise
        except Exception as error:
            raise PluginError(f"the healer {healer.spec()} ({type(healer).__module__}) failed: {_say(error)}") from error
        if dense.digest() != digest or any(_nodes(draft, name) != _nodes(program, name) for name in program.entries):
            raise VerificationError(f"the healer {healer.name} edited nodes or the dense program; a healer trains tensors")
        self._check_contents(program, healer.name)
        _verify(program, draft, [])
        program.entries, program.annotations = draft.entries, {}
        self.seconds[healer.name] = time.perf_counter() - started
        return healing

    def _check_contents(self, program: Program, name: str) -> None:
        try:
            program.store.check(program.keys(), deep=True)
        except VerificationError as error:
            raise VerificationError(f"{name} edited the program behind the framework's back: {error}") from error

    def transform(
        self,
        program: Program,
        steps: Sequence[Step],
        began: Callable[[Program], None] | None = None,
        each: Callable[[Step], None] | None = None,
    ) -> list[Step]:
        """Apply transforms at sites, in order, as one transaction; returns the steps that were done.

        A refused step is remarked and passed over. Anything else that goes wrong raises, and `program` is what it was.
        `began` sees the draft before the first step, `each` every step once it is done.
        """
        for _, transform in steps:
            self._require(program, transform)
        started = time.perf_counter()
        draft, done = self._draft(program, list(steps), began, each)
        sites = [site for site, _ in done]
        self._named(done, lambda: _verify(program, draft, sites))
        if done and all(transform.exact for _, transform in done):
            self._named(done, lambda: self._probe(program, draft))
        if not self._within_limit(draft, done):
            return []
        kept = set.intersection(*(set(t.preserves) for _, t in done)) if done else set(program.annotations)
        draft.annotations = {key: value for key, value in program.annotations.items() if key in kept}
        program.entries, program.annotations = draft.entries, draft.annotations
        label = ", ".join(sorted({t.name for _, t in steps})) or "nothing"
        self.seconds[label] = self.seconds.get(label, 0.0) + time.perf_counter() - started
        return done

    def _draft(
        self,
        program: Program,
        steps: list[Step],
        began: Callable[[Program], None] | None,
        each: Callable[[Step], None] | None,
    ) -> tuple[Program, list[Step]]:
        """A copy with the steps applied. A step refused after `check` may have left edits: the draft is made anew without it."""
        draft, done = program.copy(), []
        if began is not None:
            began(draft)
        for step in steps:
            site, transform = step
            graph = draft.entries[site.entry]
            try:
                transform.check(graph, site)
            except Refused as refusal:
                self.ctx.remark(transform.name, site.id, "refused", refusal.reason)
                continue
            try:
                transform.apply(graph, site, self.ctx)
            except Refused as refusal:
                self.ctx.remark(transform.name, site.id, "refused", refusal.reason)
                return self._draft(program, [s for s in steps if s is not step], began, each)
            except LwError:
                raise
            except Exception as error:
                where = f"the transform {transform.spec()} ({type(transform).__module__}) failed at {site.id}"
                raise PluginError(f"{where}: {_say(error)}") from error
            done.append(step)
            if each is not None:
                each(step)
        return draft, done

    def _named(self, done: Sequence[Step], check: Callable[[], None]) -> None:
        """Say which transforms a broken promise belongs to."""
        try:
            check()
        except VerificationError as error:
            names = ", ".join(sorted({str(t.spec()) for _, t in done}))
            where = done[0][0].id if len(done) == 1 else f"{len(done)} sites"
            raise VerificationError(f"{names} at {where}: {error}") from error

    def _probe(self, before: Program, after: Program) -> None:
        for name, graph in before.entries.items():
            for inputs in self.ctx.probes(graph):
                with torch.no_grad():
                    old, new = graph.module()(*inputs), after.entries[name].module()(*inputs)
                for label, a, b in zip(graph.outputs, old, new):
                    if (error := relative_error(a, b)) > EXACT_TOLERANCE:
                        raise VerificationError(
                            f"it promises the same function, but output {label!r} differs by {error:.2g} relative to its largest "
                            f"value (allowed: {EXACT_TOLERANCE:g})"
                        )

    def _within_limit(self, draft: Program, done: Sequence[Step]) -> bool:
        if self.measure is None or not any(not t.exact for _, t in done):
            return True
        damage = self.measure(draft)
        if self.limit is not None and damage > self.limit:
            for site, transform in done:
                text = f"rolled back: the program's damage would be {damage:.4g}, past the limit of {self.limit:.4g}"
                self.ctx.remark(transform.name, site.id, "refused", text, damage=damage, limit=self.limit)
            return False
        self.damage = damage
        return True

    def _require(self, program: Program, wanted: AnalysisPass | TransformPass) -> None:
        for key in wanted.requires:
            if key not in program.annotations:
                names = providers(key)
                hint = f"run {' or '.join(names)} first" if names else "no installed pass provides it"
                raise Refused(f"{wanted.name} requires the annotation {key!r}, which is missing; {hint}")


def _nodes(program: Program, entry: str) -> object:
    return program.entries[entry].to_json()["nodes"]


def _verify(before: Program, after: Program, sites: Sequence[Site]) -> None:
    for name, graph in after.entries.items():
        verify(before.entries[name], graph, [site for site in sites if site.entry == name])


def relative_error(a: Tensor, b: Tensor) -> float:
    """max |a - b| / max |a|; infinite where shapes differ or one of them is not finite where the other is."""
    if a.shape != b.shape:
        return float("inf")
    if not a.is_floating_point():
        return 0.0 if torch.equal(a, b) else float("inf")
    difference = (a.double() - b.double()).abs().nan_to_num(nan=float("inf"))
    same = (a == b) | (a.isnan() & b.isnan())
    worst = torch.where(same, 0.0, difference).max().item() if a.numel() else 0.0
    scale = a.double().abs().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).max().item() if a.numel() else 1.0
    return worst / max(scale, torch.finfo(torch.float32).tiny)


def require_same(graph: ModelGraph, inputs: Sequence[Any], made: Sequence[Any], tolerance: float, whose: str) -> None:
    """Raise `VerificationError` if outputs that code made of `inputs`, which it left as they were, are further from the graph's than
    this, relative to the largest value."""
    with torch.no_grad():
        wanted = graph.module(dense=True)(*inputs)
    for name, value, found in zip(graph.outputs, wanted, made, strict=True):
        if isinstance(value, Tensor) and not (error := relative_error(value, found)) <= tolerance:
            raise VerificationError(f"{whose} {name} is {error:.1e} of the largest value away from the graph's")


def _say(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else 'no reason given'}"
