"""How many workers pay off, and how many of PyTorch's intra-op threads each of them gets."""

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch as th
from stable_baselines3.common.vec_env import VecEnv
from torch import nn

from sb3_async1step.common.warn import warn_the_caller
from sb3_async1step.parameter_checks import check, is_whole
from sb3_async1step.vec_envs.split import find_unsplittable
from sb3_async1step.workers.actor_learner import ActorLearner
from sb3_async1step.workers.cores import count_usable_cores
from sb3_async1step.workers.gate import Call, Calls

#: With fewer multiplications for each observation, several workers would only wait for Python's interpreter lock: on
#: CartPole and MinAtar (0.07 and 0.2 million) one is fastest, on Atari (3 million and more) as many as there are cores
SMALL_NETWORK = 1_000_000
#: A batch with fewer multiplications is done before intra-op threads have shared the work: with 64 lanes, CartPole has
#: 4 million and MinAtar 13 million
SMALL_BATCH = 8_000_000

# Several models may learn at the same time. The number of threads to share is the one before the first of them began
_trainings = Calls()
_original = 1
# Numbers of threads to restore at the ends of these trainings
_before: WeakKeyDictionary[Call, int] = WeakKeyDictionary()


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


def check_n_workers(n_workers: int | str, env: VecEnv | None) -> None:
    """
    :param n_workers: number of workers, or "auto"
    :param env: the training env, None if it comes later
    :raises ValueError: if it is neither "auto" nor a whole number of at least 1, or if there are fewer lanes
    :raises TypeError: if the env can't be split among several workers
    """
    is_valid = n_workers == "auto" or (is_whole(n_workers) and int(n_workers) >= 1)
    allowed = '"auto" or from 1 to the number of env lanes'
    check("n_workers", n_workers, is_valid, allowed)
    if env is None or n_workers == "auto":
        return
    check("n_workers", n_workers, int(n_workers) <= env.num_envs, f"{allowed} ({env.num_envs})")
    unsplittable = find_unsplittable(env)
    if unsplittable is not None and int(n_workers) > 1:
        raise TypeError(
            f"{unsplittable.__name__} can't be split among n_workers={n_workers}: use n_workers=1, "
            "or register the class with sb3_async1step.split_vec_env.register."
        )


def count_workers(n_workers: int | str, env: VecEnv, n_multiplications: int) -> int:
    """
    :param n_workers: number of workers, or "auto"
    :param env: the training env
    :param n_multiplications: of the network for each observation
    :return: number of workers for this env
    :raises ValueError: if it is neither "auto" nor a whole number of at least 1
    :raises TypeError: if the env can't be split among them
    """
    # It may have been set after the construction
    check_n_workers(n_workers, None)
    if n_workers != "auto":
        if int(n_workers) > env.num_envs:
            # The model was loaded with another env than it was made for
            warn_the_caller(f"n_workers={n_workers}, but there are only {env.num_envs} env lanes to share.")
        n_workers = min(int(n_workers), env.num_envs)
        check_n_workers(n_workers, env)
        return n_workers
    n_workers = 1 if n_multiplications < SMALL_NETWORK else min(count_usable_cores(), env.num_envs)
    unsplittable = find_unsplittable(env)
    if n_workers == 1 or unsplittable is None:
        return n_workers
    warn_the_caller(
        f"{unsplittable.__name__} can't be split among several workers, so there will be only one. "
        "See sb3_async1step.split_vec_env for how to register a VecEnv class."
    )
    return 1


def count_workers_of_nodes(n_workers: int | str, env: VecEnv, n_multiplications: int) -> int | None:
    """
    :param n_workers: number of workers, or "auto"
    :param env: the training env
    :param n_multiplications: of the network for each observation
    :return: number of workers of each node, None for as many as it has CPUs, whatever this machine has
    """
    if n_workers == "auto" and n_multiplications >= SMALL_NETWORK:
        return None
    return count_workers(n_workers, env, n_multiplications)


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
    # A callback of another training may have begun this one
    _before[training] = th.get_num_threads() if _trainings.is_by_this_thread() else _original
    _trainings.add(training)
    is_little = n_multiplications < SMALL_NETWORK and n_multiplications * n_lanes < SMALL_BATCH
    # The number is set for the calling thread, and inherited by the threads that it starts
    th.set_num_threads(1 if is_little else max(1, _original // n_workers))


def restore_intra_op_threads(training: Call) -> None:
    """
    Undo :func:`set_intra_op_threads`.

    :param training: what that was given
    """
    if training in _trainings:
        th.set_num_threads(_before[training])
        _trainings.discard(training)


def describe_workers(workers: Sequence[ActorLearner]) -> str:
    """
    :param workers: those of a training that begins
    :return: how many there are, and what each of them has
    """
    n_lanes = sum(worker.n_lanes for worker in workers)
    pace = "each at its own pace" if workers[0].env.is_async else "together"
    return (
        f"Learning with {len(workers)} worker(s) for {n_lanes} env lane(s), which step {pace}; "
        f"{th.get_num_threads()} intra-op thread(s) of PyTorch for each worker"
    )
