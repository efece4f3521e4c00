"""Search space of n-step Q-learning for ``sb3-async1step train -optimize``."""

from typing import TYPE_CHECKING, Any

from sb3_async1step.value_based import search_space as value_based

if TYPE_CHECKING:
    import optuna


def sample_hyperparams(trial: "optuna.Trial") -> dict[str, Any]:
    """
    :param trial: the Optuna trial
    :return: the values that it chose
    """
    return {**value_based.sample_hyperparams(trial), "q_lambda": trial.suggest_float("q_lambda", 0.0, 1.0)}
