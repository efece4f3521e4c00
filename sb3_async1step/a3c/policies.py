"""SB3's actor-critic policies, with mixed precision, for action spaces that start anywhere."""

import copy
from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import (
    ActorCriticCnnPolicy,
    ActorCriticPolicy,
    MultiInputActorCriticPolicy,
)
from stable_baselines3.common.type_aliases import PyTorchObs

from sb3_async1step.common.mixed_precision import MixedPrecision


# ActorCriticPolicy overrides extract_features() with another signature, hence the type: ignore
class MlpPolicy(ActorCriticPolicy, MixedPrecision):  # type: ignore[misc]
    """
    SB3's ``ActorCriticPolicy``.

    :param args: see SB3's ``ActorCriticPolicy``
    :param mixed_precision: whether the features extractor computes in bfloat16 (``torch.autocast``), which is faster
        where the processor can; all else, and what is learned, stays in float32
    :param kwargs: see SB3's ``ActorCriticPolicy``
    """

    def __init__(self, *args: Any, mixed_precision: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.mixed_precision = mixed_precision

    def _get_constructor_parameters(self) -> dict[str, Any]:
        # SB3 omits share_features_extractor, so that a loaded policy would share its extractor
        ours = {"share_features_extractor": self.share_features_extractor, "mixed_precision": self.mixed_precision}
        return {**super()._get_constructor_parameters(), **ours}

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        actions = super()._predict(observation, deterministic)
        # The network numbers actions from 0, the action space may start elsewhere
        if isinstance(self.action_space, (spaces.Discrete, spaces.MultiDiscrete)):
            return actions + th.as_tensor(self.action_space.start, device=actions.device)
        return actions


class CnnPolicy(MlpPolicy, ActorCriticCnnPolicy):  # type: ignore[misc]
    """SB3's ``ActorCriticCnnPolicy``, with the parameters of :class:`MlpPolicy`."""


class MultiInputPolicy(MlpPolicy, MultiInputActorCriticPolicy):  # type: ignore[misc]
    """SB3's ``MultiInputActorCriticPolicy``, with the parameters of :class:`MlpPolicy`."""


def view_policy(policy: ActorCriticPolicy) -> ActorCriticPolicy:
    """
    SB3's policies keep the parameters of the last distribution between two calls, with the graph in which they were
    computed: other threads must not replace them meanwhile, and a graph can't be copied.

    :param policy: a policy
    :return: the same modules and parameters, with a distribution of its own
    """
    view = copy.copy(policy)
    view.action_dist = copy.copy(policy.action_dist)
    for name, value in vars(policy.action_dist).items():
        if isinstance(value, th.Tensor):
            setattr(view.action_dist, name, value.detach())
        elif name in ("distribution", "weights_dist"):
            setattr(view.action_dist, name, None)
    return view
