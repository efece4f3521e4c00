from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch as th
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from stable_baselines3.dqn.policies import DQNPolicy

from sb3_async1step.async_n_step_q.actor_learner import NStepQActorLearner, NStepQSettings
from sb3_async1step.common.async_algorithm import Backend
from sb3_async1step.parameter_checks import check_unit_interval, check_whole
from sb3_async1step.value_based.algorithm import ValueBasedAlgorithm
from sb3_async1step.workers.actor_learner import ActorLearner


class AsyncNStepQ(ValueBasedAlgorithm):
    """
    Asynchronous n-step Q-learning (Mnih et al. 2016, Algorithm 2 in the supplement).

    Paper: https://arxiv.org/abs/1602.01783

    :param policy: ``MlpPolicy``, ``CnnPolicy``, ``MultiInputPolicy`` (DQN's, with other networks by default), or a
        ``DQNPolicy``
    :param env: the environment to learn from (if registered in Gym, can be str)
    :param learning_rate: learning rate, or a function of the progress remaining (from 1 to 0); by default annealed
        linearly to zero from 1e-3, or from 1e-4 if there are images (uint8, 0 to 255) among the observations
    :param gamma: discount factor
    :param n_envs: number of environments (lanes) to create if ``env`` is an id: 16 by default, the paper's number of
        actor-learners. They have no ``render_mode``. If ``env`` is an object, leave this out
    :param n_workers: number of worker threads, at most the number of env lanes; ``"auto"`` for as many as there are
        usable cores, or one if the network is so small that several would only wait for Python's interpreter lock.
        With one worker, everything runs on the calling thread, with any VecEnv
    :param update_interval: maximum number of time steps in a segment (the paper's t_max), after which a worker
        updates; a worker with a single lane also updates at the end of an episode, as in the paper
    :param target_update_interval: environment steps, over all lanes, between two updates of the target network
        (the paper's I_target)
    :param tau: soft update coefficient of the target network, 1 for a copy
    :param exploration_fraction: fraction of the training over which epsilon is annealed
    :param exploration_initial_eps: initial epsilon
    :param exploration_final_eps: final epsilon of all lanes, or the values that the lanes get
    :param exploration_final_probs: proportion of lanes for each final epsilon
    :param eval_eps: epsilon of ``predict(deterministic=False)``
    :param max_grad_norm: norm to which gradients are clipped
    :param loss: ``"mse"`` (the paper's) or ``"huber"`` (DQN's), of the TD error
    :param q_lambda: weight of the longer returns in the targets. 1 is the paper's n-step return; a smaller value mixes
        it with the shorter ones (Peng's Q(lambda), as in Gallici et al. 2025), 0 is the one-step return
    :param batch_size: number of transitions that an update learns from. The transitions of a segment are shuffled, and
        split into minibatches of about this size (as in Gallici et al. 2025). By default, one update learns from all of
        them, as in the paper
    :param lock_updates: whether workers learn in turns, so that no gradient is stale: one reads the parameters,
        computes a gradient and applies it before the next one does. Otherwise, they compute gradients at the same time,
        as in the paper, and apply them at the same time if the optimizer is :class:`~sb3_async1step.SharedRMSprop`, one
        after the other if it is any other, such as the default, Adam
    :param backend: ``"threads"``, or ``"serial"``: the same workers take turns on the calling thread, reproducible
        bit for bit from the seed
    :param stats_window_size: number of episodes over which logged returns and lengths are averaged
    :param tensorboard_log: folder for TensorBoard logs (no logging if None)
    :param policy_kwargs: further parameters of the policy
    :param verbose: 0 for no output, 1 for info messages, 2 for debug messages
    :param seed: seed of all random generators
    :param device: ``"auto"`` means the CPU, for which these methods are made; any other device has to be named
    :param _init_setup_model: whether to build the networks at the creation of the instance
    :raises AssertionError: if the action space is not ``Discrete``
    :raises ValueError: if a parameter is out of range, or ``env`` has another number of lanes than ``n_envs``
    :raises TypeError: if the env can't be split among ``n_workers``
    """

    actor_learner_class: ClassVar[type[ActorLearner]] = NStepQActorLearner
    _followed: ClassVar[frozenset[str]] = ValueBasedAlgorithm._followed | {"q_lambda", "batch_size"}

    def __init__(
        self,
        policy: str | type[DQNPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule | None = None,
        gamma: float = 0.99,
        n_envs: int | None = None,
        n_workers: int | Literal["auto"] = "auto",
        update_interval: int = 5,
        target_update_interval: int = 500,
        tau: float = 1.0,
        exploration_fraction: float = 0.1,
        exploration_initial_eps: float = 1.0,
        exploration_final_eps: float | Sequence[float] = (0.1, 0.01, 0.5),
        exploration_final_probs: Sequence[float] = (0.45, 0.45, 0.1),
        eval_eps: float = 0.01,
        max_grad_norm: float = 10.0,
        loss: Literal["mse", "huber"] = "mse",
        q_lambda: float = 1.0,
        batch_size: int | None = None,
        lock_updates: bool = True,
        backend: Backend = "threads",
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
    ) -> None:
        # Before super().__init__(), which checks all parameters
        self.q_lambda = q_lambda
        self.batch_size = batch_size
        super().__init__(
            policy,
            env,
            learning_rate,
            gamma=gamma,
            n_envs=n_envs,
            n_workers=n_workers,
            update_interval=update_interval,
            target_update_interval=target_update_interval,
            tau=tau,
            exploration_fraction=exploration_fraction,
            exploration_initial_eps=exploration_initial_eps,
            exploration_final_eps=exploration_final_eps,
            exploration_final_probs=exploration_final_probs,
            eval_eps=eval_eps,
            max_grad_norm=max_grad_norm,
            loss=loss,
            lock_updates=lock_updates,
            backend=backend,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            seed=seed,
            device=device,
            _init_setup_model=_init_setup_model,
        )

    def _check_parameters(self) -> None:
        super()._check_parameters()
        check_unit_interval(q_lambda=self.q_lambda)
        check_whole(or_none=True, batch_size=self.batch_size)

    def _make_settings(self, num_envs: int) -> NStepQSettings:
        settings = self._get_value_based_settings(num_envs)
        return NStepQSettings(**settings, q_lambda=self.q_lambda, batch_size=self.batch_size)
