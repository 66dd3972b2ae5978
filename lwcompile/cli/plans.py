"""`plan` makes a plan; `plan show` and `plan diff` read them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lwcompile.cli.console import note, show, show_json
from lwcompile.cli.flags import Budgets, Data, Healing, HeldOut, Json, Run, Source, flags, settings
from lwcompile.cli.make import dry_run, open_model, progress, require_words

if TYPE_CHECKING:
    from rich.table import Table

    from lwcompile.plans import Plan


def register(app: typer.Typer) -> None:
    group = typer.Typer(help="Choose an option for every site; show and compare plans.", invoke_without_command=True)
    group.callback()(plan)
    group.command("show")(show_plan)
    group.command("diff")(diff)
    app.add_typer(group, name="plan")


@flags
def plan(
    ctx: typer.Context, source: Source, budget: Budgets, healing: Healing, data: Data, held_out: HeldOut, run: Run,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the plan here instead of to stdout.")] = None,
) -> None:  # fmt: skip
    """Choose an option for every site under a budget, and write the plan as YAML.

    Without a subcommand this makes one; `plan show FILE` and `plan diff A B` read them.
    """
    if ctx.invoked_subcommand is not None:
        return
    from lwcompile import pipeline
    from lwcompile.errors import BadInput

    words = settings(budget, data, run, healing, held_out=held_out)
    if healing.heal is not None and budget.max_kl is None:
        raise BadInput("--heal says nothing to a plan without --max-kl, which measures plans; give it to compress or export")
    require_words(words)
    program = open_model(source.model)
    if run.dry_run:
        return dry_run(program, words, (output or Path("plan.yaml")).parent, run.json, "plan")
    made = pipeline.plan(program, progress=progress(), **words)
    if output is not None:
        made.save(output)
        note(f"wrote {output}")
    if run.json:
        show_json(as_json(made))
    elif output is None:
        typer.echo(made.to_yaml(), nl=False)


def show_plan(file: Annotated[Path, typer.Argument(help="A plan in YAML.")], json: Json = False) -> None:
    """Print what a plan carries, site by site, and what it was made for."""
    from rich.console import Group

    from lwcompile.plans import Plan

    found = Plan.load(file)
    if json:
        return show_json(as_json(found))
    show(Group(*facts(found), "", sites_table(found)))


def diff(
    before: Annotated[Path, typer.Argument(metavar="A", help="A plan in YAML.")],
    after: Annotated[Path, typer.Argument(metavar="B", help="Another one.")],
    json: Json = False,
) -> None:
    """Print what plan B does differently from plan A."""
    from rich.table import Table

    from lwcompile.plans import Plan
    from lwcompile.table import format_options

    a, b = Plan.load(before), Plan.load(after)
    changes = [(c.site, format_options(c.before), format_options(c.after)) for c in a.diff(b)]
    numbers = [(key, getattr(a, key), getattr(b, key)) for key in ("bytes", "avg_bits", "predicted", "measured")]
    numbers = [(key, x, y) for key, x, y in numbers if x != y]
    if json:
        sites = [{"site": site, "before": x, "after": y} for site, x, y in changes]
        return show_json({"sites": sites, **{key: {"before": x, "after": y} for key, x, y in numbers}})
    if not changes:
        show("every site carries the same")
    drawn = Table(box=None, show_header=False, pad_edge=False)
    for site, x, y in [*changes, *((key, _number(x), _number(y)) for key, x, y in numbers)]:
        drawn.add_row(site, f"[red]{_plain(x)}[/]", "->", f"[green]{_plain(y)}[/]")
    show(drawn)


def as_json(plan: Plan) -> dict[str, object]:
    from lwcompile.table import format_options

    numbers = {key: getattr(plan, key) for key in ("predicted", "conditional", "measured", "interval", "bytes", "avg_bits")}
    sites = {site: format_options(options) for site, options in plan.choices.items()}
    return {"unit": plan.unit, "budget": plan.budget.to_dict(), **numbers, "origin": plan.origin, "sites": sites}


def facts(plan: Plan) -> list[str]:
    """A line for each number a plan states, then one that counts its options."""
    from collections import Counter

    from lwcompile.budget import format_size
    from lwcompile.table import format_options

    lines = [f"budget: {plan.budget}"]
    if plan.bytes is not None:
        bits = "" if plan.avg_bits is None else f", {plan.avg_bits:.2f} bits per weight"
        lines.append(f"size: {format_size(plan.bytes)}{bits}")
    if plan.predicted is not None:
        lines.append(f"predicted damage: {plan.predicted:.4g} {plan.unit}")
    if plan.measured is not None:
        interval = "" if plan.interval is None else f" (95 % {plan.interval[0]:.4g} to {plan.interval[1]:.4g})"
        lines.append(f"measured damage: {plan.measured:.4g} {plan.unit}{interval}")
    counts = Counter(map(format_options, plan.choices.values()))
    lines += [f"{count} x {_plain(name)}" for name, count in counts.most_common()]
    return lines


def sites_table(plan: Plan) -> Table:
    from rich.table import Table

    from lwcompile.table import format_options

    drawn = Table(box=None, show_header=False, pad_edge=False)
    for site, options in plan.choices.items():
        drawn.add_row(site, _plain(format_options(options)))
    return drawn


def _plain(text: str) -> str:
    """Text that rich prints as it is: an option's `[64]` is no markup."""
    from rich.markup import escape

    return escape(text)


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
