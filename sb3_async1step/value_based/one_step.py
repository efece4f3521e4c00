"""The thread of Algorithm 1, whose targets look one step ahead."""

from abc import abstractmethod
from typing import ClassVar

import torch as th

from sb3_async1step.value_based.actor_learner import ValueBasedActorLearner, ValueBasedSettings
from sb3_async1step.workers.rollout import AnyRollout


class OneStepActorLearner(ValueBasedActorLearner[ValueBasedSettings, AnyRollout]):
    """
    A worker of Algorithm 1. A subclass says what it bootstraps on.

    Algorithm 1 has no thread-specific parameters: it acts and computes gradients by the shared ones.
    """

    thread_specific_parameters: ClassVar[bool] = False

    @abstractmethod
    def compute_next_values(self, rollout: AnyRollout) -> th.Tensor:
        """
        :param rollout: transitions, time by lane
        :return: values of s' that are not terminal, shape ``(n_steps, n_lanes)``
        """

    def compute_targets(self, rollout: AnyRollout) -> th.Tensor:
        # y = r for terminal s', else r + gamma * (value of s')
        continues = self.to_device(~rollout.terminated).float()
        return self.to_device(rollout.rewards) + self.settings.gamma * continues * self.compute_next_values(rollout)

    @property
    def max_segment(self) -> int:
        # Transitions are learned from one by one, so that a fast lane may give several in place of a slow one's
        return 4 * self._update_interval

    def begin_segment(self) -> None:
        pass

    def pull_for_gradient(self) -> None:
        """Pull the parameters right before the first gradient since the last update, so that it is hardly stale."""
        if not self._metrics:
            self.local.pull()

    def before_target_sync(self) -> None:
        # The TD targets of the transitions so far are from the old target network: Algorithm 1 accumulates gradients
        # at every step
        self.accumulate_gradient()
