"""Algorithm 3 of the paper (in its supplement): one thread of the asynchronous advantage actor-critic."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import StateDependentNoiseDistribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.utils import explained_variance
from torch.nn import functional as F

from sb3_async1step.a3c.random_draws import DrawFrom
from sb3_async1step.vec_envs.observations import take_rows
from sb3_async1step.workers.actor_learner import ActorLearner, Settings
from sb3_async1step.workers.lanes import Rows
from sb3_async1step.workers.rollout import Rollout


@dataclass
class A3CSettings(Settings):
    """
    What all workers of A3C need to know.

    :param action_space: the env's
    :param gae_lambda: lambda of generalized advantage estimation, 1 for the paper's advantage
    :param ent_coef: coefficient of the entropy (the paper's beta)
    :param vf_coef: coefficient of the value loss
    :param normalize_advantage: whether the advantages of a rollout are normalized
    :param use_sde: whether the policy explores by state-dependent noise
    :param sde_sample_freq: time steps after which its noise is drawn again, -1 for once in a segment
    """

    action_space: spaces.Space
    gae_lambda: float
    ent_coef: float
    vf_coef: float
    normalize_advantage: bool
    use_sde: bool
    sde_sample_freq: int


#: What the distribution of gSDE keeps: the noise of single observations, and that of each lane
NOISE = frozenset({"exploration_mat", "exploration_matrices"})


class A3CActorLearner(ActorLearner[A3CSettings, Rollout]):
    """A worker of :class:`~sb3_async1step.A3C`."""

    settings: A3CSettings
    # How often noise was drawn in this segment
    _n_draws = 0

    @property
    def acting_policy(self) -> ActorCriticPolicy:
        """The view of theta' that acts."""
        policy = self.local.acting_network
        assert isinstance(policy, ActorCriticPolicy)
        return policy

    def begin_segment(self) -> None:
        super().begin_segment()
        self._n_draws = 0
        if self.settings.use_sde:
            self._draw_noise()

    def choose_actions(self, lanes: Rows) -> np.ndarray:
        # Perform a_t according to the policy pi(a_t | s_t; theta')
        freq, n_steps = self.settings.sde_sample_freq, self._n_since_update // self.n_lanes
        # Once for all lanes, although some of them may act before others
        if self.settings.use_sde and freq > 0 and n_steps // freq >= self._n_draws:
            self._draw_noise()
        with th.no_grad(), self._noise_of(lanes):
            actions = self._act(self.to_tensor(take_rows(self.observations, lanes))).cpu().numpy()
        # Distributions flatten continuous actions
        shape = self.settings.action_space.shape
        assert shape is not None
        return actions.reshape(-1, *shape)

    def _act(self, observations: Any) -> th.Tensor:
        policy = self.acting_policy
        if type(policy).forward is not ActorCriticPolicy.forward:
            # A2C acts by forward(), which a subclass has overridden
            return self._draw(lambda: policy(observations)[0])
        # The same as SB3's forward(), without the values
        return self._draw(policy.get_distribution(observations).get_actions)

    def to_env_actions(self, actions: np.ndarray) -> np.ndarray:
        # As SB3's A2C does
        space = self.settings.action_space
        if isinstance(space, (spaces.Discrete, spaces.MultiDiscrete)):
            return actions + space.start
        if not isinstance(space, spaces.Box):
            return actions
        if self.acting_policy.squash_output:
            return self.acting_policy.unscale_action(actions)
        return np.clip(actions, space.low, space.high)

    def compute_loss(self, rollout: Rollout) -> tuple[th.Tensor, dict[str, float]]:
        policy = self.local.learning_network
        assert isinstance(policy, ActorCriticPolicy)
        actions = self.to_batch(rollout, rollout.actions)
        if isinstance(self.settings.action_space, spaces.Box):
            actions = actions.reshape(len(actions), -1)
        values, log_prob, entropy = policy.evaluate_actions(self.to_batch(rollout, rollout.observations), actions)
        values = values.flatten()

        # A = R - V(s; theta'_v), through which no gradient flows
        constant_values = rollout.unflatten(values.detach()).cpu().numpy()
        advantages = self.to_batch(rollout, self.compute_advantages(rollout, constant_values))
        returns = advantages + values.detach()
        # A single advantage has no standard deviation
        if self.settings.normalize_advantage and len(advantages) > 1:
            advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)

        # d_theta <- d_theta + grad log pi(a_i | s_i; theta') (R - V(s_i; theta'_v)) + beta grad H(pi(s_i; theta'))
        policy_loss = -(advantages * log_prob).mean()
        # d_theta_v <- d_theta_v + d(R - V(s_i; theta'_v))^2 / d_theta'_v
        value_loss = F.mse_loss(returns, values)
        # Some distributions have no analytical entropy
        entropy_loss = -th.mean(-log_prob if entropy is None else entropy)
        loss = policy_loss + self.settings.ent_coef * entropy_loss + self.settings.vf_coef * value_loss
        metrics = {
            "train/policy_loss": policy_loss.item(),
            "train/value_loss": value_loss.item(),
            "train/entropy_loss": entropy_loss.item(),
        }
        explained = float(explained_variance(values.detach().cpu().numpy(), returns.cpu().numpy()))
        # Undefined for equal returns, as a single one is
        if not np.isnan(explained):
            metrics["train/explained_variance"] = explained
        return loss, metrics

    def compute_advantages(self, rollout: Rollout, values: np.ndarray) -> np.ndarray:
        """
        :param rollout: transitions, time by lane
        :param values: V(s; theta'_v), shape ``(n_steps, n_lanes)``
        :return: advantages, shape ``(n_steps, n_lanes)``
        """
        continues = (~rollout.terminated).astype(np.float32)
        ends = rollout.truncated | rollout.is_last
        goes_on = continues * ~ends
        # Python floats: NumPy's scalars would promote the arrays to float64
        gamma, gae_lambda = float(self.settings.gamma), float(self.settings.gae_lambda)

        td_errors = rollout.rewards + gamma * continues * self.compute_next_values(rollout, values, ends) - values
        advantages = np.empty_like(td_errors)
        following = np.zeros_like(td_errors[0])
        # GAE (Schulman et al. 2016, equation 16). With lambda = 1, it is R - V(s_i), with R <- r_i + gamma * R
        for i in reversed(range(len(rollout))):
            following = advantages[i] = td_errors[i] + gamma * gae_lambda * goes_on[i] * following
        return advantages

    def compute_next_values(self, rollout: Rollout, values: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """
        :param rollout: transitions, time by lane
        :param values: V(s; theta'_v), shape ``(n_steps, n_lanes)``
        :param ends: where the rollout or the episode does not go on, shape ``(n_steps, n_lanes)``
        :return: V(s'; theta'_v), shape ``(n_steps, n_lanes)``
        """
        next_values = np.zeros_like(values)
        next_values[:-1] = values[1:]
        observations = take_rows(rollout.next_observations, ends)
        with th.no_grad():
            next_values[ends] = self.acting_policy.predict_values(self.to_tensor(observations)).flatten().cpu().numpy()
        return next_values

    def _draw_noise(self) -> None:
        self._n_draws += 1
        with th.no_grad():
            self._draw(lambda: self.acting_policy.reset_noise(self.n_lanes))
        # As with A2C, predict() explores with the noise that was drawn last
        for name in NOISE:
            setattr(self.shared.policy.action_dist, name, getattr(self.acting_policy.action_dist, name))

    @contextmanager
    def _noise_of(self, lanes: Rows) -> Iterator[None]:
        """Let the policy use the noise of some lanes, each of which has its own."""
        distribution = self.acting_policy.action_dist
        if isinstance(lanes, slice) or not isinstance(distribution, StateDependentNoiseDistribution):
            yield
            return
        one, all_lanes = distribution.exploration_mat, distribution.exploration_matrices
        distribution.exploration_matrices = all_lanes[lanes]
        # For a single observation, SB3 uses this
        distribution.exploration_mat = distribution.exploration_matrices[0]
        try:
            yield
        finally:
            distribution.exploration_mat, distribution.exploration_matrices = one, all_lanes

    def _draw(self, function: Callable[[], Any]) -> Any:
        """Call a function that draws random numbers, which follow from this worker's own generator."""
        generator = th.Generator(self.settings.device)
        generator.manual_seed(int(self.random_generator.integers(2**63)))
        with DrawFrom(generator):
            return function()

    def get_extra_state(self) -> dict[str, Any]:
        distribution = self.acting_policy.action_dist
        if not isinstance(distribution, StateDependentNoiseDistribution):
            return {}
        return {"n_draws": self._n_draws, **{name: getattr(distribution, name).detach().cpu() for name in NOISE}}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self._n_draws = state.get("n_draws", 1)
        for name in NOISE.intersection(state):
            setattr(self.acting_policy.action_dist, name, state[name].to(self.settings.device))
