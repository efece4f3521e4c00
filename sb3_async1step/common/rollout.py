"""The transitions of a worker's lanes between two updates."""

from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch as th
from stable_baselines3.common.type_aliases import PyTorchObs
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs

Observations = np.ndarray | dict[str, np.ndarray]


class Rollout(NamedTuple):
    """``n`` transitions (time steps times lanes), ordered by time step, and by lane within a time step."""

    #: s, shape ``(n, *observation_shape)``
    observations: PyTorchObs
    #: indices of the actions a, shape ``(n,)``
    actions: th.Tensor
    #: r, shape ``(n,)``
    rewards: th.Tensor
    #: s', the terminal observation if the episode was truncated, shape ``(n, *observation_shape)``
    next_observations: PyTorchObs
    #: 1 if s' is terminal, otherwise 0 (also at the end of a truncated episode), shape ``(n,)``
    terminated: th.Tensor
    #: indices of the actions a' that the behaviour policy chose in s' (Sarsa; -1 for Q-learning), shape ``(n,)``
    next_actions: th.Tensor


class RolloutBuffer:
    """
    Preallocated storage for the rollout of one worker.

    :param n_steps: maximum number of vector steps
    :param observations: observations of the worker's lanes, which give the shapes and data types
    """

    FIELDS: ClassVar = ("observations", "actions", "rewards", "next_observations", "terminated", "next_actions")

    def __init__(self, n_steps: int, observations: VecEnvObs) -> None:
        assert isinstance(observations, (np.ndarray, dict))
        n_lanes = len(observations if isinstance(observations, np.ndarray) else next(iter(observations.values())))
        self.n_steps = n_steps
        self.n_filled = 0
        self.observations = _empty_like(n_steps, observations)
        self.next_observations = _empty_like(n_steps, observations)
        self.actions = np.empty((n_steps, n_lanes), dtype=np.int64)
        self.next_actions = np.empty((n_steps, n_lanes), dtype=np.int64)
        self.rewards = np.empty((n_steps, n_lanes), dtype=np.float32)
        self.terminated = np.empty((n_steps, n_lanes), dtype=np.float32)

    @property
    def is_full(self) -> bool:
        return self.n_filled == self.n_steps

    def add(
        self,
        observations: Observations,
        actions: np.ndarray,
        rewards: np.ndarray,
        next_observations: Observations,
        terminated: np.ndarray,
        next_actions: np.ndarray | int,
    ) -> None:
        """Store one vector step. The parameters are those of :class:`Rollout`, with shapes ``(n_lanes, ...)``."""
        step = self.n_filled
        _store(self.observations, step, observations)
        _store(self.next_observations, step, next_observations)
        self.actions[step] = actions
        self.next_actions[step] = next_actions
        self.rewards[step] = rewards
        self.terminated[step] = terminated
        self.n_filled += 1

    def take(self, device: th.device) -> Rollout:
        """
        Return the stored transitions, and empty the buffer.

        :param device: device of the tensors
        :return: the transitions; they share the buffer's memory, and are valid until the next ``add``
        """
        n_filled, self.n_filled = self.n_filled, 0
        return Rollout(
            obs_as_tensor(_flatten(self.observations, n_filled), device),
            th.as_tensor(self.actions[:n_filled].reshape(-1), device=device),
            th.as_tensor(self.rewards[:n_filled].reshape(-1), device=device),
            obs_as_tensor(_flatten(self.next_observations, n_filled), device),
            th.as_tensor(self.terminated[:n_filled].reshape(-1), device=device),
            th.as_tensor(self.next_actions[:n_filled].reshape(-1), device=device),
        )

    def get_state(self) -> dict[str, Any]:
        """
        :return: a copy of the stored transitions
        """
        return {name: _first_steps(getattr(self, name), self.n_filled) for name in self.FIELDS}

    def set_state(self, state: dict[str, Any]) -> None:
        """
        :param state: a state returned by :meth:`get_state`
        """
        for name in self.FIELDS:
            _store(getattr(self, name), slice(len(state["actions"])), state[name])
        self.n_filled = len(state["actions"])


def _empty_like(n_steps: int, observations: Observations) -> Observations:
    if isinstance(observations, dict):
        return {key: _empty_array(n_steps, obs) for key, obs in observations.items()}
    return _empty_array(n_steps, observations)


def _empty_array(n_steps: int, observations: np.ndarray) -> np.ndarray:
    if observations.ndim == 4:
        # Images: the channels come first in the shape, but last in memory, with which convolutions are faster
        n_lanes, n_channels, height, width = observations.shape
        storage = np.empty((n_steps, n_lanes, height, width, n_channels), observations.dtype)
        return storage.transpose(0, 1, 4, 2, 3)
    return np.empty((n_steps, *observations.shape), observations.dtype)


def _store(storage: Observations, step: int | slice, observations: Observations) -> None:
    if isinstance(storage, dict):
        for key in storage:
            storage[key][step] = observations[key]
    else:
        storage[step] = observations


def _first_steps(storage: Observations, n_steps: int) -> Observations:
    if isinstance(storage, dict):
        return {key: obs[:n_steps].copy() for key, obs in storage.items()}
    return storage[:n_steps].copy()


def _flatten(storage: Observations, n_filled: int) -> Observations:
    if isinstance(storage, dict):
        return {key: obs[:n_filled].reshape(-1, *obs.shape[2:]) for key, obs in storage.items()}
    return storage[:n_filled].reshape(-1, *storage.shape[2:])


def slice_observations(observations: Observations, lanes: range) -> Observations:
    """
    :param observations: observations; the first axis is that of the lanes
    :param lanes: consecutive lanes
    :return: the observations of these lanes
    """
    if isinstance(observations, dict):
        return {key: obs[lanes.start : lanes.stop] for key, obs in observations.items()}
    return observations[lanes.start : lanes.stop]


def concatenate_observations(parts: list[Observations]) -> Observations:
    """
    :param parts: observations of several groups of lanes; the first axis is that of the lanes
    :return: the observations of all lanes
    """
    if isinstance(parts[0], dict):
        return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    return np.concatenate(parts)  # type: ignore[arg-type]
