"""Where the observed prefix of a path ends."""

MIN_PREFIX_END = 3
"""The shortest prefix that shows a curvature: theta_0 and three checkpoints after it."""


def prefix_end_of(fraction: float, num_checkpoints: int) -> int:
    """Return the index h of the last checkpoint seen when `fraction` of a path 0..T-1 has been walked."""
    return round(fraction * (num_checkpoints - 1))
