"""One figure for a site's numeric formats: the option of middle width is judged by itself, and the others by how much more or
less of the weight a cheap solver loses there."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from torch import Tensor

from lwcompile.context import Context
from lwcompile.formats import NumericFormat
from lwcompile.passes.analysis._changes import Changes
from lwcompile.program import Program
from lwcompile.spec import Spec

Jobs = Sequence[tuple[tuple[str, ...], Spec]]
PIECE = 1 << 24
"""Elements of a weight's difference that are squared at a time."""


def find_anchors(jobs: Jobs, ctx: Context) -> dict[int, int]:
    """Job -> the job of the same unit and solver that stands for it; itself, where an option names no solver or stands alone."""
    families: defaultdict[tuple[tuple[str, ...], Spec], list[tuple[NumericFormat, int]]] = defaultdict(list)
    for job, (unit, option) in enumerate(jobs):
        transform = ctx.transform(option)
        solver, format = getattr(transform, "solver", None), getattr(transform, "format", None)
        if isinstance(solver, Spec) and isinstance(format, NumericFormat):
            families[unit, solver].append((format, job))
    anchors = {job: job for job in range(len(jobs))}
    for members in families.values():
        members.sort(key=lambda member: (member[0].bits, -(member[0].group_size or 0)))
        middle = members[(len(members) - 1) // 2][1]
        anchors |= {job: middle for _, job in members}
    return anchors


def losses(program: Program, ctx: Context, jobs: Jobs, wanted: Sequence[int], cheap: Spec, energy: Energies) -> dict[int, float]:
    """sum_nk dW_nk^2 E[g_n^2] E[x_k^2] of each wanted job, its weights quantized by the cheap solver; 0 where nothing is read."""
    found: dict[int, float] = {}
    with ctx.progress.task("formats", len(wanted)) as task:
        for option in dict.fromkeys(jobs[job][1] for job in wanted):
            alike = [(job, jobs[job][0]) for job in wanted if jobs[job][1] == option]
            changes = Changes(program, ctx, cheap)
            refused = changes.add(alike, option)
            found |= {job: 0.0 for job, _ in alike if job not in refused}
            for key, made in changes.by_key.items():
                for change in made:
                    if change.delta is not None and (key, "rows") in energy:
                        rows, columns = energy[key, "rows"], energy[key, "columns"]
                        found[change.job] += change.scale**2 * _weighed(changes.delta(change), rows, columns)
            task.advance(len(alike))
    return found


Energies = Mapping[tuple[str, str], Tensor]
"""(key of a call, "rows" or "columns") -> second moments of the score at its output [N], or of its input [K]."""


def _weighed(delta: Tensor, rows: Tensor, columns: Tensor) -> float:
    step = max(1, PIECE // delta.shape[1])
    return sum((r @ (piece.float().square() @ columns)).item() for r, piece in zip(rows.split(step), delta.split(step)))
