"""What a machine's cores need for an agent step on Atari if they do nothing else, and what they could do at best."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch as th
from ale_py.vector_env import AtariVectorEnv

from sb3_async1step import AsyncOneStepQ
from sb3_async1step.common.heap import keep_freed_memory
from sb3_async1step.common.parallelism import count_multiplications
from sb3_async1step.workers.cores import count_usable_cores

IMAGES = (4, 84, 84)
#: Side of the square matrices whose product shows how fast a core computes
N_ROWS = 2048


def time_call(function: Callable[[], Any], repeats: int = 30) -> float:
    """
    :param function: function to be timed, which is warmed up first
    :param repeats: number of measurements
    :return: median of the seconds that a call takes
    """
    times = []
    for i in range(repeats + 5):
        start = time.perf_counter()
        function()
        if i >= 5:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def on_one_core(measure: Callable[[], Any]) -> Any:
    """
    :param measure: measures something
    :return: what it returns when PyTorch computes in a single thread
    """
    n_threads = th.get_num_threads()
    th.set_num_threads(1)
    try:
        return measure()
    finally:
        th.set_num_threads(n_threads)


def time_emulation(n_lanes: int) -> float:
    """
    :param n_lanes: number of games that the engine emulates, one after another
    :return: seconds for each agent step
    """
    engine = AtariVectorEnv("pong", n_lanes, num_threads=1, stack_num=1)
    engine.reset(seed=0)
    actions = np.zeros(n_lanes, dtype=np.int64)
    return time_call(lambda: engine.step(actions)) / n_lanes


def measure_floor(model: AsyncOneStepQ) -> dict[str, float]:
    """
    Measure the work that cannot be avoided, done by one core with nothing around it: emulation in the engine, and the
    arithmetic of the same networks at the batch sizes of a single worker.

    :param model: with as many lanes as a worker has
    :return: microseconds of each part of an agent step
    """
    keep_freed_memory()
    n_lanes = model.n_envs
    n_rollout = n_lanes * model.update_interval
    # As RolloutBuffer stores them
    images = th.randint(0, 255, (n_rollout, *IMAGES), dtype=th.uint8).contiguous(memory_format=th.channels_last)
    optimizer = model.policy.optimizer

    def act() -> None:
        with th.no_grad():
            model.q_net(images[:n_lanes])

    def compute_targets() -> None:
        with th.no_grad():
            model.q_net_target(images)

    def learn() -> None:
        model.q_net(images).square().mean().backward()
        th.nn.utils.clip_grad_norm_(model.q_net.parameters(), model.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    parts = on_one_core(
        lambda: {
            "emulation": time_emulation(n_lanes),
            "acting": time_call(act) / n_lanes,
            "targets": time_call(compute_targets) / n_rollout,
            "gradient and update": time_call(learn) / n_rollout,
        }
    )
    return {name: 1e6 * seconds for name, seconds in parts.items()}


def measure_limit(model: AsyncOneStepQ, mixed_precision: bool) -> float:
    """
    Measure what this machine could do at best: the emulation of a core that does nothing else, and the multiplications
    and additions of the network at the speed at which a core multiplies large matrices.

    :param model: learns to play an Atari game
    :param mixed_precision: whether its CNN computes in bfloat16
    :return: agent steps per second of all cores
    """
    images = th.zeros(1, *IMAGES, dtype=th.uint8)
    model.policy.set_training_mode(False)
    n_multiplications = count_multiplications(model.q_net, lambda: model.q_net(images))
    first = next(layer for layer in model.q_net.modules() if isinstance(layer, th.nn.Conv2d))
    n_of_first = count_multiplications(first, lambda: model.q_net(images))
    # Targets, the forward pass of the gradient and two of the backward pass; with update_interval=1, the first of the
    # gradient's is the one that chooses the actions. Images need no gradient: the first layer has one pass less
    n_passes = 4 if model.update_interval == 1 else 5
    n_operations = 2 * (n_passes * n_multiplications - n_of_first)
    matrix = th.ones(N_ROWS, N_ROWS, dtype=th.bfloat16 if mixed_precision else th.float32)
    seconds_per_operation = on_one_core(lambda: time_call(lambda: matrix @ matrix)) / (2 * N_ROWS**3)
    return count_usable_cores() / (time_emulation(8) + n_operations * seconds_per_operation)
