"""The clauses of a transform: see `lwcompile.testing`."""

from __future__ import annotations

import math
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

import torch

from lwcompile.contract import TransformPass
from lwcompile.damage import DamageMeter
from lwcompile.errors import Refused
from lwcompile.executor import Executor
from lwcompile.manager import EXACT_TOLERANCE, Manager, relative_error
from lwcompile.program import Program
from lwcompile.site import Site, SiteKind
from lwcompile.structure import Structure, find_structure
from lwcompile.trials import Broken, Plain, Report, calibration, context, global_seed, require

PER_KIND = 2
"""How many sites of a kind a transform is tried at one by one; after that it is tried at all of them together."""


class TransformTrial:
    def __init__(self, report: Report, transform: TransformPass, sites: list[str] | None) -> None:
        self.report, self.transform, self.sites = report, transform, sites

    def run(self, cases: Mapping[str, Program]) -> None:
        self._declared()
        applied = sum(self._on(label, program, find_structure(program)) for label, program in cases.items())
        with self.report.clause("sites", f"applied at {applied} in all"):
            require(applied, "it applies nowhere in these models; give check_pass a program and sites where it does")

    def _declared(self) -> None:
        t = self.transform
        with self.report.clause("kinds", ", ".join(t.kinds)):
            require(t.kinds, "it names no kind of site")
            unknown = set(t.kinds) - set(get_args(SiteKind))
            require(not unknown, f"{', '.join(map(str, unknown))} is no kind of site; there are {', '.join(get_args(SiteKind))}")
        with self.report.clause("declarations", f"{'exact' if t.exact else 'lossy'}, {_role(t)}"):
            require(isinstance(t.conflicts, tuple) and all(isinstance(c, str) for c in t.conflicts), "conflicts: names, a tuple")
            require(not (t.silences and t.exact), "what silences the sites below removes them, and cannot be exact as well")
            require(not t.silences or t.structural, "a numeric format cannot silence the sites below")
            require(not t.replaces or t.silences, "what replaces the sites below silences them as well")
            require(t.structural or not set(t.kinds) - {"linear", "embedding"}, "a numeric format stands at weights only")

    def _on(self, label: str, program: Program, structure: Structure) -> int:
        offered = self._offered(label, program, structure)
        done: dict[str, list[Site]] = defaultdict(list)
        refused: dict[str, str] = {}
        for site in offered:
            with self.report.clause(f"check at {label}:{site.id}"):
                reason = self._refusal(program, structure, site)
            if reason is not None:
                refused[site.id] = reason
            else:
                done[site.kind].append(site)
        chosen = [s for sites in done.values() for s in (sites if self.sites else sites[:1] + sites[1:][-(PER_KIND - 1) :])]
        worst = 0.0
        for site in chosen:
            with self.report.clause(f"contract at {label}:{site.id}"):
                after = self._applied(program, structure, [site])
                worst = max(worst, self._one(program, structure, site, after))
        for kind, sites in done.items():
            with self.report.clause(f"contract at every {kind} of {label}"):
                after = self._applied(program, structure, sites)
                self._runs(program, after)
        for id, reason in refused.items():
            self.report.lines.append(f"refused at {label}:{id}: {reason}")
        if chosen:
            unit = context(program, structure).need_metric().unit
            harm = "same function" if self.transform.exact else f"damage at most {worst:.3g} {unit} at one site"
            self.report.lines.append(f"contract on {label}: {', '.join(s.id for s in chosen)}; {harm}")
        return len(chosen)

    def _offered(self, label: str, program: Program, structure: Structure) -> list[Site]:
        with self.report.clause(f"sites of {label}"):
            if unknown := [id for id in self.sites or () if id not in structure.sites]:
                raise Broken(f"{label} has no site {unknown[0]!r}; it has {', '.join(structure.sites)}")
            candidates = [structure.sites[id] for id in self.sites] if self.sites else list(structure.sites.values())
            offered = self.transform.sites(candidates)
            for site in offered:
                require(site in candidates, f"its sites() makes up {site.id}")
                require(site.kind in self.transform.kinds, f"its sites() gives {site.id}, of the kind {site.kind}")
        return offered

    def _refusal(self, program: Program, structure: Structure, site: Site) -> str | None:
        """Why `check` or `needs` refuses, or None; they must edit nothing and give a reason."""
        copy = program.copy()
        try:
            self.transform.check(copy.entries[site.entry], site)
            require(copy.digest() == program.digest(), "`check` edits the graph")
            needs = self.transform.needs(copy.entries[site.entry], site, structure)
            named = {*needs.kept, *needs.shared, *needs.shared.values()}
            require(named <= structure.sites.keys(), f"its needs() names {min(named - structure.sites.keys(), default='')!r}")
            reason = None
        except Refused as refusal:
            require(refusal.reason.strip(), "it refuses without a reason")
            reason = refusal.reason
        require(copy.digest() == program.digest(), "a refusing `check`, or `needs`, edits the graph")
        copy.store.check(copy.keys(), deep=True)
        return reason

    def _applied(self, program: Program, structure: Structure, sites: Sequence[Site]) -> Program:
        """A copy with the transform applied through the manager, which verifies it; twice, with the same result."""
        before, made = program.digest(), []
        for seed in (1, 2):
            after, ctx = program.copy(), context(program, structure)
            with global_seed(seed):
                done = Manager(ctx).transform(after, [(site, self.transform) for site in sites])
            refusals = [r for r in ctx.remarks if r.kind == "refused"]
            require(all(r.text.strip() for r in refusals), "it refuses without a reason")
            require(done or refusals, "it was applied nowhere and refused nowhere")
            require(not done or after.digest() != before, "it changed nothing, and did not refuse")
            made.append(after)
        require(program.digest() == before, "it edits the program that it was given a copy of")
        program.store.check(program.keys(), deep=True)
        require(made[0].digest() == made[1].digest(), "two runs under one seed make different programs")
        return made[0]

    def _one(self, program: Program, structure: Structure, site: Site, after: Program) -> float:
        self._silenced(structure, site, after)
        self._stored(program, site, after)
        return self._runs(program, after)

    def _silenced(self, structure: Structure, site: Site, after: Program) -> None:
        below = [s for s in structure.sites.values() if s.id.startswith(f"{site.id}.") and s.kind in ("linear", "embedding")]
        alive = {node.name for node in after.entries[site.entry].nodes}
        for s in below:
            if self.transform.silences and not self.transform.replaces and s.node in alive:
                raise Broken(f"it silences the sites below, but {s.id} is still computed")
            if not self.transform.silences and s.node not in alive:
                raise Broken(f"{s.id} below it is gone, and `silences` does not say so")

    def _stored(self, program: Program, site: Site, after: Program) -> None:
        stored = self.transform.stored(program.entries[site.entry], site)
        for tensor in stored:
            require(tensor.shape and min(tensor.shape) > 0, f"stored() names a tensor of shape {tensor.shape}")
            require(Plain().price(tensor) > 0, "stored() names a tensor that costs nothing")
        alive = {node.name for node in after.entries[site.entry].nodes}
        if site.kind in ("linear", "embedding") and site.node in alive:
            require(stored, "stored() names no tensor, so its bytes would count as nothing; say what the site stores afterwards")

    def _runs(self, program: Program, after: Program) -> float:
        """Runs at other sizes, where EXACT must hold too, and comes back from a folder as it was; returns the damage."""
        with tempfile.TemporaryDirectory() as folder:
            loaded = Program.load(after.save(Path(folder)))
            require(loaded.digest() == after.digest(), "the program that is loaded is not the one that was saved")
            meter = DamageMeter(context(program, find_structure(program)).need_metric())
            for rows, length in ((8, 12), (3, 7)):
                batch = dict(calibration(program, rows, length, seed=1).samples)
                with torch.no_grad():
                    dense, changed, again = (Executor(p).run(batch) for p in (program, after, loaded))
                for name, value in dense.items():
                    require(value.shape == changed[name].shape, f"{name} has the wrong shape on {rows} x {length} inputs")
                    require(bool(torch.isfinite(changed[name]).all()), f"{name} is not finite on {rows} x {length} inputs")
                    require(torch.equal(changed[name], again[name]), f"{name} differs after saving and loading")
                    error = relative_error(value, changed[name])
                    if self.transform.exact and error > EXACT_TOLERANCE:
                        raise Broken(f"it promises the same function; {name} differs by {error:.2g} on {rows} x {length} inputs")
                meter.update(dense, changed, batch)
        damage = meter.result().mean
        require(math.isfinite(damage), "its damage is not finite")
        return damage


def _role(t: TransformPass) -> str:
    words = ["structural" if t.structural else "a numeric format"]
    words += [f"{'replaces' if t.replaces else 'silences'} the sites below"] if t.silences else []
    words += [f"conflicts with {', '.join(t.conflicts)}"] if t.conflicts else []
    return ", ".join(words)
