"""Small environments that tests drive the algorithms with."""

import threading
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv

from tests.helpers import DEADLINE


class RandomWalkEnv(gym.Env):
    """
    Observations and rewards depend on the actions taken; episodes terminate at random or are truncated.

    :param max_steps: steps until truncation
    :param p_terminate: probability of termination in each step
    """

    action_space = spaces.Discrete(3)
    observation_space = spaces.Box(-1.0, 1.0, (4,), dtype=np.float32)

    def __init__(self, max_steps: int = 11, p_terminate: float = 0.05) -> None:
        self.max_steps = max_steps
        self.p_terminate = p_terminate
        self.tape: list[Any] = []

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.state = self.np_random.uniform(-1, 1, size=4)
        self.n_steps = 0
        self.tape.append("reset")
        return self.state.astype(np.float32), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.tape.append(int(action))
        push = np.zeros(4)
        push[int(action)] = 0.5
        self.state = np.tanh(np.roll(self.state, 1) + push + 0.1 * self.np_random.standard_normal(4))
        self.n_steps += 1
        terminated = bool(self.np_random.random() < self.p_terminate)
        truncated = self.n_steps >= self.max_steps
        return self.state.astype(np.float32), float(self.state.sum()), terminated, truncated, {}


class BlockingEnv(RandomWalkEnv):
    """
    An env that hangs in its third step, or in the reset after it, until it is released.

    :param release: set it to let the env go on
    :param where: ``"step"`` or ``"reset"``
    """

    def __init__(self, release: threading.Event, where: str) -> None:
        super().__init__(max_steps=3, p_terminate=0.0)
        self.release = release
        self.where = where
        self.n_resets = 0
        self.hangs = threading.Event()

    def _hang(self) -> None:
        self.hangs.set()
        assert self.release.wait(DEADLINE)

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict]:
        self.n_resets += 1
        if self.where == "reset" and self.n_resets > 1:
            self._hang()
        return super().reset(**kwargs)

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        if self.where == "step" and self.n_steps == 2:
            self._hang()
        return super().step(action)


class Speechless(Exception):
    """An exception that has no text."""

    def __str__(self) -> str:
        raise TypeError("no text")


class RaisingEnv(RandomWalkEnv):
    """
    An env that raises in some step.

    :param at_step: number of the step, over all episodes
    """

    def __init__(self, at_step: int) -> None:
        super().__init__()
        self.at_step = at_step
        self.n_steps_in_all = 0

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.n_steps_in_all += 1
        if self.n_steps_in_all == self.at_step:
            raise ZeroDivisionError("the env is broken")
        return super().step(action)


def make_env(n_envs: int, env_class: Callable[..., gym.Env] = RandomWalkEnv, **kwargs: Any) -> DummyVecEnv:
    """
    :param n_envs: number of env lanes
    :param env_class: class of the envs
    :param kwargs: parameters of the envs
    :return: a DummyVecEnv of monitored envs
    """
    return DummyVecEnv([lambda: Monitor(env_class(**kwargs)) for _ in range(n_envs)])


class BoxWalkEnv(RandomWalkEnv):
    """A random walk whose actions are continuous."""

    action_space = spaces.Box(-1.0, 1.0, (2,), dtype=np.float32)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        _, reward, *rest = super().step(0)
        self.tape[-1] = action.tolist()
        self.state[:2] = np.tanh(self.state[:2] + 0.5 * action)
        return self.state.astype(np.float32), reward - float(np.square(action).sum()), *rest
