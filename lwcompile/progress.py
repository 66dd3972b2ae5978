"""How far a piece of work is, with the time left.

    with progress.task("measuring", total=211) as task:
        for site in sites:
            ...
            task.advance()

On a terminal each running task is a bar; anywhere else it is a line from time to time, so that a log stays readable. Both go
to stderr: stdout is for results.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich import progress
    from rich.console import Console


class Task(Protocol):
    """One piece of work under way."""

    def advance(self, steps: float = 1) -> None: ...


class Progress(Protocol):
    """Says how far the work is. `total` is in the task's own unit: sites, batches, floating-point operations."""

    def task(self, name: str, total: float) -> AbstractContextManager[Task]: ...


class _Quiet:
    def advance(self, steps: float = 1) -> None:
        pass


class SilentProgress:
    """Says nothing: what Python callers and tests get."""

    def task(self, name: str, total: float) -> AbstractContextManager[Task]:
        return nullcontext(_Quiet())


class BarProgress:
    """A bar for every running task, inner ones below outer ones; a finished outermost one leaves a line with its time."""

    def __init__(self, console: Console) -> None:
        from rich import progress  # here, because passes import this module and rarely draw

        self.bars = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.TaskProgressColumn(),
            progress.TimeElapsedColumn(),
            progress.TextColumn("[dim]left[/]"),
            progress.TimeRemainingColumn(compact=True),
            console=console,
            transient=True,
        )
        self.depth = 0

    @contextmanager
    def task(self, name: str, total: float) -> Iterator[Task]:
        started = time.monotonic()
        if self.depth == 0:
            self.bars.start()
        bar = self.bars.add_task("  " * self.depth + name, total=total)
        self.depth += 1
        done = False
        try:
            yield _Bar(self.bars, bar)
            done = True
        finally:
            self.depth -= 1
            self.bars.remove_task(bar)
            if self.depth == 0:
                self.bars.stop()
        if done and self.depth == 0:
            self.bars.console.print(f"[green]✓[/] {name} [dim]{format_seconds(time.monotonic() - started)}[/]", highlight=False)


class _Bar:
    def __init__(self, bars: progress.Progress, bar: progress.TaskID) -> None:
        self.bars, self.bar = bars, bar

    def advance(self, steps: float = 1) -> None:
        self.bars.advance(self.bar, steps)


class LineProgress:
    """For logs and pipes: a line every `every` seconds, and one when an outermost task is done."""

    def __init__(self, console: Console, every: float = 20.0) -> None:
        self.console, self.every, self.depth = console, every, 0

    @contextmanager
    def task(self, name: str, total: float) -> Iterator[Task]:
        line = _Line(self, name, total)
        self.depth += 1
        done = False
        try:
            yield line
            done = True
        finally:
            self.depth -= 1
        if done and self.depth == 0:
            self.say(f"{name}: done in {format_seconds(time.monotonic() - line.started)}")

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


TELLING = 0.02
"""The share of a task from which on its time tells how long the rest takes: the first steps read weights and samples too."""


class _Line:
    def __init__(self, progress: LineProgress, name: str, total: float) -> None:
        self.progress, self.name, self.total = progress, name, total
        self.steps, self.started = 0.0, time.monotonic()
        self.said = self.started

    def advance(self, steps: float = 1) -> None:
        self.steps += steps
        now = time.monotonic()
        if now - self.said < self.progress.every or self.total <= 0:
            return
        self.said = now
        share = min(self.steps / self.total, 1.0)
        told = f", {format_seconds((now - self.started) * (1 / share - 1))} left" if share >= TELLING else ""
        self.progress.say(f"{self.name}: {100 * share:.0f} %{told}")


def terminal_progress(console: Console | None = None) -> Progress:
    """Bars on a terminal, lines elsewhere; on stderr unless a console is given."""
    if console is None:
        from rich.console import Console

        console = Console(stderr=True)
    return BarProgress(console) if console.is_terminal else LineProgress(console)


def format_seconds(seconds: float) -> str:
    """`0.4 s`, `42 s`, `3 min 20 s`, `1 h 5 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
