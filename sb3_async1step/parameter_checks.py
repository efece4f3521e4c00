"""Checks of parameters, whose errors say what was wrong and what is allowed."""

import math
import numbers
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np


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


def check_whole(at_least: int = 1, or_none: bool = False, **parameters: object) -> None:
    """
    :param at_least: the smallest number that is allowed
    :param or_none: whether ``None`` is allowed as well
    :param parameters: must be whole numbers
    """
    allowed = f"a whole number of at least {at_least}"
    _check_each(parameters, lambda value: is_whole(value) and value >= at_least, allowed, or_none)


def check_unit_interval(**parameters: object) -> None:
    """
    :param parameters: must be in [0, 1]
    """
    _check_each(parameters, lambda value: is_number(value) and 0 <= value <= 1, "in [0, 1]")


def check_positive(or_none: bool = False, or_infinite: bool = False, **parameters: object) -> None:
    """
    :param or_none: whether ``None`` is allowed as well
    :param or_infinite: whether infinity is allowed as well
    :param parameters: must be positive
    """
    allowed = "a positive number" if or_infinite else "a positive, finite number"
    _check_each(
        parameters,
        lambda value: is_number(value) and value > 0 and (or_infinite or value < math.inf),
        allowed,
        or_none,
    )


def check_not_negative(**parameters: object) -> None:
    """
    :param parameters: must be finite, and 0 or more
    """
    _check_each(parameters, lambda value: is_number(value) and 0 <= value < math.inf, "a finite number of at least 0")


def check_bool(**parameters: object) -> None:
    """
    :param parameters: must be ``True`` or ``False``
    """
    _check_each(parameters, lambda value: isinstance(value, bool), "True or False")


def _check_each(
    parameters: dict[str, object], is_valid: Callable[[Any], bool], allowed: str, or_none: bool = False
) -> None:
    for name, value in parameters.items():
        is_allowed = or_none if value is None else is_valid(value)
        check(name, value, is_allowed, f"{allowed}, or None" if or_none else allowed)


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
