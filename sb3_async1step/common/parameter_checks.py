"""Checks of parameters, whose errors say what was wrong and what is allowed."""

import numbers
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from gymnasium import spaces

from sb3_async1step.vec_envs.observations import list_spaces

#: Observation spaces that SB3's buffers support, each alone or in a ``Dict``
SUPPORTED_OBSERVATION_SPACES = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)


def check(name: str, value: object, is_valid: bool | np.bool_, allowed: str) -> None:
    """
    :param name: name of a parameter
    :param value: its value
    :param is_valid: whether the value is allowed
    :param allowed: which values are
    :raises ValueError: if the value is not
    """
    if not is_valid:
        raise ValueError(f"{name} must be {allowed}, got {value!r}")


def check_whole(**parameters: object) -> None:
    """
    :param parameters: must be whole numbers of at least 1
    """
    for name, value in parameters.items():
        check(name, value, is_whole(value) and value >= 1, "a whole number of at least 1")  # type: ignore[operator]


def check_unit_interval(**parameters: Any) -> None:
    """
    :param parameters: must be in [0, 1]
    """
    for name, value in parameters.items():
        check(name, value, is_number(value) and 0 <= value <= 1, "in [0, 1]")


def check_positive(**parameters: Any) -> None:
    """
    :param parameters: must be positive
    """
    for name, value in parameters.items():
        check(name, value, is_number(value) and value > 0, "positive")


def check_not_negative(**parameters: Any) -> None:
    """
    :param parameters: must be finite, and 0 or more
    """
    for name, value in parameters.items():
        check(name, value, is_number(value) and 0 <= value < float("inf"), "a finite number of at least 0")


def check_bool(**parameters: object) -> None:
    """
    :param parameters: must be ``True`` or ``False``
    """
    for name, value in parameters.items():
        check(name, value, isinstance(value, bool), "True or False")


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """
    :param name: name of a parameter
    :param value: its value
    :param choices: what it may be
    """
    check(name, value, value in list(choices), f"one of {sorted(choices)}")


def check_proportions(values_name: str, values: Any, shares_name: str, shares: Any) -> None:
    """
    :param values_name: name of a parameter that is one value in [0, 1], or several
    :param values: its value
    :param shares_name: name of the parameter that is the proportion of each of several values
    :param shares: its value
    """
    listed = list(values) if isinstance(values, Sequence) else [values]
    are_valid = len(listed) > 0 and all(is_number(value) and 0 <= value <= 1 for value in listed)
    check(values_name, values, are_valid, "one or more values in [0, 1]")
    if not isinstance(values, Sequence):
        return
    proportions = list(shares) if isinstance(shares, Sequence) else []
    are_shares = len(proportions) == len(listed) and all(is_number(share) and share >= 0 for share in proportions)
    check(
        shares_name,
        shares,
        are_shares and abs(sum(proportions) - 1) < 1e-6,
        f"{len(listed)} proportions that sum up to 1, one for each value of {values_name} ({values})",
    )


def to_list(values: Any) -> Any:
    """
    :param values: anything
    :return: a list, or a single number, if it was an array, a Series or a tensor; anything else unchanged
    """
    return values.tolist() if hasattr(values, "tolist") else values


def is_number(value: object) -> bool:
    """
    :param value: anything
    :return: whether it is a real number, which ``True`` is not
    """
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def is_whole(value: object) -> bool:
    """
    :param value: anything
    :return: whether it is a whole number, which ``True`` is not
    """
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def check_observation_space(space: spaces.Space) -> None:
    """
    :param space: an observation space
    :raises AssertionError: if SB3's buffers do not support it
    """
    for part in list_spaces(space):
        # The wording of SB3's constructor
        assert isinstance(part, SUPPORTED_OBSERVATION_SPACES), (
            f"The algorithm only supports {SUPPORTED_OBSERVATION_SPACES}, or a Dict of them, as observation spaces "
            f"but {space} was provided"
        )


def check_first_action(action_space: spaces.Space, policy_class: type, ours: type) -> None:
    """
    :param action_space: the action space
    :param policy_class: class of the policy
    :param ours: class of policies that predict actions of spaces that don't start at 0
    :raises ValueError: if the space does not start at 0, and the policy is of another class
    """
    # Of Discrete and MultiDiscrete
    start = getattr(action_space, "start", 0)
    if np.any(start) and not issubclass(policy_class, ours):
        raise ValueError(
            f"The actions start at {start}, but {policy_class.__name__} predicts actions that start at 0: derive it "
            f"from {ours.__module__}.{ours.__name__}."
        )
