"""`export`, `compress`, `analyze`: commands that run the pipeline."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lwcompile.cli.console import err, note, show, show_json
from lwcompile.cli.flags import Budgets, Data, Healing, HeldOut, Run, Source, flags, settings

if TYPE_CHECKING:
    from lwcompile.estimate import Command
    from lwcompile.pipeline import Result
    from lwcompile.program import Program
    from lwcompile.table import OptionTable


def register(app: typer.Typer) -> None:
    app.command()(export)
    app.command()(compress)
    app.command()(analyze)


@flags
def export(
    path: Annotated[
        Path, typer.Argument(help="The file to write, such as model.onnx (or a folder, with --backend); its folder becomes loadable.")
    ],
    source: Source, budget: Budgets, healing: Healing, data: Data, held_out: HeldOut, run: Run,
    target: Annotated[
        str | None, typer.Option(help="What the file is compiled for, of those that its backend knows, such as iree.")
    ] = None,
) -> None:  # fmt: skip
    """Compile a model into a file that a runtime takes, and prove that the file computes the same."""
    from lwcompile import pipeline

    words = settings(budget, data, run, healing, held_out)
    require_backend(path, run.backend, budget.recipe)
    if target is not None:
        words["backend"] = with_target(path, run.backend, target)
    require_words(words)
    program = open_model(source.model)
    if run.dry_run:
        return dry_run(program, words, path.parent, run.json, "export")
    finish(pipeline.export(program, path, progress=progress(), **words), run.json)


@flags
def compress(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder to write the compressed program into.")],
    source: Source, budget: Budgets, healing: Healing, data: Data, held_out: HeldOut, run: Run,
) -> None:  # fmt: skip
    """Compress a model and write it as a program that Python loads, without lowering it."""
    from lwcompile import pipeline

    words = settings(budget, data, run, healing, held_out)
    require_words(words)
    program = open_model(source.model)
    if run.dry_run:
        return dry_run(program, words, folder, run.json, "compress")
    with pipeline.writable(folder.parent):
        finish(pipeline.compress(program, folder, progress=progress(), **words), run.json)


@flags
def analyze(
    source: Source, budget: Budgets, data: Data, run: Run,
    rows: Annotated[int, typer.Option(help="How many sites to print, the most sensitive first; 0 prints all.")] = 20,
) -> None:  # fmt: skip
    """Score every option at every site, and print what hurts most."""
    from lwcompile import pipeline

    words = settings(budget, data, run)
    require_words(words)
    program = open_model(source.model)
    if run.dry_run:
        return dry_run(program, words, Path(), run.json, "analyze")
    session = pipeline.session(program, pipeline.Settings(**words), progress())
    table = session.table
    note(f"kept in {session.results.root}")
    if run.json:
        import json

        return show_json(json.loads(table.to_json()))
    show(damage_table(table, rows))


# --- what the commands share


def progress() -> Any:
    from lwcompile import ranks
    from lwcompile.progress import SilentProgress, terminal_progress

    return SilentProgress() if ranks.rank() else terminal_progress(err())


def require_backend(path: Path, backend: str | None, recipe: str) -> None:
    """`BadInput` for a file that no installed backend writes; a folder is for the recipe's backend, if that writes one."""
    from lwcompile.errors import BadInput
    from lwcompile.pipeline import backend_for
    from lwcompile.recipe import Recipe
    from lwcompile.registry import load, plugins

    if backend is not None or backend_for(path) is not None:
        return
    chosen = Recipe.find(recipe).backend
    if chosen is not None and load("backends", chosen.name).file:
        return
    known = sorted({suffix for plugin in plugins("backends") for suffix in load("backends", plugin.name).suffixes if suffix})
    what = f"files named {path.suffix}" if path.suffix else f"a file without a suffix such as {path}"
    raise BadInput(f"no installed backend writes {what}; name it with one of {', '.join(known)}, or give --backend")


def require_words(words: dict[str, Any]) -> None:
    """A recipe, a plan's file or a plugin's name that cannot be meant is said before a model is downloaded and traced."""
    from lwcompile.pipeline import Settings
    from lwcompile.plans import Plan
    from lwcompile.registry import make, plugins

    known: dict[str, list[str]] = {}
    for plugin in plugins():
        known.setdefault(plugin.group, []).append(plugin.name)
    recipe = Settings(**words).resolved()
    recipe.check_names(known)
    recipe.check_specs(make)
    if words["plan"] is not None:
        Plan.load(words["plan"])


def with_target(path: Path, backend: str | None, target: str) -> str:
    """The backend's line with this target in it."""
    from lwcompile.errors import BadInput, BadPlan
    from lwcompile.pipeline import backend_for
    from lwcompile.registry import load, make
    from lwcompile.spec import Spec

    spec = Spec.parse(backend or backend_for(path) or "")
    if "target" not in {field.name for field in dataclasses.fields(load("backends", spec.name))}:
        raise BadInput(f"the backend {spec.name} has no targets to choose from; leave --target out")
    try:
        make("backends", Spec(spec.name, (("target", target),)))
    except BadPlan as error:
        raise BadInput(f"--target: {error}") from None
    return str(Spec(spec.name, (*(arg for arg in spec.args if arg[0] != "target"), ("target", target))))


def open_model(model: str | None) -> Program:
    """The program of `--model`, or of the demo model."""
    from lwcompile import pipeline

    if model is not None:
        return pipeline.capture(model)
    from lwcompile.demo import demo_model

    note("no --model is given: this compiles the demo model")
    return pipeline.capture(demo_model(progress=note))


def finish(result: Result, as_json: bool) -> None:
    """What a compile ends with: the strip and the figures, or their JSON; where things lie, on stderr."""
    from lwcompile import ranks

    if ranks.rank():
        return
    report = result.run_dir / "report.html" if result.run_dir else None
    if as_json:
        return show_json({"path": result.path, "run_dir": result.run_dir, "report": report, **result.report.summary()})
    from lwcompile.strip import closing

    show(closing(result.report.data))
    if result.path is not None:
        note(f"wrote {result.path}")
    if report is not None:
        note(f"report {report}")


def dry_run(program: Program, words: dict[str, Any], folder: Path, as_json: bool, command: Command) -> None:
    """Print what a command would take; `BadInput` where the machine does not have it, or the samples are not there."""
    from lwcompile import pipeline
    from lwcompile.estimate import estimate

    wished = pipeline.Settings(**words)
    pipeline.require_samples(pipeline.session(program, wished), judged=command in ("compress", "export"))
    found = estimate(program, folder=folder, command=command, **words)
    show_json(found.to_json()) if as_json else show(str(found))
    found.require()


def damage_table(table: OptionTable, rows: int) -> Any:
    """Sites by their worst damage, a column for each option they are offered."""
    from rich.table import Table

    from lwcompile.html.view import short_labels
    from lwcompile.table import format_options

    scored = [row for row in table.sites.values() if len(row.choices) > 1]
    options = {format_options(c.options): c.options for row in scored for c in row.choices if c.options}
    labels = dict(zip(options, short_labels(list(options.values()))))
    scored.sort(key=lambda row: max(c.predicted for c in row.choices if c.refused is None), reverse=True)
    shown = scored[:rows] if rows else scored
    drawn = Table(title=f"damage in {table.unit}, {len(shown)} of {len(scored)} sites", box=None, header_style="dim")
    drawn.add_column("site")
    for name in labels.values():
        drawn.add_column(name, justify="right")
    for row in shown:
        by_name = {format_options(c.options): c for c in row.choices}
        cells = [by_name.get(name) for name in options]
        drawn.add_row(row.site, *("" if c is None else "refused" if c.refused else f"{c.damage:.3g}" for c in cells))
    return drawn
