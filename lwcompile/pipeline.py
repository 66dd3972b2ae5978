"""The way of a model, as five functions that say the same words as the command line.

program = lw.capture("model_dir")
plan    = lw.plan(program, avg_bits=4.25)
result  = lw.compress(program, "small", plan=plan)
result  = lw.export(program, "model.onnx", plan=plan)
model   = lw.load("small"); model.generate("Once upon a time")
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lwcompile import ranks
from lwcompile.artifact import load, model_files, write_artifact
from lwcompile.budget import Budget
from lwcompile.context import Progress, SilentProgress
from lwcompile.contract import Backend, who_runs
from lwcompile.errors import BadInput, InfeasibleBudget, Refused
from lwcompile.folder import ProgramFolder
from lwcompile.plans import Plan
from lwcompile.program import Program
from lwcompile.recipe import DEFAULT, Recipe
from lwcompile.registry import load as load_plugin
from lwcompile.registry import make, plugins
from lwcompile.report import Report
from lwcompile.rundir import RunDir, content_key, versions
from lwcompile.session import Session
from lwcompile.spec import Spec
from lwcompile.store import ParameterStore
from lwcompile.table import pareto
from lwcompile.tracing import capture_module, from_exported

if TYPE_CHECKING:
    from torch import nn

    from lwcompile.sources import Source

TRACERS = ("tracing.py", "canonical.py", "attention.py", "masks.py", "sources.py", "huggingface.py", "graph.py", "serialize.py")

__all__ = ["Result", "Settings", "capture", "compress", "export", "load", "plan", "session"]


@dataclass(frozen=True)
class Settings:
    """What flags and keyword arguments say; None leaves it to the recipe.

    `max_kl` limits the measured damage on held-out samples, in the metric's unit; `avg_bits` and `max_bytes` the size. Samples are
    calibrated on; `eval_dataset` is what the result is judged on. `heal` names a healer, such as `distill{steps=200}`; False heals
    nothing, whatever the recipe says. With a healer `max_kl` limits the damage once healed, and every plan that is tried is healed.
    """

    recipe: str | Path | Recipe = DEFAULT
    plan: str | Path | Plan | None = None
    avg_bits: float | None = None
    max_bytes: int | None = None
    drop_sublayers: int | None = None
    max_kl: float | None = None
    dataset: str | None = None
    samples: int | None = None
    seqlen: int | None = None
    eval_dataset: str | None = None
    metric: str | None = None
    backend: str | None = None
    device: str = "cpu"
    run_dir: Path | None = None
    seed: int | None = None
    heal: str | Spec | Literal[False] | None = None

    @property
    def searches(self) -> bool:
        """Whether plans are tried until one keeps `max_kl`: where the size is given too, there is one to try."""
        return self.plan is None and self.max_kl is not None and self.avg_bits is None and self.max_bytes is None

    def resolved(self) -> Recipe:
        """The recipe with these settings over it."""
        recipe = self.recipe if isinstance(self.recipe, Recipe) else Recipe.find(self.recipe)
        wished = Budget(self.max_bytes, self.avg_bits, self.drop_sublayers)
        data = {"dataset": self.dataset, "samples": self.samples, "seqlen": self.seqlen}
        return recipe.with_(
            budget=None if wished.empty else wished,
            calibration=data,
            evaluation={"dataset": self.eval_dataset, "seqlen": self.seqlen},
            metric=self.metric,
            backend=self.backend,
            seed=self.seed,
            heal=self.heal,
        )


@dataclass
class Result:
    """A compressed program, the plan that made it (with its measured damage), the report, and where it was written."""

    program: Program
    plan: Plan
    report: Report
    path: Path | None = None
    run_dir: Path | None = None


# --- capture


def capture(
    source: str | Path | nn.Module | Source,
    example: Mapping[str, Any] | None = None,
    dynamic: Mapping[str, Mapping[int, str]] | None = None,
) -> Program:
    """Trace what `source` names: a program folder, a Hugging Face folder, a .gguf or .pt2 file, `module:function`, or a module.

    example, dynamic: for modules, keyword inputs and their free dimensions (`{"x": {0: "batch"}}`).

    A traced file is kept in the user's cache under its content, since tracing takes longer than reading it back.
    """
    if isinstance(source, str | Path) and (Path(source) / "program.json").is_file():
        return Program.load(Path(source))
    from lwcompile.sources import open_source, origin_of

    origin = origin_of(source) if isinstance(source, str | Path) else None
    if origin is None:
        opened = open_source(source, example, {k: dict(v) for k, v in dynamic.items()} if dynamic else None)  # type: ignore[arg-type]
        return _trace(opened, None)
    folder = RunDir.default_root().parent / "programs" / content_key(origin, versions(), _tracer_code())
    with ranks.first_alone():
        if not (folder / "program.json").is_file():
            return _trace(open_source(source), folder)
    return Program.load(folder)


def _tracer_code() -> str:
    """A hash of this package's own tracing code, so that an improved one traces again."""
    here = Path(__file__).parent
    return content_key(*[(here / name).read_text(encoding="utf-8") for name in TRACERS])


def _trace(source: Source, keep: Path | None) -> Program:
    store, entries, remarks = ParameterStore(), {}, list(source.remarks)
    for name, part in source.parts.items():
        if source.exported is not None:
            entries[name], found = from_exported(source.exported, store, part.dynamic), []
        else:
            entries[name], found = capture_module(part.model, part.example_kwargs, part.dynamic, store=store)
        remarks += [f"{name}: {remark}" for remark in found]
    program = Program(entries, store, source.task, source.name, source.config or {}, source.license, (), tuple(remarks))
    if keep is None:
        return program
    program.assets = source.write_assets(keep)
    program.save(keep)
    return Program.load(keep)


# --- plan, compress, export


def session(program: Program, settings: Settings, progress: Progress | None = None) -> Session:
    """The run that a program and settings describe; its steps are computed when they are asked for."""
    made = Session(program, settings.resolved(), settings.run_dir, settings.device, progress or SilentProgress())
    made.recipe.check_specs(make)
    return made


def plan(program: Program, *, progress: Progress | None = None, **settings: Any) -> Plan:
    """Choose an option for every site: see `Settings` for the words. A plan given by file is checked and returned.

    A plan that changes structure says in its origin what its size would cost with numeric formats alone.
    """
    wished = Settings(**settings)
    run = session(program, wished, progress)
    made = _planned(run, wished)[0]
    alone = formats_alone(run, made) if wished.plan is None else None
    return made if alone is None else made.replace(origin=made.origin | {"numeric formats alone": alone})


def _planned(run: Session, settings: Settings) -> tuple[Plan, Program | None]:
    if settings.plan is not None:
        given = settings.plan if isinstance(settings.plan, Plan) else Plan.load(settings.plan)
        return run.adopt(given), None
    if settings.max_kl is None:
        return run.plan(), None
    require_samples(run, judged=True)
    return run.plan_within(settings.max_kl) if settings.searches else _planned_within_both(run, settings.max_kl)


def _planned_within_both(run: Session, limit: float) -> tuple[Plan, Program]:
    """The least damage for the size, where that keeps the limit on damage too."""
    chosen = run.plan()
    program = run.compress(chosen)
    found = run.settle(program, limit).found["damage"]
    if found.high > limit:
        raise InfeasibleBudget(
            f"the best plan found for {run.recipe.budget} does {found} on held-out samples, past the limit of {limit:g}: allow that "
            "much damage, or more bytes"
        )
    return chosen.replace(measured=found.mean, interval=(found.low, found.high)), program


def require_samples(run: Session, judged: bool) -> None:
    """Open the samples now: a dataset that is missing, or shares its text with the other one, is no news for after the work."""
    if len(run.calibration) == 0 or (judged and len(run.evaluation) == 0):
        raise BadInput("there are no samples; name others with --dataset and --eval-dataset")


def compress(program: Program, path: str | Path | None = None, *, progress: Progress | None = None, **settings: Any) -> Result:
    """Apply a plan and measure it. With `path`, the compressed program is written there, loadable by `lw.load`."""
    wished = Settings(**settings)
    if wished.backend is None:
        wished = dataclasses.replace(wished, backend=ProgramFolder.name)
    run = session(program, wished, progress)
    result = _compressed(run, wished)
    if path is not None and not ranks.rank():
        folder = Path(path)
        with_decode(result.program, run)  # a decode graph that would differ is said now, and not when somebody generates
        with run._timed("writing"):
            _whole(folder, lambda draft: write_artifact(draft, run, result.program, result.plan, None, result.report))
        result.path = folder
    return result


def _compressed(run: Session, settings: Settings, lowered: bool = False) -> Result:
    require_samples(run, judged=True)
    chosen, program = _planned(run, settings)
    if lowered and program is None and (reasons := run.backend.unsupported(run.restructured(chosen))):
        raise Refused(f"{run.backend.name} cannot hold this plan: {'; '.join(reasons)}")
    program = program or run.compress(chosen)
    settled = run.settle(program, settings.max_kl)
    program, found, healing = settled.program, settled.found, settled.said
    if healing is not None and settled.text:
        run.context.remark(
            str(run.recipe.heal), "", "refused" if "refused" in healing else "did", settled.text, **settled.numbers
        )
    damage = found["damage"]
    chosen = chosen.replace(measured=damage.mean, interval=(damage.low, damage.high), unit=run.metric.unit)
    report = _report(run, chosen, found, healing)
    if not ranks.rank():
        report.save(run.results.root)
        chosen.save(run.results.root / "plan.yaml", run.table)
    return Result(program, chosen, report, None, run.results.root)


def export(program: Program, path: str | Path, *, progress: Progress | None = None, **settings: Any) -> Result:
    """Compress, lower to the backend's format at `path`, and prove that the file computes what the graph does.

    The file's folder becomes the loadable directory: configuration, tokenizer, plan, manifest, licence and model card. A failed
    parity check raises `VerificationError` and leaves no file.
    """
    path, wished = Path(path), Settings(**settings)
    if wished.backend is None and (named := backend_for(path)) is not None:
        wished = dataclasses.replace(wished, backend=named)
    run = session(program, wished, progress)
    if run.backend.file and path.suffix not in run.backend.suffixes:
        path = path / run.backend.file
    with writable(path.parent):
        return _exported(run, wished, path)


def _exported(run: Session, wished: Settings, path: Path) -> Result:
    if reasons := run.backend.unsupported(run.dense):
        raise Refused(f"{run.backend.name} cannot hold this model: {'; '.join(reasons)}")
    result = _compressed(run, wished, lowered=True)
    if ranks.rank():
        return result
    lowered = with_decode(result.program, run)
    with run._timed("lowering"):
        parity = run.backend.lower(lowered, path, run.context)
    for entry, graph in lowered.entries.items():
        if who := run.backend.executors(graph):
            run.context.note(run.backend.name, entry, f"runs {'; '.join(who_runs(graph, who))}")
    report = result.report
    report.data["parity"] = dataclasses.asdict(parity)
    report.data["bytes"] |= {"file": folder_bytes(path)}
    report.data["seconds"] = {name: round(s, 2) for name, s in run.seconds.items()}
    report.data["remarks"] = _remarks(run)
    if (speed := _speed(run, path)) is not None:
        report.data["speed"] = speed
    write_artifact(path.parent, run, None, result.plan, path, report)
    report.save(run.results.root)
    result.path, result.report = path, report
    return result


def with_decode(program: Program, run: Session) -> Program:
    """The program with the graph that continues from cached keys and values, where one can be derived."""
    if "logits" not in program.main.outputs or set(program.entries) != {"forward"}:
        return program
    from lwcompile.decode import derive_decode
    from lwcompile.rolling import bound_of

    try:
        decode = derive_decode(program.main)
    except Refused as refusal:
        run.context.remark("decode", "forward", "refused", refusal.reason)
        return program
    if rolling := [i.name for i in decode.inputs if bound_of(i.dynamic.get(2, "")) is not None]:
        text = f"{len(rolling)} caches roll ({rolling[0]}, ...): a runtime must not take a cache's length for the sequence's"
        run.context.remark("decode", "forward", "note", text)
    return dataclasses.replace(program, entries={**program.entries, "decode": decode})


def backend_for(path: Path) -> str | None:
    """The backend that writes files with this suffix, by what the installed backends say of themselves."""
    for plugin in plugins("backends"):
        backend: type[Backend] = load_plugin("backends", plugin.name)
        if path.suffix in backend.suffixes:
            return plugin.name
    return None


@contextmanager
def writable(folder: Path) -> Iterator[None]:
    """Make a folder, failing before the work and not after it; where the work fails, what was made and is empty goes away."""
    if ranks.rank():
        yield
        return
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        _require_writable(folder)
        yield
    except BaseException:
        for path in made:
            with suppress(OSError):  # one that holds something stays
                path.rmdir()
        raise


def _require_writable(folder: Path) -> None:
    probe = folder / f".lwcompile-{time.time_ns()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise BadInput(f"cannot write into {folder}: {error.strerror or error}; name another directory") from error


def folder_bytes(path: Path) -> int:
    """Bytes of a model file and of the weights beside it, or of a model folder."""
    return sum(f.stat().st_size for f in model_files(path))


def _whole(folder: Path, write: Any) -> None:
    """Write a folder under another name and move it into place, so that a half-written one never has the name."""
    draft = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        write(draft)
        shutil.rmtree(folder, ignore_errors=True)
        draft.rename(folder)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


# --- the report


def formats_alone(run: Session, chosen: Plan) -> dict[str, Any] | None:
    """What the size of a plan costs with numeric formats and nothing else, by the same scores; None for a plan without structure."""
    size = chosen.bytes or run.table.evaluate(chosen.choices).bytes
    try:
        plan = run.formats_alone(Budget(bytes=size))
    except InfeasibleBudget as error:
        return {"plan's bytes": size, "refused": str(error)}
    if plan is None:
        return None
    return {
        "plan's bytes": size,
        "predicted with all options": chosen.predicted,
        "predicted": plan.predicted,
        "bytes": plan.bytes,
    }


def _report(run: Session, chosen: Plan, found: Mapping[str, Any], healing: Mapping[str, Any] | None = None) -> Report:
    damage = found["damage"]
    rows = {name: e.to_json() for name, e in found.items()}
    return Report.build(
        name=run.program.name,
        license=run.program.license,
        table=run.table,
        plan=chosen,
        curve=pareto(run.table, make("allocators", run.recipe.allocator), n=12),
        sites=run.structure.sites,
        recipe=run.recipe.canonical(),
        analyses=run.analysis_reports(chosen),
        measured={"value": damage.mean, "low": damage.low, "high": damage.high, "samples": damage.n},
        evaluation={
            "dense": {"perplexity": rows["perplexity dense"]} if "perplexity dense" in rows else {},
            "compressed": {k: v for k, v in rows.items() if k not in ("perplexity dense", "damage")},
            "dataset": run.evaluation.describe(),
        },
        remarks=_remarks(run),
        **({} if healing is None else {"healing": dict(healing)}),
        **({} if (alone := formats_alone(run, chosen)) is None else {"numeric formats alone": alone}),
        seconds={name: round(s, 2) for name, s in run.seconds.items()},
        versions=versions(),
        seed=run.recipe.seed,
        calibration=run.calibration.describe(),
    )


def _remarks(run: Session) -> list[dict[str, Any]]:
    return [
        {"pass": r.by, "site": r.site, "kind": r.kind, "text": r.text, "numbers": dict(r.numbers)} for r in run.context.remarks
    ]


def _speed(run: Session, path: Path) -> dict[str, Any] | None:
    """Speed of the file beside the dense model's on the same backend, if the backend can time itself and this file."""
    time_it = getattr(run.backend, "speed", None)
    if time_it is None:
        return None
    with run._timed("timing"):
        if (after := time_it(path)) is None:
            return None
        key = content_key("speed", run.digest, str(run.backend.spec()), versions())
        before = run.results.get(key)
        if before is None:
            folder = run.results.root / "dense"
            folder.mkdir(parents=True, exist_ok=True)
            try:
                run.backend.lower(with_decode(run.dense, run), folder / path.name, run.context)
                before = {**time_it(folder / path.name), "file_bytes": folder_bytes(folder / path.name)}
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            run.results.put(key, before)
    return {"before": before, "after": {**after, "file_bytes": folder_bytes(path)}}
