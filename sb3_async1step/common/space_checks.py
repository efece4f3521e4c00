"""Checks of spaces, as far as SB3 does not make them."""

import numpy as np
from gymnasium import spaces

from sb3_async1step.vec_envs.observations import list_spaces

#: Observation spaces that SB3's buffers support, each alone or in a ``Dict``
SUPPORTED_OBSERVATION_SPACES = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)


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
