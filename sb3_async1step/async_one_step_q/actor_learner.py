"""Algorithm 1 of the paper: one thread of asynchronous one-step Q-learning."""

import torch as th

from sb3_async1step.async_one_step_q.forward_passes import ForwardPassReuse
from sb3_async1step.value_based.one_step import OneStepActorLearner
from sb3_async1step.workers.rollout import Rollout


class OneStepQActorLearner(ForwardPassReuse, OneStepActorLearner[Rollout]):
    """A worker of :class:`~sb3_async1step.AsyncOneStepQ`."""

    def compute_next_values(self, rollout: Rollout) -> th.Tensor:
        # max_a' Q(s', a'; theta^-)
        return self.compute_target_q_values(rollout).max(dim=2).values
