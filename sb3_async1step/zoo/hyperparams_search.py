"""The search spaces of our algorithms, as ``train -optimize`` calls them."""

from collections.abc import Callable
from typing import Any

import optuna

from sb3_async1step.registry import Algorithm
from sb3_async1step.sb3_internals import preprocess_schedules

#: Takes a trial, the numbers of actions and of environments, and further arguments of the Zoo
Sampler = Callable[[optuna.Trial, int, int, dict[str, Any]], dict[str, Any]]


def keep_policy_kwargs(hyperparams: dict[str, Any], policy_kwargs: dict[str, Any]) -> dict[str, Any]:
    """
    :param hyperparams: those of a trial
    :param policy_kwargs: those of the environment's entry
    :return: the same, with what else the policy needs there: the features extractor, whether it computes in bfloat16
    """
    if "policy_kwargs" not in hyperparams:
        return hyperparams
    # The arguments of an optimizer are of no use for another one
    kept = {name: value for name, value in policy_kwargs.items() if not name.startswith("optimizer_")}
    return {**hyperparams, "policy_kwargs": {**kept, **hyperparams["policy_kwargs"]}}


def make_sampler(algorithm: Algorithm, policy_kwargs: dict[str, Any] | None = None) -> Sampler:
    """
    :param algorithm: one of our algorithms
    :param policy_kwargs: those of the environment's entry
    :return: function that samples arguments of its constructor
    """

    def sample_hyperparams(
        trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]
    ) -> dict[str, Any]:
        sampled = algorithm.convert_hyperparams(algorithm.sample_hyperparams(trial))
        return preprocess_schedules(keep_policy_kwargs(sampled, policy_kwargs or {}))

    return sample_hyperparams
