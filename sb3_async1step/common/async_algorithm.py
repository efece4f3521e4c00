"""What makes an asynchronous value-based method an SB3 algorithm: constructor, learn, predict, save and load."""

import functools
import io
import numbers
import pathlib
import time
import warnings
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar, TypeVar

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from gymnasium.vector.utils import create_empty_array
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, ProgressBarCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule, TensorDict
from stable_baselines3.common.utils import LinearSchedule, check_for_correct_spaces, obs_as_tensor
from stable_baselines3.common.vec_env import VecEnv, VecNormalize
from stable_baselines3.dqn.policies import DQNPolicy, QNetwork
from torch.nn import functional as F

from sb3_async1step.common.actor_learner import ActorLearner, Transitions, WorkerState
from sb3_async1step.common.exploration import BehaviourPolicy, ExplorationSchedule, allot_final_epsilons
from sb3_async1step.common.heap import keep_freed_memory
from sb3_async1step.common.model_file import check_saved_model, write_atomically
from sb3_async1step.common.optimizers import SharedRMSprop
from sb3_async1step.common.parallelism import (
    SMALL_NETWORK,
    count_multiplications,
    count_usable_cores,
    intra_op_threads_for,
)
from sb3_async1step.common.policies import CnnPolicy, MlpPolicy, MultiInputPolicy
from sb3_async1step.common.rollout import Observations, Rollout, concatenate_observations, slice_observations
from sb3_async1step.common.shared_parameters import SharedParameters
from sb3_async1step.common.vec_env_guard import guard_vec_env, watch_processes
from sb3_async1step.common.vec_env_split import find_unsplittable, group_lanes, rejoin_vec_env, split_vec_env
from sb3_async1step.common.worker_pool import Lookers, SerialWorkerPool, ThreadWorkerPool, WorkerPool

SelfAsyncAlgorithm = TypeVar("SelfAsyncAlgorithm", bound="AsyncAlgorithm")

LOSSES = {"mse": F.mse_loss, "huber": F.smooth_l1_loss}
#: Annealed to zero, as in the paper (section 8 of its supplement)
DEFAULT_LEARNING_RATE = LinearSchedule(1e-3, 0.0, 1.0)
#: As many lanes as the paper had actor-learners (section 5.1)
DEFAULT_N_ENVS = 16
WORKER_POOLS: dict[str, type[WorkerPool]] = {"threads": ThreadWorkerPool, "serial": SerialWorkerPool}


class AsyncAlgorithm(BaseAlgorithm):
    """
    Base class of the asynchronous one-step methods (Mnih et al. 2016, https://arxiv.org/abs/1602.01783).

    The lanes of a VecEnv (the paper's actor-learners) are split into groups, each of which is driven by a worker: a
    thread that acts in all its lanes in one batch, and applies its gradients to the shared online network without
    waiting for the other workers.

    :param policy: ``MlpPolicy``, ``CnnPolicy``, ``MultiInputPolicy`` (DQN's, with other networks by default), or a
        ``DQNPolicy``
    :param env: the environment to learn from (if registered in Gym, can be str)
    :param learning_rate: learning rate, or a function of the progress remaining (from 1 to 0); by default annealed
        linearly to zero
    :param gamma: discount factor
    :param n_envs: number of env lanes to make if ``env`` is an id, by default 16, as many as the paper had
        actor-learners, without a ``render_mode``. An env object has its own number
    :param n_workers: number of worker threads, at most the number of env lanes; ``"auto"`` for as many as there are
        usable cores, or one if the network is so small that several would only wait for Python's interpreter lock.
        With one worker, everything runs on the calling thread, with any VecEnv
    :param update_interval: vector steps of a worker's lanes between two updates (the paper's I_AsyncUpdate); a
        worker with a single lane also updates at the end of an episode, as in the paper
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
    :param lock_updates: whether workers wait for each other's updates. By default they don't (Hogwild); with another
        optimizer than :class:`~sb3_async1step.SharedRMSprop`, they always do
    :param backend: ``"threads"``, or ``"serial"``: the same workers take turns on the calling thread, reproducible
        bit for bit from the seed
    :param stats_window_size: number of episodes over which logged returns and lengths are averaged
    :param tensorboard_log: folder for TensorBoard logs (no logging if None)
    :param policy_kwargs: further parameters of the policy
    :param verbose: 0 for no output, 1 for info messages, 2 for debug messages
    :param seed: seed of all random generators
    :param device: ``"auto"`` means the CPU, for which these methods are made; any other device has to be named
    :param _init_setup_model: whether to build the networks at the creation of the instance
    :raises ValueError: if a parameter is out of range, or ``env`` has another number of lanes than ``n_envs``
    :raises TypeError: if the env can't be split among ``n_workers``
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
    }
    #: Whether the next action is chosen before the update, bootstrapped on, and then executed
    on_policy: ClassVar[bool]

    policy: DQNPolicy
    q_net: QNetwork
    q_net_target: QNetwork
    action_space: spaces.Discrete

    def __init__(
        self,
        policy: str | type[DQNPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = DEFAULT_LEARNING_RATE,
        gamma: float = 0.99,
        n_envs: int | None = None,
        n_workers: int | str = "auto",
        update_interval: int = 1,
        target_update_interval: int = 500,
        tau: float = 1.0,
        exploration_fraction: float = 0.1,
        exploration_initial_eps: float = 1.0,
        exploration_final_eps: float | Sequence[float] = (0.1, 0.01, 0.5),
        exploration_final_probs: Sequence[float] = (0.4, 0.3, 0.3),
        eval_eps: float = 0.01,
        max_grad_norm: float = 10.0,
        loss: str = "mse",
        lock_updates: bool = False,
        backend: str = "threads",
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
            make_lanes(env, n_envs, seed, verbose),
            learning_rate,
            policy_kwargs=policy_kwargs,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            verbose=verbose,
            device="cpu" if device == "auto" else device,
            support_multi_env=True,
            seed=seed,
        )
        self.gamma = gamma
        self.n_workers = n_workers
        self.update_interval = update_interval
        self.target_update_interval = target_update_interval
        self.tau = tau
        self.exploration_fraction = exploration_fraction
        self.exploration_initial_eps = exploration_initial_eps
        self.exploration_final_eps = exploration_final_eps
        self.exploration_final_probs = exploration_final_probs
        self.eval_eps = eval_eps
        self.max_grad_norm = max_grad_norm
        self.loss = loss
        self.lock_updates = lock_updates
        self.backend = backend
        # Mean epsilon of the lanes
        self.exploration_rate = 0.0
        self._random_generators: list[np.random.Generator] = []
        # Where the workers stopped, None after a reset of the env
        self._worker_states: list[WorkerState] | None = None
        self._lookers = Lookers()
        self._setup_runtime()

        if _init_setup_model:
            self._setup_model()
            if self.env is not None:
                self._check_n_workers(self.env)

    @classmethod
    def paper_hyperparams(cls) -> dict[str, Any]:
        """
        The paper's settings (sections 4 and 5.1, and section 8 of its supplement), which are made for 16 lanes of
        Atari games and millions of steps::

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
            "policy_kwargs": {"optimizer_class": SharedRMSprop, "layer_norm": False},
        }

    def _setup_runtime(self) -> None:
        """Set the attributes that are never saved."""
        # The pool of workers, while learn() runs
        self._pool: WorkerPool | None = None
        # Number of updates since the last log, the sums of their losses and of their gradients' staleness, and its time
        self._recent_updates = np.zeros(3)
        self._last_dump = time.perf_counter()

    def _setup_model(self) -> None:
        self._check_parameters()
        self._setup_lr_schedule()
        # Call the parent's version: ours would discard the loaded workers' random generators
        super().set_random_seed(self.seed)
        self.policy = self.policy_class(  # type: ignore[assignment]
            self.observation_space, self.action_space, self.lr_schedule, **self.policy_kwargs
        )
        self.policy = self.policy.to(self.device)
        self._create_aliases()

    def _create_aliases(self) -> None:
        self.q_net = self.policy.q_net
        self.q_net_target = self.policy.q_net_target

    # ------------------------------------------------------------------ checks

    def _check_parameters(self) -> None:
        if not isinstance(self.action_space, spaces.Discrete):
            raise ValueError(
                f"{type(self).__name__} needs a Discrete action space, but the env's is {self.action_space}. "
                "For other action spaces use e.g. PPO (Box, MultiDiscrete, MultiBinary) or SAC (Box)."
            )
        for name in ("update_interval", "target_update_interval"):
            value = getattr(self, name)
            _check(name, value, _is_whole(value) and value >= 1, "a whole number of at least 1")
        for name in ("gamma", "tau", "exploration_initial_eps", "eval_eps"):
            value = getattr(self, name)
            _check(name, value, _is_number(value) and 0 <= value <= 1, "in [0, 1]")
        fraction, norm = self.exploration_fraction, self.max_grad_norm
        _check("exploration_fraction", fraction, _is_number(fraction) and 0 < fraction <= 1, "in (0, 1]")
        _check("max_grad_norm", norm, _is_number(norm) and norm > 0, "positive")
        _check("loss", self.loss, self.loss in list(LOSSES), f"one of {sorted(LOSSES)}")
        _check("backend", self.backend, self.backend in list(WORKER_POOLS), f"one of {sorted(WORKER_POOLS)}")
        _check("lock_updates", self.lock_updates, isinstance(self.lock_updates, bool), "True or False")
        n_workers = self.n_workers
        is_valid = n_workers == "auto" or (_is_whole(n_workers) and int(n_workers) >= 1)
        _check("n_workers", n_workers, is_valid, '"auto" or from 1 to the number of env lanes')
        self._check_final_epsilons()

    def _check_final_epsilons(self) -> None:
        eps, probs = self.exploration_final_eps, self.exploration_final_probs
        values = list(eps) if isinstance(eps, Iterable) else [eps]
        are_valid = len(values) > 0 and all(_is_number(value) and 0 <= value <= 1 for value in values)
        _check("exploration_final_eps", eps, are_valid, "one or more values in [0, 1]")
        if not isinstance(eps, Iterable):
            return
        shares = list(probs) if isinstance(probs, Iterable) else []
        are_shares = len(shares) == len(values) and all(_is_number(share) and share >= 0 for share in shares)
        _check(
            "exploration_final_probs",
            probs,
            are_shares and abs(sum(shares) - 1) < 1e-6,
            f"{len(values)} proportions that sum up to 1, one for each value of exploration_final_eps ({eps})",
        )

    def _check_n_workers(self, env: VecEnv) -> None:
        n_workers = self.n_workers
        is_valid = n_workers == "auto" or int(n_workers) <= env.num_envs
        _check("n_workers", n_workers, is_valid, f'"auto" or from 1 to the number of env lanes ({env.num_envs})')
        self._count_workers(env)

    def _count_workers(self, env: VecEnv) -> int:
        """
        :param env: the training env
        :return: the number of workers for it
        """
        if self.n_workers == "auto":
            return self._choose_n_workers(env)
        unsplittable = find_unsplittable(env)
        n_workers = int(self.n_workers)
        if unsplittable is not None and n_workers > 1:
            raise TypeError(
                f"{unsplittable.__name__} can't be split among n_workers={n_workers}: use n_workers=1, "
                "or register the class with sb3_async1step.split_vec_env.register."
            )
        if n_workers > env.num_envs:
            # The model was loaded with another env than it was made for
            warnings.warn(f"n_workers={n_workers}, but there are only {env.num_envs} env lanes to share.", stacklevel=4)
        return min(n_workers, env.num_envs)

    def _choose_n_workers(self, env: VecEnv) -> int:
        n_workers = 1 if self._network_is_small() else min(count_usable_cores(), env.num_envs)
        unsplittable = find_unsplittable(env)
        if n_workers == 1 or unsplittable is None:
            return n_workers
        warnings.warn(
            f"{unsplittable.__name__} can't be split among several workers, so there will be only one. "
            "See sb3_async1step.split_vec_env for how to register a VecEnv class.",
            stacklevel=5,
        )
        return 1

    def _network_is_small(self) -> bool:
        observation: Any = create_empty_array(self.observation_space, n=1, fn=np.zeros)
        # The target network, which is always in evaluation mode: batch norm can't learn from a single observation
        return count_multiplications(self.q_net_target, obs_as_tensor(observation, self.device)) < SMALL_NETWORK

    # ------------------------------------------------------------------ algorithm

    @staticmethod
    @abstractmethod
    def next_state_values(target_network: QNetwork, rollout: Rollout) -> th.Tensor:
        """
        :param target_network: the target network
        :param rollout: ``n`` transitions
        :return: what to bootstrap on, values of s', shape ``(n,)``
        """

    def compute_loss(self, online_network: QNetwork, target_network: QNetwork, rollout: Rollout) -> th.Tensor:
        """
        The loss of Algorithm 1, a pure function of its arguments.

        :param online_network: the online network (theta)
        :param target_network: the target network (theta^-)
        :param rollout: ``n`` transitions
        :return: mean loss over the transitions, a scalar
        """
        with th.no_grad():
            # y = r for terminal s', else r + gamma * (value of s')
            td_targets = rollout.rewards + self.gamma * (1.0 - rollout.terminated) * self.next_state_values(
                target_network, rollout
            )
        q_values = online_network(rollout.observations).gather(dim=1, index=rollout.actions[:, None]).squeeze(dim=1)
        return LOSSES[self.loss](q_values, td_targets)

    def learn(
        self: SelfAsyncAlgorithm,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int | None = 4,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfAsyncAlgorithm:
        """
        Train the model.

        :param total_timesteps: number of environment steps over all lanes; exceeded by less than one vector step
        :param callback: called once for every ``num_envs`` transitions, on the calling thread, while no worker steps
        :param log_interval: number of episodes between two logs, None for no logs
        :param tb_log_name: name of the run for TensorBoard, by default the class's
        :param reset_num_timesteps: whether to start counting at zero again
        :param progress_bar: whether to show a progress bar
        :return: the trained model
        :raises BaseException: the exception of an env, a worker or a callback, with its own traceback. All workers
            have been stopped by then, and the model can still predict, save and continue learning
        """
        assert self.env is not None, "You must set the environment before calling learn()"
        if self._pool is not None:
            raise RuntimeError("This model's learn() is running already; another thread or a callback called it again.")
        warn_of_a_single_lane(self.env, type(self).__name__)
        if reset_num_timesteps or self._last_obs is None:
            # The env is about to be reset
            self._worker_states = None
        tb_log_name = tb_log_name or type(self).__name__
        with watch_processes(self.env):
            total_timesteps, callback = self._setup_learn(
                total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar
            )
        env = self.env
        self._setup_runtime()
        schedule = self._make_exploration_schedule(env.num_envs)
        self._update_schedules(schedule)
        try:
            callback.on_training_start(locals(), globals())
            with self._run_workers(env, schedule, total_timesteps) as pool:
                callback.on_rollout_start()
                for n_batches, transitions in enumerate(pool.batches(), start=1):
                    # SB3's callbacks look for these names
                    actions, new_obs, rewards = transitions.actions, transitions.new_obs, transitions.rewards
                    dones, infos = transitions.dones, transitions.infos
                    n_episodes_before = self._episode_num
                    with pool.changing_the_model():
                        self._count(transitions)
                    if len(transitions) == env.num_envs:
                        callback.update_locals(locals())
                        if not callback.on_step():
                            break
                    with pool.changing_the_model():
                        self._update_schedules(schedule)
                        if log_interval and self._episode_num // log_interval > n_episodes_before // log_interval:
                            self.dump_logs()
                    if n_batches % self.update_interval == 0:
                        callback.on_rollout_end()
                        callback.on_rollout_start()
                callback.on_rollout_end()
        except BaseException:
            close_progress_bars(callback)
            raise
        callback.on_training_end()
        return self

    @contextmanager
    def _run_workers(self, env: VecEnv, schedule: ExplorationSchedule, total_timesteps: int) -> Iterator[WorkerPool]:
        """Split the env among the workers, run them inside the ``with`` block, and put the env together again."""
        groups = group_lanes(env.num_envs, self._count_workers(env))
        # A single worker drives the env itself, whatever kind of VecEnv it is
        parts = [env] if len(groups) == 1 else split_vec_env(env, groups)
        workers = self._make_workers(parts, groups, schedule)
        on_threads = self.backend == "threads" and len(workers) > 1
        make_pool = WORKER_POOLS["threads" if on_threads else "serial"]
        if on_threads:
            keep_freed_memory()
        # Ctrl-C between the two halves of a th.no_grad() block leaves the process without gradients
        with th.enable_grad(), intra_op_threads_for(len(workers) if on_threads else 1, self._network_is_small()):
            try:
                self._pool = pool = make_pool(workers, self.num_timesteps, total_timesteps)
                self._lookers.wait_for_earlier_ones(pool)
                with (
                    watch_processes(env),
                    pool,
                    guard_vec_env(env, pool.standing_still) if len(parts) > 1 else nullcontext(),
                ):
                    yield pool
                self._remember_workers(workers)
            except BaseException:
                # The lanes may be anywhere: the next learn() has to reset the env
                self._last_obs = self._worker_states = None
                raise
            finally:
                self._pool = None
        if len(groups) > 1:
            rejoin_vec_env(env, parts, groups)

    def _remember_workers(self, workers: list[ActorLearner]) -> None:
        """Keep what the next ``learn()`` needs to go on where the workers are."""
        self._last_obs = concatenate_observations([worker.observations for worker in workers])
        self._worker_states = [worker.get_state() for worker in workers]

    def _make_workers(
        self, parts: list[VecEnv], groups: list[range], schedule: ExplorationSchedule
    ) -> list[ActorLearner]:
        observations: Observations | None = self._last_obs
        assert observations is not None
        shared = SharedParameters(self.policy, self.tau, self.lock_updates)
        workers = [
            ActorLearner(
                env=part,
                lanes=lanes,
                observations=slice_observations(observations, lanes),
                behaviour=BehaviourPolicy(
                    schedule.epsilons[lanes.start : lanes.stop], int(self.action_space.n), random_generator
                ),
                shared=shared,
                loss_function=self.compute_loss,
                on_policy=self.on_policy,
                update_interval=self.update_interval,
                target_update_interval=self.target_update_interval,
                max_grad_norm=self.max_grad_norm,
                first_action=int(self.action_space.start),
                device=self.device,
            )
            for part, lanes, random_generator in zip(
                parts, groups, self._get_random_generators(len(groups)), strict=True
            )
        ]
        for worker, state in zip(workers, self._worker_states or [], strict=False):
            worker.set_state(state)
        return workers

    def _get_random_generators(self, n_workers: int) -> list[np.random.Generator]:
        """One generator for each worker, from one seed sequence; they go on from one ``learn()`` to the next."""
        if len(self._random_generators) != n_workers:
            # Without a seed, follow numpy's global generator, which users may have seeded
            seed = np.random.randint(2**31) if self.seed is None else self.seed
            self._random_generators = [np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(n_workers)]
        return self._random_generators

    def set_random_seed(self, seed: int | None = None) -> None:
        """
        Set the seed of all random generators (Python's, numpy's, torch's, the env's, the workers').

        :param seed: the seed
        """
        super().set_random_seed(seed)
        if seed is not None:
            self.seed = seed
            self._random_generators = []

    def _make_exploration_schedule(self, num_envs: int) -> ExplorationSchedule:
        final_epsilons = allot_final_epsilons(self.exploration_final_eps, self.exploration_final_probs, num_envs)
        return ExplorationSchedule(self.exploration_initial_eps, final_epsilons, self.exploration_fraction)

    def _update_schedules(self, schedule: ExplorationSchedule) -> None:
        """Set the learning rate and the epsilons that the workers read."""
        self._update_current_progress_remaining(self.num_timesteps, max(self._total_timesteps, 1))
        self._update_learning_rate(self.policy.optimizer)
        learning_rate = self.policy.optimizer.param_groups[0]["lr"]
        _check("learning_rate", learning_rate, np.isfinite(learning_rate), "a finite number at all times")
        schedule.update(self._current_progress_remaining)
        self.exploration_rate = float(schedule.epsilons.mean())
        self.logger.record("rollout/exploration_rate", self.exploration_rate)

    # ------------------------------------------------------------------ logging

    def _count(self, transitions: Transitions) -> None:
        self.num_timesteps += len(transitions)
        self._n_updates += len(transitions.updates)
        self._episode_num += int(transitions.dones.sum())
        for update in transitions.updates:
            self._recent_updates += (1, update.loss, update.gradient_staleness)
        self._update_info_buffer(transitions.infos, transitions.dones)

    def dump_logs(self) -> None:
        """Write log data: DQN's keys, and the ``async/*`` metrics over the updates since the last log."""
        now = time.perf_counter()
        seconds, self._last_dump = now - self._last_dump, now
        n_updates, losses, staleness = self._recent_updates.tolist()
        self._recent_updates[:] = 0
        if n_updates > 0:
            self.logger.record("train/loss", losses / n_updates)
            self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
            self.logger.record("async/gradient_staleness", staleness / n_updates)
        if self._pool is not None:
            self.logger.record("async/updates_per_second", n_updates / seconds)
            self.logger.record("async/worker_idle_fraction", self._pool.take_idle_fraction())
        # SB3's own: reads only what BaseAlgorithm has
        OffPolicyAlgorithm.dump_logs(self)  # type: ignore[arg-type]

    # ------------------------------------------------------------------ access to the model while it learns

    @contextmanager
    def _standing_still(self) -> Iterator[None]:
        """No update is in flight inside the ``with`` block."""
        with self._lookers.look(lambda: self._pool):
            yield

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """
        Choose actions.

        :param observation: one observation, or a batch
        :param state: not used
        :param episode_start: not used
        :param deterministic: greedy actions; otherwise epsilon-greedy with ``eval_eps``
        :return: the actions, and the state
        """
        with self._standing_still():
            actions, state = self.policy.predict(observation, state, episode_start, deterministic)
        if deterministic:
            return actions, state
        explores = np.random.random(actions.shape) < self.eval_eps
        random_actions = np.random.randint(self.action_space.n, size=actions.shape) + self.action_space.start
        return np.where(explores, random_actions, actions), state

    def save(
        self,
        path: str | pathlib.Path | io.BufferedIOBase,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
    ) -> None:
        """
        Save the model, from any thread. While it learns, this waits until no update is in flight.

        The file is written completely or not at all: if anything fails, an existing file is left as it was.

        :param path: file to write, ".zip" is added to a name without suffix
        :param exclude: names of attributes not to save
        :param include: names of attributes to save that would not be saved by default
        """
        with self._standing_still():
            if self._pool is not None:
                self._remember_workers(self._pool.workers)
            if isinstance(path, (str, pathlib.Path)):
                # SB3's suffix
                with write_atomically(pathlib.Path(path), default_suffix=".zip") as file:
                    super().save(file, exclude, include)
            else:
                super().save(path, exclude, include)

    @classmethod
    def load(
        cls: type[SelfAsyncAlgorithm], path: str | pathlib.Path | io.BufferedIOBase, *args: Any, **kwargs: Any
    ) -> SelfAsyncAlgorithm:
        """
        Load a model. It may continue with another number of lanes or workers.

        :param path: path of a saved model, or an open file
        :param args: positional arguments of
            :meth:`BaseAlgorithm.load <stable_baselines3.common.base_class.BaseAlgorithm.load>`
        :param kwargs: keyword arguments of the same method
        :return: the model
        :raises ValueError: if the file is damaged, or was saved by another algorithm
        """
        check_saved_model(path, cls.__name__, expected="n_workers")
        return super().load(path, *args, **kwargs)

    def get_parameters(self) -> dict[str, dict]:
        """
        :return: state dicts of the policy and of its optimizer. As in SB3 they are views: copy them to keep them
        """
        with self._standing_still():
            return super().get_parameters()

    def set_parameters(
        self, load_path_or_dict: str | TensorDict, exact_match: bool = True, device: th.device | str = "auto"
    ) -> None:
        """
        Load parameters, with which the workers continue.

        :param load_path_or_dict: path of a saved model, or a dict as returned by ``get_parameters()``
        :param exact_match: whether all parameters must be given
        :param device: device onto which a file is loaded
        """
        with self._standing_still():
            super().set_parameters(load_path_or_dict, exact_match, device)
            if self._pool is not None:
                # Loading replaced the optimizer's statistics
                for worker in self._pool.workers:
                    worker.renew_optimizer()

    def set_env(self, env: GymEnv, force_reset: bool = True) -> None:
        """
        Set the training env. Unlike SB3's other algorithms, it may have another number of lanes than the last one:
        a model that was made from an env's id has many, of which its user may not know.

        :param env: the env
        :param force_reset: whether the next ``learn()`` resets it, which other lanes have to be
        :raises ValueError: if its spaces are others, or other lanes shall not be reset
        """
        env = self._wrap_env(env, self.verbose)
        check_for_correct_spaces(env, self.observation_space, self.action_space)
        if env.num_envs != self.n_envs and not force_reset:
            raise ValueError(
                f"The env has {env.num_envs} lane(s) and the model's last one had {self.n_envs}: "
                "it has to be reset, so leave force_reset out."
            )
        self.n_envs = env.num_envs
        super().set_env(env, force_reset)

    def get_vec_normalize_env(self) -> VecNormalize | None:
        """
        :return: the ``VecNormalize`` wrapper of the training env, if it has one. Inside a callback, its statistics do
            not change after this call
        """
        with self._standing_still():
            return super().get_vec_normalize_env()

    def _excluded_save_params(self) -> list[str]:
        ours = ["q_net", "q_net_target", "_pool", "_lookers", "_recent_updates", "_last_dump"]
        return [*super()._excluded_save_params(), *ours]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", "policy.optimizer"], []


def make_lanes(env: GymEnv | str | None, n_envs: int | None, seed: int | None, verbose: int) -> GymEnv | None:
    """
    :param env: an env, or the id of one that is registered in Gymnasium
    :param n_envs: number of lanes, by default ``DEFAULT_N_ENVS`` of an id, and what there is of an env
    :param seed: seed of the lanes' action spaces
    :param verbose: 1 or more to print what is made
    :return: the env, or so many lanes of the one that the id names
    :raises ValueError: if ``n_envs`` is no positive whole number, or not the number of the env's lanes
    """
    _check("n_envs", n_envs, n_envs is None or (_is_whole(n_envs) and n_envs >= 1), "a whole number of at least 1")
    if isinstance(env, str):
        n_lanes = n_envs or DEFAULT_N_ENVS
        if verbose >= 1:
            print(f"Creating {n_lanes} environments from the given name '{env}'")
        # SB3 would make them with render_mode="rgb_array". Nobody looks at them, and some envs do the work of drawing
        # nevertheless: LunarLander-v3 simulates the engines' sparks, which takes up to 3 ms a step
        return make_vec_env(functools.partial(gym.make, env), n_envs=n_lanes, seed=seed)
    n_lanes = env.num_envs if isinstance(env, VecEnv) else 1
    if n_envs is not None and env is not None and n_envs != n_lanes:
        raise ValueError(
            f"n_envs={n_envs}, but the env has {n_lanes} lane(s): n_envs is for an env's id. "
            f"Make a VecEnv of {n_envs} lanes by stable_baselines3.common.env_util.make_vec_env, or leave n_envs out."
        )
    return env


def warn_of_a_single_lane(env: VecEnv, algorithm: str) -> None:
    """
    :param env: the training env
    :param algorithm: name of the algorithm's class
    """
    if env.num_envs == 1:
        warnings.warn(
            f"{algorithm} learns from a single env lane, that is, with one actor-learner and from one transition at a "
            "time: without a replay buffer, this is slow and seldom learns well. Give it the env's id (then it makes "
            f"{DEFAULT_N_ENVS} lanes), or a VecEnv of several: "
            f"stable_baselines3.common.env_util.make_vec_env(..., n_envs={DEFAULT_N_ENVS}).",
            stacklevel=3,
        )


def close_progress_bars(callback: BaseCallback) -> None:
    """
    Close the progress bars that SB3 leaves open when the training fails.

    :param callback: the callback of the training
    """
    if isinstance(callback, CallbackList):
        for child in callback.callbacks:
            close_progress_bars(child)
    elif isinstance(callback, ProgressBarCallback) and hasattr(callback, "pbar"):
        callback.on_training_end()


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _is_whole(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _check(name: str, value: object, is_valid: bool | np.bool_, allowed: str) -> None:
    if not is_valid:
        raise ValueError(f"{name} must be {allowed}, got {value!r}")
