"""SB3's actor-critic policies, for action spaces that start anywhere."""

from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import (
    ActorCriticCnnPolicy,
    ActorCriticPolicy,
    MultiInputActorCriticPolicy,
)
from stable_baselines3.common.type_aliases import PyTorchObs


class MlpPolicy(ActorCriticPolicy):
    """SB3's ``ActorCriticPolicy``, whose parameters it has."""

    def _get_constructor_parameters(self) -> dict[str, Any]:
        # SB3 forgets it, and loads separate extractors into one
        return {**super()._get_constructor_parameters(), "share_features_extractor": self.share_features_extractor}

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        actions = super()._predict(observation, deterministic)
        # The network numbers actions from 0, the action space may start elsewhere
        if isinstance(self.action_space, (spaces.Discrete, spaces.MultiDiscrete)):
            return actions + th.as_tensor(self.action_space.start, device=actions.device)
        return actions


class CnnPolicy(MlpPolicy, ActorCriticCnnPolicy):
    """SB3's ``ActorCriticCnnPolicy``, whose parameters it has."""


class MultiInputPolicy(MlpPolicy, MultiInputActorCriticPolicy):
    """SB3's ``MultiInputActorCriticPolicy``, whose parameters it has."""
