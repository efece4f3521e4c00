"""The transitions of a worker's lanes between two updates, time by lane."""

from dataclasses import dataclass, fields
from typing import Any, Generic, TypeVar

import numpy as np

from sb3_async1step.vec_envs.observations import Observations, map_arrays, store_rows


@dataclass
class Rollout:
    """
    Transitions of ``n_steps`` time steps in ``n_lanes`` lanes. An algorithm that stores more than these, such as
    Sarsa, has a subclass.

    :param observations: s, shape ``(n_steps, n_lanes, *observation_shape)``
    :param actions: a, shape ``(n_steps, n_lanes, *action_shape)``
    :param rewards: r, shape ``(n_steps, n_lanes)``
    :param next_observations: s', the terminal observation if the episode was truncated and the first one of the next
        episode if it was terminated, shape ``(n_steps, n_lanes, *observation_shape)``
    :param terminated: whether s' is terminal, shape ``(n_steps, n_lanes)``
    :param truncated: whether the episode was cut off in s', which is not terminal, shape ``(n_steps, n_lanes)``
    """

    observations: Observations
    actions: np.ndarray
    rewards: np.ndarray
    next_observations: Observations
    terminated: np.ndarray
    truncated: np.ndarray

    def __len__(self) -> int:
        return len(self.rewards)


AnyRollout = TypeVar("AnyRollout", bound=Rollout)


class RolloutBuffer(Generic[AnyRollout]):
    """
    Storage for the rollout of one worker, allocated when the first transitions come.

    :param n_steps: maximum number of time steps
    """

    def __init__(self, n_steps: int) -> None:
        self.n_steps = n_steps
        self.n_filled = 0
        self._storage: AnyRollout | None = None

    def add(self, step: AnyRollout) -> None:
        """
        :param step: one time step of all lanes, as a rollout whose arrays lack the first axis
        """
        if self._storage is None:
            self._storage = _map_fields(lambda array: _allocate(self.n_steps, array), step)
        for field in fields(step):
            store_rows(getattr(self._storage, field.name), self.n_filled, getattr(step, field.name))
        self.n_filled += 1

    def take(self) -> AnyRollout:
        """
        Return the stored transitions, and empty the buffer.

        :return: the transitions; they share the buffer's memory, and are valid until the next ``add``
        """
        assert self._storage is not None
        n_filled, self.n_filled = self.n_filled, 0
        return _map_fields(lambda array: array[:n_filled], self._storage)

    def get_state(self) -> AnyRollout | None:
        """
        :return: a copy of the stored transitions, None if there are none
        """
        if self.n_filled == 0 or self._storage is None:
            return None
        return _map_fields(lambda array: array[: self.n_filled].copy(), self._storage)

    def set_state(self, state: AnyRollout | None) -> None:
        """
        :param state: a state returned by :meth:`get_state`
        """
        self.n_filled = 0
        for step in range(0 if state is None else len(state)):
            assert state is not None
            self.add(_map_fields(lambda array, step=step: array[step], state))


def merge_time_and_lanes(observations: Observations) -> Observations:
    """
    :param observations: shape ``(n_steps, n_lanes, ...)``
    :return: the same in shape ``(n_steps * n_lanes, ...)``, for a network
    """
    return map_arrays(lambda array: array.reshape(-1, *array.shape[2:]), observations)


def _map_fields(function: Any, rollout: AnyRollout) -> AnyRollout:
    values: dict[str, Any] = {
        field.name: map_arrays(function, getattr(rollout, field.name)) for field in fields(rollout)
    }
    return type(rollout)(**values)


def _allocate(n_steps: int, array: np.ndarray) -> np.ndarray:
    if array.ndim == 4:
        # Images: the channels come first in the shape, but last in memory, with which convolutions are faster
        n_lanes, n_channels, height, width = array.shape
        storage = np.empty((n_steps, n_lanes, height, width, n_channels), array.dtype)
        return storage.transpose(0, 1, 4, 2, 3)
    return np.empty((n_steps, *array.shape), array.dtype)
