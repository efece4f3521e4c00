import copy
from typing import Any, ClassVar, Literal

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule, TensorDict
from stable_baselines3.common.utils import LinearSchedule

from sb3_async1step.a3c.actor_learner import A3CActorLearner, A3CSettings
from sb3_async1step.a3c.policies import CnnPolicy, MlpPolicy, MultiInputPolicy, view_policy
from sb3_async1step.common.async_algorithm import AsyncAlgorithm, Backend, SelfAsyncAlgorithm
from sb3_async1step.common.optimizers import SharedRMSprop
from sb3_async1step.common.space_checks import check_first_action
from sb3_async1step.parameter_checks import (
    check,
    check_bool,
    check_not_negative,
    check_positive,
    check_unit_interval,
    is_whole,
)
from sb3_async1step.sb3_internals import dump_logs_by_iterations
from sb3_async1step.workers.actor_learner import ActorLearner
from sb3_async1step.workers.shared_parameters import SharedParameters


class A3C(AsyncAlgorithm):
    """
    Asynchronous advantage actor-critic (Mnih et al. 2016, Algorithm 3 in the supplement).

    Paper: https://arxiv.org/abs/1602.01783

    :param policy: ``MlpPolicy``, ``CnnPolicy``, ``MultiInputPolicy`` (those of SB3's A2C), or an ``ActorCriticPolicy``
    :param env: the environment to learn from (if registered in Gym, can be str)
    :param learning_rate: learning rate, or a function of the progress remaining (from 1 to 0)
    :param gamma: discount factor
    :param n_envs: number of environments (lanes) to create if ``env`` is an id: 16 by default, the paper's number of
        actor-learners. They have no ``render_mode``. If ``env`` is an object, leave this out
    :param n_workers: number of worker threads, at most the number of env lanes; ``"auto"`` for as many as there are
        usable cores, or one if the network is so small that several would only wait for Python's interpreter lock.
        With one worker, everything runs on the calling thread, with any VecEnv
    :param update_interval: maximum number of time steps in a segment (the paper's t_max), after which a worker
        updates; a worker with a single lane also updates at the end of an episode, as in the paper
    :param gae_lambda: lambda of generalized advantage estimation; 1 is the paper's advantage, the n-step return less
        the value
    :param ent_coef: coefficient of the entropy in the loss (the paper's beta)
    :param vf_coef: coefficient of the value loss
    :param normalize_advantage: whether to normalize the advantages of a rollout
    :param max_grad_norm: norm to which gradients are clipped
    :param rms_prop_eps: term that shared RMSProp adds to the average of squared gradients, unless ``policy_kwargs``
        names another optimizer
    :param use_sde: whether to explore by state-dependent noise (gSDE), for Box actions
    :param sde_sample_freq: time steps after which that noise is drawn again, -1 for once in a segment
    :param lock_updates: whether workers learn in turns, so that no gradient is stale: one reads the parameters,
        computes a gradient and applies it before the next one does. Otherwise, they compute gradients at the same time,
        as in the paper, and apply them at the same time (Hogwild), or one after the other if the optimizer is another
        than :class:`~sb3_async1step.SharedRMSprop`
    :param backend: ``"threads"``, or ``"serial"``: the same workers take turns on the calling thread, reproducible
        bit for bit from the seed
    :param stats_window_size: number of episodes over which logged returns and lengths are averaged
    :param tensorboard_log: folder for TensorBoard logs (no logging if None)
    :param policy_kwargs: further parameters of the policy
    :param verbose: 0 for no output, 1 for info messages, 2 for debug messages
    :param seed: seed of all random generators
    :param device: ``"auto"`` means the CPU, for which these methods are made; any other device has to be named
    :param _init_setup_model: whether to build the networks at the creation of the instance
    :raises AssertionError: if the action space is not ``Box``, ``Discrete``, ``MultiDiscrete`` or ``MultiBinary``
    :raises ValueError: if a parameter is out of range, or ``env`` has another number of lanes than ``n_envs``
    :raises TypeError: if the env can't be split among ``n_workers``
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
    }
    actor_learner_class: ClassVar[type[ActorLearner]] = A3CActorLearner
    _own_attributes: ClassVar[tuple[str, ...]] = ("gae_lambda",)
    _followed: ClassVar[frozenset[str]] = AsyncAlgorithm._followed | {
        "gae_lambda",
        "ent_coef",
        "vf_coef",
        "normalize_advantage",
        "sde_sample_freq",
    }
    _fixed_while_learning: ClassVar[frozenset[str]] = AsyncAlgorithm._fixed_while_learning | {"rms_prop_eps"}
    _kept_by_optimizer: ClassVar[frozenset[str]] = frozenset({"rms_prop_eps"})
    _sb3_counterpart: ClassVar[str] = "A2C"

    policy: ActorCriticPolicy

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 7e-4,
        gamma: float = 0.99,
        n_envs: int | None = None,
        n_workers: int | Literal["auto"] = "auto",
        update_interval: int = 5,
        gae_lambda: float = 1.0,
        ent_coef: float = 0.01,
        vf_coef: float = 0.5,
        normalize_advantage: bool = False,
        max_grad_norm: float = 0.5,
        rms_prop_eps: float = 1e-5,
        use_sde: bool = False,
        sde_sample_freq: int = -1,
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
            learning_rate,
            gamma=gamma,
            n_envs=n_envs,
            n_workers=n_workers,
            update_interval=update_interval,
            max_grad_norm=max_grad_norm,
            lock_updates=lock_updates,
            backend=backend,
            supported_action_spaces=(spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary),
            use_sde=use_sde,
            sde_sample_freq=sde_sample_freq,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            seed=seed,
            device=device,
        )
        self.gae_lambda = gae_lambda
        self.ent_coef = ent_coef
        self.vf_coef = vf_coef
        self.normalize_advantage = normalize_advantage
        self.rms_prop_eps = rms_prop_eps
        if _init_setup_model:
            self._setup_model()

    @classmethod
    def paper_hyperparams(cls) -> dict[str, Any]:
        """
        The paper's settings (sections 4 and 5.1, and section 8 of its supplement), which are made for Atari games
        with 16 lanes and millions of steps. The learning rate, RMSProp's epsilon and ``vf_coef`` are those that its
        authors gave in correspondence (https://github.com/muupan/async-rl/wiki), the norm to which gradients are
        clipped follows later implementations::

            A3C("CnnPolicy", env, **A3C.paper_hyperparams())

        Its layout, one thread for each actor-learner, is ``n_workers=env.num_envs``, and its network
        ``policy_kwargs=dict(features_extractor_class=NipsCNN, net_arch=[])``.

        :return: arguments of the constructor
        """
        return {
            "learning_rate": LinearSchedule(7e-4, 0.0, 1.0),
            "update_interval": 5,
            "ent_coef": 0.01,
            "vf_coef": 0.5,
            "max_grad_norm": 40.0,
            "rms_prop_eps": 0.1,
            "lock_updates": False,
        }

    def _make_policy(self) -> BasePolicy:
        policy_kwargs = dict(self.policy_kwargs)
        if policy_kwargs.get("optimizer_class", SharedRMSprop) is SharedRMSprop:
            optimizer_kwargs = policy_kwargs.get("optimizer_kwargs") or {}
            policy_kwargs["optimizer_class"] = SharedRMSprop
            policy_kwargs["optimizer_kwargs"] = {"eps": self.rms_prop_eps, **optimizer_kwargs}
        return self.policy_class(
            self.observation_space, self.action_space, self.lr_schedule, use_sde=self.use_sde, **policy_kwargs
        )

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "rms_prop_eps" and "policy" in self.__dict__:
            for group in self._list_groups_with_eps():
                group["eps"] = value

    def _list_groups_with_eps(self) -> list[dict[str, Any]]:
        """The parameter groups of the optimizer whose epsilon is ``rms_prop_eps``."""
        optimizer_kwargs = self.policy_kwargs.get("optimizer_kwargs") or {}
        follows = isinstance(self.policy.optimizer, SharedRMSprop) and "eps" not in optimizer_kwargs
        return self.policy.optimizer.param_groups if follows else []

    def _set_parameters(self, params: TensorDict, exact_match: bool, device: th.device | str) -> None:
        super()._set_parameters(params, exact_match, device)
        # The state of an optimizer has its epsilon. Nobody else may change the attribute while learn() runs
        for group in self._list_groups_with_eps():
            self.__dict__["rms_prop_eps"] = group["eps"]

    def _check_parameters(self) -> None:
        super()._check_parameters()
        check_unit_interval(gae_lambda=self.gae_lambda)
        check_not_negative(ent_coef=self.ent_coef, vf_coef=self.vf_coef)
        check_positive(rms_prop_eps=self.rms_prop_eps)
        check_bool(normalize_advantage=self.normalize_advantage, use_sde=self.use_sde)
        freq = self.sde_sample_freq
        check("sde_sample_freq", freq, is_whole(freq) and (freq == -1 or freq >= 1), "-1, or 1 or more")
        check_first_action(self.action_space, self.policy_class, MlpPolicy)

    def _sync_after_jump(self, before: int, after: int) -> None:
        # Draw the noise of gSDE again: the server has replaced log_std
        if self.use_sde:
            self.policy.reset_noise(self.n_envs)

    def _make_settings(self, num_envs: int) -> A3CSettings:
        return A3CSettings(
            device=self.device,
            gamma=self.gamma,
            update_interval=self.update_interval,
            max_grad_norm=self.max_grad_norm,
            action_space=self.action_space,
            gae_lambda=self.gae_lambda,
            ent_coef=self.ent_coef,
            vf_coef=self.vf_coef,
            normalize_advantage=self.normalize_advantage,
            use_sde=self.use_sde,
            sde_sample_freq=self.sde_sample_freq,
        )

    def _share_parameters(self) -> SharedParameters:
        # torch.compile() wraps the policy: share the module inside
        policy = getattr(self.policy, "_orig_mod", self.policy)
        return SharedParameters(policy, policy, self.lock_updates)

    def _view_policy(self) -> BasePolicy:
        # The wrapper of torch.compile() is no ActorCriticPolicy
        return view_policy(self.policy) if isinstance(self.policy, ActorCriticPolicy) else self.policy

    def _forward_once(self, observation: Any) -> None:
        # A features extractor may change its input in place
        self.policy.get_distribution(copy.deepcopy(observation))
        self.policy.predict_values(observation)

    def learn(
        self: SelfAsyncAlgorithm,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int | None = 100,
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
        :param log_interval: number of iterations (``update_interval`` vector steps of all lanes) between two logs, as
            in SB3's A2C, None for no logs
        :param tb_log_name: name of the run for TensorBoard, by default the class's
        :param reset_num_timesteps: whether to start counting at zero again
        :param progress_bar: whether to show a progress bar
        :return: the trained model
        :raises BaseException: the exception of an env, a worker or a callback, with its own traceback. All workers
            have been stopped by then, and the model can still predict, save and continue learning
        """
        return super().learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)

    def _log_is_due(self, log_interval: int, n_episodes_before: int, n_batches: int) -> bool:
        return n_batches % (log_interval * self.update_interval) == 0

    def dump_logs(self, iteration: int | None = None) -> None:
        """
        Write log data: A2C's keys, and the ``async/*`` metrics over the updates since the last log.

        :param iteration: what is logged as ``time/iterations``, by default the number of iterations of this training
        """
        self._record_updates()
        if hasattr(self.policy, "log_std"):
            # If nodes learn, theirs
            self._refresh()
            self.logger.record("train/std", th.exp(self.policy.log_std).mean().item())
        if iteration is None:
            n_batches = (self.num_timesteps - self._num_timesteps_at_start) // self.n_envs
            iteration = n_batches // self.update_interval
        dump_logs_by_iterations(self, iteration)
