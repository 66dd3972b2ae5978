"""The command line: `lwcompile COMMAND`. Nothing heavy is imported before a command's own body runs.

Exit codes: 0; 2 for what the user can mend (one sentence on stderr); 70 for a fault of ours (with a traceback); 130 when stopped.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from lwcompile import ranks
from lwcompile.cli import look, make, plans, plugins, quality
from lwcompile.cli.failures import Stopped, report_failure

__all__ = ["app", "main"]

# Before torch loads: OpenMP threads that wait by spinning make small operations up to 30 times as dear while a core is busy.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


ORDER = ["export", "compress", "inspect", "analyze", "plan", "eval", "chat", "report", "runs", "passes", "backends"]


class _Commands(TyperGroup):
    """Commands in the order of a model's way, and an interrupt that keeps its meaning."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(self.commands, key=ORDER.index)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise Stopped from None


app = typer.Typer(
    name="lwcompile",
    cls=_Commands,
    help="Compile a pretrained PyTorch model into a smaller, faster one, layer by layer.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _options(version: bool = typer.Option(False, "--version", help="Print the version and leave.")) -> None:
    if version:
        from lwcompile import __version__

        typer.echo(__version__)
        raise typer.Exit


make.register(app)
plans.register(app)
quality.register(app)
look.register(app)
plugins.register(app)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; the exit code."""
    try:
        app(None if arguments is None else list(arguments))
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except (Stopped, Exception) as error:
        return report_failure(error)
    finally:
        ranks.leave()
    return 0


def main() -> NoReturn:
    """The console script."""
    keep_stdout()
    sys.exit(run())


def keep_stdout() -> None:
    """Results alone go to stdout: what native libraries print there (HiGHS does) goes to stderr, or it would end up in JSON and plans."""
    try:
        sys.stdout.flush()
        ours = os.dup(1)
        os.dup2(2, 1)
    except OSError:  # one of them is closed
        return
    sys.stdout = os.fdopen(ours, "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors)
