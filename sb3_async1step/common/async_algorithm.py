"""What makes the paper's methods SB3 algorithms: constructor, checks, and learn()."""

import io
import math
import sys
from abc import abstractmethod
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.utils import obs_as_tensor

from sb3_async1step.callbacks.background_eval import check_evaluation_envs, stop_evaluations
from sb3_async1step.common.heap import HeapTrimmer, keep_freed_memory
from sb3_async1step.common.live_algorithm import LiveAlgorithm
from sb3_async1step.common.parallelism import (
    check_n_workers,
    count_multiplications,
    count_workers,
    count_workers_of_nodes,
    describe_workers,
    restore_intra_op_threads,
    set_intra_op_threads,
)
from sb3_async1step.common.space_checks import check_observation_space
from sb3_async1step.common.training_env import (
    make_lanes,
    warn_of_a_single_lane,
    warn_of_frames_skipped_twice,
    warn_of_no_update,
)
from sb3_async1step.common.update_log import UpdateLog
from sb3_async1step.common.warn import (
    list_modules_and_parameters,
    warn_of_what_is_not_followed,
    warn_the_caller,
    without_autocast,
)
from sb3_async1step.nodes.node import NodeRecipe
from sb3_async1step.nodes.ray_pool import RayWorkerPool
from sb3_async1step.nodes.ray_vec_env import RayVecEnv
from sb3_async1step.parameter_checks import (
    check,
    check_bool,
    check_choice,
    check_not_negative,
    check_positive,
    check_unit_interval,
    check_whole,
)
from sb3_async1step.sb3_internals import close_progress_bars
from sb3_async1step.vec_envs.guard import NOBODY_ELSE, guard_vec_env, unguard_vec_env
from sb3_async1step.vec_envs.healing_vec_env import HealingVecEnv
from sb3_async1step.vec_envs.observations import Observations, map_arrays, take_rows
from sb3_async1step.vec_envs.process_watcher import INTERRUPT_TIMEOUT, ProcessWatcher, make_process_watcher
from sb3_async1step.vec_envs.split import find_base, find_unsplittable
from sb3_async1step.workers.actor_learner import ActorLearner
from sb3_async1step.workers.gate import Call, learning_on
from sb3_async1step.workers.lanes import Lanes, SharedLanes
from sb3_async1step.workers.pool import Pool, WorkerPool
from sb3_async1step.workers.serial_pool import SerialWorkerPool
from sb3_async1step.workers.shared_parameters import SharedParameters
from sb3_async1step.workers.step_result import check_first_observations
from sb3_async1step.workers.thread_pool import ThreadWorkerPool
from sb3_async1step.workers.transitions import Transitions

SelfAsyncAlgorithm = TypeVar("SelfAsyncAlgorithm", bound="AsyncAlgorithm")

#: Attributes that belong to a model's lanes and logs: saved without them, it can predict, and learn with other envs
STATE_OF_LANES = ("_last_obs", "_last_original_obs", "_worker_states", "ep_info_buffer", "_random_generators")

Backend = Literal["threads", "serial"]
WORKER_POOLS: dict[str, type[WorkerPool]] = {"threads": ThreadWorkerPool, "serial": SerialWorkerPool}


class AsyncAlgorithm(LiveAlgorithm):
    """
    Base class of the asynchronous methods (Mnih et al. 2016, https://arxiv.org/abs/1602.01783).

    The lanes of a VecEnv (the paper's actor-learners) are split into groups, each of which is driven by a worker: a
    thread that acts in all its lanes in one batch, and applies its gradients to the shared online network without
    waiting for the other workers. A subclass says which class its workers have and what they need to know.

    :param policy: name of one of ``policy_aliases``, or a class of policies
    :param env: the environment to learn from (if registered in Gym, can be str)
    :param learning_rate: learning rate, or a function of the progress remaining (from 1 to 0)
    :param gamma: discount factor
    :param n_envs: number of environments (lanes) to create if ``env`` is an id: 16 by default, the paper's number of
        actor-learners. They have no ``render_mode``. If ``env`` is an object, leave this out
    :param n_workers: number of worker threads, at most the number of env lanes; ``"auto"`` for as many as there are
        usable cores, or one if the network is so small that several would only wait for Python's interpreter lock.
        With one worker, everything runs on the calling thread, with any VecEnv
    :param update_interval: vector steps of a worker's lanes between two updates (the paper's I_AsyncUpdate and t_max);
        a worker with a single lane also updates at the end of an episode, as in the paper
    :param max_grad_norm: norm to which gradients are clipped
    :param lock_updates: whether workers learn in turns, so that no gradient is stale: one reads the parameters,
        computes a gradient and applies it before the next one does. Otherwise, they compute gradients at the same time,
        and apply them at the same time if the optimizer is :class:`~sb3_async1step.SharedRMSprop`, one after the other
        if it is any other
    :param backend: ``"threads"``, or ``"serial"``: the same workers take turns on the calling thread, reproducible
        bit for bit from the seed
    :param use_sde: whether the policy explores by state-dependent noise
    :param sde_sample_freq: time steps after which that noise is drawn again
    :param supported_action_spaces: classes of action spaces that the algorithm supports
    :param stats_window_size: number of episodes over which logged returns and lengths are averaged
    :param tensorboard_log: folder for TensorBoard logs (no logging if None)
    :param policy_kwargs: further parameters of the policy
    :param verbose: 0 for no output, 1 for info messages, 2 for debug messages
    :param seed: seed of all random generators
    :param device: ``"auto"`` means the CPU, for which these methods are made; any other device has to be named
    :raises ValueError: if a parameter is out of range, or ``env`` has another number of lanes than ``n_envs``
    :raises AssertionError: if an action or observation space is not supported, as in SB3
    :raises TypeError: if the env can't be split among ``n_workers``
    """

    #: Class of the workers
    actor_learner_class: ClassVar[type[ActorLearner]]

    def __init__(
        self,
        policy: str | type[BasePolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule,
        gamma: float,
        n_envs: int | None,
        n_workers: int | Literal["auto"],
        update_interval: int,
        max_grad_norm: float,
        lock_updates: bool,
        backend: Backend,
        supported_action_spaces: tuple[type[spaces.Space], ...],
        use_sde: bool = False,
        sde_sample_freq: int = -1,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
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
            use_sde=use_sde,
            sde_sample_freq=sde_sample_freq,
            supported_action_spaces=supported_action_spaces,
        )
        self.gamma = gamma
        self.n_workers = n_workers
        self.update_interval = update_interval
        self.max_grad_norm = max_grad_norm
        self.lock_updates = lock_updates
        self.backend = backend
        self._random_generators: list[np.random.Generator] = []
        # From which they were spawned
        self._seed_of_generators = seed
        check_n_workers(n_workers, self.env)

    def _setup_runtime(self) -> None:
        super()._setup_runtime()
        # What the workers share, while learn() runs
        self._shared: SharedParameters | None = None
        self._process_watcher: ProcessWatcher | None = None
        self._callback: BaseCallback | None = None
        # True from the first step until the lanes' last observations are stored
        self._lanes_may_be_anywhere = False
        self._update_log = UpdateLog()

    def _setup_model(self) -> None:
        self._check_parameters()
        check_observation_space(self.observation_space)
        self._setup_lr_schedule()
        # Call the parent's version: ours would discard the loaded workers' random generators
        super().set_random_seed(self.seed)
        self.policy = self._make_policy().to(self.device)

    # ------------------------------------------------------------------ what an algorithm says

    @classmethod
    @abstractmethod
    def paper_hyperparams(cls) -> dict[str, Any]:
        """
        :return: the paper's settings, arguments of the constructor
        """

    def _make_policy(self) -> BasePolicy:
        """
        :return: a new policy, with its optimizer
        """
        return self.policy_class(self.observation_space, self.action_space, self.lr_schedule, **self.policy_kwargs)

    def _check_parameters(self) -> None:
        check_whole(update_interval=self.update_interval)
        check_unit_interval(gamma=self.gamma)
        check_positive(or_infinite=True, max_grad_norm=self.max_grad_norm)
        check_choice("backend", self.backend, WORKER_POOLS)
        check_bool(lock_updates=self.lock_updates)
        check_whole(stats_window_size=self._stats_window_size)
        check_whole(at_least=0, or_none=True, seed=self.seed)
        if not callable(self.learning_rate):
            check_not_negative(learning_rate=self.learning_rate)

    @abstractmethod
    def _share_parameters(self) -> SharedParameters:
        """
        :return: what the workers share
        """

    @abstractmethod
    def _forward_once(self, observation: Any) -> None:
        """
        Make the forward pass that acting takes, in evaluation mode.

        :param observation: tensors, a batch of one
        """

    @abstractmethod
    def _log_is_due(self, log_interval: int, n_episodes_before: int, n_batches: int) -> bool:
        """
        :param log_interval: what ``learn()`` was given
        :param n_episodes_before: number of episodes before the last batch of transitions
        :param n_batches: number of batches since ``learn()`` began
        :return: whether it is time to write a log
        """

    # ------------------------------------------------------------------ learn

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
        :param callback: called once for every ``num_envs`` transitions, on the calling thread. No worker begins a step
            meanwhile; one that has begun a step may still apply its update, for which ``predict()``, ``save()`` and
            ``get_parameters()`` wait
        :param log_interval: number of episodes (A3C: of iterations) between two logs, None for no logs
        :param tb_log_name: name of the run for TensorBoard, by default the class's
        :param reset_num_timesteps: whether to start counting at zero again
        :param progress_bar: whether to show a progress bar
        :return: the trained model
        :raises RuntimeError: if ``learn()`` is running already, of this model or of another one with the same env
        :raises BaseException: the exception of an env, a worker or a callback, with its own traceback. All workers
            have been stopped by then, and the model can still predict, save and continue learning
        """
        assert self.env is not None, "You must set the environment before calling learn()"
        call = Call(sys._getframe())
        if not self._gate.begin_learning(call):
            raise RuntimeError("This model's learn() is running already; another thread or a callback called it again.")
        try:
            tb_log_name = tb_log_name or type(self).__name__
            # Ctrl-C between the two halves of a th.no_grad() block leaves the process without gradients
            with th.enable_grad():
                self._train(
                    call, total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar
                )
        finally:
            # Twice, since a Ctrl-C may interrupt the first
            try:
                self._end_learning(call)
            finally:
                self._end_learning(call)
        return self

    def _train(
        self,
        call: Call,
        total_timesteps: int,
        callback: MaybeCallback,
        log_interval: int | None,
        tb_log_name: str,
        reset_num_timesteps: bool,
        progress_bar: bool,
    ) -> None:
        """Train; ``learn()``, whose call ``call`` is, cleans up afterwards."""
        assert self.env is not None
        total_timesteps = self._prepare_training(call, total_timesteps, reset_num_timesteps)
        self._process_watcher = make_process_watcher(self.env)
        try:
            self._process_watcher.start()
            warn_of_frames_skipped_twice(self.env)
            total_timesteps, callback = self._setup_learn(
                total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar
            )
            self._callback = callback
            check_evaluation_envs(callback)
            try:
                callback.on_training_start(locals(), globals())
                # on_training_start() may have changed parameters
                self._check_parameters()
                self._update_schedules()
                run = self._run_nodes if isinstance(find_base(self.env), RayVecEnv) else self._run_workers
                run(call, total_timesteps, callback, log_interval)
            except BaseException:
                close_progress_bars(callback)
                raise
        except BaseException as exception:
            self._process_watcher.check(exception)
            raise
        # The lanes stand still, and a callback may play in them
        unguard_vec_env(self.env)
        callback.on_training_end()

    def _prepare_training(self, call: Call, total_timesteps: int, reset_num_timesteps: bool) -> int:
        """
        Claim the env, check the parameters, and forget what the last training has left.

        :param call: the call of ``learn()``
        :param total_timesteps: what ``learn()`` was given
        :param reset_num_timesteps: what ``learn()`` was given
        :return: the number of environment steps, as a whole number
        """
        assert self.env is not None
        base = find_base(self.env)
        if not learning_on(base).claim(call):
            raise RuntimeError(NOBODY_ELSE)
        check("total_timesteps", total_timesteps, total_timesteps > -math.inf, "a number")
        # As with SB3's algorithms, it may be 1e6 or infinite; workers and nodes count in whole numbers
        total_timesteps = math.ceil(min(total_timesteps, sys.maxsize))
        # Attributes may have been set since the construction
        self._check_parameters()
        warn_of_a_single_lane(self.env, type(self).__name__)
        self._setup_runtime()
        if reset_num_timesteps or self._last_obs is None:
            # The env is about to be reset
            self._worker_states = None
        self._lanes_may_be_anywhere = True
        if isinstance(base, RayVecEnv) and base.restart_dead_nodes():
            # The new lanes have to be reset
            self._last_obs = None
        return total_timesteps

    def _run_workers(self, call: Call, total_timesteps: int, callback: BaseCallback, log_interval: int | None) -> None:
        """Split the env among the workers, follow them until they have ended, and put the env together again."""
        env = self.env
        assert env is not None
        n_multiplications = self._count_multiplications()
        n_workers = count_workers(self.n_workers, env, n_multiplications)
        observations = check_first_observations(self._last_obs, self.observation_space, env.num_envs)
        shared_lanes = SharedLanes(env, n_workers, in_step=self.backend == "serial")
        # Several workers take unequal shares of the steps, a single lane's episode may end, a segment may have begun
        if n_workers == 1 < env.num_envs and self._worker_states is None and not shared_lanes.is_async:
            warn_of_no_update(total_timesteps - self.num_timesteps, self.update_interval, env.num_envs)
        workers = self._make_workers(shared_lanes.make_lanes(), shared_lanes.groups, observations)
        on_threads = self.backend == "threads" and n_workers > 1
        if on_threads:
            keep_freed_memory()
        parts = list_modules_and_parameters(self.policy)
        set_intra_op_threads(n_workers if on_threads else 1, n_multiplications, workers[0].n_lanes, call)
        if self.verbose >= 1:
            print(describe_workers(workers))
        make_pool = WORKER_POOLS["threads" if on_threads else "serial"]
        self._pool = make_pool(workers, self._gate, self.num_timesteps, total_timesteps)
        guard_vec_env(env, self._gate.closed, self._pool.settle, lambda: self._gate.is_inside() or not call.is_running)
        with without_autocast(self.device):
            self._follow(self._pool, callback, log_interval)
        self._pool.stop()
        # A callback may have ended the training when a worker had failed
        self._pool.check()
        self._pool.settle()
        # Other threads may be about to look at the model
        with self._gate.passed():
            self._pool.finish_steps()
            self._remember_workers()
        warn_of_what_is_not_followed(self.policy, parts, workers)
        shared_lanes.rejoin()
        self._lanes_may_be_anywhere = False

    def _run_nodes(self, call: Call, total_timesteps: int, callback: BaseCallback, log_interval: int | None) -> None:
        """Let the nodes of a ``RayVecEnv`` learn, and follow them until they have ended."""
        env = self.env
        assert env is not None
        n_workers = count_workers_of_nodes(self.n_workers, env, self._count_multiplications())
        if self.device.type != "cpu":
            warn_the_caller("The nodes of a RayVecEnv learn on the CPU, whatever the model's device is.")
        self._shared = self._share_parameters()
        recipe = self._make_node_recipe(n_workers, total_timesteps)
        self._pool = RayWorkerPool(
            env,
            self._gate,
            recipe,
            self.update_interval,
            self._longest_sync_interval,
            self._shared,
            self._sync_after_jump,
        )
        if self.verbose >= 1:
            print(self._pool.describe())
        # Whoever asks the lanes keeps nobody waiting: it may wait for a node that hangs, which this thread replaces
        guard_vec_env(env, nullcontext, self._pool.settle, lambda: not call.is_running)
        with without_autocast(self.device):
            self._follow(self._pool, callback, log_interval)
        self._pool.stop()
        self._pool.check()

    def _make_node_recipe(self, n_workers: int | None, total_timesteps: int) -> NodeRecipe:
        file = io.BytesIO()
        # The nodes have lanes of their own
        self.save(file, exclude=STATE_OF_LANES)
        seed = np.random.randint(2**31) if self.seed is None else self.seed
        return NodeRecipe(
            type(self),
            file.getvalue(),
            [parameter.requires_grad for parameter in self.list_learned_parameters()],
            self.lr_schedule,
            n_workers,
            self.num_timesteps,
            total_timesteps,
            seed,
            self.n_envs,
        )

    def get_workers(self) -> tuple[Pool | None, SharedParameters | None]:
        """
        :return: the workers and what they share, None if ``learn()`` does not run
        """
        return self._pool, self._shared

    def jump(self, num_timesteps: int) -> None:
        """
        Advance the number of time steps to that of all nodes.

        :param num_timesteps: environment steps of all models that learn together (the paper's T)
        """
        assert isinstance(self._pool, WorkerPool)
        self._pool.jump(num_timesteps)
        self._count_to(num_timesteps)
        # A node that joins late would act and learn as at the start
        self._update_schedules()

    def list_learned_parameters(self) -> list[th.nn.Parameter]:
        """
        :return: the parameters that workers learn
        """
        return self._share_parameters().parameters

    def learn_from_lanes(self, lanes: range, num_envs: int) -> None:
        """
        Learn as one of several nodes: the model's env has some of the lanes of all nodes.

        :param lanes: which these are
        :param num_envs: number of all lanes
        """

    @property
    def _longest_sync_interval(self) -> float:
        """Most environment steps of all nodes that should lie between two exchanges of their parameters."""
        return math.inf

    def _sync_after_jump(self, before: int, after: int) -> None:
        """
        Do what is due when the parameters were replaced by those of a later step.

        :param before: environment steps (the paper's T) of the parameters before
        :param after: those of the new ones
        """

    def _end_learning(self, call: Call) -> None:
        """Undo what the call of ``learn()`` has begun. If this is interrupted, it can be done again."""
        if self._process_watcher is not None:
            self._process_watcher.hurry()
        if self._pool is not None:
            self._pool.stop()
        if self.env is not None and call in learning_on(find_base(self.env)):
            unguard_vec_env(self.env)
        if self._process_watcher is not None:
            # After Ctrl-C, don't wait for a lane that hangs
            was_interrupted = isinstance(sys.exc_info()[1], KeyboardInterrupt)
            self._process_watcher.end(INTERRUPT_TIMEOUT if was_interrupted else math.inf)
        if self._callback is not None:
            stop_evaluations(self._callback)
        restore_intra_op_threads(call)
        # A thread that saves the model meanwhile keeps where the workers are
        with self._gate.passed():
            if self._lanes_may_be_anywhere:
                # The next learn() has to reset the env
                self._last_obs = self._worker_states = None
            self._pool = self._shared = self._process_watcher = self._callback = None
        if self.env is not None:
            learning_on(find_base(self.env)).discard(call)
        self._gate.end_learning(call)

    def _follow(self, pool: Pool, callback: BaseCallback, log_interval: int | None) -> None:
        """Count, log and call back, once for every ``num_envs`` transitions that the workers make."""
        assert self.env is not None
        # SB3's callbacks look for these names, and for those below
        env = self.env
        base = find_base(env)
        # Only the parts of a VecEnv that is split know; any other one knows by itself
        knows_resets = find_unsplittable(env) is not None
        heap = HeapTrimmer()
        n_rollout_steps = 0
        if self.num_timesteps < self._total_timesteps:
            callback.on_rollout_start()
        for n_batches, transitions in enumerate(pool.batches(), start=1):
            actions = clipped_actions = transitions.actions
            new_obs, rewards = transitions.new_obs, transitions.rewards
            dones, infos = transitions.dones, transitions.infos
            n_episodes_before = self._episode_num
            with self._gate.passed():
                self._count(transitions)
            if dones.any() and not knows_resets:
                base.reset_infos = pool.reset_infos
            if len(transitions) == pool.num_envs:
                callback.update_locals(locals())
                if not callback.on_step():
                    return
                n_rollout_steps += 1
            with self._gate.passed():
                self._update_schedules()
                if log_interval and self._log_is_due(log_interval, n_episodes_before, n_batches):
                    self.dump_logs()
            if n_rollout_steps >= self.update_interval:
                callback.on_rollout_end()
                n_rollout_steps = 0
                if self.num_timesteps < self._total_timesteps:
                    callback.on_rollout_start()
            heap.trim_when_due()
        if n_rollout_steps > 0:
            callback.on_rollout_end()

    def _make_workers(
        self, envs: Sequence[Lanes], groups: list[range], observations: Observations
    ) -> list[ActorLearner]:
        settings = self._make_settings(sum(map(len, groups)))
        self._shared = self._share_parameters()
        self._shared.progress_remaining = self._current_progress_remaining
        workers = []
        generators = self._get_random_generators(len(groups))
        for env, lanes, generator in zip(envs, groups, generators, strict=True):
            first = take_rows(observations, slice(lanes.start, lanes.stop))
            workers.append(self.actor_learner_class(settings, lanes, generator, env, first, self._shared))
        for worker, state in zip(workers, self._worker_states or [], strict=False):
            worker.set_state(state)
        return workers

    def _count_multiplications(self) -> int:
        """Count the multiplications of a forward pass for one observation."""
        assert self.env is not None
        observations = check_first_observations(self._last_obs, self.observation_space, self.env.num_envs)
        # A copy, since a features extractor may change its input in place
        tensors = obs_as_tensor(map_arrays(np.copy, take_rows(observations, slice(1))), self.device)
        # Batch norm can't learn from a single observation
        self.policy.set_training_mode(False)
        return count_multiplications(self.policy, lambda: self._forward_once(tensors))

    def _get_random_generators(self, n_workers: int) -> list[np.random.Generator]:
        """One generator for each worker, from one seed sequence; they go on from one ``learn()`` to the next."""
        if len(self._random_generators) != n_workers or self._seed_of_generators != self.seed:
            self._seed_of_generators = self.seed
            # Without a seed, follow numpy's global generator, which users may have seeded
            seed = np.random.randint(2**31) if self.seed is None else self.seed
            self._random_generators = [np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(n_workers)]
        return self._random_generators

    def set_random_seed(self, seed: int | None = None) -> None:
        """
        Set the seed of all random generators (Python's, numpy's, torch's, the env's, the workers').

        :param seed: the seed
        """
        if self._is_learning():
            raise RuntimeError("learn() has seeded its workers already: set the seed before or after it.")
        super().set_random_seed(seed)
        if seed is not None:
            self.seed = seed
            self._random_generators = []

    def _update_schedules(self) -> None:
        """Set the learning rate and the progress, from which workers follow their own schedules."""
        self._update_current_progress_remaining(self.num_timesteps, max(self._total_timesteps, 1))
        # The last vector step may exceed total_timesteps: a schedule that falls to zero would fall below
        self._current_progress_remaining = max(self._current_progress_remaining, 0.0)
        self._update_learning_rate(self.policy.optimizer)
        learning_rate = self.policy.optimizer.param_groups[0]["lr"]
        is_valid = np.isfinite(learning_rate) and learning_rate >= 0
        check("learning_rate", learning_rate, is_valid, "a finite number at all times, and not negative")
        if self._shared is not None:
            self._shared.progress_remaining = self._current_progress_remaining

    # ------------------------------------------------------------------ logging

    def _count_to(self, num_timesteps: int) -> None:
        # Nobody else may change it while learn() runs
        self.__dict__["num_timesteps"] = num_timesteps

    def _count(self, transitions: Transitions) -> None:
        pace = 1 if self._shared is None else self._shared.pace
        self._count_to(self.num_timesteps + round(len(transitions) * pace))
        self._n_updates += len(transitions.updates)
        self._episode_num += int(transitions.dones.sum())
        self._update_log.add(transitions.updates)
        self._update_info_buffer(transitions.infos, transitions.dones)

    def _record_updates(self) -> None:
        """Record the means of the updates' metrics since the last log, and the ``async/*`` metrics."""
        n_updates = self._update_log.n_updates
        for key, value in self._update_log.take(is_learning=self._pool is not None).items():
            self.logger.record(key, value)
        if n_updates > 0:
            self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        for key, value in ({} if self._pool is None else self._pool.take_metrics()).items():
            self.logger.record(key, value)
        base = None if self.env is None else find_base(self.env)
        if isinstance(base, HealingVecEnv):
            self.logger.record("async/lane_restarts", base.n_restarts)

    @abstractmethod
    def dump_logs(self) -> None:
        """Write log data."""
