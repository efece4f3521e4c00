"""The env lanes of a worker: all in step with each other, or each at its own pace."""

import os
import selectors
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import wait
from typing import Any

import numpy as np
from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvStepReturn

from sb3_async1step.vec_envs.healing_lane import HealingLane
from sb3_async1step.vec_envs.observations import concatenate, to_arrays
from sb3_async1step.vec_envs.split import (
    find_base,
    find_unsplittable,
    group_lanes,
    read_reset_infos,
    rejoin_vec_env,
    split_vec_env,
)
from sb3_async1step.workers.rollout import ALL_LANES

#: Which of a worker's lanes
Rows = np.ndarray | slice
#: Seconds for which a worker waits for a lane, before it looks whether the training is over
POLL_INTERVAL = 0.05


class Lanes:
    """
    Lanes that step together, when the worker takes their results.

    :param env: VecEnv with the lanes
    """

    #: Whether lanes step while the worker does something else
    is_async = False

    def __init__(self, env: VecEnv) -> None:
        self.parts: list[VecEnv] = [env]
        self.n_lanes = env.num_envs
        self._actions: Any = None

    @property
    def n_idle(self) -> int:
        """Number of lanes that wait for an action."""
        return self.n_lanes

    @property
    def reset_infos(self) -> list[dict[str, Any]]:
        """What the envs said at their last resets."""
        return [info for part in self.parts for info in read_reset_infos(part)]

    def next_idle(self, n_lanes: int) -> Rows:
        """
        :param n_lanes: a number of lanes
        :return: indices of this many lanes that wait for an action
        """
        assert n_lanes == self.n_lanes
        return ALL_LANES

    def begin_step(self, rows: Rows, actions: np.ndarray) -> None:
        """
        :param rows: idle lanes
        :param actions: the actions that they take
        """
        self._actions = actions

    def wait(self) -> None:
        """Wait until a lane is ready, or for a moment."""

    def settle(self) -> None:
        """Wait until no lane steps; their results are kept until the worker takes them."""

    def end_step(self) -> tuple[Rows, VecEnvStepReturn] | None:
        """
        :return: the lanes that are ready, and what ``VecEnv.step()`` returns for them; None if there is none
        """
        return ALL_LANES, self.parts[0].step(self._actions)


class AsyncLanes(Lanes):
    """
    Lanes whose processes step while the worker does something else. It serves those that are ready.

    :param parts: a VecEnv of one lane each, which is in a process of its own
    """

    is_async = True

    def __init__(self, parts: Sequence[VecEnv]) -> None:
        self.parts = list(parts)
        self.n_lanes = len(parts)
        remotes: list[Any] = [find_base(part).remotes[0] for part in parts]  # type: ignore[attr-defined]
        can_change = any(isinstance(remote, HealingLane) for remote in remotes)
        self._pipes = Pipes(remotes) if can_change or os.name == "nt" else LastingPipes(remotes)
        self._idle = list(range(self.n_lanes))
        self._stepping: list[int] = []
        # Results that arrived before the worker asked for them
        self._kept: dict[int, VecEnvStepReturn] = {}

    @property
    def n_idle(self) -> int:
        return len(self._idle)

    def next_idle(self, n_lanes: int) -> Rows:
        return np.array(sorted(self._idle[:n_lanes]))

    def begin_step(self, rows: Rows, actions: np.ndarray) -> None:
        for row, action in zip(np.arange(self.n_lanes)[rows].tolist(), actions, strict=True):
            self._idle.remove(row)
            self._stepping.append(row)
            self.parts[row].step_async(action[None])

    def wait(self) -> None:
        self._pipes.wait(self._stepping)

    def settle(self) -> None:
        for row in self._stepping:
            if row not in self._kept:
                self._kept[row] = self.parts[row].step_wait()

    def end_step(self) -> tuple[Rows, VecEnvStepReturn] | None:
        ready = self._list_ready()
        if not ready:
            return None
        results = []
        for row in ready:
            results.append(self._kept.pop(row) if row in self._kept else self.parts[row].step_wait())
            self._stepping.remove(row)
            self._idle.append(row)
        return np.array(ready), join_results(results)

    def _list_ready(self) -> list[int]:
        ready = self._pipes.find_ready([row for row in self._stepping if row not in self._kept])
        return sorted([*self._kept, *ready])


class Pipes:
    """
    The pipes through which the processes of lanes answer.

    :param remotes: what a ``SubprocVecEnv`` receives each lane's answers from
    """

    def __init__(self, remotes: Sequence[Any]) -> None:
        self._remotes = remotes

    def find_ready(self, rows: Sequence[int]) -> list[int]:
        """
        :param rows: some of the lanes
        :return: those of them whose answers are there
        """
        healing = [row for row in rows if isinstance(self._remotes[row], HealingLane)]
        others = {self._remotes[row]: row for row in rows if not isinstance(self._remotes[row], HealingLane)}
        # One look at all pipes is much faster than a poll() of each
        return [others[remote] for remote in wait(list(others), 0)] + [
            row for row in healing if self._remotes[row].poll()
        ]

    def wait(self, rows: Sequence[int]) -> None:
        """
        Wait until an answer is there, or for a moment.

        :param rows: some of the lanes
        """
        # A callback may be asking the lanes meanwhile: this only looks, and a HealingVecEnv may close what it looks at
        with suppress(OSError, ValueError):
            wait([waitable for row in rows for waitable in list_waitables(self._remotes[row])], POLL_INTERVAL)


class LastingPipes(Pipes):
    """
    Pipes that stay the same, so that the operating system need not be told again and again which they are.

    :param remotes: see :class:`Pipes`
    """

    def __init__(self, remotes: Sequence[Any]) -> None:
        super().__init__(remotes)
        self._selector = selectors.DefaultSelector()
        for row, remote in enumerate(remotes):
            self._selector.register(remote, selectors.EVENT_READ, row)

    def find_ready(self, rows: Sequence[int]) -> list[int]:
        ready = {key.data for key, _ in self._selector.select(0)}
        return [row for row in rows if row in ready]

    def wait(self, rows: Sequence[int]) -> None:
        self._selector.select(POLL_INTERVAL)


class SharedLanes:
    """
    A VecEnv whose lanes workers share.

    :param env: the VecEnv
    :param n_workers: number of workers
    :param in_step: whether the lanes of a worker step together, even if they could step each at its own pace
    """

    def __init__(self, env: VecEnv, n_workers: int, in_step: bool) -> None:
        self._env = env
        self.groups = group_lanes(env.num_envs, n_workers)
        self.is_async = not in_step and env.num_envs > 1 and can_step_asynchronously(env)
        self._part_groups = group_lanes(env.num_envs, env.num_envs) if self.is_async else self.groups
        # A single worker drives the env itself, whatever kind of VecEnv it is
        self._is_split = len(self._part_groups) > 1
        self._parts = split_vec_env(env, self._part_groups) if self._is_split else [env]

    def make_lanes(self) -> list[Lanes]:
        """
        :return: the lanes of each worker
        """
        if self.is_async:
            return [AsyncLanes(self._parts[lanes.start : lanes.stop]) for lanes in self.groups]
        return [Lanes(part) for part in self._parts]

    def rejoin(self) -> None:
        """Give the VecEnv the state that its lanes are in, once no worker steps them any more."""
        if self._is_split:
            rejoin_vec_env(self._env, self._parts, self._part_groups)


def can_step_asynchronously(env: VecEnv) -> bool:
    """
    :param env: a VecEnv with its wrappers
    :return: whether its lanes are in processes of their own, and can be split
    """
    return isinstance(find_base(env), SubprocVecEnv) and find_unsplittable(env) is None


def list_waitables(remote: Any) -> list[Any]:
    """
    :param remote: what a ``SubprocVecEnv`` receives a lane's answers from
    :return: what ``multiprocessing.connection.wait()`` takes: one of them is ready if the lane is
    """
    return remote.list_waitables() if isinstance(remote, HealingLane) else [remote]


def join_results(results: list[VecEnvStepReturn]) -> VecEnvStepReturn:
    """
    :param results: what ``VecEnv.step()`` has returned for some lanes each
    :return: the same for all of them
    """
    new_obs, rewards, dones, infos = zip(*results, strict=True)
    observations: Any = concatenate([to_arrays(each) for each in new_obs])
    return (
        observations,
        np.concatenate([np.atleast_1d(each) for each in rewards]),
        np.concatenate([np.atleast_1d(each) for each in dones]),
        [info for each in infos for info in each],
    )
