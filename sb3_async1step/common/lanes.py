"""The lanes of a model: making them, and choosing how many workers share them."""

import functools
from collections.abc import Sequence

import gymnasium as gym
import torch as th
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.vec_env import VecEnv

from sb3_async1step.common.parallelism import SMALL_NETWORK, count_usable_cores
from sb3_async1step.common.parameter_checks import check, is_whole
from sb3_async1step.common.warn import warn_the_caller
from sb3_async1step.vec_envs.split import find_unsplittable
from sb3_async1step.workers.actor_learner import ActorLearner

#: As many lanes as the paper had actor-learners (section 5.1)
DEFAULT_N_ENVS = 16


def make_lanes(env: GymEnv | str | None, n_envs: int | None, seed: int | None, verbose: int) -> GymEnv | None:
    """
    :param env: an env, or the id of one that is registered in Gymnasium
    :param n_envs: number of lanes, by default ``DEFAULT_N_ENVS`` of an id, and what there is of an env
    :param seed: seed of the lanes' action spaces
    :param verbose: 1 or more to print what is made
    :return: the env, or so many lanes of the one that the id names
    :raises ValueError: if ``n_envs`` is no positive whole number, or not the number of the env's lanes
    """
    check("n_envs", n_envs, n_envs is None or (is_whole(n_envs) and n_envs >= 1), "a whole number of at least 1")
    if isinstance(env, str):
        n_lanes = n_envs or DEFAULT_N_ENVS
        if verbose >= 1:
            print(f"Creating {n_lanes} environments from the given name '{env}'")
        # SB3 would make them with render_mode="rgb_array", with which some envs work even if render() is never called:
        # LunarLander-v3 simulates the engines' sparks, which takes up to 3 ms a step
        return make_vec_env(functools.partial(gym.make, env), n_envs=n_lanes, seed=seed)
    n_lanes = env.num_envs if isinstance(env, VecEnv) else 1
    if n_envs is not None and env is not None and n_envs != n_lanes:
        raise ValueError(
            f"n_envs={n_envs}, but the env has {n_lanes} lane(s): n_envs is for an env's id. "
            f"Make a VecEnv of {n_envs} lanes by stable_baselines3.common.env_util.make_vec_env, or leave n_envs out."
        )
    return env


def warn_of_a_single_lane(env: VecEnv, algorithm: str) -> None:
    """
    :param env: the training env
    :param algorithm: name of the algorithm's class
    """
    if env.num_envs == 1:
        warn_the_caller(
            f"{algorithm} learns from a single env lane, that is, with one actor-learner and from one transition at a "
            "time: without a replay buffer, this is slow and seldom learns well. Give it the env's id (then it makes "
            f"{DEFAULT_N_ENVS} lanes), or a VecEnv of several: "
            f"stable_baselines3.common.env_util.make_vec_env(..., n_envs={DEFAULT_N_ENVS})."
        )


def check_n_workers(n_workers: int | str, env: VecEnv | None) -> None:
    """
    :param n_workers: number of workers, or "auto"
    :param env: the training env, None if it comes later
    :raises ValueError: if the number is none, or if there are fewer lanes
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
    :raises ValueError: if the number is none
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
    :param n_workers: see :func:`count_workers`
    :param env: see there
    :param n_multiplications: see there
    :return: number of workers of each node, None for as many as it has CPUs, whatever this machine has
    """
    if n_workers == "auto" and n_multiplications >= SMALL_NETWORK:
        return None
    return count_workers(n_workers, env, n_multiplications)


def describe_workers(workers: Sequence[ActorLearner]) -> str:
    """
    :param workers: those of a training that begins
    :return: how many there are, and what each of them has
    """
    n_lanes = sum(worker.n_lanes for worker in workers)
    pace = "each at its own pace" if workers[0].env.at_their_own_pace else "together"
    return (
        f"Learning with {len(workers)} worker(s) for {n_lanes} env lane(s), which step {pace}; "
        f"{th.get_num_threads()} intra-op thread(s) of PyTorch for each worker"
    )
