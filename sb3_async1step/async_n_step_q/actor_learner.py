"""Algorithm 2 of the paper (in its supplement): one thread of asynchronous n-step Q-learning."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch as th

from sb3_async1step.value_based.actor_learner import ValueBasedActorLearner, ValueBasedSettings
from sb3_async1step.vec_envs.observations import take_rows
from sb3_async1step.workers.rollout import Rollout, map_fields


@dataclass
class NStepQSettings(ValueBasedSettings):
    """
    What all workers of n-step Q-learning need to know.

    :param q_lambda: weight of the longer returns, 1 for n-step returns
    :param batch_size: number of transitions that an update learns from, None for all of a segment
    """

    q_lambda: float
    batch_size: int | None


@dataclass
class Minibatch(Rollout):
    """
    Some transitions of a rollout, as if they were of one time step in ``n_lanes`` lanes.

    :param targets: targets of their Q-values (the paper's y), shape ``(1, n_lanes)``
    """

    targets: np.ndarray


class NStepQActorLearner(ValueBasedActorLearner[NStepQSettings, Rollout]):
    """A worker of :class:`~sb3_async1step.AsyncNStepQ`."""

    settings: NStepQSettings

    def pull_for_gradient(self) -> None:
        # Minibatches after the first are of the newest parameters, so the first is, too
        if self.settings.batch_size is None:
            super().pull_for_gradient()
        else:
            self.local.pull()

    def make_minibatches(self, rollout: Rollout) -> Iterable[Rollout]:
        batch_size = self.settings.batch_size
        n_minibatches = 1 if batch_size is None else max(1, round(rollout.n_transitions / batch_size))
        if n_minibatches == 1:
            yield rollout
            return
        # Transitions of one lane resemble each other: each minibatch has some of all lanes
        order = self.random_generator.permutation(rollout.n_transitions)
        # Returns are of the whole segment
        with th.no_grad():
            targets = rollout.flatten(self.compute_targets(rollout)).cpu().numpy()
        transitions = map_fields(rollout.flatten, rollout)
        for rows in np.array_split(order, n_minibatches):
            selected = map_fields(lambda array, rows=rows: array[rows][None], transitions)
            yield Minibatch(**vars(selected), targets=targets[rows][None])

    def compute_targets(self, rollout: Rollout) -> th.Tensor:
        if isinstance(rollout, Minibatch):
            return self.to_device(rollout.targets)
        rewards = self.to_device(rollout.rewards)
        continues = self.to_device(~rollout.terminated).float()
        # The last steps of the rollout and of truncated episodes: returns bootstrap there
        ends = rollout.truncated | rollout.is_last
        is_end = self.to_device(ends)
        next_values = self.compute_next_values(rollout, ends)
        gamma, q_lambda = self.settings.gamma, self.settings.q_lambda

        returns = th.empty_like(rewards)
        following = next_values[-1]
        for i in reversed(range(len(rollout))):
            # R = max_a Q(s_t, a; theta^-) at the end, for a state that is not terminal, 0 for a terminal one
            longer = th.where(is_end[i], next_values[i], following)
            # R <- r_i + gamma * R, or in Peng's Q(lambda) a mixture with the one-step return
            mixture = longer if q_lambda == 1.0 else q_lambda * longer + (1.0 - q_lambda) * next_values[i]
            following = returns[i] = rewards[i] + gamma * continues[i] * mixture
        return returns

    def compute_next_values(self, rollout: Rollout, ends: np.ndarray) -> th.Tensor:
        """
        :param rollout: transitions, time by lane
        :param ends: where a return bootstraps, shape ``(n_steps, n_lanes)``
        :return: ``max_a Q(s', a; theta^-)`` where a return bootstraps on it, elsewhere 0, shape ``(n_steps, n_lanes)``
        """
        if self.settings.q_lambda < 1.0:
            return self.compute_target_q_values(rollout).max(dim=2).values
        next_values = th.zeros(rollout.rewards.shape, device=self.settings.device)
        observations = self.to_tensor(take_rows(rollout.next_observations, ends))
        next_values[self.to_device(ends)] = self.target_network(observations).max(dim=1).values
        return next_values
