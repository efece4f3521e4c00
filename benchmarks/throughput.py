"""
Agent steps per second while learning on Pong with the Nature CNN: SB3's DQN and A2C, and ours.

``make bench``, or ``python -m benchmarks.throughput``. The contenders take turns within each repeat, so
that a slow phase of the machine hits all of them; what counts are the medians and their ratios.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date

import ale_py
import gymnasium as gym
import torch as th
from stable_baselines3 import A2C, DQN
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.vec_env import VecEnv, VecFrameStack

from sb3_async1step import AsyncOneStepQ, AsyncOneStepSarsa
from sb3_async1step.common.intra_op_threads import count_usable_cores

ENV_ID = "PongNoFrameskip-v4"


def make_env(n_envs: int) -> VecEnv:
    """
    :param n_envs: number of envs
    :return: Pong as SB3's users make it: ``AtariWrapper``, four stacked frames
    """
    gym.register_envs(ale_py)
    return VecFrameStack(make_atari_env(ENV_ID, n_envs=n_envs, seed=0), n_stack=4)


def make_dqn() -> BaseAlgorithm:
    """
    :return: DQN with its defaults, learning from the start; the buffer is smaller, to fit any machine
    """
    return DQN("CnnPolicy", make_env(1), buffer_size=10_000, seed=0)


CONTENDERS: dict[str, Callable[[], BaseAlgorithm]] = {
    "DQN, 1 env": make_dqn,
    "A2C, 16 envs": lambda: A2C("CnnPolicy", make_env(16), seed=0),
    "AsyncOneStepQ, 16 lanes": lambda: AsyncOneStepQ("CnnPolicy", make_env(16), seed=0),
    "AsyncOneStepSarsa, 16 lanes": lambda: AsyncOneStepSarsa("CnnPolicy", make_env(16), seed=0),
}


def measure(model: BaseAlgorithm, seconds: float) -> float:
    """
    :param model: learns on; warmed up already
    :param seconds: how long, about
    :return: environment steps per second
    """
    before, start = model.num_timesteps, time.perf_counter()
    model.learn(
        10**9,
        callback=lambda locals_, globals_: time.perf_counter() - start < seconds,
        reset_num_timesteps=False,
        log_interval=None,  # type: ignore[arg-type]
    )
    return (model.num_timesteps - before) / (time.perf_counter() - start)


def main() -> None:
    """Print a table of medians and of their ratios to DQN."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each contender")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of a measurement")
    arguments = parser.parse_args()

    models = {name: make() for name, make in CONTENDERS.items()}
    for model in models.values():
        # DQN's defaults start to learn after 100 steps
        model.learn(320)
    speeds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(arguments.repeats):
        for name, model in models.items():
            speeds[name].append(measure(model, arguments.seconds))

    cores = count_usable_cores()
    print(f"{ENV_ID}, AtariWrapper, Nature CNN, learning; {arguments.repeats} x {arguments.seconds:g} s each")
    print(f"{date.today()}, {platform.machine()}, {cores} cores, torch {th.__version__}\n")
    print(f"{'':28} {'steps/s':>8} {'min':>6} {'max':>6} {'x DQN':>6}")
    reference = statistics.median(speeds["DQN, 1 env"])
    for name, values in speeds.items():
        median = statistics.median(values)
        print(f"{name:28} {median:8.0f} {min(values):6.0f} {max(values):6.0f} {median / reference:6.1f}")


if __name__ == "__main__":
    main()
