"""An SB3 algorithm whose model may be used from any thread while it learns."""

import copy
import io
import pathlib
from abc import abstractmethod
from collections import deque
from collections.abc import Iterable
from contextvars import ContextVar
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.save_util import load_from_zip_file, open_path, recursive_getattr
from stable_baselines3.common.type_aliases import GymEnv, TensorDict
from stable_baselines3.common.utils import check_for_correct_spaces
from stable_baselines3.common.vec_env import VecNormalize

from sb3_async1step.common.model_file import (
    check_saved_model,
    explain_errors,
    pack_model,
    read_attributes,
    write_atomically,
)
from sb3_async1step.common.warn import warn_the_caller
from sb3_async1step.vec_envs.observations import list_arrays
from sb3_async1step.workers import gate
from sb3_async1step.workers.actor_learner import Settings, WorkerState
from sb3_async1step.workers.gate import Gate
from sb3_async1step.workers.optimizer_views import check_optimizer_state
from sb3_async1step.workers.pool import Pool

SelfLiveAlgorithm = TypeVar("SelfLiveAlgorithm", bound="LiveAlgorithm")

NEEDS_A_RESET = (
    "The env has {now} lane(s) and the model's last one had {before}: it has to be reset, so leave force_reset out."
)
#: Whether SB3's load() sets parameters, which are those that the saved workers go on with
IS_LOADING: ContextVar[bool] = ContextVar("IS_LOADING", default=False)


class LiveAlgorithm(BaseAlgorithm):
    """
    An SB3 algorithm that any thread may use while it learns: ``predict()``, ``save()``, ``get_parameters()`` and
    ``set_parameters()`` wait until no worker is in the middle of a step, and no worker begins one meanwhile.

    :param args: positional arguments of :class:`BaseAlgorithm <stable_baselines3.common.base_class.BaseAlgorithm>`
    :param kwargs: keyword arguments of :class:`BaseAlgorithm <stable_baselines3.common.base_class.BaseAlgorithm>`
    """

    # Attributes whose changes are forwarded to the workers while learn() runs, and those that can't be changed then
    _followed: ClassVar[frozenset[str]] = frozenset({"gamma", "update_interval", "max_grad_norm"})
    _fixed_while_learning: ClassVar[frozenset[str]] = frozenset(
        {
            "action_space",
            "backend",
            "device",
            "env",
            "lock_updates",
            "n_envs",
            "n_workers",
            "num_timesteps",
            "observation_space",
            "policy",
            "policy_class",
            "policy_kwargs",
            "seed",
            "use_sde",
        }
    )
    # What is never saved nor copied
    _runtime_attributes: ClassVar[tuple[str, ...]] = (
        "_pool",
        "_shared",
        "_process_watcher",
        "_callback",
        "_lanes_may_be_anywhere",
        "_update_log",
    )
    # Parameters that the optimizer keeps as well, which follows when they are set
    _kept_by_optimizer: ClassVar[frozenset[str]] = frozenset()
    # Attributes that tell files of this algorithm, and of those with the same policies, from others
    _own_attributes: ClassVar[tuple[str, ...]]
    # SB3's algorithm with the same policies
    _sb3_counterpart: ClassVar[str]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._gate = Gate()
        # Where the workers stopped, None after a reset of the env
        self._worker_states: list[WorkerState] | None = None
        self._setup_runtime()

    def _setup_runtime(self) -> None:
        """Set the attributes that are never saved."""
        # The pool of workers, while learn() runs
        self._pool: Pool | None = None

    # ------------------------------------------------------------------ attributes

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._fixed_while_learning and self._is_learning():
            raise AttributeError(
                f"{name} can't be changed while learn() runs, whose workers have begun with it. "
                "End the training (by a callback that returns False), change it, and call learn() again."
            )
        pool = self._find_pool() if name in (*self._followed, "learning_rate", "lr_schedule") else None
        if pool is not None:
            pool.check_change(name)
            if name in self._followed:
                self._change_setting(name, value, pool)
                return
        super().__setattr__(name, value)
        if name == "learning_rate" and "lr_schedule" in self.__dict__:
            self._setup_lr_schedule()

    def _find_pool(self) -> Pool | None:
        """
        :return: the pool of workers, None if ``learn()`` does not run. To be asked once: outside of the gate, another
            thread's training may end at any moment
        """
        pool = self.__dict__.get("_pool")
        # A forked process has a copy of the pool, but no workers
        return pool if pool is not None and self._gate.is_learning() else None

    def _is_learning(self) -> bool:
        return self._find_pool() is not None

    def _change_setting(self, name: str, value: Any, pool: Pool) -> None:
        """Change an attribute which the workers of a pool follow, if its value is allowed."""
        with self._gate.closed():
            value_before = getattr(self, name)
            self.__dict__[name] = value
            try:
                self._check_parameters()
            except ValueError:
                self.__dict__[name] = value_before
                raise
            settings = self._make_settings(pool.num_envs)
            for worker in pool.workers:
                worker.change_settings(settings)

    @abstractmethod
    def _check_parameters(self) -> None:
        """
        :raises ValueError: if a parameter is out of range
        """

    @abstractmethod
    def _make_settings(self, num_envs: int) -> Settings:
        """
        :param num_envs: number of env lanes
        :return: what the workers need to know
        """

    @property
    def _last_obs(self) -> Any:
        """The current observations, as in SB3, also while workers step."""
        pool = self.__dict__.get("_pool")
        return self.__dict__["_last_obs"] if pool is None else pool.observations

    @_last_obs.setter
    def _last_obs(self, observations: Any) -> None:
        self.__dict__["_last_obs"] = observations

    # ------------------------------------------------------------------ use from any thread

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
        :param deterministic: whether to choose the best action, or to sample
        :return: the actions, and the state
        """
        with self._gate.closed_to_look() as nobody_steps:
            if not nobody_steps:
                warn_the_caller(
                    f"predict() stopped waiting for a step of the training env after {gate.LOOK_TIMEOUT:g} s, and used "
                    "the parameters as they were. If that step waits for this thread (an opponent's, say), call "
                    "model.policy.predict(), which never waits."
                )
            self._refresh()
            return self._view_policy().predict(observation, state, episode_start, deterministic)

    def _view_policy(self) -> BasePolicy:
        """
        :return: the policy, as one that can be copied, and of which this thread alone asks actions: several workers may
            do so at the same time, if their envs play against the model
        """
        return self.policy

    def save(
        self,
        path: str | pathlib.Path | io.BufferedIOBase,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
    ) -> None:
        """
        Save the model, from any thread. While it learns, this waits until no update is in flight.

        The file is written completely or not at all: if anything fails, an existing file is left as it was. Only where
        it can't be replaced (a mount point, a folder without write permission) it is written in place, with a warning.

        :param path: file to write, ".zip" is added to a name without suffix
        :param exclude: names of attributes not to save
        :param include: names of attributes to save that would not be saved by default
        """
        if not isinstance(path, (str, pathlib.Path)):
            # SB3's errors for what is no file
            open_path(path, "w")
        with self._gate.closed():
            self._refresh()
            if self._is_learning():
                self._remember_workers()
            # Files of different algorithms hold the same attributes
            self._saved_by = type(self).__name__
            content = pack_model(*self._get_saved_parts(exclude, include))
        # Workers need not wait for the disk
        if not isinstance(path, (str, pathlib.Path)):
            path.write(content)
            return
        path = pathlib.Path(path)
        if path.suffix == "":
            # SB3's suffix
            path = path.with_name(f"{path.name}.zip")
        write_atomically(path, content)

    def _get_saved_parts(
        self, exclude: Iterable[str] | None, include: Iterable[str] | None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The attributes to save, and by its name in the file what torch saves, as in SB3's ``save()``."""
        state_dicts, variables = self._get_torch_save_params()
        excluded = {*(exclude or ()), *self._excluded_save_params()} - {*(include or ())}
        # What torch saves, pickle need not save
        excluded |= {name.split(".")[0] for name in (*state_dicts, *variables)}
        attributes = {name: value for name, value in self.__dict__.items() if name not in excluded}
        others = {name: recursive_getattr(self, name) for name in variables}
        parameters = self.get_parameters()
        for group in (group for state in parameters.values() for group in state.get("param_groups", ())):
            # SB3 could not load numpy's numbers
            group.update((name, value.item()) for name, value in list(group.items()) if isinstance(value, np.generic))
        return attributes, {"pytorch_variables": others, **parameters}

    @classmethod
    def load(
        cls: type[SelfLiveAlgorithm], path: str | pathlib.Path | io.BufferedIOBase, *args: Any, **kwargs: Any
    ) -> SelfLiveAlgorithm:
        """
        Load a model. It may continue with another number of lanes or workers.

        :param path: path of a saved model, or an open file
        :param args: positional arguments of
            :meth:`BaseAlgorithm.load <stable_baselines3.common.base_class.BaseAlgorithm.load>`
        :param kwargs: keyword arguments of the same method
        :return: the model
        :raises ValueError: if the file is damaged, or was saved by an algorithm with other policies
        """
        expected = ("n_workers", *cls._own_attributes)
        attributes = check_saved_model(path, cls.__name__, expected, cls._sb3_counterpart)
        saved_by = attributes.get("_saved_by", cls.__name__)
        if saved_by != cls.__name__:
            warn_the_caller(
                f"{path} was saved by {saved_by}, and {cls.__name__} goes on with it: the weights and settings are "
                "those of the file, but it learns other targets from now on."
            )
        if "stats_window_size" in kwargs:
            # SB3 would set an attribute of that name, which it does not read
            kwargs["_stats_window_size"] = kwargs.pop("stats_window_size")
        token = IS_LOADING.set(True)
        try:
            with explain_errors(path):
                model = super().load(path, *args, **kwargs)
                model._resize_windows()
        finally:
            IS_LOADING.reset(token)
        for name in cls._kept_by_optimizer & kwargs.keys():
            # The optimizer has got the file's
            setattr(model, name, kwargs[name])
        model._check_last_observations()
        return model

    def _resize_windows(self) -> None:
        """Let the last episodes' statistics, which may be a file's, follow ``stats_window_size``."""
        for name in ("ep_info_buffer", "ep_success_buffer"):
            episodes = getattr(self, name)
            if episodes is not None:
                setattr(self, name, deque(episodes, maxlen=self._stats_window_size))

    def _check_last_observations(self) -> None:
        """
        :raises ValueError: if they are those of another number of lanes
        """
        if self.env is None or self._last_obs is None:
            return
        n_lanes = len(list_arrays(self._last_obs)[0])
        if n_lanes != self.env.num_envs:
            raise ValueError(NEEDS_A_RESET.format(now=self.env.num_envs, before=n_lanes))

    def get_parameters(self) -> dict[str, dict]:
        """
        :return: state dicts of the policy and of its optimizer. As in SB3 they are views: copy them to keep them
        """
        with self._gate.closed():
            self._refresh()
            return super().get_parameters()

    def set_parameters(
        self, load_path_or_dict: str | TensorDict, exact_match: bool = True, device: th.device | str = "auto"
    ) -> None:
        """
        Load parameters, with which the workers continue.

        :param load_path_or_dict: path of a saved model, or a dict as returned by ``get_parameters()``
        :param exact_match: whether all parameters must be given
        :param device: device onto which a file is loaded
        :raises ValueError: if the file is damaged, names are missing, or the optimizer's state is another one's
        """
        if isinstance(load_path_or_dict, dict):
            self._set_parameters(load_path_or_dict, exact_match, device)
            return
        read_attributes(load_path_or_dict)
        with explain_errors(load_path_or_dict):
            _, params, _ = load_from_zip_file(load_path_or_dict, device=device, load_data=False)
            self._set_parameters(params, exact_match, device)

    def _set_parameters(self, params: TensorDict, exact_match: bool, device: th.device | str) -> None:
        if "policy.optimizer" in params:
            # Torch would go on with the tensors of the given state, which may be those of another model
            state = copy.deepcopy(params["policy.optimizer"])
            check_optimizer_state(self.policy, state)
            params = {**params, "policy.optimizer": state}
        pool = self._find_pool()
        if pool is not None:
            pool.check_change("The parameters")
        with self._gate.closed():
            super().set_parameters(params, exact_match, device)
            if "policy" in params and not self._is_learning() and not IS_LOADING.get():
                # The workers would go on with gradients of the old parameters
                self._worker_states = None

    def get_vec_normalize_env(self) -> VecNormalize | None:
        """
        :return: the ``VecNormalize`` wrapper of the training env, if it has one. Inside a callback, its statistics do
            not change after this call
        """
        with self._gate.closed():
            return super().get_vec_normalize_env()

    def _refresh(self) -> None:
        """Fetch the newest parameters, if nodes learn."""
        pool = self.__dict__.get("_pool")
        if pool is not None:
            pool.refresh()

    def set_env(self, env: GymEnv, force_reset: bool = True) -> None:
        """
        Set the training env. Unlike SB3's other algorithms, it may have another number of lanes than the last one:
        a model that was made from an env's id has many, of which its user may not know.

        :param env: the env
        :param force_reset: whether the next ``learn()`` resets it, which other lanes have to be
        :raises ValueError: if its spaces are others, or other lanes shall not be reset
        :raises RuntimeError: if the model is learning
        """
        if self._gate.is_learning():
            raise RuntimeError("learn() steps the model's env: set another one when it has ended.")
        env = self._wrap_env(env, self.verbose)
        check_for_correct_spaces(env, self.observation_space, self.action_space)
        if env.num_envs != self.n_envs and not force_reset:
            raise ValueError(NEEDS_A_RESET.format(now=env.num_envs, before=self.n_envs))
        self.n_envs = env.num_envs
        super().set_env(env, force_reset)

    # ------------------------------------------------------------------ files and copies

    def _remember_workers(self) -> None:
        """Keep what the next ``learn()`` needs to go on where the workers are."""
        assert self._pool is not None
        self._last_obs = self._pool.observations
        self._worker_states = [worker.get_state() for worker in self._pool.workers]

    def __getstate__(self) -> dict[str, Any]:
        """
        The state of a copy (``copy.deepcopy``, pickle) made at any time and from any thread. It has no workers and no
        logger; if the model is learning, the copy begins with a reset of its env.
        """
        with self._gate.closed():
            left_out = {*self._runtime_attributes, "_logger"}
            state = {name: value for name, value in self.__dict__.items() if name not in left_out}
            state["_custom_logger"] = False
            if "policy" in state:
                state["policy"] = self._view_policy()
            if self._pool is None:
                return state
            # The workers go on before the state has been written
            state["_last_obs"] = state["_worker_states"] = None
            return copy.deepcopy(state)

    def __copy__(self: SelfLiveAlgorithm) -> SelfLiveAlgorithm:
        """
        A second model with the same policy and env, but without workers. It waits for nobody, so give it another policy
        if this one may learn.
        """
        self._refresh()
        twin = type(self).__new__(type(self))
        twin.__setstate__({**self.__dict__, "_gate": Gate()})
        return twin

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._setup_runtime()

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_gate", *self._runtime_attributes]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", "policy.optimizer"], []
