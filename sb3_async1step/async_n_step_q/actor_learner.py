"""Algorithm 2 of the paper (in its supplement): one thread of asynchronous n-step Q-learning."""

from dataclasses import dataclass

import torch as th

from sb3_async1step.value_based.actor_learner import ValueBasedActorLearner, ValueBasedSettings
from sb3_async1step.vec_envs.observations import take_rows
from sb3_async1step.workers.rollout import Rollout


@dataclass
class NStepQSettings(ValueBasedSettings):
    """
    What all workers of n-step Q-learning need to know.

    :param q_lambda: weight of the longer returns, 1 for n-step returns
    """

    q_lambda: float


class NStepQActorLearner(ValueBasedActorLearner[NStepQSettings, Rollout]):
    """A worker of :class:`~sb3_async1step.AsyncNStepQ`."""

    settings: NStepQSettings

    def compute_targets(self, rollout: Rollout) -> th.Tensor:
        rewards = self.to_device(rollout.rewards)
        continues = self.to_device(~rollout.terminated).float()
        truncated = self.to_device(rollout.truncated)
        next_values = self.compute_next_values(rollout)
        gamma, q_lambda = self.settings.gamma, self.settings.q_lambda

        returns = th.empty_like(rewards)
        # R = max_a Q(s_t, a; theta^-) for a state that is not terminal, 0 for a terminal one
        following = next_values[-1]
        for i in reversed(range(len(rollout))):
            # The episode that a truncation cut off has no longer return than the bootstrapped one
            longer = th.where(truncated[i], next_values[i], following)
            # R <- r_i + gamma * R, or in Peng's Q(lambda) a mixture with the one-step return
            mixture = longer if q_lambda == 1.0 else q_lambda * longer + (1.0 - q_lambda) * next_values[i]
            following = returns[i] = rewards[i] + gamma * continues[i] * mixture
        return returns

    def compute_next_values(self, rollout: Rollout) -> th.Tensor:
        """
        :param rollout: transitions, time by lane
        :return: ``max_a Q(s', a; theta^-)`` where a return bootstraps on it, elsewhere 0, shape ``(n_steps, n_lanes)``
        """
        if self.settings.q_lambda < 1.0:
            return self.compute_target_q_values(rollout.next_observations).max(dim=2).values
        next_values = th.zeros(rollout.rewards.shape, device=self.settings.device)
        last = take_rows(rollout.next_observations, slice(-1, None))
        next_values[-1] = self.compute_target_q_values(last).max(dim=2).values[0]
        cut_off = rollout.truncated.copy()
        cut_off[-1] = False
        if cut_off.any():
            ends = take_rows(rollout.next_observations, cut_off)
            next_values[self.to_device(cut_off)] = self.shared.target_network(self.to_tensor(ends)).max(dim=1).values
        return next_values
