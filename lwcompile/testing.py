"""The contract as a test: what a plugin's author runs on a pass before anybody else does.

    from lwcompile.testing import check_pass

    def test_kurtosis():
        print("\\n".join(check_pass(Kurtosis)))

The pass runs on three small random models (`lwcompile.tiny`), or on a program of your own. Each clause that holds is one line of
the report; the first that does not raises `VerificationError`, which names the clause.

    every pass      name, api version, frozen dataclass, options that read back from one line, documentation
    analysis        edits nothing, finite numbers at known sites, the same under one seed, the same from a run directory
    transform       `check` edits nothing, the manager's contract, the same under one seed, EXACT where promised, at other sizes
                    too, saves and loads, tensors declared for pricing, silences what it removes, refusals with reasons
    solver          the format that was asked for, finite, weight untouched, the same twice, more bits less error
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor

from lwcompile import API_VERSION
from lwcompile.context import Context
from lwcompile.contract import AnalysisPass, Backend, Damage, Pass, Score, Solver, StoredTensor, TransformPass, configure
from lwcompile.contract import _to_value as to_value
from lwcompile.damage import DamageMeter
from lwcompile.data import CalibrationSet, load_dataset
from lwcompile.errors import LwError, Refused, VerificationError
from lwcompile.executor import Executor
from lwcompile.formats import NumericFormat
from lwcompile.manager import EXACT_TOLERANCE, Manager, relative_error
from lwcompile.metric import default_metric
from lwcompile.program import Program
from lwcompile.registry import make, plugins, providers
from lwcompile.site import Site, SiteKind
from lwcompile.spec import Spec
from lwcompile.stats import InputStats, proxy_loss
from lwcompile.structure import Structure, find_structure
from lwcompile.tiny import programs, token_ids

SEED = 0
PER_KIND = 2
"""How many sites of a kind a transform is tried at one by one; after that it is tried at all of them together."""


def check_pass(given: Pass | type[Pass], program: Program | None = None, sites: Iterable[str] | None = None) -> list[str]:
    """Run the whole contract on a pass; returns the report, a line for each clause that holds.

    Args:
        given: a pass, or its class, which is then taken with its default options.
        program: runs on this one, with random inputs, instead of on the built-in models.
        sites: ids of the sites that a transform is tried at; by default the first and last of each kind that it takes.

    Raises:
        VerificationError: the first clause that does not hold, and why.
    """
    report = _Report(given)
    checked = report.declaration(given)
    cases = {program.name: program} if program is not None else programs()
    if isinstance(checked, AnalysisPass):
        _Analysis(report, checked).run(cases)
    elif isinstance(checked, TransformPass):
        _Transform(report, checked, None if sites is None else list(sites)).run(cases)
    elif isinstance(checked, Solver):
        _solver(report, checked)
    return report.lines


# --- the report, and the clauses of every pass


class _Report:
    """Lines for clauses that hold; a clause that does not raises with its name."""

    def __init__(self, given: Pass | type[Pass]) -> None:
        self.cls = given if isinstance(given, type) else type(given)
        self.lines: list[str] = []

    @contextmanager
    def clause(self, name: str, holds: str = "") -> Iterator[None]:
        """Whatever is raised inside breaks the clause `name`; if nothing is, `holds` goes into the report."""
        label = getattr(self.cls, "name", self.cls.__name__)
        try:
            yield
        except Exception as error:
            kind = "" if isinstance(error, LwError | _Broken) else f"{type(error).__name__}: "
            raise VerificationError(f"{label} breaks the clause {name!r}: {kind}{error}") from error
        if holds:
            self.lines.append(f"{name}: {holds}")

    def declaration(self, given: Pass | type[Pass]) -> Pass:
        cls = self.cls
        with self.clause("name", "readable in a spec"):
            name = getattr(cls, "name", None)
            _require(isinstance(name, str), "the class attribute `name` is missing")
            _require(Spec.parse(str(name)) == Spec(str(name)), f"{name!r} cannot stand in a spec")
        with self.clause("api", f"version {API_VERSION}"):
            _require(cls.api == API_VERSION, f"it was written for version {cls.api}, and this is version {API_VERSION}")
        with self.clause("frozen", "its fields are its options"):
            fields = {f.name: f for f in dataclasses.fields(cls)}
            own = [k for k, hint in vars(cls).get("__annotations__", {}).items() if "ClassVar" not in str(hint)]
            lost = [k for k in own if k not in fields]
            _require(not lost, f"{', '.join(lost)} is no option, because the class lacks @dataclass(frozen=True)")
            _require(cls.__dataclass_params__.frozen, "the dataclass is not frozen")  # type: ignore[attr-defined]
        with self.clause("options"):
            made = given() if isinstance(given, type) else given
            whole = Spec(made.name, tuple((k, to_value(getattr(made, k))) for k in fields))
            for spec in (made.spec(), whole):
                read = configure(cls, Spec.parse(str(spec)))
                _require(read == made, f"{spec} reads back as {read}")
        self.lines.append(f"options: {whole} reads back as itself")
        with self.clause("documentation", "says what it does, and costs"):
            self._documentation(made)
        return made

    def _documentation(self, made: Pass) -> None:
        own = inspect.getdoc(self.cls) if "__doc__" in vars(self.cls) and self.cls.__doc__ else ""
        generated = (own or "").startswith(f"{self.cls.__name__}(")  # what dataclass writes where there is none
        text = f"{'' if generated else own}\n{getattr(sys.modules.get(self.cls.__module__), '__doc__', None) or ''}"
        _require(text.strip(), "neither the class nor its module has a docstring")
        if isinstance(made, AnalysisPass | TransformPass | Solver):
            _require("Cost" in text, "no word of what it costs: say `Cost: one forward`, or what it is")
        if isinstance(made, TransformPass):
            _require("->" in text or "Source" in text, "a transform shows `before -> after`, or names its source")


class _Broken(Exception):
    """A clause that does not hold; `_Report.clause` says which."""


def _require(holds: object, reason: str) -> None:
    if not holds:
        raise _Broken(reason)


# --- what the passes run in


@dataclasses.dataclass(frozen=True)
class _Plain(Backend):
    """Prices what is stored and nothing else, so that analyses that ask for bytes get some."""

    name: ClassVar[str] = "plain"

    def price(self, tensor: StoredTensor) -> int:
        if tensor.format is not None:
            return tensor.format.stored_bytes(tensor.shape)
        return math.prod(tensor.shape) * getattr(torch, tensor.dtype).itemsize


class _Memory:
    """A run directory in memory; results go through JSON, as they do on disk."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}
        self.tensors: dict[str, dict[str, Tensor]] = {}

    def get(self, key: str) -> dict[str, Any] | None:
        return json.loads(self.texts[key]) if key in self.texts else None

    def put(self, key: str, value: dict[str, Any]) -> None:
        self.texts[key] = json.dumps(value)

    def get_tensors(self, key: str) -> dict[str, Tensor] | None:
        return self.tensors.get(key)

    def put_tensors(self, key: str, value: dict[str, Tensor]) -> None:
        self.tensors[key] = value


def _calibration(program: Program, rows: int = 8, length: int = 12, seed: int = SEED) -> CalibrationSet:
    wanted = Executor(program).inputs()
    if wanted == ["input_ids"]:
        return CalibrationSet({"input_ids": token_ids(rows, length, seed)}, "random", "random")
    examples = {i.name: torch.ones(i.shape, dtype=i.dtype) for g in program.entries.values() for i in g.inputs}
    return load_dataset("random", samples=rows, seed=seed, examples={k: v for k, v in examples.items() if k in wanted})


def _context(program: Program, structure: Structure, rundir: _Memory | None = None) -> Context:
    """What a run gives a pass: samples, a metric, prices, and every installed transform on offer at its default options."""
    metric = default_metric("logits" if "logits" in program.main.outputs else "features")
    ctx = Context(calibration=_calibration(program), metric=metric, backend=_Plain(), structure=structure, program=program)
    ctx.rundir, ctx.seed = rundir, SEED
    return ctx


def _offers(program: Program, structure: Structure) -> Mapping[str, list[Spec]]:
    offered: dict[str, list[Spec]] = defaultdict(list)
    for plugin in plugins("passes"):
        try:
            transform = make("passes", Spec(plugin.name))
        except LwError:  # a plugin that is broken, or that needs options, offers nothing here
            continue
        for site in transform.sites(structure.sites.values()) if isinstance(transform, TransformPass) else ():
            try:
                transform.check(program.entries[site.entry], site)
            except Refused:
                continue
            offered[site.id].append(transform.spec())
    return offered


@contextmanager
def _global_seed(seed: int) -> Iterator[None]:
    """Another state of torch's global generator, which a pass must not depend on."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


# --- analyses


class _Analysis:
    def __init__(self, report: _Report, analysis: AnalysisPass) -> None:
        self.report, self.analysis = report, analysis

    def run(self, cases: Mapping[str, Program]) -> None:
        found = 0
        for label, program in cases.items():
            structure = find_structure(program)
            try:
                with self.report.clause(f"contract on {label}"):
                    first = self._found(program, structure, None, 1)
            except VerificationError as error:
                if not isinstance(error.__cause__, Refused):
                    raise
                self._refusal(label, error.__cause__)
                continue
            found += len(first)
            with self.report.clause(f"annotations on {label}", f"{len(first)} sites, all known, all numbers finite"):
                self._annotations(first, structure)
            kept = _Memory()
            with self.report.clause(f"determinism on {label}", "the same numbers under one seed"):
                _same(first, self._found(program, structure, kept, 2), "twice under one seed")
            with self.report.clause(f"resuming on {label}", "the same numbers from a run directory"):
                _same(first, self._found(program, structure, kept, 3), "from its own run directory")
        with self.report.clause("annotations", f"{found} in all"):
            _require(found, "it annotates nothing on any of these models; give check_pass a program that it does apply to")

    def _found(self, program: Program, structure: Structure, rundir: _Memory | None, seed: int) -> dict[str, Any]:
        ctx, copy = _context(program, structure, rundir), program.copy()
        ctx.options = _offers(program, structure)
        with _global_seed(seed):
            self._provide(ctx, copy)
            return Manager(ctx).analyze(copy, self.analysis)

    def _provide(self, ctx: Context, program: Program) -> None:
        for key in self.analysis.requires:
            if key not in program.annotations and (names := providers(key)):
                Manager(ctx).analyze(program, make("passes", Spec(names[0])))

    def _refusal(self, label: str, refusal: Refused) -> None:
        with self.report.clause(f"refusal on {label}", refusal.reason):
            _require(refusal.reason.strip(), "it refuses without a reason")

    def _annotations(self, found: Mapping[str, Any], structure: Structure) -> None:
        for id, value in found.items():
            _require(id in structure.sites, f"it annotates {id!r}, which is no site of the model")
            rows = value.values() if isinstance(value, dict) else [value]
            for row in rows:
                _require(isinstance(row, Score | Damage), f"at {id} it yields a {type(row).__name__}, not a Score or Damage")
                for name, number in dataclasses.asdict(row).items():
                    plain = type(number) in (int, float, bool)
                    _require(plain, f"at {id} the {name} is a {type(number).__name__}, not a plain number")
                _require(math.isfinite(row.value), f"at {id} the value is {row.value}")


def _same(first: Mapping[str, Any], second: Mapping[str, Any], when: str) -> None:
    differing = [id for id in {**first, **second} if str(first.get(id)) != str(second.get(id))]
    if differing:
        id = differing[0]
        raise _Broken(f"{len(differing)} sites differ {when}, such as {id}: {first.get(id)} and {second.get(id)}")


# --- transforms


class _Transform:
    def __init__(self, report: _Report, transform: TransformPass, sites: list[str] | None) -> None:
        self.report, self.transform, self.sites = report, transform, sites

    def run(self, cases: Mapping[str, Program]) -> None:
        self._declared()
        applied = sum(self._on(label, program, find_structure(program)) for label, program in cases.items())
        with self.report.clause("sites", f"applied at {applied} in all"):
            _require(applied, "it applies nowhere in these models; give check_pass a program and sites where it does")

    def _declared(self) -> None:
        t = self.transform
        with self.report.clause("kinds", ", ".join(t.kinds)):
            _require(t.kinds, "it names no kind of site")
            unknown = set(t.kinds) - set(get_args(SiteKind))
            _require(not unknown, f"{', '.join(map(str, unknown))} is no kind of site; there are {', '.join(get_args(SiteKind))}")
        with self.report.clause("declarations", f"{'exact' if t.exact else 'lossy'}, {_role(t)}"):
            _require(isinstance(t.conflicts, tuple) and all(isinstance(c, str) for c in t.conflicts), "conflicts: names, a tuple")
            _require(not (t.silences and t.exact), "what silences the sites below removes them, and cannot be exact as well")
            _require(not t.silences or t.structural, "a numeric format cannot silence the sites below")
            _require(t.structural or not set(t.kinds) - {"linear", "embedding"}, "a numeric format stands at weights only")

    def _on(self, label: str, program: Program, structure: Structure) -> int:
        offered = self._offered(label, program, structure)
        done: dict[str, list[Site]] = defaultdict(list)
        refused: dict[str, str] = {}
        for site in offered:
            with self.report.clause(f"check at {label}:{site.id}"):
                reason = self._refusal(program, site)
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
            unit = _context(program, structure).need_metric().unit
            harm = "same function" if self.transform.exact else f"damage at most {worst:.3g} {unit} at one site"
            self.report.lines.append(f"contract on {label}: {', '.join(s.id for s in chosen)}; {harm}")
        return len(chosen)

    def _offered(self, label: str, program: Program, structure: Structure) -> list[Site]:
        with self.report.clause(f"sites of {label}"):
            if unknown := [id for id in self.sites or () if id not in structure.sites]:
                raise _Broken(f"{label} has no site {unknown[0]!r}; it has {', '.join(structure.sites)}")
            candidates = [structure.sites[id] for id in self.sites] if self.sites else list(structure.sites.values())
            offered = self.transform.sites(candidates)
            for site in offered:
                _require(site in candidates, f"its sites() makes up {site.id}")
                _require(site.kind in self.transform.kinds, f"its sites() gives {site.id}, of the kind {site.kind}")
        return offered

    def _refusal(self, program: Program, site: Site) -> str | None:
        """Why `check` refuses, or None; it must edit nothing and give a reason."""
        copy = program.copy()
        try:
            self.transform.check(copy.entries[site.entry], site)
            reason = None
        except Refused as refusal:
            _require(refusal.reason.strip(), "it refuses without a reason")
            reason = refusal.reason
        _require(copy.digest() == program.digest(), "`check` edits the graph")
        copy.store.check(copy.keys(), deep=True)
        return reason

    def _applied(self, program: Program, structure: Structure, sites: Sequence[Site]) -> Program:
        """A copy with the transform applied through the manager, which verifies it; twice, with the same result."""
        before, made = program.digest(), []
        for seed in (1, 2):
            after, ctx = program.copy(), _context(program, structure)
            with _global_seed(seed):
                done = Manager(ctx).transform(after, [(site, self.transform) for site in sites])
            refusals = [r for r in ctx.remarks if r.kind == "refused"]
            _require(all(r.text.strip() for r in refusals), "it refuses without a reason")
            _require(done or refusals, "it was applied nowhere and refused nowhere")
            _require(not done or after.digest() != before, "it changed nothing, and did not refuse")
            made.append(after)
        _require(program.digest() == before, "it edits the program that it was given a copy of")
        program.store.check(program.keys(), deep=True)
        _require(made[0].digest() == made[1].digest(), "two runs under one seed make different programs")
        return made[0]

    def _one(self, program: Program, structure: Structure, site: Site, after: Program) -> float:
        self._silenced(structure, site, after)
        self._stored(program, site, after)
        return self._runs(program, after)

    def _silenced(self, structure: Structure, site: Site, after: Program) -> None:
        below = [s for s in structure.sites.values() if s.id.startswith(f"{site.id}.") and s.kind in ("linear", "embedding")]
        alive = {node.name for node in after.entries[site.entry].nodes}
        for s in below:
            if self.transform.silences and s.node in alive:
                raise _Broken(f"it silences the sites below, but {s.id} is still computed")
            if not self.transform.silences and s.node not in alive:
                raise _Broken(f"{s.id} below it is gone, and `silences` does not say so")

    def _stored(self, program: Program, site: Site, after: Program) -> None:
        stored = self.transform.stored(program.entries[site.entry], site)
        for tensor in stored:
            _require(tensor.shape and min(tensor.shape) > 0, f"stored() names a tensor of shape {tensor.shape}")
            _require(_Plain().price(tensor) > 0, "stored() names a tensor that costs nothing")
        alive = {node.name for node in after.entries[site.entry].nodes}
        if site.kind in ("linear", "embedding") and site.node in alive:
            _require(stored, "stored() names no tensor, so its bytes would count as nothing; say what the site stores afterwards")

    def _runs(self, program: Program, after: Program) -> float:
        """Runs at other sizes, where EXACT must hold too, and comes back from a folder as it was; returns the damage."""
        with tempfile.TemporaryDirectory() as folder:
            loaded = Program.load(after.save(Path(folder)))
            _require(loaded.digest() == after.digest(), "the program that is loaded is not the one that was saved")
            meter = DamageMeter(_context(program, find_structure(program)).need_metric())
            for rows, length in ((8, 12), (3, 7)):
                batch = dict(_calibration(program, rows, length, seed=1).samples)
                with torch.no_grad():
                    dense, changed, again = (Executor(p).run(batch) for p in (program, after, loaded))
                for name, value in dense.items():
                    _require(value.shape == changed[name].shape, f"{name} has the wrong shape on {rows} x {length} inputs")
                    _require(bool(torch.isfinite(changed[name]).all()), f"{name} is not finite on {rows} x {length} inputs")
                    _require(torch.equal(changed[name], again[name]), f"{name} differs after saving and loading")
                    error = relative_error(value, changed[name])
                    if self.transform.exact and error > EXACT_TOLERANCE:
                        raise _Broken(f"it promises the same function; {name} differs by {error:.2g} on {rows} x {length} inputs")
                meter.update(dense, changed, batch)
        damage = meter.result().mean
        _require(math.isfinite(damage), "its damage is not finite")
        return damage


def _role(t: TransformPass) -> str:
    words = ["structural" if t.structural else "a numeric format"]
    words += ["silences the sites below"] if t.silences else []
    words += [f"conflicts with {', '.join(t.conflicts)}"] if t.conflicts else []
    return ", ".join(words)


# --- solvers


def _solver(report: _Report, solver: Solver) -> None:
    generator = torch.Generator().manual_seed(SEED)
    weight, x = (torch.randn(shape, generator=generator) for shape in ((24, 64), (256, 64)))
    stats = InputStats(64)
    stats.update(x)
    given = None if not solver.needs_hessian else stats
    errors: dict[int, float] = {}
    for bits in (2, 3, 4, 8):
        for group_size, zero_point in ((32, "integer"), (None, "none"), (32, "float")):
            format = NumericFormat(bits, group_size, zero_point)  # type: ignore[arg-type]
            with report.clause(f"solve to {bits} bits, groups of {group_size or 'a row'}, zero point {zero_point}"):
                before = weight.clone()
                made, again = solver.solve(weight, format, given), solver.solve(weight, format, given)
                _require(torch.equal(weight, before), "it writes into the weight")
                _require(made.format == format, f"it gives {made.format}")
                _require(made.codes.shape == weight.shape and made.codes.dtype == torch.uint8, "codes are uint8 of its shape")
                _require(int(made.codes.max()) < 1 << bits, "a code does not fit into the bits")
                _require(bool(torch.isfinite(made.dequantize()).all()), "a value is not finite")
                _require(torch.equal(made.dequantize(), again.dequantize()), "two runs give different values")
                errors[bits] = proxy_loss(weight, made, stats) if zero_point == "integer" else errors[bits]
    with report.clause("error falls with bits", ", ".join(f"{b} bits {e:.3g}" for b, e in errors.items())):
        ordered = list(errors.values())
        _require(ordered == sorted(ordered, reverse=True), f"the output error does not fall: {errors}")
