"""
Split a VecEnv and its wrappers into one VecEnv for each worker.

The parts drive the environments of the original VecEnv, which is not stepped in the meantime. Afterwards,
:func:`rejoin_vec_env` gives it the state that its lanes are in (stacked frames, episode returns), so that the user's
VecEnv stays consistent.
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

from sb3_async1step.sb3_internals import VEC_ENV_ATTRIBUTES_PER_LANE
from sb3_async1step.vec_envs.frame_stack import accelerate
from sb3_async1step.vec_envs.observations import promote_dtypes, store_rows

AnyVecEnv = TypeVar("AnyVecEnv", bound=VecEnv)


def group_lanes(num_envs: int, n_groups: int) -> list[range]:
    """
    :param num_envs: number of env lanes
    :param n_groups: number of groups, at most ``num_envs``
    :return: consecutive lanes for each group; the sizes of the groups differ by at most one
    """
    bounds = [num_envs * i // n_groups for i in range(n_groups + 1)]
    return [range(first, end) for first, end in pairwise(bounds)]


def find_base(env: VecEnv) -> VecEnv:
    """
    :param env: a VecEnv with its wrappers
    :return: the VecEnv inside. For adapters of other libraries, ``env.unwrapped`` may be an object that is no VecEnv
    """
    while isinstance(env, VecEnvWrapper) and isinstance(env.venv, VecEnv):
        env = env.venv
    return env


def read_reset_infos(env: VecEnv) -> list[dict[str, Any]]:
    """
    :param env: a VecEnv with its wrappers
    :return: what its envs said at their last resets; empty if it is an adapter that does not keep that
    """
    return getattr(find_base(env), "reset_infos", [{}] * env.num_envs)


def find_unsplittable(env: VecEnv) -> type[VecEnv] | None:
    """
    :param env: a VecEnv with its wrappers
    :return: the outermost class for which :func:`split_vec_env` has no function, None if it has one for each class
    """
    # Subclasses of registered classes do not count: they may keep more for each lane than their parent
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

    :param env: the VecEnv to split, which has been reset already
    :param groups: consecutive lanes for each part, which together are all lanes of ``env``
    :return: a VecEnv for each group
    :raises TypeError: if no function is registered for the class
    """
    raise TypeError(f"{type(env).__name__} can't be split, see sb3_async1step.split_vec_env")


@singledispatch
def rejoin_vec_env(env: VecEnv, parts: Sequence[VecEnv], groups: Sequence[range]) -> None:
    """
    Give a VecEnv that was split the state that its lanes are in. A class of your own has to be registered only if it
    keeps a state for each lane.

    :param env: the VecEnv that was split
    :param parts: the parts, as returned by :func:`split_vec_env`
    :param groups: the lanes of each part
    """
    if isinstance(env, VecEnvWrapper):
        rejoin_vec_env(env.venv, [part.venv for part in parts if isinstance(part, VecEnvWrapper)], groups)
    else:
        env.reset_infos = [info for part in parts for info in read_reset_infos(part)]


class _SomeLanes(Sequence):
    """
    Some of the envs of a DummyVecEnv, also if a callback puts others in their place.

    :param env: the DummyVecEnv
    :param lanes: which of its envs these are
    """

    def __init__(self, env: DummyVecEnv, lanes: range) -> None:
        self._env, self._lanes = env, lanes

    def __len__(self) -> int:
        return len(self._lanes)

    def __getitem__(self, index: Any) -> Any:
        return self._env.envs[self._lanes[index]]


@split_vec_env.register
def _(env: DummyVecEnv, groups: Sequence[range]) -> list[VecEnv]:
    parts: list[VecEnv] = []
    for lanes in groups:
        part = DummyVecEnv([_returns(env.envs[lane]) for lane in lanes])
        part.envs = _SomeLanes(env, lanes)  # type: ignore[assignment]
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
        part.stacked_obs = take_stack(env.stacked_obs, lanes)
    return parts


@rejoin_vec_env.register
def _(env: VecFrameStack, parts: Sequence[VecFrameStack], groups: Sequence[range]) -> None:
    for part, lanes in zip(parts, groups, strict=True):
        _give_back_stack(env.stacked_obs, part.stacked_obs, lanes)
    rejoin_vec_env(env.venv, [part.venv for part in parts], groups)


class _LockedWriter:
    """The monitor file of a VecMonitor, to which its parts write one at a time."""

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
        # Views of the original's arrays, which the part changes in place
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
    """Waits for a step in ``take_step()``, and returns its result from ``step_wait()``."""

    def take_step(self) -> None:
        self.held = self.venv.step_wait()

    def step_wait(self) -> VecEnvStepReturn:
        return self.held

    def reset(self) -> VecEnvObs:
        return self.venv.reset()


# Attributes of a part of a VecNormalize that are not those of the whole
OF_ITS_LANES = ("num_envs", "venv", "returns", "old_reward", "old_obs", *VEC_ENV_ATTRIBUTES_PER_LANE)


class _VecNormalizePart(VecNormalize):
    """
    Part of a VecNormalize. It uses the original's settings and running statistics, which one part updates at a time.

    After each step, it copies what a VecNormalize keeps for each lane to the original, since callbacks may read that.
    """

    venv: _HeldStep
    whole: VecNormalize
    lanes: range
    statistics_lock: threading.Lock

    def step_wait(self) -> VecEnvStepReturn:
        # Without the lock, so that the environments of several parts can step at the same time
        self.venv.take_step()
        with self.statistics_lock:
            # Callbacks may have changed its settings
            self.__dict__.update((n, value) for n, value in vars(self.whole).items() if n not in OF_ITS_LANES)
            result = super().step_wait()
            self._give_back()
        return result

    def _give_back(self) -> None:
        whole, lanes = self.whole, slice(self.lanes.start, self.lanes.stop)
        whole.returns[lanes] = self.returns
        whole.old_reward[lanes] = self.old_reward
        store_rows(whole.old_obs, lanes, self.old_obs)


@split_vec_env.register
def _(env: VecNormalize, groups: Sequence[range]) -> list[VecEnv]:
    env.old_reward = np.zeros(env.num_envs) if len(env.old_reward) != env.num_envs else env.old_reward.astype(float)
    # Copied, since the first observations may be a buffer of the wrapped VecEnv
    first_observations: Any = getattr(env, "old_obs", create_empty_array(env.observation_space, env.num_envs))
    env.old_obs = promote_dtypes(deepcopy(first_observations), env.venv.observation_space)
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
    """Copy a wrapper around each part of the VecEnv that it wraps; ``per_lane``: see :func:`take_lanes`."""
    parts = []
    for venv, lanes in zip(split_vec_env(env.venv, groups), groups, strict=True):
        part = take_lanes(env, lanes, *per_lane)
        part.venv = venv
        parts.append(part)
    return parts


def take_lanes(env: AnyVecEnv, lanes: range, *per_lane: str) -> AnyVecEnv:
    """
    :param env: a VecEnv with its wrappers
    :param lanes: some of its lanes
    :param per_lane: names of the attributes that are lists or arrays with an element for each lane
    :return: a copy with these lanes only
    """
    # copy.copy would not work: VecEnvWrapper.__getattr__ recurses infinitely on an object without attributes
    part = type(env).__new__(type(env))
    part.__dict__.update(env.__dict__)
    part.num_envs = len(lanes)
    for name in (*VEC_ENV_ATTRIBUTES_PER_LANE, *per_lane):
        if name in env.__dict__:
            setattr(part, name, copy(getattr(env, name)[lanes.start : lanes.stop]))
    return part


def take_stack(whole: StackedObservations, lanes: range) -> StackedObservations:
    """
    :param whole: the stacked observations of all lanes
    :param lanes: some of these
    :return: a copy with these lanes only
    """
    part = copy(whole)
    if hasattr(whole, "sub_stacked_observations"):
        part.sub_stacked_observations = {
            key: take_stack(stack, lanes) for key, stack in whole.sub_stacked_observations.items()
        }
    else:
        part.stacked_obs = whole.stacked_obs[lanes.start : lanes.stop].copy()
        accelerate(part)
    return part


def _give_back_stack(whole: StackedObservations, part: StackedObservations, lanes: range) -> None:
    if hasattr(whole, "sub_stacked_observations"):
        for key, stack in whole.sub_stacked_observations.items():
            _give_back_stack(stack, part.sub_stacked_observations[key], lanes)
    else:
        whole.stacked_obs[lanes.start : lanes.stop] = part.stacked_obs


def _returns(env: gym.Env) -> Callable[[], gym.Env]:
    return lambda: env
