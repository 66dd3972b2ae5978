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
    healer          trains tensors and edits nothing else, keeps to its steps, the same under one seed and from a run directory
    solver          the format that was asked for, finite, weight untouched, the same twice, more bits less error
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from lwcompile import API_VERSION
from lwcompile.context import Context
from lwcompile.contract import AnalysisPass, Damage, HealPass, Pass, Score, Solver, TransformPass, configure
from lwcompile.contract import _to_value as to_value
from lwcompile.errors import Refused, VerificationError
from lwcompile.formats import NumericFormat
from lwcompile.manager import Manager
from lwcompile.program import Program
from lwcompile.registry import make, providers
from lwcompile.spec import Spec
from lwcompile.stats import InputStats, proxy_loss
from lwcompile.structure import Structure, find_structure
from lwcompile.tiny import programs
from lwcompile.trial_transform import TransformTrial
from lwcompile.trials import SEED, Broken, Memory, Report, context, global_seed, offers, require


def check_pass(given: Pass | type[Pass], program: Program | None = None, sites: Iterable[str] | None = None) -> list[str]:
    """Run the whole contract on a pass; returns the report, a line for each clause that holds.

    Args:
        given: a pass, or its class, which is then taken with its default options.
        program: runs on this one, with random inputs, instead of on the built-in models.
        sites: ids of the sites that a transform is tried at; by default the first and last of each kind that it takes.

    Raises:
        VerificationError: the first clause that does not hold, and why.
    """
    report = Report(given)
    checked = _declaration(report, given)
    cases = {program.name: program} if program is not None else programs()
    if isinstance(checked, AnalysisPass):
        AnalysisTrial(report, checked).run(cases)
    elif isinstance(checked, TransformPass):
        TransformTrial(report, checked, None if sites is None else list(sites)).run(cases)
    elif isinstance(checked, HealPass):
        _healer(report, dataclasses.replace(checked, steps=min(checked.steps, 4)), cases)
    elif isinstance(checked, Solver):
        _solver(report, checked)
    return report.lines


# --- every pass


def _declaration(report: Report, given: Pass | type[Pass]) -> Pass:
    cls = report.cls
    with report.clause("name", "readable in a spec"):
        name = getattr(cls, "name", None)
        require(isinstance(name, str), "the class attribute `name` is missing")
        require(Spec.parse(str(name)) == Spec(str(name)), f"{name!r} cannot stand in a spec")
    with report.clause("api", f"version {API_VERSION}"):
        require(cls.api == API_VERSION, f"it was written for version {cls.api}, and this is version {API_VERSION}")
    with report.clause("frozen", "its fields are its options"):
        fields = {f.name: f for f in dataclasses.fields(cls)}
        own = [k for k, hint in vars(cls).get("__annotations__", {}).items() if "ClassVar" not in str(hint)]
        lost = [k for k in own if k not in fields]
        require(not lost, f"{', '.join(lost)} is no option, because the class lacks @dataclass(frozen=True)")
        require(cls.__dataclass_params__.frozen, "the dataclass is not frozen")  # type: ignore[attr-defined]
    with report.clause("options"):
        made = given() if isinstance(given, type) else given
        whole = Spec(made.name, tuple((k, to_value(getattr(made, k))) for k in fields))
        for spec in (made.spec(), whole):
            read = configure(cls, Spec.parse(str(spec)))
            require(read == made, f"{spec} reads back as {read}")
    report.lines.append(f"options: {whole} reads back as itself")
    with report.clause("documentation", "says what it does, and costs"):
        _documentation(cls, made)
    return made


def _documentation(cls: type[Pass], made: Pass) -> None:
    texts: list[str] = []
    for base in cls.__mro__:
        if base.__module__ in ("builtins", Pass.__module__):
            continue
        own = vars(base).get("__doc__") or ""
        generated = own.startswith(f"{base.__name__}(")  # what dataclass writes where there is none
        texts += ["" if generated else own, getattr(sys.modules.get(base.__module__), "__doc__", None) or ""]
    text = "\n".join(texts)
    require(text.strip(), "neither the class nor its module has a docstring")
    if isinstance(made, AnalysisPass | TransformPass | HealPass | Solver):
        require("Cost" in text, "no word of what it costs: say `Cost: one forward`, or what it is")
    if isinstance(made, TransformPass):
        require("->" in text or "Source" in text, "a transform shows `before -> after`, or names its source")


# --- analyses


class AnalysisTrial:
    def __init__(self, report: Report, analysis: AnalysisPass) -> None:
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
            kept = Memory()
            with self.report.clause(f"determinism on {label}", "the same numbers under one seed"):
                _same(first, self._found(program, structure, kept, 2), "twice under one seed")
            with self.report.clause(f"resuming on {label}", "the same numbers from a run directory"):
                _same(first, self._found(program, structure, kept, 3), "from its own run directory")
        with self.report.clause("annotations", f"{found} in all"):
            require(found, "it annotates nothing on any of these models; give check_pass a program that it does apply to")

    def _found(self, program: Program, structure: Structure, rundir: Memory | None, seed: int) -> dict[str, Any]:
        ctx, copy = context(program, structure, rundir), program.copy()
        ctx.options = offers(program, structure)
        with global_seed(seed):
            self._provide(ctx, copy)
            return Manager(ctx).analyze(copy, self.analysis)

    def _provide(self, ctx: Context, program: Program) -> None:
        for key in self.analysis.requires:
            if key not in program.annotations and (names := providers(key)):
                Manager(ctx).analyze(program, make("passes", Spec(names[0])))

    def _refusal(self, label: str, refusal: Refused) -> None:
        with self.report.clause(f"refusal on {label}", refusal.reason):
            require(refusal.reason.strip(), "it refuses without a reason")

    def _annotations(self, found: Mapping[str, Any], structure: Structure) -> None:
        for id, value in found.items():
            require(id in structure.sites, f"it annotates {id!r}, which is no site of the model")
            rows = value.values() if isinstance(value, dict) else [value]
            for row in rows:
                require(isinstance(row, Score | Damage), f"at {id} it yields a {type(row).__name__}, not a Score or Damage")
                for name, number in dataclasses.asdict(row).items():
                    plain = type(number) in (int, float, bool)
                    require(plain, f"at {id} the {name} is a {type(number).__name__}, not a plain number")
                require(math.isfinite(row.value), f"at {id} the value is {row.value}")


def _same(first: Mapping[str, Any], second: Mapping[str, Any], when: str) -> None:
    differing = [id for id in {**first, **second} if str(first.get(id)) != str(second.get(id))]
    if differing:
        id = differing[0]
        raise Broken(f"{len(differing)} sites differ {when}, such as {id}: {first.get(id)} and {second.get(id)}")


# --- healers


def _healer(report: Report, healer: HealPass, cases: Mapping[str, Program]) -> None:
    """Four steps at most, on each model with noise on its weights."""
    for label, program in cases.items():
        structure, hurt = find_structure(program), _hurt(program)

        def heal(rundir: Memory | None, seed: int) -> str:
            draft = hurt.copy()  # noqa: B023
            with global_seed(seed):
                ctx = context(program, structure, rundir)  # noqa: B023
                healing = Manager(ctx).heal(draft, program, healer)  # noqa: B023
            if healing is None:
                raise Refused(ctx.remarks[-1].text)
            require(healing.kept <= healing.steps <= healer.steps, f"it took {healing.steps} steps of {healer.steps}")
            return draft.digest()

        try:
            with report.clause(f"contract on {label}", "only tensors changed, the dense program did not"):
                first = heal(None, 1)
        except VerificationError as error:
            if not isinstance(error.__cause__, Refused):
                raise
            report.lines.append(f"refusal on {label}: {error.__cause__.reason}")
            continue
        kept = Memory()
        with report.clause(f"determinism on {label}", "the same tensors under one seed"):
            require(heal(kept, 2) == first, "two runs give different tensors")
        with report.clause(f"resuming on {label}", "the same tensors from a run directory"):
            require(heal(kept, 3) == first, "its own run directory gives different tensors")


def _hurt(program: Program) -> Program:
    """A copy with a tenth of noise on every matrix."""
    hurt, generator = program.copy(), torch.Generator().manual_seed(SEED)
    noise: dict[str, torch.Tensor] = {}
    for graph in hurt.entries.values():
        for name, key in list(graph.tensors.items()):
            tensor = graph.tensor(name)
            if tensor.ndim == 2 and tensor.is_floating_point():
                if key not in noise:
                    noise[key] = tensor + 0.1 * tensor.std() * torch.randn(tensor.shape, generator=generator)
                graph.set_tensor(name, noise[key])
    return hurt


# --- solvers


def _solver(report: Report, solver: Solver) -> None:
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
                require(torch.equal(weight, before), "it writes into the weight")
                require(made.format == format, f"it gives {made.format}")
                require(made.codes.shape == weight.shape and made.codes.dtype == torch.uint8, "codes are uint8 of its shape")
                require(int(made.codes.max()) < 1 << bits, "a code does not fit into the bits")
                require(bool(torch.isfinite(made.dequantize()).all()), "a value is not finite")
                require(torch.equal(made.dequantize(), again.dequantize()), "two runs give different values")
                errors[bits] = proxy_loss(weight, made, stats) if zero_point == "integer" else errors[bits]
    with report.clause("error falls with bits", ", ".join(f"{b} bits {e:.3g}" for b, e in errors.items())):
        ordered = list(errors.values())
        require(ordered == sorted(ordered, reverse=True), f"the output error does not fall: {errors}")
