"""What the value-based methods add: epsilon, the target network and the loss of TD errors."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.dqn.policies import DQNPolicy, QNetwork

from sb3_async1step.common.async_algorithm import AsyncAlgorithm, Backend
from sb3_async1step.common.optimizers import SharedRMSprop
from sb3_async1step.common.space_checks import check_first_action
from sb3_async1step.parameter_checks import (
    check,
    check_choice,
    check_proportions,
    check_unit_interval,
    check_whole,
    is_number,
    to_list,
)
from sb3_async1step.sb3_internals import dump_logs_by_episodes
from sb3_async1step.value_based.actor_learner import LOSSES, ValueBasedSettings
from sb3_async1step.value_based.exploration import Exploration, allot_final_epsilons, make_exploration_schedule
from sb3_async1step.value_based.policies import CnnPolicy, MlpPolicy, MultiInputPolicy, warn_of_own_predict
from sb3_async1step.value_based.target_network import SharedQNetworks, count_syncs
from sb3_async1step.vec_envs.observations import list_spaces

# Annealed to zero, as in the paper (section 8 of its supplement)
LEARNING_RATE = LinearSchedule(1e-3, 0.0, 1.0)
LEARNING_RATE_OF_IMAGES = LinearSchedule(1e-4, 0.0, 1.0)


def default_learning_rate(observation_space: spaces.Space) -> Schedule:
    """
    :param observation_space: observation space
    :return: the default learning rate, which is lower for images
    """
    has_images = any(is_image_space(space) for space in list_spaces(observation_space))
    return LEARNING_RATE_OF_IMAGES if has_images else LEARNING_RATE


FINAL_EPSILONS = ("exploration_final_eps", "exploration_final_probs")


class ValueBasedAlgorithm(AsyncAlgorithm):
    """
    Base class of the asynchronous methods that learn action values.

    Its parameters are documented where users meet them: :class:`~sb3_async1step.AsyncOneStepQ`.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
    }

    _own_attributes: ClassVar[tuple[str, ...]] = ("target_update_interval",)
    _followed: ClassVar[frozenset[str]] = AsyncAlgorithm._followed | {
        "target_update_interval",
        "tau",
        "loss",
        "exploration_fraction",
        "exploration_initial_eps",
        "exploration_final_eps",
        "exploration_final_probs",
    }
    _runtime_attributes: ClassVar[tuple[str, ...]] = (*AsyncAlgorithm._runtime_attributes, "_exploration")
    _fixed_while_learning: ClassVar[frozenset[str]] = AsyncAlgorithm._fixed_while_learning | {"q_net", "q_net_target"}
    _sb3_counterpart: ClassVar[str] = "DQN"

    policy: DQNPolicy
    q_net: QNetwork
    q_net_target: QNetwork
    action_space: spaces.Discrete

    def __init__(
        self,
        policy: str | type[DQNPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule | None = None,
        gamma: float = 0.99,
        n_envs: int | None = None,
        n_workers: int | Literal["auto"] = "auto",
        update_interval: int = 1,
        target_update_interval: int = 500,
        tau: float = 1.0,
        exploration_fraction: float = 0.1,
        exploration_initial_eps: float = 1.0,
        exploration_final_eps: float | Sequence[float] = (0.1, 0.01, 0.5),
        exploration_final_probs: Sequence[float] = (0.45, 0.45, 0.1),
        eval_eps: float = 0.01,
        max_grad_norm: float = 10.0,
        loss: Literal["mse", "huber"] = "mse",
        lock_updates: bool = False,
        backend: Backend = "threads",
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
    ) -> None:
        super().__init__(
            policy,
            env,
            learning_rate,  # type: ignore[arg-type] # None until the model is set up
            gamma=gamma,
            n_envs=n_envs,
            n_workers=n_workers,
            update_interval=update_interval,
            max_grad_norm=max_grad_norm,
            lock_updates=lock_updates,
            backend=backend,
            supported_action_spaces=(spaces.Discrete,),
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            seed=seed,
            device=device,
        )
        self.target_update_interval = target_update_interval
        self.tau = tau
        self.exploration_fraction = exploration_fraction
        self.exploration_initial_eps = exploration_initial_eps
        self.exploration_final_eps = exploration_final_eps
        self.exploration_final_probs = exploration_final_probs
        self.eval_eps = eval_eps
        self.loss = loss
        # Mean epsilon of the lanes
        self.exploration_rate = 0.0
        if _init_setup_model:
            self._setup_model()

    @classmethod
    def paper_hyperparams(cls) -> dict[str, Any]:
        """
        The paper's settings (sections 4 and 5.1, and section 8 of its supplement), which are made for Atari games
        with 16 lanes and millions of steps. The learning rate and RMSProp's epsilon are those that its authors gave in
        correspondence (https://github.com/muupan/async-rl/wiki), the norm to which gradients are clipped follows later
        implementations::

            AsyncOneStepQ("CnnPolicy", env, **AsyncOneStepQ.paper_hyperparams())

        Its layout, one thread for each actor-learner, is ``n_workers=env.num_envs``.

        :return: arguments of the constructor
        """
        return {
            "learning_rate": LinearSchedule(7e-4, 0.0, 1.0),
            "update_interval": 5,
            "target_update_interval": 10_000,
            "exploration_fraction": 0.1,
            "exploration_final_eps": (0.1, 0.01, 0.5),
            "exploration_final_probs": (0.4, 0.3, 0.3),
            "max_grad_norm": 40.0,
            "loss": "mse",
            "lock_updates": False,
            "policy_kwargs": {"optimizer_class": SharedRMSprop, "layer_norm": False},
        }

    def _setup_runtime(self) -> None:
        super()._setup_runtime()
        self._exploration: Exploration | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        if name in FINAL_EPSILONS:
            # Arrays, Series and tensors would be read by whichever version of NumPy or pandas loads the file
            value = to_list(value)
        super().__setattr__(name, value)

    def _setup_model(self) -> None:
        if self.learning_rate is None:
            self.learning_rate = default_learning_rate(self.observation_space)
        for name in FINAL_EPSILONS:
            # Arguments of load() have not been set one by one
            setattr(self, name, getattr(self, name))
        super()._setup_model()
        self._create_aliases()
        warn_of_own_predict(self.policy)

    def _create_aliases(self) -> None:
        self.q_net = self.policy.q_net
        self.q_net_target = self.policy.q_net_target

    def _check_parameters(self) -> None:
        super()._check_parameters()
        check_whole(target_update_interval=self.target_update_interval)
        check_unit_interval(tau=self.tau, exploration_initial_eps=self.exploration_initial_eps, eval_eps=self.eval_eps)
        fraction = self.exploration_fraction
        check("exploration_fraction", fraction, is_number(fraction) and 0 < fraction <= 1, "in (0, 1]")
        check_choice("loss", self.loss, LOSSES)
        check_first_action(self.action_space, self.policy_class, MlpPolicy)
        check_proportions(
            "exploration_final_eps",
            self.exploration_final_eps,
            "exploration_final_probs",
            self.exploration_final_probs,
        )

    def _make_settings(self, num_envs: int) -> ValueBasedSettings:
        return ValueBasedSettings(**self._get_value_based_settings(num_envs))

    def _get_value_based_settings(self, num_envs: int) -> dict[str, Any]:
        """
        :param num_envs: number of env lanes
        :return: arguments of :class:`~sb3_async1step.value_based.actor_learner.ValueBasedSettings`
        """
        # One of its parameters may have changed
        self._exploration = None
        return {
            "device": self.device,
            "gamma": self.gamma,
            "update_interval": self.update_interval,
            "max_grad_norm": self.max_grad_norm,
            "exploration": self._get_exploration_schedule(num_envs),
            "first_action": int(self.action_space.start),
            "target_update_interval": self.target_update_interval,
            "tau": self.tau,
            "loss": self.loss,
        }

    def _get_exploration_schedule(self, num_envs: int) -> Exploration:
        """Return the schedule of this training, which is made again whenever the workers get settings."""
        if self._exploration is None:
            final_epsilons = allot_final_epsilons(self.exploration_final_eps, self.exploration_final_probs, num_envs)
            self._exploration = make_exploration_schedule(
                self.exploration_initial_eps, final_epsilons, self.exploration_fraction
            )
        return self._exploration

    def _share_parameters(self) -> SharedQNetworks:
        return SharedQNetworks(self.policy, self.lock_updates)

    def learn_from_lanes(self, lanes: range, num_envs: int) -> None:
        """
        Learn as one of several nodes: the model's env has some of the lanes of all nodes, with the final epsilons that
        these would have in an env of all lanes.

        :param lanes: which these are
        :param num_envs: number of all lanes
        """
        finals = allot_final_epsilons(self.exploration_final_eps, self.exploration_final_probs, num_envs)
        self.exploration_final_eps = finals[lanes.start : lanes.stop].tolist()
        self.exploration_final_probs = [1.0 / len(lanes)] * len(lanes)

    @property
    def _longest_sync_interval(self) -> float:
        # Between two exchanges, each node would copy parameters of its own to its target network
        return self.target_update_interval / self.tau if self.tau > 0 else math.inf

    def _sync_after_jump(self, before: int, after: int) -> None:
        n_syncs = count_syncs(self.target_update_interval, before, after)
        if n_syncs > 0:
            assert isinstance(self._shared, SharedQNetworks)
            self._shared.sync_target(n_syncs, self.tau)

    def _forward_once(self, observation: Any) -> None:
        self.q_net(observation)

    def _update_schedules(self) -> None:
        super()._update_schedules()
        schedule = self._get_exploration_schedule(self.n_envs)
        self.exploration_rate = float(schedule(self._current_progress_remaining).mean())
        self.logger.record("rollout/exploration_rate", self.exploration_rate)

    def _log_is_due(self, log_interval: int, n_episodes_before: int, n_batches: int) -> bool:
        return self._episode_num // log_interval > n_episodes_before // log_interval

    def dump_logs(self) -> None:
        """Write log data: DQN's keys, and the ``async/*`` metrics over the updates since the last log."""
        self._record_updates()
        dump_logs_by_episodes(self)

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """
        Choose actions. While the model learns, this waits until no step and no update is in flight; threads other than
        that of ``learn()`` wait for a second at most.

        :param observation: one observation, or a batch
        :param state: not used
        :param episode_start: not used
        :param deterministic: greedy actions; otherwise epsilon-greedy with ``eval_eps``
        :return: the actions, and the state
        """
        actions, state = super().predict(observation, state, episode_start, deterministic)
        if deterministic:
            return actions, state
        # A callback may have set it
        check_unit_interval(eval_eps=self.eval_eps)
        explores = np.random.random(actions.shape) < self.eval_eps
        random_actions = np.random.randint(self.action_space.n, size=actions.shape) + self.action_space.start
        return np.where(explores, random_actions, actions), state

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "q_net", "q_net_target"]
