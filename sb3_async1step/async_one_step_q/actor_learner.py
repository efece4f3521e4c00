"""Algorithm 1 of the paper: one thread of asynchronous one-step Q-learning."""

from typing import Any

import numpy as np
import torch as th

from sb3_async1step.async_one_step_q.pure_modules import are_pure
from sb3_async1step.value_based.one_step import OneStepActorLearner
from sb3_async1step.value_based.policies import QNetwork
from sb3_async1step.workers.lanes import Rows
from sb3_async1step.workers.rollout import Rollout


class OneStepQActorLearner(OneStepActorLearner[Rollout]):
    """
    A worker of :class:`~sb3_async1step.AsyncOneStepQ`.

    If there is an update after each step, the forward pass that chooses the actions is the one that the gradient needs,
    unless it has to be of the newest parameters (``lock_updates``).

    :param args: see :class:`~sb3_async1step.workers.actor_learner.ActorLearner`
    """

    #: Q(s, .) of the forward pass that chose the actions, reused for the gradient; None if it can't be
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

    def compute_next_values(self, rollout: Rollout) -> th.Tensor:
        # max_a' Q(s', a'; theta^-)
        return self.compute_target_q_values(rollout).max(dim=2).values
