"""
Kills nodes and servers of trainings on Ray, whose two nodes are simulated on this machine: in each training of
CartPole, the process of a node, that of the server and a whole simulated machine, one at a quarter of its steps, the
next at a half and the last at three quarters, in an order that rotates from seed to seed. For each training, prints the
steps and the score that it reached.

``python -m benchmarks.node_kills --trainings 50`` goes on where it was interrupted; the results are in
``benchmarks/results/node_kills.json``.
"""

import argparse
import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.cluster_utils import Cluster
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecEnv

from benchmarks.learning import RESULTS, describe_hardware
from benchmarks.scale_out import make_cartpole, make_lanes, simulated_machines
from sb3_async1step import AsyncOneStepQ, RayVecEnv
from sb3_async1step.common.model_file import write_atomically

N_NODES, LANES_PER_NODE = 2, 8
N_EPISODES = 20
N_POINTS = 50


@dataclass
class KilledTraining:
    """
    What came of a training.

    :param command: its command
    :param date: of its end
    :param hardware: processor and number of cores
    :param seed: of the model
    :param total_timesteps: steps that it was to take
    :param num_timesteps: steps that it took
    :param seconds: duration
    :param returns: of each greedy episode of the last model
    :param kills: what was killed, and after how many steps and seconds
    :param curve_steps: steps of the learning curve
    :param curve_seconds: its seconds
    :param curve_returns: mean return of the last 100 episodes of the training
    """

    command: str
    date: str
    hardware: str
    seed: int
    total_timesteps: int
    num_timesteps: int = 0
    seconds: float = 0.0
    returns: list[float] = field(default_factory=list)
    kills: list[tuple[str, int, float]] = field(default_factory=list)
    curve_steps: list[int] = field(default_factory=list)
    curve_seconds: list[float] = field(default_factory=list)
    curve_returns: list[float] = field(default_factory=list)
    failure: str = ""

    def describe(self) -> str:
        """
        :return: one line of the report
        """
        killed = ", ".join(f"{what} at {step}" for what, step, _ in self.kills)
        return (
            f"seed {self.seed}: {killed}; {self.num_timesteps} of {self.total_timesteps} steps, {self.seconds:.0f} s, "
            f"mean return {np.mean(self.returns):.1f}" + (f", {self.failure}" if self.failure else "")
        )


class Killer(BaseCallback):
    """
    Kills, and follows the learning curve.

    :param cluster: the simulated machines
    :param env: the lanes
    :param training: what came of it, which is filled
    """

    def __init__(self, cluster: Cluster, env: RayVecEnv, training: KilledTraining) -> None:
        super().__init__()
        self._cluster, self._env, self._training = cluster, env, training
        victims: list[tuple[str, Callable[[], None]]] = [
            ("node", self._kill_node), ("server", self._kill_server), ("machine", self._kill_machine)
        ]  # fmt: skip
        first = training.seed % len(victims)
        self._due = victims[first:] + victims[:first]
        self._step = training.total_timesteps // 4

    def _on_training_start(self) -> None:
        self._start = time.monotonic()

    def _on_step(self) -> bool:
        training, seconds = self._training, time.monotonic() - self._start
        if self.num_timesteps >= training.total_timesteps * len(training.curve_steps) // N_POINTS:
            episodes = self.model.ep_info_buffer
            if episodes:
                training.curve_steps.append(self.num_timesteps)
                training.curve_seconds.append(seconds)
                training.curve_returns.append(float(np.mean([episode["r"] for episode in episodes])))
        if self._due and self.num_timesteps >= self._step * (len(training.kills) + 1):
            name, kill = self._due.pop(0)
            kill()
            training.kills.append((name, self.num_timesteps, seconds))
        return True

    def _kill_node(self) -> None:
        os.kill(get_process_id(self._env.nodes[0].actor), signal.SIGKILL)

    def _kill_server(self) -> None:
        os.kill(get_process_id(self._env.server), signal.SIGKILL)

    def _kill_machine(self) -> None:
        self._cluster.remove_node(next(iter(self._cluster.worker_nodes)), allow_graceful=False)
        self._cluster.add_node(num_cpus=1)


def get_process_id(actor: Any) -> int:
    """
    :param actor: of Ray
    :return: id of its process
    """
    return ray.get(actor.__ray_call__.remote(lambda self: os.getpid()))


def train(seed: int, n_steps: int) -> KilledTraining:
    """
    :param seed: of the model
    :param n_steps: steps of the training
    :return: what came of it
    """
    command = f"python -m benchmarks.node_kills --steps {n_steps}"
    training = KilledTraining(command, date.today().isoformat(), describe_hardware(), seed, n_steps)
    with simulated_machines(N_NODES) as cluster:
        env = make_lanes(make_cartpole, N_NODES, LANES_PER_NODE, node_timeout=120.0)
        model, start = AsyncOneStepQ("MlpPolicy", env, seed=seed), time.monotonic()
        try:
            model.learn(n_steps, Killer(cluster, env, training), log_interval=None)
        except Exception as exception:
            # A result, too
            training.failure = f"{type(exception).__name__}: {exception}"
        training.seconds = time.monotonic() - start
        training.num_timesteps = model.num_timesteps
        env.close()
    lanes: VecEnv = make_vec_env("CartPole-v1", 4, seed=seed)
    returns: Any = evaluate_policy(model, lanes, N_EPISODES, return_episode_rewards=True)[0]
    training.returns = [float(value) for value in returns]
    return training


def read_trainings(path: Path) -> list[KilledTraining]:
    """
    :param path: of the results
    :return: those that there are
    """
    return [KilledTraining(**training) for training in json.loads(path.read_text())] if path.exists() else []


def main() -> None:
    """Train, and write what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainings", type=int, default=50)
    parser.add_argument("--steps", type=int, default=200_000, help="of all nodes, in each training")
    parser.add_argument("--results", type=Path, default=RESULTS / "node_kills.json")
    options = parser.parse_args()
    trainings = read_trainings(options.results)
    for training in trainings:
        print(training.describe())
    done = {training.seed for training in trainings if training.total_timesteps == options.steps}
    for seed in sorted(set(range(options.trainings)) - done):
        trainings.append(train(seed, options.steps))
        print(trainings[-1].describe(), flush=True)
        results = json.dumps([asdict(training) for training in trainings], indent=0)
        write_atomically(options.results, results.encode())


if __name__ == "__main__":
    main()
