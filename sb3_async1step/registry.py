"""The algorithms of this package: the command line, the benchmarks and the tests find them here."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sb3_async1step.a3c import A3C
from sb3_async1step.a3c import search_space as a3c
from sb3_async1step.async_n_step_q import AsyncNStepQ
from sb3_async1step.async_n_step_q import search_space as n_step_q
from sb3_async1step.async_one_step_q import AsyncOneStepQ
from sb3_async1step.async_one_step_sarsa import AsyncOneStepSarsa
from sb3_async1step.common.async_algorithm import AsyncAlgorithm
from sb3_async1step.value_based import search_space as value_based

if TYPE_CHECKING:
    import optuna


@dataclass(frozen=True)
class Algorithm:
    """
    An algorithm, and its search space for ``sb3-async1step train -optimize``.

    :param model_class: its SB3 class
    :param sample_hyperparams: lets an Optuna trial choose values
    :param convert_hyperparams: converts sampled values to hyperparameters, as in the YAML files
    """

    model_class: type[AsyncAlgorithm]
    sample_hyperparams: Callable[["optuna.Trial"], dict[str, Any]]
    convert_hyperparams: Callable[[dict[str, Any]], dict[str, Any]]

    @property
    def name(self) -> str:
        """
        :return: its name in tables and pictures
        """
        return self.model_class.__name__


#: The algorithms by their ids in the RL Zoo. The hyperparameters of an algorithm are in ``hyperparams/ID.yml``
ALGORITHMS: dict[str, Algorithm] = {
    "async_one_step_q": Algorithm(AsyncOneStepQ, value_based.sample_hyperparams, value_based.convert_hyperparams),
    "async_one_step_sarsa": Algorithm(
        AsyncOneStepSarsa, value_based.sample_hyperparams, value_based.convert_hyperparams
    ),
    "async_n_step_q": Algorithm(AsyncNStepQ, n_step_q.sample_hyperparams, value_based.convert_hyperparams),
    "a3c": Algorithm(A3C, a3c.sample_hyperparams, a3c.convert_hyperparams),
}
