"""
Let lanes of a HealingVecEnv fail at random moments of a training, and compare it with the same training without faults.

``python -m benchmarks.heal --faults 200``. AsyncOneStepQ learns CartPole-v1. A lane is killed, stopped, raises an
exception in a step, or hangs in one. The training has to reach its steps, and nothing may be left when its env was
closed. If it makes no step within the time limit, the program ends with the stacks of all threads.
"""

import argparse
import faulthandler
import gc
import os
import random
import signal
import time
import warnings
from collections import Counter
from dataclasses import dataclass
from multiprocessing import forkserver
from typing import Any

import gymnasium as gym
import psutil
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_async1step import AsyncOneStepQ, HealingVecEnv

#: Seconds without a step after which the training is taken for hanging
TIME_LIMIT = 120
N_LANES = 16
FAULTS = {
    "killed": signal.SIGKILL,
    "stopped": signal.SIGSTOP,
    "exception": signal.SIGUSR1,
    "hang": signal.SIGUSR2,
}


class FailingOnDemand(gym.Wrapper):
    """
    An env whose next step fails once its process was told so by a signal.

    :param env: the env
    """

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        self.fault: int | None = None
        for name in ("exception", "hang"):
            signal.signal(FAULTS[name], self._note)

    def _note(self, signal_number: int, frame: Any) -> None:
        self.fault = signal_number

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """
        :param action: the action
        :return: what the env returns
        :raises RuntimeError: on demand
        """
        if self.fault == FAULTS["exception"]:
            raise RuntimeError("an exception on demand")
        if self.fault == FAULTS["hang"]:
            time.sleep(10**6)
        return self.env.step(action)


class FaultInjector:
    """
    A callback that lets lanes fail.

    :param env: the training env
    :param n_faults: number of faults
    :param n_steps: number of steps of the training; the last tenth is without faults
    :param rng: draws lanes, kinds of faults and moments
    """

    def __init__(self, env: HealingVecEnv, n_faults: int, n_steps: int, rng: random.Random) -> None:
        self.faults: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self._env = env
        self._rng = rng
        #: Longest time between two batches of transitions, in seconds
        self.longest_pause = 0.0
        self._last_call = time.monotonic()
        self._due = sorted(rng.uniform(0.0, 0.9 * n_steps) for _ in range(n_faults))
        self._n_faults_of_lane = [0] * env.num_envs

    def __call__(self, locals_: dict[str, Any], globals_: dict[str, Any]) -> bool:
        """
        :param locals_: local variables of the training
        :param globals_: not used
        :return: True, so that the training goes on
        """
        faulthandler.dump_traceback_later(TIME_LIMIT, exit=True)
        now = time.monotonic()
        self.longest_pause = max(self.longest_pause, now - self._last_call)
        self._last_call = now
        self.reasons.update(info["lane_restart"] for info in locals_["infos"] if "lane_restart" in info)
        if self._due and self._due[0] <= locals_["self"].num_timesteps:
            self._inject()
        return True

    def _inject(self) -> None:
        # The others have not been restarted since their last fault
        lanes = [n for n, lane in enumerate(self._env.remotes) if lane.has_stepped]
        lanes = [n for n in lanes if self._env.remotes[n].n_restarts >= self._n_faults_of_lane[n]]
        if lanes:
            lane, kind = self._rng.choice(lanes), self._rng.choice(list(FAULTS))
            os.kill(self._env.remotes[lane].process.process.pid, FAULTS[kind])
            self._n_faults_of_lane[lane] += 1
            self.faults[kind] += 1
            self._due.pop(0)


@dataclass
class Outcome:
    """
    What came of a training.

    :param model: the trained model
    :param injector: what it has seen
    :param n_restarts: number of restarts of all lanes
    :param seconds: duration
    """

    model: AsyncOneStepQ
    injector: FaultInjector
    n_restarts: int
    seconds: float

    def describe(self) -> str:
        """
        :return: a line of the table
        """
        score, _ = evaluate_policy(self.model, make_vec_env("CartPole-v1", seed=0), n_eval_episodes=20)
        n_faults = self.injector.faults.total()
        return (
            f"{n_faults:>8} {self.n_restarts:>9} {self.model.num_timesteps:>9} {self.model._n_updates:>9} "
            f"{self.seconds:>9.1f} {self.injector.longest_pause:>14.1f} {score:>8.1f}"
        )


HEADER = f"{'faults':>8} {'restarts':>9} {'steps':>9} {'updates':>9} {'seconds':>9} {'longest pause':>14} {'score':>8}"


def train(n_faults: int, arguments: argparse.Namespace) -> Outcome:
    """
    :param n_faults: number of faults
    :param arguments: of the command line
    :return: what came of it
    """
    env = make_vec_env(
        "CartPole-v1", n_envs=N_LANES, seed=arguments.seed, wrapper_class=FailingOnDemand, vec_env_cls=HealingVecEnv,
        vec_env_kwargs={
            "start_method": arguments.start_method, "step_timeout": arguments.step_timeout, "max_restarts": 10**6
        },
    )  # fmt: skip
    assert isinstance(env, HealingVecEnv)
    injector = FaultInjector(env, n_faults, arguments.steps, random.Random(arguments.seed))
    model = AsyncOneStepQ("MlpPolicy", env, n_workers=arguments.workers, seed=arguments.seed)
    start = time.monotonic()
    model.learn(arguments.steps, callback=injector, log_interval=None)
    seconds = time.monotonic() - start
    faulthandler.cancel_dump_traceback_later()
    env.close()
    return Outcome(model, injector, env.n_restarts, seconds)


def count_leftovers() -> tuple[int, int]:
    """
    :return: numbers of processes that this one has started, and of its open file descriptors
    """
    gc.collect()
    process = psutil.Process()
    return len(process.children(recursive=True)), process.num_fds()


def main() -> None:
    """Print a table of both trainings, what happened to lanes, and what was left."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--steps", type=int, default=200_000, help="of each training")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--start-method", choices=("fork", "forkserver", "spawn"), default="forkserver")
    parser.add_argument("--step-timeout", type=float, default=2.0, help="seconds")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", "Env lane")
    # Processes of multiprocessing's own
    forkserver.ensure_running()
    before = count_leftovers()
    without, faulty = train(0, arguments), train(arguments.faults, arguments)
    print(f"\n{HEADER}\n{without.describe()}\n{faulty.describe()}")
    print("\nfaults:", dict(faulty.injector.faults))
    print("restarts in steps:", dict(faulty.injector.reasons))
    n_processes, n_handles = (after - n for after, n in zip(count_leftovers(), before, strict=True))
    print(f"left: {n_processes} processes, {n_handles} file descriptors")
    is_complete = faulty.model.num_timesteps >= arguments.steps and faulty.n_restarts >= arguments.faults
    raise SystemExit(not is_complete or n_processes > 0 or n_handles > 0)


if __name__ == "__main__":
    main()
