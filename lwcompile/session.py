"""One run: a program, a recipe, and everything between them that is worth keeping.

    options -> damages (analyses) -> table -> plan (allocator) -> compressed program -> (healed) -> measured damage

Each step's result lies in the run directory under its content, so that a killed run goes on where it was and a new budget is
solved without scoring again.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lwcompile import ranks
from lwcompile.apply import apply_plan
from lwcompile.budget import Budget
from lwcompile.choices import Offer, build_table, dense_bytes, groups_of, offer
from lwcompile.context import Context, Progress, SilentProgress
from lwcompile.contract import Allocator, AnalysisPass, Backend, Damage, Healing, HealPass, Score, TransformPass
from lwcompile.damage import DamageMeter, Estimate, evaluate
from lwcompile.data import CalibrationSet, load_dataset
from lwcompile.errors import BadInput, BadPlan, InfeasibleBudget, LwError
from lwcompile.executor import Executor
from lwcompile.folder import ProgramFolder
from lwcompile.held import cannot_hold
from lwcompile.manager import Manager
from lwcompile.memory import give_back
from lwcompile.metric import Metric, default_metric, load_metric
from lwcompile.oracle import Oracle
from lwcompile.plans import Plan
from lwcompile.program import Program
from lwcompile.recipe import Recipe
from lwcompile.registry import make, plugins
from lwcompile.rundir import RunDir, code_hash, content_key, short_hash, versions
from lwcompile.scoring import analysis_reports, price_by_scores, price_joint
from lwcompile.spec import Spec
from lwcompile.structure import Structure, find_structure
from lwcompile.table import Choice, OptionTable

LIMIT_ROUNDS = 5
"""How many plans `--max-kl` may heal and measure before it settles for the smallest that keeps the limit."""


@dataclass(frozen=True)
class Settled:
    """A compressed program as it is to be written, what was measured of it, and what its healer did.

    said: for the report; None where the recipe heals nothing. text, numbers: of the remark on a healing that was kept.
    """

    program: Program
    found: dict[str, Estimate]
    said: dict[str, Any] | None = None
    text: str = ""
    numbers: Mapping[str, float] = field(default_factory=dict)


@dataclass
class Session:
    """Lazy properties, each computed once. `dense` is the program after the recipe's EXACT rewrites."""

    program: Program
    recipe: Recipe
    run_dir: Path | None = None
    device: str = "cpu"
    progress: Progress = field(default_factory=SilentProgress)
    seconds: dict[str, float] = field(default_factory=dict)
    annotations: dict[str, dict[str, Any]] = field(default_factory=dict)
    _settled: dict[tuple[str, float | None], Settled] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        known: dict[str, list[str]] = {}
        for plugin in plugins():
            known.setdefault(plugin.group, []).append(plugin.name)
        self.recipe.check_names(known)
        torch.manual_seed(self.recipe.seed)

    # --- what is given

    @cached_property
    def digest(self) -> str:
        return self.program.digest()

    @cached_property
    def results(self) -> RunDir:
        scored = {k: v for k, v in self.recipe.canonical().items() if k not in ("budget", "allocator", "heal")}
        root = self.run_dir or RunDir.default_root() / short_hash(content_key(self.digest, scored))
        made = RunDir(root)
        made.describe(model=self.program.name, recipe=self.recipe.canonical(), program=self.digest, versions=versions())
        return made

    @cached_property
    def backend(self) -> Backend:
        return make("backends", self.recipe.backend) if self.recipe.backend is not None else ProgramFolder()

    @cached_property
    def metric(self) -> Metric:
        if self.recipe.metric is not None:
            return load_metric(self.recipe.metric)
        return default_metric("logits" if "logits" in self.program.main.outputs else "features")

    @cached_property
    def calibration(self) -> CalibrationSet:
        data = self.recipe.calibration
        return self._dataset(data.dataset, data.samples, data.seqlen, data.order)

    @cached_property
    def evaluation(self) -> CalibrationSet:
        data = self.recipe.evaluation
        name = data.dataset
        if name is None and self.recipe.calibration.dataset == "random":
            name = "random"
        elif name is None and self.program.tokenizer() is not None:
            name = "docstrings"
        elif name is None:
            raise BadInput("name an evaluation dataset in the recipe (evaluation: {dataset: ...}); this model has no default one")
        made = self._dataset(name, data.samples, data.seqlen, data.order, seed=self.recipe.seed + 1)
        if made.modality != "random":
            self.calibration.require_disjoint(made)
        return made

    def _dataset(self, name: str | None, samples: int, seqlen: int, order: Any, seed: int | None = None) -> CalibrationSet:
        examples = {i.name: graph.example(i.name) for graph in self.program.entries.values() for i in graph.inputs}
        wanted = Executor(self.program).inputs()
        return load_dataset(
            name,
            tokenizer=self.program.tokenizer(),
            samples=samples,
            seqlen=seqlen,
            seed=self.recipe.seed if seed is None else seed,
            order=order,
            examples={k: v for k, v in examples.items() if k in wanted},
            model_dir=self.program.asset_dir,
            decoder_start=self.program.config.get("decoder_start_token_id"),
        )

    # --- the dense program

    @cached_property
    def structure(self) -> Structure:
        return find_structure(self.dense)

    @cached_property
    def dense(self) -> Program:
        """The program after the recipe's EXACT rewrites, which the manager has probed."""
        if not self.recipe.passes:
            return self.program
        rewritten = self.program.copy()
        for spec in self.recipe.passes:
            transform: TransformPass = make("passes", spec)
            if not transform.exact:
                raise BadPlan(f"{self.recipe.where('passes')}: {spec} changes the function; offer it as an option instead")
            structure = find_structure(rewritten)
            ctx = Context(calibration=self.calibration, structure=structure, seed=self.recipe.seed, device=self.device)
            Manager(ctx).transform(rewritten, [(site, transform) for site in transform.sites(structure.sites.values())])
            self.context.remarks.extend(ctx.remarks)
        return rewritten

    @cached_property
    def context(self) -> Context:
        return Context(
            metric=self.metric,
            backend=self.backend,
            seed=self.recipe.seed,
            device=self.device,
            progress=self.progress,
            rundir=self.results,
            workdir=self.results.root / "work",
        )

    def _ready(self) -> Context:
        ctx = self.context
        ctx.structure, ctx.calibration, ctx.program = self.structure, self.calibration, self.dense
        ctx.groups = groups_of(self.structure)
        return ctx

    @contextmanager
    def _timed(self, step: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[step] = self.seconds.get(step, 0.0) + time.perf_counter() - started

    # --- scores

    @cached_property
    def offer(self) -> Offer:
        made = offer(self.dense, self.structure, self.recipe)
        for (site, spec), reason in made.refused.items():
            self.context.remark(spec.name, site, "refused", reason)
        return made

    @cached_property
    def damages(self) -> dict[str, dict[Spec, Damage]]:
        """What the recipe's analyses say of each option; where two do, the later one has the word."""
        ctx = self._ready()
        ctx.options = self.offer.options
        found: dict[str, dict[Spec, Damage]] = {}
        for spec in self.recipe.analyses:
            analysis: AnalysisPass = make("passes", spec)
            if not isinstance(analysis, AnalysisPass):
                raise BadPlan(f"{self.recipe.where('analyses')}: {spec.name} is no analysis")
            manager = Manager(ctx)
            with self._timed(str(spec)), ranks.first_alone():
                annotations = manager.analyze(self.dense, analysis)
            self.annotations[str(spec)] = annotations
            for site, value in annotations.items():
                if isinstance(value, dict):
                    found.setdefault(site, {}).update(value)
        for spec, annotations in self.annotations.items():
            scores = {site: value for site, value in annotations.items() if isinstance(value, Score)}
            if scores:
                price_by_scores(ctx, self.dense, Spec.parse(spec).name, scores, found)
        price_joint(self.dense, self.offer, self.structure, found)
        return found

    def analysis_reports(self, plan: Plan | None = None) -> list[dict[str, Any]]:
        """Each analysis with its cost, and how well it ranks and predicts: see `lwcompile.scoring`."""
        return analysis_reports(self.annotations, self.seconds, plan)

    @cached_property
    def table(self) -> OptionTable:
        self._ready()
        damages = self.damages
        with self._timed("pricing"):
            return build_table(self.dense, self.structure, self.offer, damages, self.backend, self.metric.unit)

    @property
    def dense_bytes(self) -> int:
        return dense_bytes(self.dense, self.backend)

    # --- plans

    def plan(self, budget: Budget | None = None) -> Plan:
        """The allocator's plan under a budget (the recipe's, if none is given), with where it came from."""
        budget = self.recipe.budget if budget is None else budget
        allocator: Allocator = make("allocators", self.recipe.allocator)
        table = self.table
        plans = allocator.measurements(budget, len(table.sublayers))
        with self._timed("allocating"), self.progress.task("whole plans", plans) if plans else nullcontext() as task:
            try:
                plan = allocator.allocate(table, budget, Oracle(self.dense, self.structure, self._ready(), task=task))
            except InfeasibleBudget as error:
                refused = Counter(c.refused for row in table.sites.values() for c in row.choices if c.refused)
                if not refused:
                    raise
                (reason, times), *_ = refused.most_common(1)
                whole = f"{error}; {refused.total()} options were refused, {times} of them because {reason}"
                raise InfeasibleBudget(whole) from error
        return plan.replace(origin=plan.origin | self.origin())

    def formats_alone(self, budget: Budget) -> Plan | None:
        """What the same scores make of a budget with numeric formats and nothing else; None where the recipe offers nothing else.

        `InfeasibleBudget` if they cannot meet it.
        """
        numeric = {spec for spec, transform in self.offer.transforms.items() if not spec.then and not transform.structural}

        def is_numeric(choice: Choice) -> bool:
            return choice.structural is None and choice.option in numeric

        if all(is_numeric(c) for row in self.table.sites.values() for c in row.choices if c.options and not c.refused):
            return None
        budget = dataclasses.replace(budget, drop_sublayers=None)
        return make("allocators", self.recipe.allocator).allocate(self.table.offering(is_numeric), budget)

    def adopt(self, plan: Plan) -> Plan:
        """A plan from elsewhere, checked against the table (`BadPlan` with file and line), with what it is predicted to be.

        An option that says the same as an offered one in other words, such as without a default, becomes that one. A key with `*`
        stands for every site that is offered what it says and is not named itself.
        """
        offered = {transform.spec(): spec for spec, transform in self.offer.transforms.items() if not spec.then}

        def form(option: Spec) -> Spec:
            try:
                return offered.get(make("passes", option).spec(), option)
            except LwError:  # validation says what is wrong with it, and where
                return option

        plan = plan.normalize(form)
        try:
            plan = plan.spread(self.table)
            plan.validate(self.table)
        except BadPlan as error:
            if (reason := cannot_hold(plan, self.table, self.structure, self.dense, self.backend)) is None:
                raise
            raise BadPlan(f"{error}; {self.backend.name} cannot hold it: {reason}") from None
        found = self.table.evaluate(plan.choices)
        return plan.replace(predicted=found.damage, bytes=found.bytes)

    def origin(self) -> dict[str, Any]:
        return {
            "model": self.program.name,
            "program": self.digest,
            "allocator": str(self.recipe.allocator),
            "analyses": [str(s) for s in self.recipe.analyses],
            "calibration": self.calibration.describe(),
            "seed": self.recipe.seed,
            "versions": versions(),
        }

    def plan_within(self, limit: float) -> tuple[Plan, Program]:
        """The smallest plan found whose measured damage on held-out samples keeps `limit` with its whole interval: once healed,
        if the recipe heals. With it its program, unhealed, which `settle` knows.

        Predicted damages add up and measured ones do not, so the budget of predicted damage is moved by bisection on measured
        plans: `LIMIT_ROUNDS` of them. `InfeasibleBudget` if none keeps the limit.
        """
        low, high, target = 0.0, None, limit
        best: tuple[Plan, Program] | None = None
        least = float("inf")
        for _ in range(LIMIT_ROUNDS):
            plan = self.plan(Budget(max_damage=target, drop_sublayers=self.recipe.budget.drop_sublayers))
            program = self.compress(plan)
            found = self.settle(program, limit).found["damage"]
            least = min(least, found.high)
            if found.high <= limit:
                low = target
                if best is None or (plan.bytes or 0) < (best[0].bytes or 0):
                    best = (plan.replace(measured=found.mean, interval=(found.low, found.high)), program)
                ratio = limit / max(found.high, 1e-9)
            else:
                high = target
                ratio = limit / found.high
            if 0.9 <= ratio <= 1.0 + 1e-9 and best is not None:
                break
            target = (low + high) / 2 if high is not None and low > 0 else target * min(max(ratio, 0.2), 5.0)
        if best is None:
            raise InfeasibleBudget(
                f"no plan kept the damage within {limit:g} {self.metric.unit} on held-out samples; the least measured was "
                f"{least:.4g}: allow that much, or offer wider formats"
            )
        return best

    def compress(self, plan: Plan) -> Program:
        """The program that a plan makes; weights that a killed run has solved are not solved again."""
        ctx = self._ready()
        ctx.scope = content_key(
            self.dense.digest(),
            plan.digest(),
            self.calibration.content_hash,
            repr(self.metric),
            self.recipe.seed,
            versions(),
            self._solver_code(plan),
        )
        ctx.memo.clear()
        ctx.stats.clear()
        with self._timed("compressing"), ranks.first_alone():
            return apply_plan(self.dense, plan.choices, self.structure, ctx)

    def restructured(self, plan: Plan) -> Program:
        """The dense program with the plan's structural options alone, which cost nothing: what a backend is asked about first."""
        kept = {id: tuple(o for o in options if make("passes", o).structural) for id, options in plan.choices.items()}
        kept = {id: options for id, options in kept.items() if options}
        return (
            apply_plan(self.dense, kept, self.structure, dataclasses.replace(self._ready(), remarks=[])) if kept else self.dense
        )

    def _solver_code(self, plan: Plan) -> list[str]:
        specs = {spec for options in plan.choices.values() for spec in options}
        made = [make("passes", spec) for spec in sorted(specs, key=str)]
        solvers = [make("solvers", s) for t in made if isinstance(s := getattr(t, "solver", None), Spec)]
        return sorted({code_hash(type(p)) for p in [*made, *solvers]})

    def heal(self, program: Program) -> tuple[Program, Healing | None]:
        """The compressed program trained by the recipe's healer, and what that did; None, with a remark, if it refused."""
        healer = make("passes", self.recipe.heal) if self.recipe.heal is not None else None
        if not isinstance(healer, HealPass):
            raise BadPlan(f"{self.recipe.where('heal')}: {self.recipe.heal or 'nothing'} is no healer")
        ctx, healed = self._ready(), program.copy()
        with self._timed("healing"):
            done = Manager(ctx).heal(healed, self.dense, healer)
        return healed, done

    def settle(self, program: Program, limit: float | None = None) -> Settled:
        """The program measured, healed if the recipe says so, and measured again; each once.

        Where healing would break the limit that the program keeps, or do more damage past it, the program stays as it was.
        """
        token = program.digest(), limit
        if token not in self._settled:
            self._settled[token] = self._settle(program, limit)
        return self._settled[token]

    def _settle(self, program: Program, limit: float | None) -> Settled:
        before = self.measure(program)
        if self.recipe.heal is None:
            return Settled(program, before)
        healed, done = self.heal(program)
        said = {"healer": str(self.recipe.heal), "before": before["damage"].to_json()}
        if done is None:
            return Settled(program, before, said | {"refused": self.context.remarks[-1].text})
        after = self.measure(healed)
        old, new = before["damage"], after["damage"]
        said |= {
            "after": new.to_json(),
            "steps": done.steps,
            "kept": done.kept,
            "trained": done.trained,
            "held out": done.damages,
        }
        numbers = {"before": old.mean, "after": new.mean, "steps": done.steps, "kept": done.kept, "trained": done.trained}
        if limit is not None and new.high > max(limit, old.high):
            reason = f"rolled back: damage would be {new}, past the limit of {limit:g}"
            return Settled(program, before, said | {"refused": reason}, reason, numbers | {"limit": limit})
        text = (
            f"damage {old.mean:.4g} before and {new.mean:.4g} after, {new.unit}; {done.trained:,} numbers trained for {done.steps} "
            f"steps, step {done.kept} kept"
        )
        if grown := healed.nbytes() - program.nbytes():  # gains that were all one are one stored tensor before, and several after
            text, numbers = f"{text}; {grown:+,} bytes stored", numbers | {"bytes": grown}
        return Settled(healed, after, said, text, numbers)

    # --- measuring

    def measure(self, program: Program) -> dict[str, Estimate]:
        """Damage, agreement and perplexity of a program against the dense one, on the evaluation set."""
        key = content_key("measure", self.digest, program.digest(), self.evaluation.content_hash, repr(self.metric), versions())
        with ranks.first_alone():
            if (stored := self.results.get(key)) is not None:
                return {name: Estimate.from_json(row) for name, row in stored.items()}
            with self._timed("measuring"):
                found = self._measure(program)
            self.results.put(key, {name: e.to_json() for name, e in found.items()})
        return found

    def _measure(self, program: Program) -> dict[str, Estimate]:
        dense, compressed = Executor(self.dense, self.device), Executor(program, self.device)
        batches = list(self.evaluation.batches(self.context.batch_size, dense.inputs()))
        with self.progress.task("measuring", len(batches)) as task:

            def outputs(executor: Executor, tick: bool) -> Iterator[dict[str, Tensor]]:
                for batch in batches:
                    with torch.no_grad():  # not around the yield: interleaved generators would leave gradients off
                        made = executor.run(batch)
                    yield made
                    if tick:
                        task.advance()
                        give_back()

            return evaluate(self.metric, outputs(dense, False), outputs(compressed, True), batches, self.recipe.seed)

    def damage_on_calibration(self, program: Program, samples: int = 16) -> float:
        """A quick look at a program's damage, on a few calibration samples: for limits between passes, not for reports."""
        dense, compressed = Executor(self.dense, self.device), Executor(program, self.device)
        meter = DamageMeter(self.metric, self.recipe.seed)
        with torch.no_grad():
            for batch in self.calibration.take(samples).batches(self.context.batch_size, dense.inputs()):
                meter.update(dense.run(batch), compressed.run(batch), batch)
        return meter.result().mean
