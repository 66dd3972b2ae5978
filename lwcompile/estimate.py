"""What a run would take: minutes, memory and disk, before it starts. For `--dry-run`.

Time follows from floating-point operations (two per weight and token) and this machine's own speed, timed on one product; it is
good to a factor of about three. An analysis that costs more than one backward pass says so in `forwards(sites, options)`.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lwcompile.budget import format_size
from lwcompile.errors import BadInput
from lwcompile.progress import format_seconds
from lwcompile.spec import Spec

if TYPE_CHECKING:
    from lwcompile.contract import Solver
    from lwcompile.program import Program

Command = Literal["analyze", "plan", "compress", "export"]

FORWARDS = 3.0
"""Passes over the calibration set that an analysis costs where it does not say: one forward and its backward."""

BATCH = 4
PROCESS = 700_000_000
"""Bytes that Python with its libraries takes."""


@dataclass(frozen=True)
class Estimate:
    """Seconds by step; bytes of memory at the peak, of the run directory and of the result; and what there is of both."""

    seconds: dict[str, float]
    memory: int
    disk: int
    memory_free: int
    disk_free: int
    folder: str

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    def __str__(self) -> str:
        steps = ", ".join(f"{name} {format_seconds(seconds)}" for name, seconds in self.seconds.items())
        return (
            f"time: about {format_seconds(self.total)} ({steps})\n"
            f"peak memory: {format_size(self.memory)} of {format_size(self.memory_free)} available\n"
            f"disk: {format_size(self.disk)} of {format_size(self.disk_free)} free at {self.folder}"
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"total_seconds": self.total}

    def require(self) -> None:
        """`BadInput` where the machine does not have it."""
        if self.memory > self.memory_free:
            raise BadInput(
                f"this needs about {format_size(self.memory)} of memory and {format_size(self.memory_free)} are available; "
                "give fewer tokens per sample (--seqlen), or a machine with more"
            )
        if self.disk > self.disk_free:
            raise BadInput(
                f"this needs about {format_size(self.disk)} of disk and {format_size(self.disk_free)} are free at {self.folder}; "
                "free some, or name another --run-dir"
            )


def estimate(program: Program, *, folder: str | Path = ".", command: Command = "export", **settings: Any) -> Estimate:
    """What a command on `program`, into `folder` with these settings (see `pipeline.Settings`), would take."""
    import psutil

    from lwcompile.oracle import TOKENS as ORACLE_TOKENS
    from lwcompile.pipeline import Settings
    from lwcompile.registry import make
    from lwcompile.rundir import RunDir
    from lwcompile.session import LIMIT_ROUNDS
    from lwcompile.site import SUBLAYER_KINDS
    from lwcompile.structure import find_structure

    wished = Settings(**settings)
    recipe = wished.resolved()
    sites = find_structure(program).sites.values()
    linears = [site for site in sites if site.kind == "linear" and site.shape]
    flops = 2.0 * sum(site.shape[0] * site.shape[1] for site in linears)
    calibration = recipe.calibration.samples * recipe.calibration.seqlen
    held_out = recipe.evaluation.samples * recipe.evaluation.seqlen
    speed = flops_per_second()
    offered = {site.id: len(recipe.offered(site.id, site.kind)) for site in sites}

    solvers = [solver for spec in {o for site in sites for o in recipe.offered(site.id, site.kind)} if (solver := _solver(spec))]
    solving = sum(site.shape[1] ** 3 + 2.0 * site.shape[0] * site.shape[1] ** 2 for site in linears)
    moments = sum(site.shape[1] ** 2 for site in linears)
    fitting = 8.0 * solving / speed if any(solver.needs_hessian for solver in solvers) else 0.0

    seconds: dict[str, float] = {}
    if any(solver.wanted.importance for solver in solvers):
        seconds["importance of tokens"] = FORWARDS * flops * calibration / speed
    for spec in recipe.analyses:
        asked: Callable[[int, int], float] | None = getattr(make("passes", spec), "forwards", None)
        forwards = FORWARDS if asked is None else asked(len(offered), sum(offered.values()))
        tries = sum(offered[site.id] * site.shape[0] * site.shape[1] for site in linears)
        seconds[spec.name] = forwards * flops * calibration / speed + 100.0 * tries / speed + fitting
    sublayers = sum(site.kind in SUBLAYER_KINDS for site in sites)
    if plans := make("allocators", recipe.allocator).measurements(recipe.budget, sublayers) if command != "analyze" else 0:
        seconds["whole plans"] = plans * (2.0 * flops * ORACLE_TOKENS / speed) + fitting
    passes = 2.0 if any(solver.wanted.drift for solver in solvers) else 1.0
    writes = command in ("compress", "export")
    if writes or (command == "plan" and wished.max_kl is not None):
        rounds = LIMIT_ROUNDS if wished.searches else 1
        seconds["compressing"] = rounds * ((passes * flops + 2.0 * moments) * calibration / speed + fitting)
        seconds["measuring"] = rounds * 2.0 * flops * held_out / speed
        if recipe.heal is not None:
            forwards = make("passes", recipe.heal).forwards(recipe.calibration.samples)
            seconds["healing"] = rounds * forwards * flops * recipe.calibration.seqlen / speed
            seconds["measuring"] *= 2
    dense = program.nbytes()
    if command == "export":  # and running it, beside the dense model's file
        seconds["writing"] = 5.0 + dense / 2e7
    elif command == "compress":
        seconds["writing"] = 1.0 + dense / 2e8

    rows = max((site.shape[0] for site in sites if site.shape), default=0)
    widest = max((site.shape[1] for site in linears), default=0)
    logits = 3 * BATCH * recipe.calibration.seqlen * rows * 4
    scoring = 4 * moments + 3 * dense + 32 * calibration * widest  # every layer's statistics and solved weights; live values
    memory = PROCESS + 2 * dense + logits + scoring + 4 * widest * widest * 8
    budget = recipe.budget.max_bytes(program.parameter_count()) or dense
    place = wished.run_dir or RunDir.default_root()
    return Estimate(
        seconds={name: round(value, 1) for name, value in seconds.items()},
        memory=memory,
        disk=3 * budget + dense if writes else budget,
        memory_free=int(psutil.virtual_memory().available),
        disk_free=min(_free(Path(folder)), _free(Path(place))),
        folder=str(folder),
    )


def _solver(option: Spec) -> Solver | None:
    """The solver that an option names, if it names one."""
    from lwcompile.registry import make

    named = getattr(make("passes", option), "solver", None)
    return make("solvers", named) if isinstance(named, Spec) else None


def flops_per_second() -> float:
    """What this machine does of float32 multiply-adds in products of the usual size; 0.2 s."""
    import torch

    a, b = torch.randn(256, 1024), torch.randn(1024, 1024)
    started, rounds = time.perf_counter(), 0
    while time.perf_counter() - started < 0.2:
        torch.mm(a, b)
        rounds += 1
    return 0.5 * rounds * 2 * 256 * 1024 * 1024 / (time.perf_counter() - started)  # half, for all that is no product


def _free(path: Path) -> int:
    """Free bytes of the file system that `path` is, or would be, on."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free
