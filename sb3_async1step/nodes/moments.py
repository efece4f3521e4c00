"""Running statistics (of VecNormalize) as sums, so that those of several nodes add up to those of all data."""

from dataclasses import dataclass

import numpy as np
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecNormalize


@dataclass
class Moments:
    """
    Count, sum and sum of squares of some data.

    :param count: number of values
    :param total: their sum
    :param squares: the sum of their squares
    """

    count: float
    total: np.ndarray
    squares: np.ndarray

    @classmethod
    def of(cls, statistics: RunningMeanStd) -> "Moments":
        """
        :param statistics: running statistics
        :return: their moments
        """
        mean, count = np.array(statistics.mean), float(statistics.count)
        return cls(count, mean * count, (statistics.var + mean**2) * count)

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(self.count + other.count, self.total + other.total, self.squares + other.squares)

    def __sub__(self, other: "Moments") -> "Moments":
        return Moments(self.count - other.count, self.total - other.total, self.squares - other.squares)

    def store(self, statistics: RunningMeanStd) -> None:
        """
        :param statistics: running statistics, which get these moments
        """
        mean = self.total / self.count
        # Rounding must not make it negative
        variance = np.maximum(self.squares / self.count - mean**2, 0.0)
        statistics.mean, statistics.var, statistics.count = mean, variance, self.count


def list_statistics(normalize: VecNormalize | None) -> dict[str, RunningMeanStd]:
    """
    :param normalize: the wrapper, None if there is none
    :return: its running statistics, by their names
    """
    if normalize is None:
        return {}
    statistics = {"returns": normalize.ret_rms}
    of_observations = getattr(normalize, "obs_rms", None)
    if isinstance(of_observations, dict):
        statistics |= {f"observations of {key}": value for key, value in of_observations.items()}
    elif of_observations is not None:
        statistics["observations"] = of_observations
    return statistics


def read_moments(normalize: VecNormalize | None) -> dict[str, Moments]:
    """
    :param normalize: the wrapper, None if there is none
    :return: the moments of its running statistics
    """
    return {name: Moments.of(statistics) for name, statistics in list_statistics(normalize).items()}


def store_moments(normalize: VecNormalize | None, moments: dict[str, Moments]) -> None:
    """
    :param normalize: the wrapper, None if there is none
    :param moments: what its running statistics get
    """
    for name, statistics in list_statistics(normalize).items():
        moments[name].store(statistics)
