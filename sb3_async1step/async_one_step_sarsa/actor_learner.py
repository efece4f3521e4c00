"""One thread of asynchronous one-step Sarsa: Algorithm 1 with another target (the paper's section 4)."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch as th

from sb3_async1step.value_based.one_step import OneStepActorLearner
from sb3_async1step.vec_envs.observations import Observations, take_rows
from sb3_async1step.workers.lanes import Rows
from sb3_async1step.workers.rollout import ALL_LANES, Rollout


@dataclass
class SarsaRollout(Rollout):
    """
    A rollout with the next actions.

    :param next_actions: indices of the actions a' that the behaviour policy chose in s', shape ``(n_steps, n_lanes)``
    """

    next_actions: np.ndarray


class OneStepSarsaActorLearner(OneStepActorLearner[SarsaRollout]):
    """A worker of :class:`~sb3_async1step.AsyncOneStepSarsa`. It executes the very actions that it bootstrapped on."""

    #: Chosen before the last update, to be executed next
    _chosen_actions: np.ndarray | None = None

    def choose_actions(self, lanes: Rows) -> np.ndarray:
        if self._chosen_actions is None:
            self._chosen_actions = self.act_epsilon_greedily(self.observations, ALL_LANES)
        return self._chosen_actions[lanes]

    def complete_step(self, step: Rollout, new_obs: Observations, lanes: Rows) -> SarsaRollout:
        # After a truncation, the action to bootstrap on is one for the terminal observation, which is drawn first, and
        # the action to execute is one for the first observation of the new episode
        truncated = np.flatnonzero(step.truncated)
        bootstrap_actions = None
        if len(truncated) > 0:
            ends = take_rows(step.next_observations, truncated)
            bootstrap_actions = self.act_epsilon_greedily(ends, np.arange(self.n_lanes)[lanes][truncated])
        next_actions = self.act_epsilon_greedily(new_obs, lanes)
        self._chosen_actions = self._put(self._chosen_actions, lanes, next_actions.copy())
        if bootstrap_actions is not None:
            next_actions[truncated] = bootstrap_actions
        return SarsaRollout(**vars(step), next_actions=next_actions)

    def compute_next_values(self, rollout: SarsaRollout) -> th.Tensor:
        # Q(s', a'; theta^-)
        next_actions = self.to_device(rollout.next_actions)[..., None]
        return self.compute_target_q_values(rollout).gather(dim=2, index=next_actions).squeeze(dim=2)

    def get_extra_state(self) -> dict[str, Any]:
        return {"chosen_actions": None if self._chosen_actions is None else self._chosen_actions.copy()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self._chosen_actions = state["chosen_actions"]
