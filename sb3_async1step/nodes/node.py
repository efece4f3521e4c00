"""A node: a process that has some of the lanes, and learns from them with threads of its own."""

import io
import random
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import cloudpickle
import gymnasium as gym
import numpy as np
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from sb3_async1step.nodes.exchange import EXCHANGES, Exchange
from sb3_async1step.nodes.messages import Report
from sb3_async1step.nodes.wrappers import PackedWrapper, wrap
from sb3_async1step.sb3_internals import replace_results_writer
from sb3_async1step.vec_envs.exceptions import add_note, read_text
from sb3_async1step.vec_envs.monitor_file import ContinuedResultsWriter
from sb3_async1step.vec_envs.split import find_unsplittable, read_reset_infos
from sb3_async1step.workers.cores import count_usable_cores
from sb3_async1step.workers.transitions import Transitions, UpdateStats


@dataclass
class NodeRecipe:
    """
    What a node learns with.

    :param model_class: class of the model
    :param model: a file of the model
    :param is_trained: of each parameter that workers learn, whether it is not frozen, which a file does not keep
    :param lr_schedule: learning rate by the progress remaining. Of a file, it would be that of ``learning_rate``
    :param n_workers: number of its workers, None for one for each of its CPUs that its process may use
    :param num_timesteps: environment steps before (the paper's T)
    :param total_timesteps: T at the end of the training
    :param seed: of the node's random generators and lanes
    :param num_envs: number of lanes of all nodes
    :param exchange: how the nodes exchange what they have learned, see :class:`~sb3_async1step.RayVecEnv`
    :param lanes: those of this node
    :param wrappers: those of these lanes
    :param n_cpus: number of its CPUs
    :param node: its number
    :param epoch: how often it was restarted
    """

    model_class: Any
    model: bytes
    is_trained: list[bool]
    lr_schedule: Schedule
    n_workers: int | None
    num_timesteps: int
    total_timesteps: int
    seed: int
    num_envs: int
    exchange: str = "deltas"
    lanes: range = range(0)
    wrappers: list[PackedWrapper] = field(default_factory=list)
    n_cpus: int = 1
    node: int = 0
    epoch: int = 0

    def build(self, lanes: VecEnv) -> Any:
        """
        :param lanes: the node's lanes
        :return: the model that learns from them
        """
        model = self.model_class.load(io.BytesIO(self.model), env=wrap(lanes, self.wrappers))
        for parameter, is_trained in zip(model.list_learned_parameters(), self.is_trained, strict=True):
            parameter.requires_grad_(is_trained)
        model.lr_schedule = self.lr_schedule
        model.verbose, model.tensorboard_log = 0, None
        # Whoever asks for several workers of lanes that can't be split is told so
        n_cores = min(self.n_cpus, count_usable_cores())
        n_workers = self.n_workers or (1 if find_unsplittable(model.env) else n_cores)
        model.n_workers = min(n_workers, lanes.num_envs)
        model.learn_from_lanes(self.lanes, self.num_envs)
        model.set_random_seed(self.seed)
        model.num_timesteps = self.num_timesteps
        return model


class Node:
    """
    Has some lanes, in its own process, and learns from them when it is told to. Ray makes it an actor, whose methods
    are called on several threads.

    :param env_fns: functions that make the envs
    :param vec_env_cls: class of the VecEnv that holds them
    :param is_first: whether no other process has had these lanes before
    """

    def __init__(
        self,
        env_fns: Sequence[Callable[[], gym.Env]],
        vec_env_cls: Callable[..., VecEnv] = DummyVecEnv,
        is_first: bool = True,
    ) -> None:
        self._env: Any = vec_env_cls([*env_fns] if is_first else [MadeAgain(env_fn) for env_fn in env_fns])
        self._exchange: Exchange | None = None
        # What the last reset has returned, None as soon as the lanes have been stepped
        self._first_observations: Any = None

    def get_spaces(self) -> tuple[gym.Space, gym.Space]:
        """
        :return: the spaces of observations and actions
        """
        return self._env.observation_space, self._env.action_space

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """
        :param method: name of a method of the VecEnv
        :param args: its arguments
        :param kwargs: its keyword arguments
        :return: what it returns
        """
        if method == "step":
            self._first_observations = None
        return getattr(self._env, method)(*args, **kwargs)

    def reset(self, seeds: list[int | None], options: list[dict[str, Any]]) -> tuple[Any, list[dict[str, Any]]]:
        """
        :param seeds: of each lane
        :param options: of each lane
        :return: the first observations, and what the envs said
        """
        self._env._seeds, self._env._options = seeds, options
        self._first_observations = self._env.reset()
        return self._first_observations, read_reset_infos(self._env)

    def learn(self, recipe: NodeRecipe, server: Any) -> BaseException | None:
        """
        Learn until the training is over.

        :param recipe: what to learn with
        :param server: the server's actor
        :return: the exception that ended it, None if there was none
        """
        try:
            random.seed(recipe.seed)
            model = recipe.build(self._env)
            self._skip_second_reset()
            n_left = recipe.total_timesteps - recipe.num_timesteps
            self._exchange = EXCHANGES[recipe.exchange](server, recipe.node, recipe.epoch, model)
            model.learn(n_left, NodeCallback(self._exchange), log_interval=None, reset_num_timesteps=False)
        except Exception as exception:
            # Its traceback can't be sent
            add_note(exception, f"On the node:\n{''.join(traceback.format_exception(exception))}")
            add_note(exception, f"It was raised on node {recipe.node}, where {describe_numbering(recipe.lanes)}.")
            return make_picklable(exception)
        finally:
            # If learn() has failed before it has reset the lanes
            vars(self._env).pop("reset", None)
        return None

    def _skip_second_reset(self) -> None:
        """Go on from the driver's reset: an env may refuse another one before its episode has ended, as Monitor can."""
        first, self._first_observations = self._first_observations, None

        def reset_before() -> Any:
            del self._env.reset
            return first

        if first is not None:
            self._env.reset = reset_before

    def kill_lanes(self) -> None:
        """Kill the processes of the lanes, if they have any: one that hangs would outlive this one."""
        for process in getattr(self._env, "processes", ()):
            process.kill()

    def stop(self) -> None:
        """End :meth:`learn` as soon as the lanes have taken a step."""
        if self._exchange is not None:
            self._exchange.is_stopped = True


class MadeAgain:
    """
    Makes an env that a process had before which has ended: its monitor file goes on.

    :param env_fn: function that makes the env
    """

    def __init__(self, env_fn: Callable[[], gym.Env]) -> None:
        self._env_fn = env_fn

    def __call__(self) -> gym.Env:
        # In the process of the env, which may be another one than the node's
        replace_results_writer(ContinuedResultsWriter)
        return self._env_fn()


class NodeCallback(BaseCallback):
    """
    Exchanges parameters with the server whenever the node has taken the steps that it was granted. Its workers stand
    still meanwhile.

    :param exchange: the node's way to the server
    """

    def __init__(self, exchange: Exchange) -> None:
        super().__init__()
        self._exchange = exchange
        self._n_left = 0
        self._dones: list[np.ndarray] = []
        self._infos: list[dict[str, Any]] = []
        self._updates: list[UpdateStats] = []

    def _on_rollout_start(self) -> None:
        if self._exchange.begin() and not self._go_on():
            self._exchange.stop()

    def _on_step(self) -> bool:
        transitions: Transitions = self.locals["transitions"]
        self._dones.append(transitions.dones.copy())
        self._infos.extend(strip(transitions.infos[i]) for i in np.flatnonzero(transitions.dones))
        self._updates.extend(transitions.updates)
        self._n_left -= 1
        if self._exchange.is_stopped:
            return False
        return self._n_left > 0 or self._go_on()

    def _go_on(self) -> bool:
        """
        :return: whether the training goes on
        """
        report = Report(np.concatenate([np.zeros(0, dtype=bool), *self._dones]), self._infos, self._updates)
        self._dones, self._infos, self._updates = [], [], []
        pull = self._exchange.exchange(report)
        if pull is None:
            return False
        self._n_left = pull.n_granted
        return not pull.is_over


def describe_numbering(lanes: range) -> str:
    """
    :param lanes: those of a node
    :return: how its exceptions number them
    """
    if len(lanes) == 1:
        return f"lane 0 is lane {lanes[0]} of all lanes"
    return f"lanes 0 to {len(lanes) - 1} are lanes {lanes[0]} to {lanes[-1]} of all lanes"


def make_picklable(exception: BaseException) -> BaseException:
    """
    :param exception: an exception with notes
    :return: itself, or if it can't be sent, a ``RuntimeError`` with its message and notes
    """
    try:
        # As Ray does: the class may be one of the main script
        cloudpickle.loads(cloudpickle.dumps(exception))
    except Exception:
        substitute = RuntimeError(f"{type(exception).__name__}: {read_text(exception)}")
        for note in getattr(exception, "__notes__", []):
            add_note(substitute, note)
        return substitute
    return exception


def strip(info: dict[str, Any]) -> dict[str, Any]:
    """
    :param info: what an env said at the end of an episode
    :return: the same without the observation
    """
    return {key: value for key, value in info.items() if key != "terminal_observation"}
