from typing import ClassVar

import torch as th
from stable_baselines3.dqn.policies import QNetwork

from sb3_async1step.common.async_algorithm import AsyncAlgorithm
from sb3_async1step.common.rollout import Rollout


class AsyncOneStepQ(AsyncAlgorithm):
    """
    Asynchronous one-step Q-learning (Mnih et al. 2016, Algorithm 1).

    Paper: https://arxiv.org/abs/1602.01783

    The parameters are those of :class:`~sb3_async1step.common.async_algorithm.AsyncAlgorithm`.
    """

    on_policy: ClassVar[bool] = False

    @staticmethod
    def next_state_values(target_network: QNetwork, rollout: Rollout) -> th.Tensor:
        """
        The best action's value: ``max_a' Q(s', a'; theta^-)``.

        :param target_network: the target network
        :param rollout: ``n`` transitions
        :return: values of s', shape ``(n,)``
        """
        return target_network(rollout.next_observations).max(dim=1).values
