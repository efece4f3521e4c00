"""A worker of a value-based method: it acts epsilon-greedily, and bootstraps on the shared target network."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.dqn.policies import QNetwork
from torch.nn import functional as F

from sb3_async1step.value_based.exploration import Exploration, choose_epsilon_greedily
from sb3_async1step.value_based.target_network import SharedQNetworks, count_syncs
from sb3_async1step.vec_envs.observations import Observations, take_rows
from sb3_async1step.workers.actor_learner import ActorLearner, AnySettings, Settings
from sb3_async1step.workers.lanes import Rows
from sb3_async1step.workers.network_copies import share_memory, view_network
from sb3_async1step.workers.rollout import ALL_LANES, AnyRollout

LOSSES = {"mse": F.mse_loss, "huber": F.smooth_l1_loss}


@dataclass
class ValueBasedSettings(Settings):
    """
    What all workers of a value-based method need to know.

    :param exploration: given the progress remaining (from 1 to 0), returns epsilon of each of all lanes
    :param first_action: the action of the environment that has index 0 in the network's output
    :param target_update_interval: environment steps, over all lanes, between two updates of the target network (the
        paper's I_target)
    :param tau: soft update coefficient of the target network
    :param loss: a key of ``LOSSES``
    """

    exploration: Exploration
    first_action: int
    target_update_interval: int
    tau: float
    loss: str


class ValueBasedActorLearner(ActorLearner[AnySettings, AnyRollout]):
    """
    A worker that learns action values. A subclass says what their targets are.

    :param args: see :class:`~sb3_async1step.workers.actor_learner.ActorLearner`
    """

    settings: ValueBasedSettings  # type: ignore[assignment]
    shared: SharedQNetworks

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        # A view for each worker: some modules keep activations between calls, which threads must not share
        self._target_network = view_network(self.shared.target_network)
        self._target_network.set_training_mode(False)
        self._target_parameters = list(self._target_network.parameters())

    @abstractmethod
    def compute_targets(self, rollout: AnyRollout) -> th.Tensor:
        """
        :param rollout: transitions, time by lane
        :return: targets of ``Q(s, a)`` (the paper's y), shape ``(n_steps, n_lanes)``
        """

    def choose_actions(self, lanes: Rows) -> np.ndarray:
        return self.act_epsilon_greedily(take_rows(self.observations, lanes), lanes)

    def act_epsilon_greedily(self, observations: Observations, lanes: Rows) -> np.ndarray:
        """
        :param observations: observations of some lanes
        :param lanes: which of this worker's lanes these are
        :return: indices of the behaviour policy's actions, shape ``(n,)``
        """
        with th.no_grad():
            q_values = self.local.acting_network(self.to_tensor(observations))
        return self.explore(q_values, lanes)

    def explore(self, q_values: th.Tensor, lanes: Rows = ALL_LANES) -> np.ndarray:
        """
        :param q_values: action values of some lanes, shape ``(n, n_actions)``
        :param lanes: which of this worker's lanes these are, by default all
        :return: indices of the behaviour policy's actions, shape ``(n,)``
        """
        epsilons = self.settings.exploration(self.shared.progress_remaining)[self._lane_numbers[lanes]]
        return choose_epsilon_greedily(q_values.cpu().numpy(), epsilons, self.random_generator)

    def to_env_actions(self, actions: np.ndarray) -> np.ndarray:
        return actions + self.settings.first_action

    def compute_loss(self, rollout: AnyRollout) -> tuple[th.Tensor, dict[str, float]]:
        with th.no_grad():
            targets: Any = rollout.flatten(self.compute_targets(rollout))
        actions = self.to_batch(rollout, rollout.actions).reshape(-1, 1)
        q_values = self.compute_q_values(rollout).gather(dim=1, index=actions)
        # d_theta <- d_theta + d(y - Q(s, a; theta))^2 / d_theta
        loss = LOSSES[self.settings.loss](q_values.squeeze(dim=1), targets)
        return loss, {"train/loss": loss.item(), "train/q_mean": q_values.mean().item()}

    def compute_q_values(self, rollout: AnyRollout) -> th.Tensor:
        """
        :param rollout: transitions, time by lane
        :return: ``Q(s, a; theta)`` for all actions a, with their graph, shape ``(n_transitions, n_actions)``
        """
        return self.local.learning_network(self.to_batch(rollout, rollout.observations))

    def compute_target_q_values(self, rollout: AnyRollout) -> th.Tensor:
        """
        :param rollout: transitions, time by lane
        :return: ``Q(s', a; theta^-)`` for all actions a, shape ``(n_steps, n_lanes, n_actions)``
        """
        return rollout.unflatten(self.target_network(self.to_batch(rollout, rollout.next_observations)))

    @property
    def target_network(self) -> QNetwork:
        """A view of the shared target network."""
        share_memory(self._target_parameters, self.shared.target_parameters)
        return self._target_network

    def after_step(self, num_timesteps: int | float, n_new: int | float) -> None:
        """
        Update the target network once for each multiple of the interval that this step crossed.

        :param num_timesteps: environment steps of all lanes, including these (the paper's T)
        :param n_new: by how many of them T has grown by this step
        """
        n_syncs = count_syncs(self.settings.target_update_interval, num_timesteps - n_new, num_timesteps)
        if n_syncs > 0:
            self.before_target_sync()
            self.shared.sync_target(n_syncs, self.settings.tau)

    def before_target_sync(self) -> None:
        """Called before the target network is updated."""
