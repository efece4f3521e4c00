"""The transitions of a worker's lanes between two updates, time by lane."""

from dataclasses import dataclass, field, fields
from typing import Any, Generic, TypeVar

import numpy as np
import torch as th

from sb3_async1step.vec_envs.observations import Observations, map_arrays, store_rows, take_rows

#: Selects all lanes of a worker
ALL_LANES = slice(None)


@dataclass
class Rollout:
    """
    Transitions of at most ``n_steps`` time steps in ``n_lanes`` lanes. An algorithm that stores more than these, such
    as Sarsa, has a subclass.

    :param observations: s, shape ``(n_steps, n_lanes, *observation_shape)``
    :param actions: a, shape ``(n_steps, n_lanes, *action_shape)``
    :param rewards: r, shape ``(n_steps, n_lanes)``
    :param next_observations: s', the terminal observation if the episode was truncated and the first one of the next
        episode if it was terminated, shape ``(n_steps, n_lanes, *observation_shape)``
    :param terminated: whether s' is terminal, shape ``(n_steps, n_lanes)``
    :param truncated: whether the episode was cut off in s', which is not terminal, shape ``(n_steps, n_lanes)``
    :param lengths: number of time steps of each lane, shape ``(n_lanes,)``; what the arrays hold beyond is meaningless.
        None if all lanes have ``n_steps``
    """

    observations: Observations
    actions: np.ndarray
    rewards: np.ndarray
    next_observations: Observations
    terminated: np.ndarray
    truncated: np.ndarray
    lengths: np.ndarray | None = field(default=None, init=False)

    def __len__(self) -> int:
        return len(self.rewards)

    @property
    def n_transitions(self) -> int:
        """Number of transitions of all lanes."""
        return self.rewards.size if self.lengths is None else int(self.lengths.sum())

    @property
    def is_filled(self) -> np.ndarray:
        """Where there is a transition, shape ``(n_steps, n_lanes)``."""
        lengths = np.full(self.rewards.shape[1], len(self)) if self.lengths is None else self.lengths
        return np.arange(len(self))[:, None] < lengths

    @property
    def is_last(self) -> np.ndarray:
        """Where the last transitions of the lanes are, shape ``(n_steps, n_lanes)``."""
        if self.lengths is None:
            is_last = np.zeros(self.rewards.shape, dtype=bool)
            is_last[-1] = True
            return is_last
        return self.is_filled & (np.arange(1, len(self) + 1)[:, None] == self.lengths)

    def flatten(self, observations: Any) -> Any:
        """
        :param observations: shape ``(n_steps, n_lanes, ...)``, or another array, or a tensor
        :return: those of the transitions that there are, shape ``(n_transitions, ...)``, for a network
        """
        if self.lengths is None:
            return merge_time_and_lanes(observations)
        return take_rows(observations, self.is_filled)

    def unflatten(self, values: th.Tensor) -> th.Tensor:
        """
        :param values: shape ``(n_transitions, ...)``
        :return: the same in shape ``(n_steps, n_lanes, ...)``, zero where there is no transition
        """
        shape = *self.rewards.shape, *values.shape[1:]
        if self.lengths is None:
            return values.reshape(shape)
        result = values.new_zeros(shape)
        result[th.as_tensor(self.is_filled, device=values.device)] = values
        return result


AnyRollout = TypeVar("AnyRollout", bound=Rollout)


class RolloutBuffer(Generic[AnyRollout]):
    """
    Storage for the rollout of one worker, allocated when the first transitions come.

    :param n_steps: maximum number of time steps
    :param n_lanes: number of the worker's lanes
    """

    def __init__(self, n_steps: int, n_lanes: int) -> None:
        self.n_steps = n_steps
        #: Number of time steps of the lane that has most of them
        self.n_filled = 0
        self._n_lanes = n_lanes
        self._storage: AnyRollout | None = None
        # Number of time steps of each lane, None as long as all have the same
        self._lengths: np.ndarray | None = None

    def add(self, step: AnyRollout, lanes: np.ndarray | slice = ALL_LANES) -> None:
        """
        :param step: a time step of some lanes, as a rollout whose arrays lack the first axis
        :param lanes: which of the worker's lanes these are, by default all
        """
        if self._storage is None:
            shape = self.n_steps, self._n_lanes
            self._storage = map_fields(lambda array: _allocate(shape, array), step)
        rows = self._advance(lanes)
        for name in _names_of_arrays(step):
            store_rows(getattr(self._storage, name), rows, getattr(step, name))

    def _advance(self, lanes: np.ndarray | slice) -> Any:
        """Count a time step of some lanes, and return where it is to be stored."""
        if self._lengths is None:
            if isinstance(lanes, slice):
                self.n_filled += 1
                return self.n_filled - 1
            self._lengths = np.full(self._n_lanes, self.n_filled)
        rows = self._lengths[lanes].copy(), np.arange(len(self._lengths))[lanes]
        self._lengths[lanes] += 1
        self.n_filled = int(self._lengths.max())
        return rows

    def take(self) -> AnyRollout:
        """
        Return the stored transitions, and empty the buffer.

        :return: the transitions; they share the buffer's memory, and are valid until the next ``add``
        """
        rollout = self._view()
        self._clear()
        return rollout

    def _view(self) -> AnyRollout:
        assert self._storage is not None
        n_filled = self.n_filled
        view = map_fields(lambda array: array[:n_filled], self._storage)
        if self._lengths is not None and self._lengths.min() < n_filled:
            view.lengths = self._lengths
        return view

    def _clear(self) -> None:
        self.n_filled, self._lengths = 0, None

    def get_state(self) -> AnyRollout | None:
        """
        :return: a copy of the stored transitions, None if there are none
        """
        if self.n_filled == 0:
            return None
        view = self._view()
        state = map_fields(np.copy, view)
        if view.lengths is not None:
            state.lengths = view.lengths.copy()
        return state

    def set_state(self, state: AnyRollout | None) -> None:
        """
        :param state: a state returned by :meth:`get_state`
        """
        self._clear()
        if state is None:
            return
        if len(state) >= self.n_steps:
            # A lane at its own pace may be ahead of the others
            self.n_steps, self._storage = len(state) + 1, None
        for t in range(len(state)):
            lanes = ALL_LANES if state.lengths is None else np.flatnonzero(state.lengths > t)
            self.add(map_fields(lambda array, t=t, lanes=lanes: array[t][lanes], state), lanes)


def merge_time_and_lanes(observations: Observations) -> Observations:
    """
    :param observations: shape ``(n_steps, n_lanes, ...)``
    :return: the same in shape ``(n_steps * n_lanes, ...)``, for a network
    """
    return map_arrays(lambda array: array.reshape(-1, *array.shape[2:]), observations)


def _names_of_arrays(rollout: Rollout) -> list[str]:
    return [field.name for field in fields(rollout) if field.name != "lengths"]


def map_fields(function: Any, rollout: AnyRollout) -> AnyRollout:
    """
    :param function: applied to each array
    :param rollout: a rollout
    :return: one with the results
    """
    values: dict[str, Any] = {name: map_arrays(function, getattr(rollout, name)) for name in _names_of_arrays(rollout)}
    return type(rollout)(**values)


def _allocate(shape: tuple[int, int], array: np.ndarray) -> np.ndarray:
    """Make room for as many steps and lanes, given what is to be stored of some lanes at a step."""
    if array.ndim == 4:
        # Images: the channels come first in the shape, but last in memory, with which convolutions are faster
        _, n_channels, height, width = array.shape
        storage = np.zeros((*shape, height, width, n_channels), array.dtype)
        return storage.transpose(0, 1, 4, 2, 3)
    return np.zeros((*shape, *array.shape[1:]), array.dtype)
