"""From scores to damage: how well a cheap score ranks, and the fit that turns it into the metric's unit.

    log damage = intercept + slope * s,    s = log score where all scores are positive, else the score; slope >= 0

fitted to a few sites (or sites and options) whose damage was measured. The error is the leave-one-out one, so it says what to
expect at sites that were not measured.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from lwcompile.contract import Annotation, Damage
from lwcompile.errors import BadInput

K = TypeVar("K", bound=Hashable)
S = TypeVar("S", bound=Hashable)
Opt = TypeVar("Opt", bound=Hashable)
Figures = Mapping[K, Annotation] | Mapping[K, float] | Mapping[K, Annotation | float]


@dataclass(frozen=True)
class Calibration:
    """A fitted line between a score and the logarithm of damage.

    Attributes:
        logarithmic: the line is in the score's logarithm.
        error: root mean square of log(predicted / measured), each point predicted from a fit to the others.
        points: measured damages that the fit rests on.
    """

    slope: float
    intercept: float
    logarithmic: bool
    error: float
    points: int

    def damage(self, score: Annotation | float) -> Damage:
        """The damage predicted for a score, with the interval of 1.96 errors either way. A score of 0 or less, where the line is
        in the logarithm, is damage 0."""
        value = _figure(score)
        if self.logarithmic and value <= 0:
            return Damage(0.0, 0.0, 0.0, self.points)
        x = math.log(value) if self.logarithmic else value
        made, factor = math.exp(self.intercept + self.slope * x), math.exp(1.96 * self.error)
        return Damage(made, made / factor, made * factor, self.points)

    def __str__(self) -> str:
        return f"damage within a factor of {math.exp(self.error):.2g} (leave-one-out over {self.points} measured)"


def calibrate(scores: Figures[K], measured: Figures[K]) -> Calibration:
    """Fit scores to measured damages at the keys (sites, or sites with options) that both hold.

    Damages that noise measured at 0 or below are left out. `BadInput` with fewer than three points.
    """
    keys = [k for k in scores if k in measured and _figure(measured[k]) > 0]
    if len(keys) < 3:
        raise BadInput(f"a score is calibrated on at least 3 measured damages above 0, not {len(keys)}: measure more sites")
    x, y = (np.array([_figure(side[k]) for k in keys]) for side in (scores, measured))
    logarithmic = bool((x > 0).all())
    x, y = np.log(x) if logarithmic else x, np.log(y)
    slope, intercept = _line(x, y)
    others = [np.arange(len(x)) != i for i in range(len(x))]
    errors = [y[i] - np.polyval(_line(x[keep], y[keep]), x[i]) for i, keep in enumerate(others)]
    return Calibration(slope, intercept, logarithmic, float(np.sqrt(np.mean(np.square(errors)))), len(keys))


def calibrate_options(scores: Mapping[S, float], measured: Mapping[tuple[S, Opt], float]) -> dict[Opt, Calibration]:
    """Fit scores of sites to damages of options at some of them: one slope for all, and for each measured option its intercept.

    The line is in the logarithm of the scores where all of them are positive, of the sites that were not measured too. The error
    is that of `calibrate`, over options that two sites were measured with. `BadInput` with fewer than three points, or where no
    option was measured at two sites.
    """
    points = [(s, o, math.log(value)) for (s, o), value in measured.items() if value > 0 and s in scores]
    if len(points) < 3:
        raise BadInput(f"a score is calibrated on at least 3 measured damages above 0, not {len(points)}: measure more sites")
    logarithmic = all(score > 0 for score in scores.values())
    rows = [(math.log(scores[s]) if logarithmic else scores[s], o, y) for s, o, y in points]
    slope, intercepts = _lines(rows)
    errors = []
    for i, (x, o, y) in enumerate(rows):
        others = rows[:i] + rows[i + 1 :]
        if any(option == o for _, option, _ in others):
            left, heights = _lines(others)
            errors.append(y - left * x - heights[o])
    if not errors:
        raise BadInput("a score is calibrated on options measured at two sites or more, and no option was: measure more sites")
    error = float(np.sqrt(np.mean(np.square(errors))))
    return {o: Calibration(slope, height, logarithmic, error, len(rows)) for o, height in intercepts.items()}


def _lines(rows: Sequence[tuple[float, Opt, float]]) -> tuple[float, dict[Opt, float]]:
    """The common slope (at least 0) and each option's intercept, by least squares."""
    groups: dict[Opt, list[tuple[float, float]]] = {}
    for x, option, y in rows:
        groups.setdefault(option, []).append((x, y))
    means = {option: np.mean(members, axis=0) for option, members in groups.items()}
    centred = np.array([np.subtract((x, y), means[option]) for x, option, y in rows])
    slope, _ = _line(centred[:, 0], centred[:, 1])
    return slope, {option: float(y - slope * x) for option, (x, y) in means.items()}


def rank_correlation(scores: Figures[K], damages: Figures[K]) -> float:
    """Spearman's rank correlation over the keys that both hold: 1 where the score orders as the damage does."""
    keys = [k for k in scores if k in damages]
    if len(keys) < 3:
        raise BadInput(f"a rank correlation needs at least 3 sites that both rank, not {len(keys)}")
    from scipy import stats  # takes longer to import than anything else here

    x, y = ([_figure(side[k]) for k in keys] for side in (scores, damages))
    return float(stats.spearmanr(x, y).statistic)


def _line(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Least squares with a slope of at least 0."""
    spread = float(((x - x.mean()) ** 2).sum())
    slope = max(0.0, float(((x - x.mean()) * (y - y.mean())).sum()) / spread) if spread > 0 else 0.0
    return slope, float(y.mean() - slope * x.mean())


def _figure(value: Annotation | float) -> float:
    return float(value) if isinstance(value, int | float) else value.value
