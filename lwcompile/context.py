"""What a pass may ask for: samples, activations, the metric, pricing, options, progress, remarks, and a place for results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from lwcompile.contract import Backend, Damage, Pass, TransformPass, Wanted
from lwcompile.errors import BadInput, InternalError
from lwcompile.progress import Progress, SilentProgress
from lwcompile.rundir import code_hash, content_key, versions
from lwcompile.site import Site
from lwcompile.spec import KEEP, Spec
from lwcompile.table import Group

if TYPE_CHECKING:
    from torch import Tensor

    from lwcompile.data import CalibrationSet
    from lwcompile.graph import ModelGraph
    from lwcompile.metric import Metric
    from lwcompile.program import Program
    from lwcompile.stats import InputStats
    from lwcompile.structure import Structure


# --- remarks, results


@dataclass(frozen=True)
class Remark:
    """What a pass did, refused or noticed, where, and the figures that go with it."""

    by: str
    site: str
    kind: Literal["did", "refused", "note"]
    text: str
    numbers: Mapping[str, float] = field(default_factory=dict)


class Results(Protocol):
    """Where computed results lie, by content key: a run directory, or nothing."""

    def get(self, key: str) -> dict[str, Any] | None: ...
    def put(self, key: str, value: dict[str, Any]) -> None: ...
    def get_tensors(self, key: str) -> dict[str, Tensor] | None: ...
    def put_tensors(self, key: str, value: dict[str, Tensor]) -> None: ...


class Prefix(Protocol):
    """Input statistics of layers in a program whose earlier layers are compressed already."""

    def stats(self, site: Site, wanted: Wanted) -> InputStats | None: ...


# --- the context


@dataclass
class Context:
    """What passes share in one run.

    Attributes:
        options: the options on offer at each site, by site id; analyses that price options take them from here.
        groups: sites that carry one option together; by default the structure's fused and tied ones.
        rundir: results by content key; None computes everything anew.
        workdir: takes the activations that do not fit in `memory` bytes; a temporary folder if None.
        program: the dense program, whose activations solvers see unless `prefix` knows others.
        device: where the model runs, and so where activations and gradients are. What is stored, solved or summed up (tensors of
            a graph, statistics of inputs, cached results) is on the CPU; a pass moves what it wants elsewhere.
        batch_size: samples that run through the model together.
        energies: the importance of the calibration tokens, once it is known.
        derived: by the id of a site that a transform made, the site it came from and how its inputs follow from that one's.
        prefix: the inputs of layers behind already compressed ones, while a plan is applied.
        scope: content key of what `solved` results depend on beside their own token.
    """

    calibration: CalibrationSet | None = None
    evaluation: CalibrationSet | None = None
    metric: Metric | None = None
    backend: Backend | None = None
    structure: Structure | None = None
    options: Mapping[str, Sequence[Spec]] = field(default_factory=dict)
    groups: Sequence[Group] | None = None
    seed: int = 0
    device: str = "cpu"
    batch_size: int = 4
    memory: int = 2 << 30
    progress: Progress = field(default_factory=SilentProgress)
    remarks: list[Remark] = field(default_factory=list)
    rundir: Results | None = None
    workdir: Path | None = None
    program: Program | None = None
    stats: dict[float, dict[str, InputStats | None]] = field(default_factory=dict)
    energies: Mapping[str, Tensor] | None = None
    memo: dict[Any, Any] = field(default_factory=dict)
    derived: dict[str, tuple[Site, Tensor | None]] = field(default_factory=dict)
    kept: dict[Any, Any] = field(default_factory=dict)
    prefix: Prefix | None = None
    scope: str = ""

    # --- what was given

    def need_metric(self) -> Metric:
        if self.metric is None:
            raise BadInput("this needs a metric to count damage in, and none was given: name one with --metric")
        return self.metric

    def need_calibration(self) -> CalibrationSet:
        if self.calibration is None:
            raise BadInput("this needs samples to run the model on, and none were given: name some with --dataset")
        return self.calibration

    def find_structure(self, program: Program) -> Structure:
        """The program's blocks and sites, found once."""
        if self.structure is None:
            from lwcompile.structure import find_structure

            self.structure = find_structure(program)
        return self.structure

    def children(self, site: Site) -> list[Site]:
        if self.structure is None:
            raise InternalError("the context has no structure yet; call find_structure first")
        return self.structure.children(site.id)

    def remark(self, by: str, site: str, kind: Literal["did", "refused", "note"], text: str, **numbers: float) -> None:
        self.remarks.append(Remark(by, site, kind, text, numbers))

    def note(self, by: str, site: str, text: str) -> None:
        """A remark that is made once, however often its cause comes up."""
        if (made := Remark(by, site, "note", text)) not in self.remarks:
            self.remarks.append(made)

    def derive(self, child: Site, parent: Site, by: Tensor | None = None) -> None:
        """Say what a child site is fed: what its parent is, or `by` applied to that ([k, K]), or some of its channels ([k] int64).

        What solvers may then know of it follows from the parent, wherever the samples do not run through the edited program.
        """
        self.derived[child.id] = parent, by

    def once(self, token: Any, make: Callable[[], Any]) -> Any:
        """`make()`, or what it made before under this token in this run: small things, which outlive the trials of options."""
        if token not in self.kept:
            self.kept[token] = make()
        return self.kept[token]

    def solved(self, token: Any, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Tensors made once under this token in this run; kept in the run directory too where `scope` names what they rest on."""
        if token in self.memo:
            return self.memo[token]
        self.memo[token] = self.cached_tensors(content_key(self.scope, token) if self.scope else None, make)
        return self.memo[token]

    # --- samples and activations

    def batches(
        self, program: Program | ModelGraph, *, samples: int | None = None, tokens: int | None = None, size: int | None = None
    ) -> list[dict[str, Tensor]]:
        """The calibration samples as the program's inputs, `size` at a time: the first `samples`, or about `tokens` tokens."""
        from lwcompile.executor import Executor

        given = self.need_calibration()
        if tokens is not None:
            samples = max(1, round(tokens * len(given) / given.tokens))
        chosen = given if samples is None else given.take(samples)
        return list(chosen.batches(size or self.batch_size, Executor(program).inputs()))

    def probes(self, graph: ModelGraph, rows: int = 2) -> list[list[Tensor]]:
        """Inputs of one entry, in order, for comparing two versions of it: samples, or noise where an input has none."""
        import torch

        if self.calibration is not None:
            try:
                given = self.calibration.inputs_for([i.name for i in graph.inputs], slice(0, rows))
                return [[given[i.name] for i in graph.inputs]]
            except BadInput:  # a decoder's inputs from its encoder are no samples
                pass
        generator = torch.Generator().manual_seed(self.seed)
        made = []
        for i in graph.inputs:
            if i.dtype.is_floating_point:
                made.append(torch.randn(i.shape, generator=generator, dtype=i.dtype))
            else:
                full = i.dtype == torch.bool or i.name.endswith("mask")
                noise = torch.ones(i.shape) if full else torch.randint(0, 2, i.shape, generator=generator)
                made.append(noise.to(i.dtype))
        return [made]

    def activations(
        self, program: Program | ModelGraph, sites: Iterable[Site], tokens: int | None = None
    ) -> Iterator[tuple[Site, Tensor]]:
        """(site, x [tokens, features]) in the order in which the program runs: what each layer is fed.

        For a sublayer or block, x is the residual stream before it. All sites cost one pass over the model together. Where
        the caller edits the program between two sites, the later one sees what the edited earlier layers put out.
        """
        from lwcompile.activations import activations

        return activations(self, program, sites, tokens)

    def input_stats(
        self, program: Program | ModelGraph, sites: Iterable[Site], tokens: int | None = None, importance: float = 0.0
    ) -> dict[str, InputStats]:
        """Second moments of what each linear is fed, by site id; sites fed the same tensor share one object.

        Tokens weigh their importance to this power."""
        from lwcompile.activations import input_stats

        return input_stats(self, program, sites, tokens, importance)

    def stats_of(self, graph: ModelGraph, site: Site, wanted: Wanted) -> InputStats | None:
        """What a solver may know of a weight's inputs: where a plan is applied those behind the compressed layers (`prefix`),
        else the dense program's, which know of no drift.

        A tied embedding is known by the inputs of its head, in the dense program; an untied one has none.
        """
        from lwcompile.activations import stats_of

        return stats_of(self, graph, site, wanted)

    # --- options

    def transform(self, spec: Spec) -> TransformPass:
        """The transform that an option names, configured; of a joint one the structural. From the registry."""
        from lwcompile.registry import make

        return make("passes", spec.parts[0])

    def code_of(self, option: Spec) -> list[str]:
        """Hashes of the code behind an option: its transforms', and their solvers' if they name one."""
        from lwcompile.registry import load

        transforms = [self.transform(part) for part in option.parts]
        solvers = [s for t in transforms if isinstance(s := getattr(t, "solver", None), Spec)]
        return [*(code_hash(type(t)) for t in transforms), *(code_hash(load("solvers", s.name)) for s in solvers)]

    def edited(self, program: Program, sites: Iterable[str], options: Iterable[Spec]) -> Program:
        """A copy of the program with these options applied, in order, at each of these sites. `Refused` if one does not apply.

        What the copy stores anew goes with it and not into the program's store, so that trials cost no memory for good.
        """
        from lwcompile.graph import OverlayStore

        known, memo = self.find_structure(program).sites, dict(self.memo)
        changed = program.copy()
        changed.store = OverlayStore(program.store)
        for graph in changed.entries.values():
            graph.store = changed.store
        for spec in options:
            first, *formats = (self.transform(part) for part in spec.parts)
            for id in sites:
                graph, before = changed.entries[known[id].entry], program.entries[known[id].entry]
                steps = [(first, known[id]), *((f, child) for f in formats for child in first.children(before, known[id]))]
                for transform, site in steps:
                    transform.check(graph, site)
                    transform.apply(graph, site, self)
        self.memo = memo
        return changed

    def offers(
        self, program: Program, only: str | Sequence[str] | None = None, joint: bool = True
    ) -> list[tuple[tuple[str, ...], Spec]]:
        """Every option that an analysis has to price, with the sites that carry it together: of the transforms that `only` names, if it
        names any, and without those that join two if `joint` is false."""
        names = (only,) if isinstance(only, str) else only
        units = self.units(program, self.options)
        common = [(unit, set.intersection(*(set(self.options[id]) for id in unit)) - {KEEP}) for unit in units]
        wanted = [(unit, spec) for unit, shared in common for spec in self.options[unit[0]] if spec in shared]
        return [(unit, spec) for unit, spec in wanted if (names is None or spec.name in names) and (joint or not spec.then)]

    def shares(self, program: Program, unit: Sequence[str], damage: Damage) -> Iterator[tuple[str, Damage]]:
        """A unit's damage as its sites' damages, which sum to it.

        Tied sites store one tensor: the first stands for all, and the others get 0. Fused ones share by parameters.
        """
        structure = self.find_structure(program)
        tied = any(set(unit) <= set(ids) for ids in structure.tied)
        sizes = [structure.sites[id].parameters for id in unit]
        whole = sum(sizes) or 1
        for i, id in enumerate(unit):
            part = float(i == 0) if tied or len(unit) == 1 else sizes[i] / whole
            yield id, replace(damage, value=part * damage.value, low=part * damage.low, high=part * damage.high)

    def units(self, program: Program, sites: Iterable[str]) -> list[tuple[str, ...]]:
        """The sites, joined where they carry one option together; what is priced in one go."""
        structure = self.find_structure(program)
        groups = self.groups
        if groups is None:
            groups = [Group(ids[0], ids, "fused") for ids in structure.fused]
            groups += [Group(ids[0], ids, "tied") for ids in structure.tied]
        wanted = list(dict.fromkeys(sites))
        joined: dict[str, tuple[str, ...]] = {id: (id,) for id in wanted}
        for group in groups:
            members = dict.fromkeys(m for id in group.sites if id in joined for m in joined[id])
            joined.update((member, tuple(members)) for member in members)
        return list(dict.fromkeys(joined[id] for id in wanted))

    # --- results

    def key(self, made_by: Pass, program_digest: str, *parts: object) -> str:
        """The content key of a result: the pass and its code, program, samples, metric, seed and library versions."""
        calibration = self.calibration.content_hash if self.calibration is not None else None
        whole = [str(made_by.spec()), code_hash(type(made_by)), program_digest, calibration, repr(self.metric), self.seed]
        return content_key(*whole, versions(), *map(str, parts))

    def cached(self, key: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The stored result under `key`, made and stored if there is none."""
        found = self.rundir.get(key) if self.rundir is not None else None
        if found is None:
            found = make()
            if self.rundir is not None:
                self.rundir.put(key, found)
        return found

    def cached_tensors(self, key: str | None, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The same for tensors by name, on the CPU. Without a key they are made and not stored."""
        found = self.rundir.get_tensors(key) if self.rundir is not None and key is not None else None
        if found is None:
            found = {name: tensor.cpu() for name, tensor in make().items()}
            if self.rundir is not None and key is not None:
                self.rundir.put_tensors(key, found)
        return found
