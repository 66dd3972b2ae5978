"""How far a piece of work is: a protocol, one that says nothing, and a bar."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol


class Task(Protocol):
    """One piece of work under way."""

    def advance(self, steps: int = 1) -> None: ...


class Progress(Protocol):
    """Says how far the work is: `with progress.task("measured", 300) as task: ... task.advance()`."""

    def task(self, name: str, total: int) -> AbstractContextManager[Task]: ...


class _Quiet:
    def advance(self, steps: int = 1) -> None:
        pass


class SilentProgress:
    """Says nothing."""

    def task(self, name: str, total: int) -> AbstractContextManager[Task]:
        return nullcontext(_Quiet())


class RichProgress:
    """A bar with the time left, on a rich console (standard error by default)."""

    def __init__(self, console: Any = None) -> None:
        self._console = console

    @contextmanager
    def task(self, name: str, total: int) -> Iterator[Task]:
        from rich import progress
        from rich.console import Console

        columns = (
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            progress.TextColumn("left"),
            progress.TimeRemainingColumn(),
        )
        with progress.Progress(*columns, console=self._console or Console(stderr=True), transient=True) as bars:
            yield _Bar(bars, bars.add_task(name, total=total))


class _Bar:
    def __init__(self, bars: Any, task: Any) -> None:
        self._bars, self._task = bars, task

    def advance(self, steps: int = 1) -> None:
        self._bars.advance(self._task, steps)
