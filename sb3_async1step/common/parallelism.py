"""How many workers pay off, and how many of PyTorch's intra-op threads each of them gets."""

import os
from collections.abc import Callable
from typing import Any

import torch as th
from torch import nn

from sb3_async1step.workers.gate import Call, Calls

#: With fewer multiplications for each observation, several workers would only wait for Python's interpreter lock: on
#: CartPole and MinAtar (0.07 and 0.2 million) one is fastest, on Atari (3 million and more) as many as there are cores
SMALL_NETWORK = 1_000_000
#: A batch with fewer multiplications is done before intra-op threads have shared the work: with 64 lanes, CartPole has
#: 4 million and MinAtar 13 million
SMALL_BATCH = 8_000_000

# Several models may learn at the same time. The number of threads to restore is the one before the first of them began
_trainings = Calls()
_original = 1


def count_usable_cores() -> int:
    """
    :return: number of cores that this process may use
    """
    # Only Linux has sched_getaffinity
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def count_multiplications(network: nn.Module, forward: Callable[[], Any]) -> int:
    """
    :param network: a network in evaluation mode
    :param forward: makes one forward pass with one observation
    :return: multiplications in the network's linear layers and convolutions
    """
    n_multiplications = 0

    def count(module: nn.Module, inputs: Any, output: th.Tensor) -> None:
        nonlocal n_multiplications
        # Each weight is used once for each output of its filter or unit
        weight = module.weight
        assert isinstance(weight, th.Tensor)
        n_multiplications += weight.numel() * output.numel() // max(weight.shape[0], 1)

    layers = [m for m in network.modules() if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    try:
        with th.no_grad():
            forward()
    finally:
        for hook in hooks:
            hook.remove()
    return n_multiplications


def set_intra_op_threads(n_workers: int, n_multiplications: int, n_lanes: int, training: Call) -> None:
    """
    Give each worker an equal share of PyTorch's intra-op threads, but at least one; only one if it has little to
    compute.

    :param n_workers: number of workers that compute at the same time
    :param n_multiplications: of their network for each observation
    :param n_lanes: number of observations in a worker's batch
    :param training: the call of ``learn()``, until whose end they have it
    """
    global _original
    if not _trainings:
        _original = th.get_num_threads()
    _trainings.forget_ended()
    _trainings.add(training)
    is_little = n_multiplications < SMALL_NETWORK and n_multiplications * n_lanes < SMALL_BATCH
    # The number is set for the calling thread, and inherited by the threads that it starts
    th.set_num_threads(1 if is_little else max(1, _original // n_workers))


def restore_intra_op_threads(training: Call) -> None:
    """
    :param training: what :func:`set_intra_op_threads` was given
    """
    if training in _trainings:
        th.set_num_threads(_original)
        _trainings.discard(training)
