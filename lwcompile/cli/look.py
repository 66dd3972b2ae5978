"""`inspect`, `report`, `runs`: commands that show what there is."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lwcompile.cli.console import note, show, show_json
from lwcompile.cli.flags import Json

if TYPE_CHECKING:
    from rich.table import Table

    from lwcompile.program import Program
    from lwcompile.rundir import RunInfo


def register(app: typer.Typer) -> None:
    app.command("inspect")(inspect_model)
    app.command()(report)
    app.command()(runs)


def inspect_model(
    model: Annotated[str, typer.Argument(help="A model as --model takes it.")],
    html: Annotated[Path | None, typer.Option(help="Draw it into this HTML file too.")] = None,
    full: Annotated[bool, typer.Option("--full", help="Show every block, not runs of equal ones as one.")] = False,
    fusion: Annotated[bool, typer.Option("--fusion", help="Show what backends would run as one kernel instead.")] = False,
    executors: Annotated[
        bool, typer.Option("--executors", help="Show who would run each operator, by backend and by torch.compile's codegens.")
    ] = False,
    json: Json = False,
) -> None:
    """Print a model's streams, blocks, sublayers and weights, with parameters and bytes."""
    from lwcompile.errors import BadInput
    from lwcompile.inspect import look, tree
    from lwcompile.pipeline import capture

    asked = [flag for flag, given in (("--fusion", fusion), ("--executors", executors), ("--html", html)) if given]
    if len(asked) > 1:
        raise BadInput(f"{' and '.join(asked)} show different things; give one of them at a time")
    program = capture(model)
    if fusion:
        return show_fusion(program, full, json)
    if executors:
        return show_executors(program, full, json)
    view = look(program)
    if html is not None:
        from lwcompile.html.diagram import draw
        from lwcompile.rundir import write_atomic

        write_atomic(html, draw(view).encode())
        note(f"wrote {html}")
    show_json(view.to_json()) if json else show(tree(view, full))


def show_fusion(program: Program, full: bool, json: bool) -> None:
    """The fusion groups that each backend finds, equal ones as one line unless `full`."""
    from collections import Counter
    from dataclasses import asdict

    from rich.table import Table

    from lwcompile.registry import make, plugins

    found = {p.name: groups for p in plugins("backends") if (groups := make("backends", p.name).fusion(program))}
    if json:
        return show_json({name: [asdict(group) for group in groups] for name, groups in found.items()})
    if not found:
        return note("no installed backend says what it would run as one kernel")
    for name, groups in found.items():
        drawn = Table(box=None, header_style="dim", pad_edge=False, title=name, title_justify="left")
        for heading in ("entry", "kernel", "times", "nodes", ""):
            drawn.add_column(heading, justify="right" if heading in ("times", "nodes") else "left")
        if full:
            for g in groups:
                drawn.add_row(g.entry, g.kernel, "1", ", ".join(g.nodes), g.note)
        else:
            for (entry, kernel, size, said), times in Counter((g.entry, g.kernel, len(g.nodes), g.note) for g in groups).items():
                drawn.add_row(entry, kernel, str(times), str(size), said)
        show(drawn)


def show_executors(program: Program, full: bool, json: bool) -> None:
    """Who runs each call, by backend and codegen: counted by operator, or every node if `full`."""
    from rich.table import Table

    from lwcompile.contract import who_runs
    from lwcompile.errors import LwError
    from lwcompile.registry import make, plugins

    rows: list[tuple[str, str, str, str]] = []
    for group in ("backends", "codegens"):
        for plugin in plugins(group):
            for entry, graph in program.entries.items():
                try:
                    graph.propagate()
                    who = make(group, plugin.name).executors(graph)
                except LwError as error:
                    rows.append((plugin.name, entry, "", f"refused: {error}"))
                    continue
                lines = [f"{name}: {words}" for name, words in who.items()] if full else who_runs(graph, who)
                rows += [(plugin.name, entry, *line.split(": ", 1)) for line in lines]  # type: ignore[misc]
    rows = list(dict.fromkeys(rows))  # a codegen that runs a graph as the backend of its name does
    if json:
        return show_json([dict(zip(("by", "entry", "operator", "who"), row)) for row in rows])
    drawn = Table(box=None, header_style="dim", pad_edge=False)
    for heading in ("by", "entry", "node" if full else "operator", "who runs it"):
        drawn.add_column(heading)
    for row in rows:
        drawn.add_row(*row)
    show(drawn)


def report(
    run: Annotated[str | None, typer.Argument(metavar="[RUN]", help="A run's folder or name; the last run if left out.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the HTML page here too.")] = None,
    json: Json = False,
) -> None:
    """Print what a run came to, and render its HTML page again."""
    from lwcompile.report import Report
    from lwcompile.rundir import write_atomic
    from lwcompile.strip import closing

    folder = find_run(run)
    found = Report.load(folder)
    page = found.save(folder) if folder.is_dir() else None
    if output is not None:
        write_atomic(output, found.html().encode())
        page = output
    if json:
        return show_json({"report": page, **found.summary()})
    show(closing(found.data))
    note(f"report {page}")


def runs(
    names: Annotated[list[str] | None, typer.Argument(help="Only these runs, by name.")] = None,
    clean: Annotated[bool, typer.Option("--clean", help="Remove them, with everything they have computed.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before removing.")] = False,
    json: Json = False,
) -> None:
    """List the runs kept on this machine, or remove them."""
    from lwcompile.budget import format_size
    from lwcompile.errors import BadInput
    from lwcompile.rundir import RunDir, clean_runs, list_runs

    root = RunDir.default_root()
    found = list_runs(root)
    if unknown := set(names or ()) - {run.path.name for run in found}:
        raise BadInput(f"no run is named {min(unknown)} under {root}; `lwcompile runs` lists them")
    found = [run for run in found if not names or run.path.name in names]
    if clean:
        size = format_size(sum(run.bytes for run in found))
        if found and not yes and not typer.confirm(f"remove {len(found)} runs, {size}?", err=True):
            raise typer.Exit(1)
        freed = clean_runs(found)
        if json:
            return show_json({"removed": [run.path for run in found], "bytes": freed})
        return note(f"removed {len(found)} runs, {format_size(freed)}")
    if json:
        return show_json([{"path": r.path, "time": r.time, "finished": r.finished, "bytes": r.bytes, **r.facts} for r in found])
    if not found:
        return note(f"no runs under {root}")
    show(_runs_table(found))
    note(f"under {root}")


def _runs_table(found: list[RunInfo]) -> Table:
    from rich.table import Table

    from lwcompile.budget import format_size

    drawn = Table(box=None, header_style="dim", pad_edge=False)
    for heading in ("name", "when", "model", "size", ""):
        drawn.add_column(heading, justify="right" if heading == "size" else "left")
    for run in found:
        when = datetime.datetime.fromtimestamp(run.time).strftime("%Y-%m-%d %H:%M") if run.time else ""
        state = "finished" if run.finished else "not finished"
        drawn.add_row(run.path.name, when, str(run.facts.get("model", "")), format_size(run.bytes), state)
    return drawn


def find_run(name: str | None) -> Path:
    """A run by path, by name, or the last finished one."""
    from lwcompile.errors import BadInput
    from lwcompile.rundir import RunDir, list_runs

    root = RunDir.default_root()
    if name is None:
        finished = [run.path for run in list_runs(root) if run.finished]
        if not finished:
            raise BadInput(f"no finished run under {root}; name a run directory")
        return finished[0]
    for path in (Path(name), root / name):
        if path.exists():
            return path
    raise BadInput(f"{name} is neither a run directory nor the name of a run under {root}; `lwcompile runs` lists them")
