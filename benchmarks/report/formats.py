"""Figures as the tables print them."""

import statistics
from collections.abc import Sequence

import numpy as np

from benchmarks.learning import Run
from benchmarks.report.results import first_to_reach, read_seed, seconds_to


def format_score(runs: Sequence[Run]) -> str:
    """
    :param runs: runs of one algorithm in one environment
    :return: mean ± standard deviation over the seeds of the last model's mean return
    """
    scores = [float(np.mean(run.final_returns)) for run in runs]
    return f"{np.mean(scores):.1f} ± {np.std(scores):.1f}"


def format_seconds(runs: Sequence[Run], threshold: float) -> str:
    """
    :param runs: runs of one algorithm in one environment
    :param threshold: mean return
    :return: median of the seconds until it was reached
    """
    median = statistics.median(seconds_to(run, threshold) for run in runs)
    return f"{median:.0f} s" if np.isfinite(median) else "not reached"


def format_count(number: float) -> str:
    """
    :param number: a large number
    :return: the rounded number, with spaces between groups of three digits
    """
    return f"{round(number):,}".replace(",", " ")


def format_best(run: Run, n_steps: float) -> str:
    """
    :param run: a run
    :param n_steps: number of agent steps
    :return: its seed and the best mean return of its checkpoints until then, and its length if that is shorter
    """
    best = max(value for steps, value in zip(run.curve_steps, run.curve_returns, strict=True) if steps <= n_steps)
    until = "" if n_steps <= run.n_steps else f" (until {format_count(run.n_steps)})"
    return f"seed {read_seed(run)}: {best:.1f}{until}"


def format_moment(run: Run, threshold: float) -> str:
    """
    :param run: a run
    :param threshold: mean return
    :return: the threshold, and the steps and hours until it was reached
    """
    steps, seconds = first_to_reach(run, threshold)
    if not np.isfinite(steps):
        return f"{threshold:g}: not reached"
    return f"{threshold:g}: {steps / 1e6:.1f} ({seconds / 3600:.1f})"


def format_spread(values: list[float]) -> str:
    """
    :param values: a value for each repeat, infinite if the score was not reached
    :return: median, with the smallest and largest value in brackets
    """
    median, smallest, largest = (
        format_count(value) if np.isfinite(value) else "not reached"
        for value in (statistics.median(values), min(values), max(values))
    )
    return f"{median} ({smallest} to {largest})"
