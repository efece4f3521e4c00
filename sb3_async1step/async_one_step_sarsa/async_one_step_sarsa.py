from typing import ClassVar

import torch as th
from stable_baselines3.dqn.policies import QNetwork

from sb3_async1step.common.async_algorithm import AsyncAlgorithm
from sb3_async1step.common.rollout import Rollout


class AsyncOneStepSarsa(AsyncAlgorithm):
    """
    Asynchronous one-step Sarsa (Mnih et al. 2016, section 4: Algorithm 1 with another target).

    Paper: https://arxiv.org/abs/1602.01783

    The parameters are those of :class:`~sb3_async1step.common.async_algorithm.AsyncAlgorithm`.
    """

    # The behaviour policy chooses a' before the update, and executes it afterwards
    on_policy: ClassVar[bool] = True

    @staticmethod
    def next_state_values(target_network: QNetwork, rollout: Rollout) -> th.Tensor:
        """
        The value of the action taken next: ``Q(s', a'; theta^-)``.

        :param target_network: the target network
        :param rollout: ``n`` transitions
        :return: values of s', shape ``(n,)``
        """
        next_q_values = target_network(rollout.next_observations)
        return next_q_values.gather(dim=1, index=rollout.next_actions[:, None]).squeeze(dim=1)
