"""
Steps per second on environments whose steps take uneven times, ours and A2C's in turns.

``python -m benchmarks.slow_envs``. The lanes of a ``SubprocVecEnv`` play CartPole and sleep in each step: 6 ms in the
median, log-normally distributed, and 0.5 s in one step of 300. The ideal is what the lanes could do if nobody ever
waited: their number divided by the mean time of a step, measured in the same run. ``--hang`` lets one lane hang for 30
seconds, and counts what the others do before and meanwhile.
"""

import argparse
import statistics
import time
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3 import A2C
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv

from sb3_async1step.registry import ALGORITHMS

CONTENDERS: dict[str, Any] = {
    **{name: entry.model_class for name, entry in ALGORITHMS.items()},
    "a2c": A2C,
}
SECONDS_OF_HANG = 30.0


class UnevenEnv(gym.Wrapper):
    """
    An env whose steps take uneven times.

    :param env: the env
    """

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        self.rng = np.random.default_rng()
        self.n_steps, self.seconds, self.hang = 0, 0.0, 0.0

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """
        :param action: the action
        :return: what the env returns
        """
        begin = time.perf_counter()
        pause = 0.5 if self.rng.random() < 1 / 300 else 0.006 * np.exp(0.6 * self.rng.standard_normal())
        hang, self.hang = self.hang, 0.0
        time.sleep(pause + hang)
        result = super().step(action)
        self.n_steps += 1
        self.seconds += time.perf_counter() - begin
        return result


@dataclass
class Speed:
    """
    :param steps_per_second: of all lanes
    :param ideal: the same if no lane ever waited
    :param cpu_microseconds: of the program, without the envs' processes, for each step
    """

    steps_per_second: float
    ideal: float
    cpu_microseconds: float


def make_lanes(n_lanes: int) -> VecEnv:
    """
    :param n_lanes: number of lanes
    :return: uneven envs in processes of their own
    """
    return make_vec_env(
        lambda: UnevenEnv(gym.make("CartPole-v1")),
        n_envs=n_lanes,
        vec_env_cls=SubprocVecEnv,
        # Without importing everything in each process
        vec_env_kwargs={"start_method": "fork"},
    )


def learn(model: BaseAlgorithm, seconds: float) -> None:
    """
    :param model: learns
    :param seconds: for so long
    """
    end = time.perf_counter() + seconds
    model.learn(10**9, callback=lambda *_: time.perf_counter() < end, reset_num_timesteps=False)


def measure(model_class: Any, n_lanes: int, seconds: float) -> Speed:
    """
    :param model_class: class of the algorithm, with its default settings
    :param n_lanes: number of lanes
    :param seconds: duration of the training
    :return: its speed
    """
    env = make_lanes(n_lanes)
    model = model_class("MlpPolicy", env)
    learn(model, 1.0)
    n_steps, begin, cpu = model.num_timesteps, time.perf_counter(), time.process_time()
    learn(model, seconds)
    n_steps, duration, cpu = model.num_timesteps - n_steps, time.perf_counter() - begin, time.process_time() - cpu
    mean_step = sum(env.get_attr("seconds")) / sum(env.get_attr("n_steps"))
    env.close()
    return Speed(n_steps / duration, n_lanes / mean_step, cpu / n_steps * 1e6)


def compare(names: list[str], n_lanes: int, seconds: float, repeats: int) -> None:
    """
    :param names: of the contenders, which take turns
    :param n_lanes: number of lanes
    :param seconds: duration of each measurement
    :param repeats: number of turns
    """
    speeds: dict[str, list[Speed]] = {name: [] for name in names}
    for _ in range(repeats):
        for name in names:
            speeds[name].append(measure(CONTENDERS[name], n_lanes, seconds))
    print(f"\n| {n_lanes} lanes | steps/s | of the ideal | x {names[-1]} | CPU µs per step |\n|---|---|---|---|---|")
    last = statistics.median(speed.steps_per_second for speed in speeds[names[-1]])
    for name, measured in speeds.items():
        rates = [speed.steps_per_second for speed in measured]
        share = statistics.median(speed.steps_per_second / speed.ideal for speed in measured)
        cpu = statistics.median(speed.cpu_microseconds for speed in measured)
        median = statistics.median(rates)
        spread = f"({min(rates):.0f} to {max(rates):.0f})"
        print(f"| {name} | {median:.0f} {spread} | {share:.0%} | {median / last:.2f} | {cpu:.0f} |", flush=True)


def measure_hang(name: str, n_lanes: int) -> None:
    """
    Print how many steps the other lanes make while one hangs, beside as long before.

    :param name: of the contender
    :param n_lanes: number of lanes
    """
    env = make_lanes(n_lanes)
    model = CONTENDERS[name]("MlpPolicy", env)
    learn(model, SECONDS_OF_HANG)
    before = env.get_attr("n_steps")
    env.set_attr("hang", SECONDS_OF_HANG + 1.0, indices=0)
    start, n_timesteps, begin = sum(before[1:]), model.num_timesteps, time.perf_counter()
    learn(model, SECONDS_OF_HANG)
    # What the lanes still had in hand at the end does not count
    done, duration = model.num_timesteps - n_timesteps, time.perf_counter() - begin
    env.close()
    usual = start / SECONDS_OF_HANG
    print(
        f"{name}, {n_lanes} lanes, one of which hangs: the others made {done / SECONDS_OF_HANG:.0f} steps/s meanwhile, "
        f"{usual:.0f} before ({done / start:.1%}); learn() took {duration:.1f} s"
    )


def main() -> None:
    """Print the speeds, and what a lane that hangs costs the others."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algos", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), help="the last is 1.00")
    parser.add_argument("--lanes", nargs="+", type=int, default=[16, 64])
    parser.add_argument("--seconds", type=float, default=10.0, help="duration of each measurement")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--hang", action="store_true", help="let a lane hang instead")
    arguments = parser.parse_args()
    for n_lanes in arguments.lanes:
        if arguments.hang:
            for name in arguments.algos:
                measure_hang(name, n_lanes)
        else:
            compare(arguments.algos, n_lanes, arguments.seconds, arguments.repeats)


if __name__ == "__main__":
    main()
