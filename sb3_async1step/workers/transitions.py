"""What a worker reports to the thread that called ``learn()``."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sb3_async1step.vec_envs.observations import Observations, concatenate, take_rows


@dataclass
class UpdateStats:
    """
    Statistics of one update, for the logger.

    :param metrics: what the logger shall average over the updates, by its key
    :param gradient_staleness: number of updates that other workers applied after this worker had read the parameters
        for its gradient, and before it applied that gradient
    """

    metrics: dict[str, float]
    gradient_staleness: int


@dataclass
class Transitions:
    """
    Transitions to report to the callbacks, as ``VecEnv.step()`` returns them, and the updates made with them.

    :param actions: the actions that the algorithm chose, shape ``(n, *action_shape)``
    :param new_obs: the new observations, shape ``(n, *observation_shape)``
    :param rewards: the rewards, shape ``(n,)``
    :param dones: whether an episode ended, shape ``(n,)``
    :param infos: the info dictionaries, length ``n``
    :param updates: statistics of the updates
    """

    actions: np.ndarray
    new_obs: Observations
    rewards: np.ndarray
    dones: np.ndarray
    infos: list[dict[str, Any]]
    updates: list[UpdateStats]

    def __len__(self) -> int:
        return len(self.dones)

    def split(self, n_first: int) -> tuple["Transitions", "Transitions"]:
        """
        :param n_first: number of transitions in the first part
        :return: the first part, with the statistics of all updates, and the rest
        """
        return self._take(slice(n_first), self.updates), self._take(slice(n_first, None), [])

    def _take(self, rows: slice, updates: list[UpdateStats]) -> "Transitions":
        return Transitions(
            self.actions[rows],
            take_rows(self.new_obs, rows),
            self.rewards[rows],
            self.dones[rows],
            self.infos[rows],
            updates,
        )


def join(parts: Sequence[Transitions]) -> Transitions:
    """
    :param parts: transitions in several parts
    :return: all of them
    """
    if len(parts) == 1:
        return parts[0]
    return Transitions(
        np.concatenate([part.actions for part in parts]),
        concatenate([part.new_obs for part in parts]),
        np.concatenate([part.rewards for part in parts]),
        np.concatenate([part.dones for part in parts]),
        [info for part in parts for info in part.infos],
        [update for part in parts for update in part.updates],
    )
