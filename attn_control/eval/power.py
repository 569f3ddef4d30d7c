"""What a number of prompts could detect at all, said before anything runs."""

from __future__ import annotations

import math
from statistics import NormalDist


def detectable(n: int, discordance: float, *, level: float = 0.95, power: float = 0.8) -> float:
    """The smallest paired difference of two shares that n prompts would show, in [0, 1].

    Two variants judged on the same pictures differ on a share `discordance` of them; their
    difference then has a variance of at most discordance / n (McNemar 1947; Connor 1987). With it a
    two-sided test at 1 - level finds a difference of (z_level + z_power) sqrt(discordance / n) with
    the given power.

    >>> round(detectable(160, 0.3), 3)
    0.121
    """
    z = NormalDist().inv_cdf((1 + level) / 2) + NormalDist().inv_cdf(power)
    return min(1.0, z * math.sqrt(discordance / n))
