"""The interval of a proportion."""

import math
import statistics

Z = statistics.NormalDist().inv_cdf(0.975)


def wilson(correct: int, n: int) -> tuple[float, float]:
    """The 95 % interval of the proportion `correct` of `n` (Wilson 1927, without continuity
    correction); nothing is known of a proportion of nothing, so (0, 1) for n = 0.

    Raises ValueError unless 0 <= correct <= n.
    """
    if not 0 <= correct <= n:
        raise ValueError(f"{correct} of {n} is no proportion")
    if n == 0:
        return 0.0, 1.0
    p, spread = correct / n, Z * Z / n
    centre = (p + spread / 2) / (1 + spread)
    half = math.sqrt(p * (1 - p) * spread + spread * spread / 4) / (1 + spread)
    # At p = 0 and p = 1 one end is exactly that; rounding must not step over it.
    low = max(0.0, centre - half) if correct > 0 else 0.0
    high = min(1.0, centre + half) if correct < n else 1.0
    return low, high
