"""
Split a VecEnv and its wrappers into one VecEnv for each worker.

The parts drive the very envs of the whole. The whole is not stepped while its parts are; afterwards
:func:`rejoin_vec_env` gives it what its lanes went through (stacked frames, episode returns), so that
the user's env stays consistent.
"""

import threading
from collections.abc import Callable, Sequence
from copy import copy, deepcopy
from functools import singledispatch
from itertools import pairwise
from typing import Any, TypeVar

import gymnasium as gym
import numpy as np
from gymnasium.vector.utils import create_empty_array
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    SubprocVecEnv,
    VecCheckNan,
    VecEnv,
    VecEnvWrapper,
    VecExtractDictObs,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
    VecTransposeImage,
)
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn
from stable_baselines3.common.vec_env.stacked_observations import StackedObservations

AnyVecEnv = TypeVar("AnyVecEnv", bound=VecEnv)


def group_lanes(num_envs: int, n_groups: int) -> list[range]:
    """
    :param num_envs: number of env lanes
    :param n_groups: number of groups, at most ``num_envs``
    :return: consecutive lanes for each group; the sizes differ by one at most
    """
    bounds = [num_envs * i // n_groups for i in range(n_groups + 1)]
    return [range(first, end) for first, end in pairwise(bounds)]


def find_unsplittable(env: VecEnv) -> type[VecEnv] | None:
    """
    :param env: a VecEnv, with its wrappers
    :return: the outermost class that :func:`split_vec_env` doesn't know, None if it knows them all
    """
    # A subclass may keep more for each lane than its parent: only the very classes that are registered
    if type(env) not in split_vec_env.registry:
        return type(env)
    return find_unsplittable(env.venv) if isinstance(env, VecEnvWrapper) else None


@singledispatch
def split_vec_env(env: VecEnv, groups: Sequence[range]) -> list[VecEnv]:
    """
    Make a VecEnv for each group of lanes. To support a class of your own::

        @split_vec_env.register
        def _(env: MyWrapper, groups):
            return [MyWrapper(part) for part in split_vec_env(env.venv, groups)]

    :param env: the VecEnv to split, already reset
    :param groups: consecutive lanes of each part, together all lanes of ``env``
    :return: the parts
    :raises TypeError: if the class is not registered
    """
    raise TypeError(f"{type(env).__name__} can't be split, see sb3_async1step.split_vec_env")


@singledispatch
def rejoin_vec_env(env: VecEnv, parts: Sequence[VecEnv], groups: Sequence[range]) -> None:
    """
    Give a VecEnv the state that its parts' lanes are in. Register a class of your own only if it
    keeps something for each lane.

    :param env: the VecEnv that was split
    :param parts: its parts
    :param groups: their lanes
    """
    if isinstance(env, VecEnvWrapper):
        rejoin_vec_env(env.venv, [part.venv for part in parts if isinstance(part, VecEnvWrapper)], groups)
    else:
        env.reset_infos = [info for part in parts for info in part.reset_infos]


@split_vec_env.register
def _(env: DummyVecEnv, groups: Sequence[range]) -> list[VecEnv]:
    parts: list[VecEnv] = []
    for lanes in groups:
        part = DummyVecEnv([_returns(env.envs[lane]) for lane in lanes])
        part.reset_infos = env.reset_infos[lanes.start : lanes.stop]
        parts.append(part)
    return parts


@split_vec_env.register
def _(env: SubprocVecEnv, groups: Sequence[range]) -> list[VecEnv]:
    return [take_lanes(env, lanes, "remotes", "work_remotes", "processes") for lanes in groups]


@split_vec_env.register(VecTransposeImage)
@split_vec_env.register(VecCheckNan)
@split_vec_env.register(VecExtractDictObs)
def _(env: VecEnvWrapper, groups: Sequence[range]) -> list[VecEnv]:
    return _split_wrapper(env, groups)


@split_vec_env.register
def _(env: VecFrameStack, groups: Sequence[range]) -> list[VecEnv]:
    parts = _split_wrapper(env, groups)
    for part, lanes in zip(parts, groups, strict=True):
        part.stacked_obs = _take_stack(env.stacked_obs, lanes)
    return parts


@rejoin_vec_env.register
def _(env: VecFrameStack, parts: Sequence[VecFrameStack], groups: Sequence[range]) -> None:
    for part, lanes in zip(parts, groups, strict=True):
        _give_back_stack(env.stacked_obs, part.stacked_obs, lanes)
    rejoin_vec_env(env.venv, [part.venv for part in parts], groups)


class _LockedWriter:
    """Monitor file that the parts of a VecMonitor write to, one at a time."""

    def __init__(self, env: VecMonitor) -> None:
        self._writer = env.results_writer
        self._lock = threading.Lock()

    def write_row(self, episode_info: dict[str, float]) -> None:
        assert self._writer is not None
        with self._lock:
            self._writer.write_row(episode_info)


@split_vec_env.register
def _(env: VecMonitor, groups: Sequence[range]) -> list[VecEnv]:
    parts = _split_wrapper(env, groups)
    for part, lanes in zip(parts, groups, strict=True):
        # Views: changed in place, by the part
        part.episode_returns = env.episode_returns[lanes.start : lanes.stop]
        part.episode_lengths = env.episode_lengths[lanes.start : lanes.stop]
    writer = _LockedWriter(env) if env.results_writer is not None else None
    for part in parts:
        part.results_writer, part.episode_count = writer, 0
    return parts


@rejoin_vec_env.register
def _(env: VecMonitor, parts: Sequence[VecMonitor], groups: Sequence[range]) -> None:
    env.episode_count += sum(part.episode_count for part in parts)
    rejoin_vec_env(env.venv, [part.venv for part in parts], groups)


class _HeldStep(VecEnvWrapper):
    """Takes a step first, and hands out its result when asked."""

    def take_step(self) -> None:
        self.held = self.venv.step_wait()

    def step_wait(self) -> VecEnvStepReturn:
        return self.held

    def reset(self) -> VecEnvObs:
        return self.venv.reset()


class _VecNormalizePart(VecNormalize):
    """
    Part of a VecNormalize: settings and running statistics are the whole's, one part updates them at a time.

    What it keeps for each lane, it gives to the whole at once: callbacks ask for it.
    """

    venv: _HeldStep
    whole: VecNormalize
    lanes: range
    statistics_lock: threading.Lock

    def step_wait(self) -> VecEnvStepReturn:
        # The lock is not held while the envs step
        self.venv.take_step()
        with self.statistics_lock:
            # Callbacks may have changed them
            for name in ("training", "norm_obs", "norm_reward", "clip_obs", "clip_reward", "obs_rms", "ret_rms"):
                if name in self.whole.__dict__:
                    setattr(self, name, getattr(self.whole, name))
            result = super().step_wait()
            self._give_back()
        return result

    def _give_back(self) -> None:
        whole, lanes = self.whole, slice(self.lanes.start, self.lanes.stop)
        whole.returns[lanes] = self.returns
        whole.old_reward[lanes] = self.old_reward
        if isinstance(self.old_obs, dict) and isinstance(whole.old_obs, dict):
            for key, obs in self.old_obs.items():
                whole.old_obs[key][lanes] = obs
        elif isinstance(whole.old_obs, np.ndarray):
            whole.old_obs[lanes] = self.old_obs


@split_vec_env.register
def _(env: VecNormalize, groups: Sequence[range]) -> list[VecEnv]:
    if len(env.old_reward) != env.num_envs:
        env.old_reward = np.zeros(env.num_envs)
    # A copy: the first observations may be a buffer of the wrapped VecEnv
    first_observations: Any = getattr(env, "old_obs", create_empty_array(env.observation_space, env.num_envs))
    env.old_obs = deepcopy(first_observations)
    parts = _split_wrapper(env, groups, "returns")
    lock = threading.Lock()
    for part, lanes in zip(parts, groups, strict=True):
        part.lanes = lanes
        part.__class__ = _VecNormalizePart
        part.venv = _HeldStep(part.venv)
        part.whole = env
        part.statistics_lock = lock
    return parts


@rejoin_vec_env.register
def _(env: VecNormalize, parts: Sequence[_VecNormalizePart], groups: Sequence[range]) -> None:
    rejoin_vec_env(env.venv, [part.venv.venv for part in parts], groups)


def _split_wrapper(env: VecEnvWrapper, groups: Sequence[range], *per_lane: str) -> list:
    """Copies of a wrapper, around the parts of what it wraps; ``per_lane`` names what it keeps for each lane."""
    parts = []
    for venv, lanes in zip(split_vec_env(env.venv, groups), groups, strict=True):
        part = take_lanes(env, lanes, *per_lane)
        part.venv = venv
        parts.append(part)
    return parts


def take_lanes(env: AnyVecEnv, lanes: range, *per_lane: str) -> AnyVecEnv:
    """
    :param env: a VecEnv, with its wrappers
    :param lanes: some of its lanes
    :param per_lane: names of attributes that are lists or arrays over the lanes
    :return: a copy with these lanes only
    """
    # Not copy.copy: VecEnvWrapper.__getattr__ recurses without end on an object that has no attributes yet
    part = type(env).__new__(type(env))
    part.__dict__.update(env.__dict__)
    part.num_envs = len(lanes)
    for name in ("reset_infos", "_seeds", "_options", *per_lane):
        if name in env.__dict__:
            setattr(part, name, copy(getattr(env, name)[lanes.start : lanes.stop]))
    return part


def _take_stack(whole: StackedObservations, lanes: range) -> StackedObservations:
    part = copy(whole)
    if hasattr(whole, "sub_stacked_observations"):
        part.sub_stacked_observations = {
            key: _take_stack(stack, lanes) for key, stack in whole.sub_stacked_observations.items()
        }
    else:
        part.stacked_obs = whole.stacked_obs[lanes.start : lanes.stop].copy()
    return part


def _give_back_stack(whole: StackedObservations, part: StackedObservations, lanes: range) -> None:
    if hasattr(whole, "sub_stacked_observations"):
        for key, stack in whole.sub_stacked_observations.items():
            _give_back_stack(stack, part.sub_stacked_observations[key], lanes)
    else:
        whole.stacked_obs[lanes.start : lanes.stop] = part.stacked_obs


def _returns(env: gym.Env) -> Callable[[], gym.Env]:
    return lambda: env
