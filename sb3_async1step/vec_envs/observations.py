"""
Observations of several lanes, in the order of the lanes: an array, or a dict of arrays.

Only this module asks which of the two they are.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from gymnasium import spaces

Observations = np.ndarray | dict[str, np.ndarray]


def map_arrays(function: Callable[..., np.ndarray], *observations: Observations) -> Observations:
    """
    :param function: takes an array of each of the observations, and returns one
    :param observations: observations of the same space
    :return: the function's results, in the structure of the observations
    """
    first = observations[0]
    if isinstance(first, dict):
        return {key: function(*(parts[key] for parts in observations)) for key in first}
    return function(*observations)


def to_arrays(observations: Any) -> Observations:
    """
    :param observations: what a VecEnv returned: lists or tensors, perhaps
    :return: the same as arrays; those that are arrays already are not copied
    """
    return map_arrays(np.asarray, observations)


def arrange(observations: Any, like: Any, describe: Callable[[], str]) -> Any:
    """
    :param observations: what a VecEnv returned
    :param like: an observation of the same space, or a dict with its keys
    :param describe: names these observations, for an error
    :return: the same, but a dict has the keys that it shall have, in their order
    :raises ValueError: if one of the two is a dict and the other is not, or a key is missing
    """
    if not isinstance(like, dict):
        if isinstance(observations, Mapping):
            raise ValueError(f"The {describe()} is a dict, but the observation space is not one.")
        return observations
    missing = sorted(key for key in like if not isinstance(observations, Mapping) or key not in observations)
    if missing:
        raise ValueError(f"The {describe()} lacks {', '.join(missing)}: it needs the keys of the observation space.")
    return {key: observations[key] for key in like}


def keys_of(space: spaces.Space) -> Any:
    """
    :param space: an observation space
    :return: a dict with the keys of its observations, None if these are no dicts
    """
    return dict.fromkeys(space.spaces) if isinstance(space, spaces.Dict) else None


def list_spaces(space: spaces.Space) -> list[spaces.Space]:
    """
    :param space: an observation space
    :return: the spaces of its observations' arrays, one or several
    """
    return list(space.spaces.values()) if isinstance(space, spaces.Dict) else [space]


def list_arrays(observations: Observations) -> list[np.ndarray]:
    """
    :param observations: observations
    :return: their arrays, one or several
    """
    return list(observations.values()) if isinstance(observations, dict) else [observations]


def promote_dtypes(observations: Observations, space: spaces.Space) -> Observations:
    """
    :param observations: first observations: those of an env whose space is of floats may be integers
    :param space: the observation space
    :return: the same, of types that all values of the space can be stored in
    """
    dtypes = iter([part.dtype for part in list_spaces(space)])
    return map_arrays(lambda array: array.astype(np.result_type(array.dtype, next(dtypes)), copy=False), observations)


def take_rows(observations: Observations, rows: slice | np.ndarray) -> Observations:
    """
    :param observations: observations of several lanes, or of a rollout (time by lane)
    :param rows: indices or a mask of the first axes
    :return: the observations that they select, a view if they are a slice
    """
    return map_arrays(lambda array: array[rows], observations)


def store_rows(storage: Observations, rows: int | slice | np.ndarray, observations: Observations) -> None:
    """
    :param storage: observations to overwrite in part
    :param rows: which part of the first axis
    :param observations: the values
    """

    def store(array: np.ndarray, values: np.ndarray) -> np.ndarray:
        array[rows] = values
        return array

    map_arrays(store, storage, observations)


def concatenate(parts: Sequence[Observations]) -> Observations:
    """
    :param parts: observations of several groups of lanes
    :return: the observations of all lanes
    """
    return map_arrays(lambda *arrays: np.concatenate(arrays), *parts)


def replace_rows(observations: Observations, replacements: dict[int, Observations]) -> Observations:
    """
    :param observations: observations
    :param replacements: the observation of a lane, by the lane
    :return: a copy with the replacements, or the observations themselves if there are none
    """
    if not replacements:
        return observations
    replaced = map_arrays(np.copy, observations)
    for row, observation in replacements.items():
        store_rows(replaced, row, observation)
    return replaced
