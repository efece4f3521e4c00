"""What an env has returned from a step: checked, and told as a time step of a rollout."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from gymnasium import spaces

from sb3_async1step.vec_envs.observations import (
    Observations,
    arrange,
    keys_of,
    list_arrays,
    list_spaces,
    map_arrays,
    promote_dtypes,
    replace_rows,
    to_arrays,
)
from sb3_async1step.workers.rollout import Rollout


@dataclass
class StepResult:
    """
    What ``VecEnv.step()`` returns for ``n`` lanes, as arrays.

    :param new_obs: the new observations, shape ``(n, *observation_shape)``
    :param rewards: the rewards, shape ``(n,)``
    :param dones: whether an episode ended, shape ``(n,)``
    :param infos: the info dictionaries, length ``n``
    """

    new_obs: Observations
    rewards: np.ndarray
    dones: np.ndarray
    infos: list[dict[str, Any]]


def check_result(returned: Any, observations: Observations, lanes: np.ndarray) -> StepResult:
    """
    Convert and check the result of a step. As with SB3's DQN, a VecEnv of the user's own may return
    anything like arrays.

    :param returned: what ``VecEnv.step()`` returned
    :param observations: the observations before
    :param lanes: numbers of the lanes that have taken the step, for errors
    :return: the same as arrays
    :raises ValueError: if a reward or an observation is not finite, or there is not one for each lane
    """
    new_obs, rewards, dones, infos = returned
    result = StepResult(
        to_arrays(arrange(new_obs, observations, lambda: f"observation of {describe(lanes)}")),
        to_lanes("rewards", rewards, len(lanes)),
        to_lanes("dones", dones, len(lanes), dtype=bool),
        to_infos(infos, lanes),
    )
    check_finite("reward", to_float32(result.rewards), lanes)
    check_finite("observation", result.new_obs, lanes)
    for new, old in zip(list_arrays(result.new_obs), list_arrays(observations), strict=True):
        if new.shape != old.shape:
            raise ValueError(f"The observations of {describe(lanes)} had the shape {old.shape}, now {new.shape}.")
    result.new_obs = to_dtypes(result.new_obs, observations, lanes)
    return result


def to_dtypes(new: Observations, old: Observations, lanes: np.ndarray) -> Observations:
    """
    :param new: observations
    :param old: others, with whose types they are stored
    :param lanes: numbers of the lanes, for errors
    :return: the same with these types
    :raises ValueError: if that would change them
    """

    def convert(new: np.ndarray, old: np.ndarray) -> np.ndarray:
        if new.dtype == old.dtype:
            return new
        converted = new.astype(old.dtype)
        if not np.can_cast(new.dtype, old.dtype, "same_kind") and not np.array_equal(converted, new):
            raise ValueError(
                f"The observations of {describe(lanes)} were {old.dtype}, and are {new.dtype} now: {new}. Let the env "
                "return those of its observation space's dtype."
            )
        return converted

    return map_arrays(convert, new, old)


def check_first_observations(returned: Any, space: spaces.Space, n_lanes: int) -> Observations:
    """
    :param returned: what ``VecEnv.reset()`` returned
    :param space: the observation space
    :param n_lanes: number of lanes
    :return: the same as arrays, of a type that the space's values have room in
    :raises ValueError: if an observation is not finite, there is not one for each lane, or a key is missing
    """
    if returned is None:
        raise ValueError("The env's reset() returned None instead of the first observations.")
    observations = to_arrays(arrange(returned, keys_of(space), lambda: "first observation"))
    for array, part in zip(list_arrays(observations), list_spaces(space), strict=True):
        expected = (n_lanes, *part.shape) if isinstance(part, spaces.Box) else (n_lanes, *array.shape[1:])
        if array.shape != expected:
            raise ValueError(
                f"The env's reset() returned observations of the shape {array.shape}: {n_lanes} lane(s) of {part} need "
                f"{expected}."
            )
    check_finite("observation", observations, np.arange(n_lanes))
    return promote_dtypes(observations, space)


def describe(lanes: np.ndarray) -> str:
    """
    :param lanes: numbers of some lanes
    :return: in words
    """
    return f"env lane {lanes[0]}" if len(lanes) == 1 else f"env lanes {lanes[0]} to {lanes[-1]}"


def to_infos(infos: Any, lanes: np.ndarray) -> list[dict[str, Any]]:
    """
    :param infos: what the env returned
    :param lanes: numbers of the lanes
    :return: a list
    :raises ValueError: if it is not a dict for each lane
    """
    listed = list(infos) if isinstance(infos, Iterable) and not isinstance(infos, Mapping) else []
    if len(listed) != len(lanes) or not all(isinstance(info, Mapping) for info in listed):
        raise ValueError(f"The infos of {describe(lanes)} have to be a dict for each lane, got {infos!r}.")
    return listed


def to_lanes(name: str, values: Any, n_lanes: int, dtype: type[bool] | None = None) -> np.ndarray:
    """
    :param name: what they are, for an error
    :param values: a value for each lane
    :param n_lanes: number of lanes
    :param dtype: of the array
    :return: the values as an array, shape ``(n_lanes,)``
    :raises ValueError: if there are more or fewer
    """
    array = np.asarray(values, dtype=dtype)
    if array.size != n_lanes:
        raise ValueError(
            f"The env returned {name} of shape {array.shape} for {n_lanes} lane(s), each of which needs one."
        )
    return array.reshape(n_lanes)


def to_float32(rewards: np.ndarray) -> np.ndarray:
    """
    :param rewards: as the env returned them
    :return: as networks learn them; what is too large is infinite, and None not a number
    """
    with np.errstate(over="ignore"):
        return np.asarray(rewards, dtype=np.float32)


def check_finite(name: str, values: Observations, lanes: np.ndarray) -> None:
    """
    :param name: what they are, for an error
    :param values: of each lane
    :param lanes: numbers of the lanes, for an error
    :raises ValueError: if one of them is infinite or not a number
    """
    for array in list_arrays(values):
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            i = int(np.flatnonzero(~np.isfinite(array.reshape(len(lanes), -1)).all(axis=1))[0])
            raise ValueError(
                f"The {name} of env lane {lanes[i]} is not finite: {array[i]}. Nothing was learned "
                "from it. Repair the env; stable_baselines3.common.vec_env.VecCheckNan helps to find the cause."
            )


def make_time_step(observations: Observations, actions: np.ndarray, result: StepResult, lanes: np.ndarray) -> Rollout:
    """
    :param observations: the observations before
    :param actions: the actions, as the network numbers them
    :param result: what the env returned
    :param lanes: numbers of the lanes, for errors
    :return: the time step; its arrays lack the first axis
    :raises ValueError: if the last observation of a truncated episode is missing, or not finite
    """
    # An array of one flag, too
    flags = [bool(info.get("TimeLimit.truncated", False)) for info in result.infos]
    truncated = np.array(flags, dtype=bool) & result.dones
    # Only truncated lanes need their terminal observation: after a termination, nothing is bootstrapped
    ends = {
        i: get_terminal_observation(result.infos[i], observations, lanes[i]) for i in np.flatnonzero(truncated).tolist()
    }
    next_observations = replace_rows(result.new_obs, ends)
    if ends:
        check_finite("terminal observation", next_observations, lanes)
    return Rollout(
        observations, actions, to_float32(result.rewards), next_observations, result.dones & ~truncated, truncated
    )


def get_terminal_observation(info: dict[str, Any], observations: Observations, lane: int) -> Observations:
    """
    :param info: the info of a truncated episode's last step
    :param observations: others, whose keys it needs
    :param lane: number of the lane, for an error
    :return: the last observation of the episode
    :raises ValueError: if it, or a key of it, is missing
    """
    if info.get("terminal_observation") is None:
        raise ValueError(
            f'The info of env lane {lane} says "TimeLimit.truncated", but its "terminal_observation" is missing: the '
            "last observation of the episode, on which the return is bootstrapped."
        )
    terminal = arrange(info["terminal_observation"], observations, lambda: f"terminal observation of env lane {lane}")
    return to_dtypes(to_arrays(terminal), observations, np.array([lane]))
