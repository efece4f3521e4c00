"""With an update after each step, the forward pass that chooses the actions is the one that the gradient needs."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.torch_layers import CombinedExtractor, FlattenExtractor, NatureCNN
from torch import nn

from sb3_async1step.common.torch_layers import ImageLayerNorm, LayerNormNatureCNN, MinAtarCNN, NipsCNN
from sb3_async1step.sb3_internals import HOOKS_OF_MODULES
from sb3_async1step.value_based.one_step import OneStepActorLearner
from sb3_async1step.value_based.policies import QNetwork
from sb3_async1step.workers.lanes import Rows
from sb3_async1step.workers.rollout import Rollout

#: Modules without a state, whose forward pass is the same in training and in evaluation mode
PURE_MODULES = frozenset(
    (
        *(nn.Sequential, nn.ModuleDict, nn.Identity, nn.Flatten),
        *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.LayerNorm, ImageLayerNorm),
        *(nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid),
        *(FlattenExtractor, CombinedExtractor, NatureCNN, NipsCNN, LayerNormNatureCNN, MinAtarCNN),
    )
)


def are_pure(modules: Iterable[nn.Module]) -> bool:
    """
    :param modules: modules of a network
    :return: whether their forward pass is known to be the same in training and in evaluation mode, and to leave nothing
        behind in them. Unlike BatchNorm, Dropout, modules of a class of the user's own, and those with hooks
    """
    # Subclasses don't count: they may do anything
    return all(
        type(module) in PURE_MODULES and not any(getattr(module, name) for name in HOOKS_OF_MODULES)
        for module in modules
    )


class ForwardPassReuse(OneStepActorLearner[Rollout]):
    """
    A worker that computes Q(s, .) once, to act and to learn. But not if its network is not known to allow that, if the
    actions of several steps lead to one update, or if its gradients have to be of the newest parameters
    (``lock_updates``).

    :param args: see :class:`~sb3_async1step.workers.actor_learner.ActorLearner`
    """

    #: Q(s, .) of the forward pass that chose the actions, until the gradient is computed; None if it is not reused
    _q_values: th.Tensor | None = None

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        network, *layers = self.local.learning_network.modules()
        self._network_is_pure = type(network) is QNetwork and are_pure(layers)

    def choose_actions(self, lanes: Rows) -> np.ndarray:
        if self.rollout.n_steps > 1 or self.shared.lock_updates or not self._network_is_pure:
            return super().choose_actions(lanes)
        self.local.pull()
        self._q_values = self.local.learning_network(self.to_tensor(self.observations))
        return self.explore(self._q_values.detach())

    def pull_for_gradient(self) -> None:
        if self._q_values is None:
            super().pull_for_gradient()

    def compute_q_values(self, rollout: Rollout) -> th.Tensor:
        q_values, self._q_values = self._q_values, None
        return super().compute_q_values(rollout) if q_values is None else q_values
