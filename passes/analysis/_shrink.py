"""Empirical Bayes for noisy figures in groups: each group has a level, and its members scatter about it."""

from __future__ import annotations

import math
from collections.abc import Sequence


def shrink(values: Sequence[Sequence[float]], noises: Sequence[Sequence[float]]) -> list[list[tuple[float, float]]]:
    """(estimate, standard error) of each member, from values with known noise variances.

    Model: value = level of the group + deviation of variance t + noise. t is one number for all groups, by the method of moments
    from the scatter within groups (DerSimonian and Laird); each member is then its posterior mean.
    """
    excess = weight = 0.0
    for group, noise in zip(values, noises):
        level = sum(group) / len(group)
        scatter = sum((v - level) ** 2 for v in group)
        excess += scatter - sum(noise) * (len(group) - 1) / len(group)
        weight += len(group) - 1
    spread = max(excess / weight, 0.0) if weight else 0.0
    made = []
    for group, noise in zip(values, noises):
        precision = [1 / (spread + n) if spread + n > 0 else 1e12 for n in noise]
        level = sum(p * v for p, v in zip(precision, group)) / sum(precision)
        members = []
        for value, n in zip(group, noise):
            trust = spread / (spread + n) if spread + n > 0 else 1.0
            variance = trust * n + (1 - trust) ** 2 / sum(precision)
            members.append((level + trust * (value - level), math.sqrt(variance)))
        made.append(members)
    return made
