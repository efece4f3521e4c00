"""The training env: making its lanes from an id, and warnings about it."""

import functools

import gymnasium as gym
from stable_baselines3.common.atari_wrappers import MaxAndSkipEnv
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.vec_env import VecEnv

from sb3_async1step.common.warn import warn_the_caller
from sb3_async1step.parameter_checks import check_whole

#: As many lanes as the paper had actor-learners (section 5.1)
DEFAULT_N_ENVS = 16


def make_lanes(env: GymEnv | str | None, n_envs: int | None, seed: int | None, verbose: int) -> GymEnv | None:
    """
    :param env: an env, or the id of one that is registered in Gymnasium
    :param n_envs: number of lanes, by default ``DEFAULT_N_ENVS`` of an id, and what there is of an env
    :param seed: seed of the lanes' action spaces
    :param verbose: 1 or more to print what is made
    :return: the env, or so many lanes of the one that the id names
    :raises ValueError: if ``n_envs`` is not a positive whole number, or not the number of the env's lanes
    """
    check_whole(or_none=True, n_envs=n_envs)
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


def warn_of_frames_skipped_twice(env: VecEnv) -> None:
    """
    :param env: the training env
    """
    try:
        if not any(env.env_is_wrapped(MaxAndSkipEnv)):
            return
        spec = env.get_attr("spec")[0]
    except (AttributeError, NotImplementedError, TypeError):
        # SB3's algorithms do not ask while they train, and adapters of other libraries need not have an answer
        return
    frame_skip = spec.kwargs.get("frameskip", 1) if spec is not None else 1
    if frame_skip != 1:
        warn_the_caller(
            f"{spec.id} skips frames itself (frameskip={frame_skip}), and so does its wrapper (AtariWrapper or "
            "MaxAndSkipEnv) for each of these: the agent sees one frame of 16, if both skip as usual. Take an env that "
            f"skips none: {spec.id} with frameskip=1 (make_atari_env(..., env_kwargs=dict(frameskip=1))), or the id "
            "that ends in NoFrameskip-v4."
        )


def warn_of_no_update(n_steps: int, update_interval: int, num_envs: int) -> None:
    """
    :param n_steps: environment steps that a training takes, of all lanes
    :param update_interval: vector steps between two updates
    :param num_envs: number of lanes
    """
    # Each lane takes the last step
    if 0 < n_steps <= (update_interval - 1) * num_envs:
        warn_the_caller(
            f"learn() takes {n_steps} steps and learns nothing: the first update follows after update_interval * "
            f"n_envs = {update_interval} * {num_envs} = {update_interval * num_envs} steps. Take more steps, or lower "
            "update_interval. (Unlike SB3's A2C, learn() does not go on until the segment is complete; its steps count "
            "towards the first update of the next learn() with reset_num_timesteps=False.)"
        )
