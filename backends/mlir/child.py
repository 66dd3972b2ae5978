"""Jobs in a process of their own: limits, and what its death becomes.

Where torch-mlir fails on a program, every kind of call in it is converted alone, so that the error names the operator.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from lwcompile.errors import BadInput, LwError, Refused
from lwcompile.program import Program

SHARE = 0.9
"""Of the memory that is free when a job starts, what it may take."""


class Died(LwError):
    """The process ended without a result; `at` is what it was doing, `how` what ended it."""

    def __init__(self, at: str, how: str) -> None:
        super().__init__(f"{how} while {at}")
        self.at, self.how = at, how


class Failed(LwError):
    """The job raised; `at` is what it was doing."""

    def __init__(self, at: str, reason: str) -> None:
        super().__init__(f"{reason} while {at}")
        self.at, self.reason = at, reason


@dataclass(frozen=True)
class Child:
    """Runs jobs of `worker` in a folder. `seconds` bounds each one."""

    folder: Path
    seconds: int

    def run(self, do: str, **words: Any) -> dict[str, Any]:
        """What the job left as its result. Raises `Died` or `Failed`."""
        result, at = self.folder / "result.json", self.folder / "at"
        result.unlink(missing_ok=True)
        at.write_text("starting", encoding="utf-8")
        memory = int(SHARE * psutil.virtual_memory().available)
        (self.folder / "job.json").write_text(json.dumps({"do": do, "memory": memory, **words}), encoding="utf-8")
        how = self._ended([sys.executable, "-m", f"{__package__}.worker", str(self.folder)])
        doing = at.read_text(encoding="utf-8")
        if not result.is_file():
            raise Died(doing, how)
        made = json.loads(result.read_text(encoding="utf-8"))
        if "error" in made:
            raise Failed(doing, made["error"])
        return made

    def _ended(self, command: list[str]) -> str:
        """Run to the end, and say what the end was; the compiler that a job may start ends with it."""
        with (self.folder / "log").open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)
            try:
                code = process.wait(self.seconds)
            except subprocess.TimeoutExpired:
                return f"took more than {self.seconds} s"
            finally:
                if process.poll() is None:
                    with suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        if code >= 0:
            return f"ended with code {code} ({self._last_words()})"
        return f"was killed by {signal.Signals(-code).name}" + (f" ({words})" if (words := self._last_words()) else "")

    def _last_words(self) -> str:
        """The line of the log that says most: an assertion, running out of memory, or an exception."""
        lines = (self.folder / "log").read_text(encoding="utf-8", errors="replace").splitlines()
        telling = [line for line in lines if any(w in line for w in ("Assertion", "LLVM ERROR", "bad_alloc", "Error:"))]
        return telling[-1].strip()[:300] if telling else ""


def convert(child: Child, program: Program, out: Path | None, form: str) -> dict[str, list[str]]:
    """Lower a program to a module of linalg on tensors; entry -> the symbols that had to be fixed.

    Raises:
        Refused: torch-mlir fails on it or dies of it; the message names the operator and its place.
    """
    program.save(child.folder / "program")
    try:
        return child.run("convert", out=None if out is None else str(out), form=form)["fixed"]
    except (Died, Failed) as failure:
        if failure.at.startswith(("starting", "tracing")):
            raise Refused(f"torch-mlir cannot take this program: {failure}") from failure
        raise _named(child, program, failure) from failure


def _named(child: Child, program: Program, failure: Died | Failed) -> Refused:
    """The same failure with the operator that makes it alone, if there is one."""
    try:
        failed = child.run("probe")["failed"]
    except Died as death:
        with suppress(ValueError):
            call = json.loads(death.at)
            return Refused(f"torch-mlir {death.how} on {call['operator']}", site=_place(program, call))
        failed = []
    except Failed:
        failed = []
    if not failed:
        return Refused(f"torch-mlir fails on the program and on no operator of it alone: {failure}")
    first = failed[0]
    return Refused(f"torch-mlir does not lower {first['operator']}: {first['reason']}", site=_place(program, first))


def _place(program: Program, call: dict[str, str]) -> str:
    """entry, module path and node."""
    node = next((n for n in program.entries[call["entry"]].graph.nodes if n.name == call["node"]), None)
    path = "" if node is None else node.meta.get("path", "")
    return f"{call['entry']}: {path + ': ' if path else ''}node {call['node']}"


def compile_with_iree(child: Child, source: Path, out: Path, ways: Sequence[Sequence[str]]) -> int:
    """Machine code of a module, by the first of several sets of flags that the compiler comes to an end with: its index.
    `Refused` with the last one's reason."""
    failure: Died | Failed | None = None
    for k, flags in enumerate(ways):
        try:
            child.run("compile", source=str(source), out=str(out), flags=list(flags))
            return k
        except (Died, Failed) as found:
            failure = found
    raise Refused(f"IREE does not compile this program: {failure}") from failure


def installed(module: str) -> bool:
    with suppress(ImportError):
        return importlib.util.find_spec(module) is not None
    return False


def require(module: str, extra: str) -> None:
    """`BadInput` naming the extra that a Python module comes with, if it is not installed."""
    if not installed(module):
        raise BadInput(f"the module {module} is not installed; pip install 'lwcompile[{extra}]'")
