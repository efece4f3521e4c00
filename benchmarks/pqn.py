"""
PQN (Gallici et al. 2025, "Simplifying Deep Temporal Difference Learning"), to compare with. It is written after
CleanRL's single file, with its hyperparameters, and shares no code with our algorithms. Like them, it learns action
values without a replay buffer. Unlike them, it acts and learns alternately, with all envs in one batch, and learns from
lambda-returns in several epochs.
"""

from collections.abc import Callable
from typing import Any

import torch as th
from stable_baselines3.common.vec_env import VecEnv, VecTransposeImage
from torch import nn


def make_network(n_actions: int) -> nn.Sequential:
    """
    :param n_actions: number of actions
    :return: the Nature CNN with ``LayerNorm`` before each ReLU
    """
    return nn.Sequential(
        *(nn.Conv2d(4, 32, 8, stride=4), nn.LayerNorm([32, 20, 20]), nn.ReLU()),
        *(nn.Conv2d(32, 64, 4, stride=2), nn.LayerNorm([64, 9, 9]), nn.ReLU()),
        *(nn.Conv2d(64, 64, 3), nn.LayerNorm([64, 7, 7]), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(3136, 512), nn.LayerNorm(512), nn.ReLU()),
        nn.Linear(512, n_actions),
    )


class PQN:
    """
    PQN with a constant epsilon.

    :param env: VecEnv whose observations are images of four frames
    :param epsilon: probability of a random action
    """

    N_STEPS, N_EPOCHS, N_MINIBATCHES = 128, 4, 4
    GAMMA, LAMBDA, MAX_GRAD_NORM = 0.99, 0.65, 10.0

    def __init__(self, env: VecEnv, epsilon: float = 0.1) -> None:
        self.env = VecTransposeImage(env)
        self.epsilon = epsilon
        self.num_timesteps = 0
        self.n_actions = int(env.action_space.n)  # type: ignore[attr-defined]
        self.network = make_network(self.n_actions)
        self.optimizer = th.optim.RAdam(self.network.parameters(), lr=2.5e-4)
        self.observations = th.as_tensor(self.env.reset())

    def learn(self, total_timesteps: int, callback: Callable[..., bool] | None = None, **_: Any) -> "PQN":
        """
        :param total_timesteps: number of further environment steps
        :param callback: function that is called after each update; the training ends if it returns False
        :return: the trained model
        """
        end = self.num_timesteps + total_timesteps
        while self.num_timesteps < end:
            self._learn_from(*self._collect())
            if callback is not None and not callback(locals(), globals()):
                break
        return self

    def _q_values(self, observations: th.Tensor) -> th.Tensor:
        return self.network(observations.float() / 255)

    @th.no_grad()
    def _collect(self) -> tuple[th.Tensor, ...]:
        steps = []
        q_values = self._q_values(self.observations)
        for _ in range(self.N_STEPS):
            explores = th.rand(self.env.num_envs) < self.epsilon
            actions = th.where(explores, th.randint(self.n_actions, explores.shape), q_values.argmax(dim=1))
            observations = self.observations
            new_obs, rewards, dones, _infos = self.env.step(actions.numpy())
            self.observations = th.as_tensor(new_obs)
            q_values = self._q_values(self.observations)
            next_values = q_values.max(dim=1).values
            steps.append((observations, actions, th.as_tensor(rewards), ~th.as_tensor(dones), next_values))
            self.num_timesteps += self.env.num_envs
        all_observations, all_actions, *rest = (th.stack(values) for values in zip(*steps, strict=True))
        returns = self._lambda_returns(*rest)
        return all_observations.flatten(0, 1), all_actions.flatten(), returns.flatten()

    def _lambda_returns(self, rewards: th.Tensor, goes_on: th.Tensor, next_values: th.Tensor) -> th.Tensor:
        returns = th.empty_like(rewards)
        following = next_values[-1]
        for t in reversed(range(self.N_STEPS)):
            bootstrap = self.LAMBDA * following + (1 - self.LAMBDA) * next_values[t]
            following = returns[t] = rewards[t] + self.GAMMA * goes_on[t] * bootstrap
        return returns

    def _learn_from(self, observations: th.Tensor, actions: th.Tensor, returns: th.Tensor) -> None:
        for _ in range(self.N_EPOCHS):
            for batch in th.randperm(len(returns)).chunk(self.N_MINIBATCHES):
                q_values = self._q_values(observations[batch])
                chosen = q_values.gather(dim=1, index=actions[batch, None]).squeeze(dim=1)
                self.optimizer.zero_grad()
                nn.functional.mse_loss(chosen, returns[batch]).backward()
                nn.utils.clip_grad_norm_(self.network.parameters(), self.MAX_GRAD_NORM)
                self.optimizer.step()
