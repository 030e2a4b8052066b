"""Queries of the dashboards: Prometheus, over all processes.

What one process did is summed over the processes; what is counted in the database is the same in each, so it is `max`.
"""

RATE = "[$__rate_interval]"


def by(metric: str, *labels: str, where: str = "") -> str:
    """Per second, summed by labels."""
    return f"sum by ({', '.join(labels)}) (rate({metric}{where}{RATE}))"


def total(metric: str, where: str = "") -> str:
    return f"sum(rate({metric}{where}{RATE}))"


def quantile(share: float, metric: str, *labels: str, where: str = "") -> str:
    of = ", ".join(("le", *labels))
    return f"histogram_quantile({share}, sum by ({of}) (rate({metric}_bucket{where}{RATE})))"


def grown(metric: str, *labels: str, over: str) -> str:
    """By how much a counter grew, by labels; 0 where it has not been seen."""
    return or_none(f"sum by ({', '.join(labels)}) (increase({metric}[{over}]))")


def or_none(expr: str) -> str:
    """0 where nothing was measured."""
    return f"({expr}) or vector(0)"


def half_and_worst(metric: str) -> tuple[tuple[str, str], tuple[str, str]]:
    """Two lines: below the one is half of what was measured, below the other all but one in a hundred."""
    return (quantile(0.5, metric), "half"), (quantile(0.99, metric), "99 %")


def half_and_worst_or_none(metric: str) -> tuple[tuple[str, str], tuple[str, str]]:
    return (or_none(quantile(0.5, metric)), "half"), (or_none(quantile(0.99, metric)), "99 %")
