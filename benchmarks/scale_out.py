"""
Training on Ray with 1, 2 and 4 nodes, which are simulated on this machine: a cluster has a machine of one logical CPU
for each of them.

``python -m benchmarks.scale_out throughput`` counts steps per second on CartPole whose steps sleep: 10 ms on average,
log-normally distributed; the lanes of a node step together, so that a step takes as long as the slowest of 16.
``learning`` prints the mean return of greedy episodes after the same number of steps of all nodes, which share the same
number of lanes; ``--nodes 0`` is a training without Ray. ``traffic`` prints bytes per second of the paper's Atari
network for several numbers of steps between exchanges. ``server`` lets clients exchange parameters of that size without
a break.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import gymnasium as gym
import numpy as np
import ray
from ray.cluster_utils import Cluster
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import FakeImageEnv
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvStepReturn

from sb3_async1step import AsyncOneStepQ, NipsCNN, RayVecEnv
from sb3_async1step.nodes.messages import Learned, Push, Report, ServerState
from sb3_async1step.nodes.parameters import read_values
from sb3_async1step.nodes.server import ParameterServer
from sb3_async1step.nodes.settings import ExchangeSettings
from sb3_async1step.registry import ALGORITHMS

LANES_PER_NODE = 16
MEAN_PAUSE = 0.01
SPREAD = 0.6


class SleepingLanes(DummyVecEnv):
    """
    Lanes whose steps sleep at the same time, as if each had a core of its own: a vector step takes as long as the
    slowest of them. Processes for 64 lanes would need more cores than this machine has.

    :param env_fns: functions that make the envs
    """

    def __init__(self, env_fns: list[Callable[[], gym.Env]]) -> None:
        super().__init__(env_fns)
        self.rng = np.random.default_rng()

    def step_wait(self) -> VecEnvStepReturn:
        """
        :return: what the envs return
        """
        # The mean of exp(SPREAD * a normal number) is exp(SPREAD ** 2 / 2)
        pauses = MEAN_PAUSE * np.exp(SPREAD * self.rng.standard_normal(self.num_envs) - SPREAD**2 / 2)
        time.sleep(float(pauses.max()))
        return super().step_wait()


def make_cartpole() -> gym.Env:
    """
    :return: CartPole
    """
    return gym.make("CartPole-v1")


def make_images() -> gym.Env:
    """
    :return: noise in the size of four stacked Atari frames
    """
    return FakeImageEnv(action_dim=6, screen_height=84, screen_width=84, n_channels=4, channel_first=True)


@contextmanager
def simulated_machines(n_machines: int) -> Iterator[Cluster]:
    """
    Inside the ``with`` block, Ray has so many machines of one CPU, and the one of this program without any.

    :param n_machines: number of simulated machines
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(n_machines):
            cluster.add_node(num_cpus=1)
        ray.init(address=cluster.address, log_to_driver=False)
        cluster.wait_for_nodes()
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def make_lanes(
    make: Callable[[], gym.Env], n_nodes: int, lanes_per_node: int = LANES_PER_NODE, **settings: Any
) -> RayVecEnv:
    """
    :param make: makes an env
    :param n_nodes: number of nodes
    :param lanes_per_node: number of lanes of each
    :param settings: further arguments of ``RayVecEnv``
    :return: the lanes
    """
    kwargs = {"lanes_per_node": lanes_per_node, **settings}
    vec_env_cls: Any = RayVecEnv
    lanes: Any = make_vec_env(make, n_nodes * lanes_per_node, vec_env_cls=vec_env_cls, vec_env_kwargs=kwargs)
    return lanes


class Clock(BaseCallback):
    """
    Ends a training after some seconds, and counts the steps that were reported after the first ones.

    :param warm_up: seconds that do not count
    :param seconds: seconds that do
    """

    def __init__(self, warm_up: float, seconds: float) -> None:
        super().__init__()
        self._warm_up, self._seconds = warm_up, seconds
        self._begin: tuple[float, int] | None = None
        self.steps_per_second = 0.0

    def _on_training_start(self) -> None:
        self._start = time.monotonic()

    def _on_step(self) -> bool:
        now = time.monotonic()
        if now - self._start < self._warm_up:
            return True
        if self._begin is None:
            self._begin = now, self.num_timesteps
            return True
        then, n_steps = self._begin
        self.steps_per_second = (self.num_timesteps - n_steps) / max(now - then, 1e-9)
        return now - then < self._seconds


def measure_throughput(numbers: list[int], seconds: float, repeats: int, sync_interval: int | None) -> None:
    """
    :param numbers: of nodes
    :param seconds: duration of each measurement
    :param repeats: measurements of each number
    :param sync_interval: steps of a node between two exchanges
    """
    first = 0.0
    print("| nodes (simulated) | steps/s | x |\n|---|---|---|")
    for n_nodes in numbers:
        with simulated_machines(n_nodes):
            env = make_lanes(make_cartpole, n_nodes, vec_env_cls=SleepingLanes, sync_interval=sync_interval)
            rates = []
            for _ in range(repeats):
                clock = Clock(5.0, seconds)
                AsyncOneStepQ("MlpPolicy", env).learn(10**9, clock, log_interval=None)
                rates.append(clock.steps_per_second)
            env.close()
        median = statistics.median(rates)
        first = first or median
        print(f"| {n_nodes} | {median:.0f} ({min(rates):.0f} to {max(rates):.0f}) | {median / first:.2f} |", flush=True)


def compare_learning(
    numbers: list[int], algo: str, env_id: str, n_lanes: int, n_steps: int, n_seeds: int, **settings: Any
) -> None:
    """
    :param numbers: of nodes, 0 for a training without Ray
    :param algo: id of the algorithm
    :param env_id: id of the env
    :param n_lanes: number of lanes of all nodes
    :param n_steps: steps of all nodes
    :param n_seeds: number of trainings
    :param settings: of the exchanges
    """
    print("| nodes (simulated) | mean return of each seed | mean | seconds |\n|---|---|---|---|")
    model_class: Any = ALGORITHMS[algo].model_class
    for n_nodes in numbers:
        returns, seconds = [], []
        with simulated_machines(n_nodes) if n_nodes > 0 else nullcontext():
            env: VecEnv
            if n_nodes > 0:
                env = make_lanes(lambda: gym.make(env_id), n_nodes, n_lanes // n_nodes, **settings)
            else:
                env = make_vec_env(env_id, n_lanes)
            for seed in range(n_seeds):
                model, begin = model_class("MlpPolicy", env, seed=seed), time.monotonic()
                model.learn(n_steps, log_interval=None)
                seconds.append(time.monotonic() - begin)
                score, _ = evaluate_policy(model, make_vec_env(env_id, 4), 20)
                returns.append(float(np.mean(score)))
            env.close()
        each = ", ".join(f"{value:.1f}" for value in returns)
        mean = f"{statistics.mean(returns):.1f} ± {np.std(returns):.1f}"
        print(f"| {n_nodes or 'without Ray'} | {each} | {mean} | {statistics.median(seconds):.0f} |", flush=True)


class Traffic(BaseCallback):
    """Keeps the bytes per second of the whole training."""

    bytes_per_second = 0.0

    def _on_step(self) -> bool:
        return True

    def _on_training_end(self) -> None:
        model: Any = self.model
        pool, _ = model.get_workers()
        self.bytes_per_second = pool.take_metrics()["ray/bytes_per_second"]


def measure_traffic(intervals: list[int], n_steps: int) -> None:
    """
    :param intervals: steps of a node between two exchanges
    :param n_steps: steps of each training of one node
    """
    print("| sync_interval | steps/s | bytes/s | bytes of an exchange |\n|---|---|---|---|")
    for interval in intervals:
        with simulated_machines(1):
            env = make_lanes(make_images, 1, sync_interval=interval)
            policy_kwargs = {"features_extractor_class": NipsCNN, "net_arch": []}
            model, traffic = AsyncOneStepQ("CnnPolicy", env, policy_kwargs=policy_kwargs), Traffic()
            begin = time.monotonic()
            model.learn(n_steps, traffic, log_interval=None)
            rate = model.num_timesteps / (time.monotonic() - begin)
            n_bytes = 2 * 4 * sum(parameter.numel() for parameter in model.q_net.parameters())
            env.close()
        print(f"| {interval} | {rate:.0f} | {traffic.bytes_per_second:.0f} | {n_bytes} |", flush=True)


def exchange_without_a_break(server: Any, node: int, n_parameters: int, seconds: float) -> int:
    """
    :param server: the server's actor
    :param node: number of the node that this client pretends to be
    :param n_parameters: how many parameters it pushes and pulls
    :param seconds: for how long
    :return: number of exchanges
    """
    change, number, begin = np.zeros(n_parameters, dtype=np.float32), 0, time.monotonic()
    while time.monotonic() - begin < seconds:
        number += 1
        ray.get(server.exchange.remote(Push(node, 0, number, number, Learned(change), [], {}, Report())))
    return number


def measure_server(numbers: list[int], seconds: float) -> None:
    """
    :param numbers: of clients
    :param seconds: duration of each measurement
    """
    model = AsyncOneStepQ("CnnPolicy", make_vec_env(make_images), policy_kwargs={"net_arch": []})
    values = read_values(model.list_learned_parameters())
    print("| clients | exchanges/s | MB/s, each way |\n|---|---|---|")
    for n_clients in numbers:
        with simulated_machines(n_clients + 1):
            server: Any = ray.remote(ParameterServer).remote()
            state = ServerState(values, [], {}, [1] * n_clients, 0, 10**9, 10**9)
            ray.get(server.load.remote(state, ExchangeSettings(sync_interval=1)))
            client = ray.remote(num_cpus=1)(exchange_without_a_break)
            counts = ray.get([client.remote(server, node, len(values), seconds) for node in range(n_clients)])
        rate = sum(counts) / seconds
        print(f"| {n_clients} | {rate:.0f} | {rate * values.nbytes / 1e6:.0f} |", flush=True)


def main() -> None:
    """Run one of the benchmarks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", choices=["throughput", "learning", "traffic", "server"])
    parser.add_argument("--nodes", nargs="+", type=int, default=[1, 2, 4], help="0: learning without Ray")
    parser.add_argument("--seconds", type=float, default=15.0, help="duration of a measurement of throughput or server")
    parser.add_argument("--repeats", type=int, default=3, help="measurements or seeds")
    parser.add_argument("--algo", choices=list(ALGORITHMS), default="async_one_step_q")
    parser.add_argument("--env", default="CartPole-v1", help="of learning")
    parser.add_argument("--lanes", type=int, default=16, help="of all nodes, of learning; a multiple of --nodes")
    parser.add_argument("--steps", type=int, default=150_000, help="of all nodes, in each training")
    parser.add_argument("--sync-interval", nargs="+", type=int, default=[None], help="by default RayVecEnv's")
    parser.add_argument("--exchange", choices=["deltas", "gradients"], default="deltas", help="of learning")
    options = parser.parse_args()
    if options.benchmark != "learning" and min(options.nodes) < 1:
        parser.error(f"{options.benchmark} needs 1 node or more: only learning has --nodes 0, for comparison")
    if options.benchmark == "learning" and any(options.lanes % max(1, n_nodes) for n_nodes in options.nodes):
        parser.error(f"--lanes {options.lanes} can't be shared equally by each number of --nodes {options.nodes}")
    if options.benchmark == "throughput":
        measure_throughput(options.nodes, options.seconds, options.repeats, options.sync_interval[0])
    elif options.benchmark == "learning":
        compare_learning(
            options.nodes, options.algo, options.env, options.lanes, options.steps, options.repeats,
            exchange=options.exchange, sync_interval=options.sync_interval[0],
        )  # fmt: skip
    elif options.benchmark == "server":
        measure_server(options.nodes, options.seconds)
    else:
        measure_traffic(options.sync_interval, options.steps)


if __name__ == "__main__":
    main()
