"""One worker, which acts in its env lanes, learns from its transitions, and updates the shared network."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.dqn.policies import QNetwork

from sb3_async1step.common.exploration import BehaviourPolicy
from sb3_async1step.common.rollout import Observations, Rollout, RolloutBuffer
from sb3_async1step.common.shared_parameters import SharedParameters

#: Takes the online network, the target network and a rollout, and returns the mean loss over its transitions
LossFunction = Callable[[QNetwork, QNetwork, Rollout], th.Tensor]


@dataclass
class UpdateStats:
    """
    Statistics of one update, for the logger.

    :param loss: mean loss over the transitions of the update
    :param gradient_staleness: number of updates that other workers applied after this worker had read the parameters
        for its gradient, and before it applied that gradient
    """

    loss: float
    gradient_staleness: int


@dataclass
class Transitions:
    """
    Transitions to report to the callbacks, as ``VecEnv.step()`` returns them, and the updates made with them.

    :param actions: the executed actions, shape ``(n,)``
    :param new_obs: the new observations, shape ``(n, *observation_shape)``
    :param rewards: the rewards, shape ``(n,)``
    :param dones: whether an episode ended, shape ``(n,)``
    :param infos: the info dictionaries, length ``n``
    :param updates: statistics of the updates
    """

    actions: np.ndarray
    new_obs: Observations
    rewards: np.ndarray
    dones: np.ndarray
    infos: list[dict[str, Any]]
    updates: list[UpdateStats]

    def __len__(self) -> int:
        return len(self.dones)


@dataclass
class WorkerState:
    """
    The state of a worker between two updates, from which it can continue.

    :param lanes: the lanes of the worker
    :param update_interval: vector steps between two updates
    :param rollout: the transitions since the last gradient, see :meth:`RolloutBuffer.get_state`
    :param chosen_actions: the actions to be executed next (Sarsa), None if they have not been chosen yet
    :param gradients: gradients accumulated since the last update (None for a parameter without a gradient)
    :param losses: mean loss of each part of the rollout that these gradients are from, and its number of time steps
    :param steps_since_update: vector steps since the last update
    """

    lanes: range
    update_interval: int
    rollout: dict[str, Any]
    chosen_actions: np.ndarray | None
    gradients: list[th.Tensor | None]
    losses: list[tuple[float, int]]
    steps_since_update: int


class ActorLearner:
    """
    A worker: the paper's actor-learner thread (Algorithm 1), which drives a group of env lanes in one batch.

    The gradient is the sum over the time steps of the rollout, as in the paper, and the mean over the lanes, so that
    its size depends on ``update_interval`` alone.

    :param env: VecEnv with the lanes of this worker
    :param lanes: the numbers of these lanes among all lanes of the model
    :param observations: the current observations of these lanes
    :param behaviour: the behaviour policy of these lanes
    :param shared: the networks and the optimizer that all workers share
    :param loss_function: computes the mean loss of a rollout
    :param on_policy: whether the next action is chosen before the update and then executed (Sarsa)
    :param update_interval: vector steps between two updates (the paper's I_AsyncUpdate)
    :param target_update_interval: environment steps, over all lanes, between two updates of the target network (the
        paper's I_target)
    :param max_grad_norm: norm to which the gradient is clipped
    :param first_action: the action of the environment that has index 0 in the network's output
    :param device: device of the networks
    """

    def __init__(
        self,
        env: VecEnv,
        lanes: range,
        observations: Observations,
        behaviour: BehaviourPolicy,
        shared: SharedParameters,
        loss_function: LossFunction,
        on_policy: bool,
        update_interval: int,
        target_update_interval: int,
        max_grad_norm: float,
        first_action: int,
        device: th.device,
    ) -> None:
        self.env = env
        self.lanes = lanes
        self.observations = observations
        self.behaviour = behaviour
        self.shared = shared
        self.loss_function = loss_function
        self.on_policy = on_policy
        self.target_update_interval = target_update_interval
        self.max_grad_norm = max_grad_norm
        self.first_action = first_action
        self.device = device

        self.rollout = RolloutBuffer(update_interval, observations)
        self.acting_network = shared.view_network(training=False)
        self.learning_network = shared.view_network(training=True)
        self.renew_optimizer()
        # Sarsa: the actions that the last transitions bootstrapped on, to be executed next
        self._chosen_actions: np.ndarray | None = None
        self._steps_since_update = 0
        self._losses: list[tuple[float, int]] = []
        self._n_updates_when_read = 0

    def renew_optimizer(self) -> None:
        """Use the shared optimizer's statistics again, after loading has replaced them."""
        self.optimizer = self.shared.view_optimizer(self.learning_network)

    def get_state(self) -> WorkerState:
        """
        :return: a copy of everything that another worker needs to continue in place of this one
        """
        gradients = [None if p.grad is None else p.grad.clone() for p in self.learning_network.parameters()]
        return WorkerState(
            self.lanes,
            self.rollout.n_steps,
            self.rollout.get_state(),
            self._chosen_actions,
            gradients,
            list(self._losses),
            self._steps_since_update,
        )

    def set_state(self, state: WorkerState) -> None:
        """
        Continue where another worker stopped. If its lanes or its update interval differ, its state is ignored, and the
        transitions since its last update are lost.

        :param state: a state returned by :meth:`get_state`
        """
        if (state.lanes, state.update_interval) != (self.lanes, self.rollout.n_steps):
            return
        self.rollout.set_state(state.rollout)
        self._chosen_actions = state.chosen_actions
        for parameter, gradient in zip(self.learning_network.parameters(), state.gradients, strict=True):
            parameter.grad = None if gradient is None else gradient.clone()
        self._losses = list(state.losses)
        self._steps_since_update = state.steps_since_update

    @property
    def n_lanes(self) -> int:
        return len(self.lanes)

    def step(self, num_timesteps: int) -> Transitions:
        """
        Take one step in every lane, and update the parameters if an update is due.

        :param num_timesteps: environment steps of all lanes, including these (the paper's T)
        :return: the transitions
        :raises ValueError: if a reward, an observation or the gradient is not finite; the shared parameters are not
            changed then
        """
        actions = self._chosen_actions
        if actions is None:
            actions = self._choose_actions(self.observations)
        env_actions = actions + self.first_action
        new_obs, rewards, dones, infos = self.env.step(env_actions)
        assert isinstance(new_obs, (np.ndarray, dict))
        self._check_finite("reward", rewards)
        self._check_finite("observation", new_obs)
        self._store_transitions(actions, rewards, new_obs, dones, infos)
        self.observations = new_obs
        self._steps_since_update += 1

        self._sync_target_if_due(num_timesteps)
        episode_ended = self.n_lanes == 1 and bool(dones[0])
        updates = [self._update()] if self._rollout_is_over(episode_ended) else []
        return Transitions(env_actions, new_obs, rewards, dones, infos, updates)

    def _check_finite(self, name: str, values: Observations) -> None:
        for array in values.values() if isinstance(values, dict) else [values]:
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                lane = int(np.flatnonzero(~np.isfinite(array.reshape(self.n_lanes, -1)).all(axis=1))[0])
                raise ValueError(
                    f"The {name} of env lane {self.lanes[lane]} is not finite: {array[lane]}. Nothing was learned "
                    "from it. Repair the env; stable_baselines3.common.vec_env.VecCheckNan helps to find the cause."
                )

    def _rollout_is_over(self, episode_ended: bool) -> bool:
        # As in the paper, a single lane also updates at the end of its episode
        return self._steps_since_update == self.rollout.n_steps or episode_ended

    def _choose_actions(self, observations: Observations, lanes: np.ndarray | slice = slice(None)) -> np.ndarray:
        with th.no_grad():
            q_values = self.acting_network(obs_as_tensor(observations, self.device))
        return self.behaviour.choose_actions(q_values.cpu().numpy(), lanes)

    def _store_transitions(
        self,
        actions: np.ndarray,
        rewards: np.ndarray,
        new_obs: Observations,
        dones: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        truncated = np.array([info.get("TimeLimit.truncated", False) for info in infos], dtype=bool) & dones
        next_observations = _with_terminal_observations(new_obs, np.flatnonzero(truncated), infos)
        if next_observations is not new_obs:
            self._check_finite("terminal observation", next_observations)
        next_actions: np.ndarray | int = -1
        if self.on_policy:
            next_actions = self._choose_next_actions(next_observations, new_obs, np.flatnonzero(truncated))
        self.rollout.add(self.observations, actions, rewards, next_observations, dones & ~truncated, next_actions)

    def _choose_next_actions(
        self, next_observations: Observations, new_obs: Observations, truncated_lanes: np.ndarray
    ) -> np.ndarray:
        """
        Choose the next actions before the update: Sarsa bootstraps on the very actions that it executes next.

        After a truncation the two differ. Sarsa bootstraps on an action for the terminal observation, which is drawn
        first, and executes another one for the first observation of the new episode.
        """
        bootstrap_actions = None
        if len(truncated_lanes) > 0:
            bootstrap_actions = self._choose_actions(_rows(next_observations, truncated_lanes), truncated_lanes)
        self._chosen_actions = self._choose_actions(new_obs)
        next_actions = self._chosen_actions.copy()
        if bootstrap_actions is not None:
            next_actions[truncated_lanes] = bootstrap_actions
        return next_actions

    def _sync_target_if_due(self, num_timesteps: int) -> None:
        """Update the target network once for each multiple of the interval that this step crossed."""
        interval = self.target_update_interval
        n_syncs = num_timesteps // interval - (num_timesteps - self.n_lanes) // interval
        if n_syncs > 0:
            # The TD targets of the transitions so far are from the old target network: Algorithm 1 accumulates
            # gradients at every step
            self._accumulate_gradient()
            self.shared.sync_target(n_syncs)

    def _accumulate_gradient(self) -> None:
        n_steps = self.rollout.n_filled
        if n_steps == 0:
            return
        if not self._losses:
            self._n_updates_when_read = self.shared.n_updates
        rollout = self.rollout.take(self.device)
        # BatchNorm cannot normalize a single transition
        self.learning_network.set_training_mode(len(rollout.rewards) > 1)
        loss = self.loss_function(self.learning_network, self.shared.target_network, rollout)
        self.shared.share_buffers(self.learning_network)
        # Mean over the lanes, sum over the time steps
        (loss * n_steps).backward()
        self._losses.append((loss.item(), n_steps))

    def _update(self) -> UpdateStats:
        self._accumulate_gradient()
        self._clip_gradient()
        staleness = self.shared.apply_gradient(self.optimizer) - self._n_updates_when_read
        self.optimizer.zero_grad()
        losses, n_steps = zip(*self._losses, strict=True)
        self._losses.clear()
        self._steps_since_update = 0
        return UpdateStats(float(np.average(losses, weights=n_steps)), staleness)

    def _clip_gradient(self) -> None:
        norm = th.nn.utils.clip_grad_norm_(self.learning_network.parameters(), self.max_grad_norm)
        if not th.isfinite(norm):
            raise ValueError(
                f"The gradient's norm is {norm.item()}: the training diverges. The update was not applied. "
                "Lower the learning rate, or normalize rewards and observations (VecNormalize)."
            )


def _with_terminal_observations(
    new_obs: Observations, truncated_lanes: np.ndarray, infos: list[dict[str, Any]]
) -> Observations:
    """
    Return the observations that the transitions led to.

    Only truncated lanes need their terminal observation: after a termination, nothing is bootstrapped.
    """
    if len(truncated_lanes) == 0:
        return new_obs
    if isinstance(new_obs, dict):
        next_observations = {key: obs.copy() for key, obs in new_obs.items()}
        for lane in truncated_lanes:
            for key, obs in infos[lane]["terminal_observation"].items():
                next_observations[key][lane] = obs
        return next_observations
    next_obs = new_obs.copy()
    for lane in truncated_lanes:
        next_obs[lane] = infos[lane]["terminal_observation"]
    return next_obs


def _rows(observations: Observations, rows: np.ndarray) -> Observations:
    if isinstance(observations, dict):
        return {key: obs[rows] for key, obs in observations.items()}
    return observations[rows]
