"""The search spaces of our algorithms, as ``train -optimize`` calls them."""

from collections.abc import Callable
from typing import Any

import optuna

from sb3_async1step.registry import Algorithm
from sb3_async1step.sb3_internals import preprocess_schedules

#: Takes a trial, the numbers of actions and of environments, and further arguments of the Zoo
Sampler = Callable[[optuna.Trial, int, int, dict[str, Any]], dict[str, Any]]


def make_sampler(algorithm: Algorithm) -> Sampler:
    """
    :param algorithm: one of our algorithms
    :return: function that samples arguments of its constructor
    """

    def sample_hyperparams(
        trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]
    ) -> dict[str, Any]:
        return preprocess_schedules(algorithm.convert_hyperparams(algorithm.sample_hyperparams(trial)))

    return sample_hyperparams
