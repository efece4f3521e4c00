"""One thread of the paper: pull, act, step, store, gradient, push."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import torch as th
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.common.vec_env import VecEnv

from sb3_async1step.vec_envs.observations import Observations, list_arrays, replace_rows, to_arrays
from sb3_async1step.workers.rollout import AnyRollout, Rollout, RolloutBuffer, merge_time_and_lanes
from sb3_async1step.workers.shared_parameters import LocalParameters, SharedParameters
from sb3_async1step.workers.transitions import Transitions, UpdateStats


@dataclass
class Settings:
    """
    What all workers of an algorithm need to know.

    :param device: of the networks
    :param gamma: discount factor
    :param update_interval: vector steps of a worker's lanes between two updates
    :param max_grad_norm: norm to which gradients are clipped
    """

    device: th.device
    gamma: float
    update_interval: int
    max_grad_norm: float


AnySettings = TypeVar("AnySettings", bound=Settings)


@dataclass(frozen=True)
class WorkerRecipe:
    """
    What a worker is made from, apart from its env and the shared parameters. It can be pickled.

    :param actor_learner: the class of the worker
    :param settings: those of the algorithm
    :param lanes: the numbers of the worker's lanes among all lanes of the model
    :param random_generator: the worker's own
    """

    actor_learner: type["ActorLearner"]
    settings: Settings
    lanes: range
    random_generator: np.random.Generator

    def build(self, env: VecEnv, observations: Observations, shared: SharedParameters) -> "ActorLearner":
        """
        :param env: VecEnv with the lanes of this worker
        :param observations: the current observations of these lanes
        :param shared: the parameters that all workers share
        :return: the worker
        """
        return self.actor_learner(self, env, observations, shared)


@dataclass
class WorkerState:
    """
    The state of a worker between two steps, from which it can continue.

    :param actor_learner: name of the worker's class
    :param lanes: the lanes of the worker
    :param update_interval: vector steps between two updates
    :param steps_since_update: vector steps since the last update
    :param rollout: the transitions since the last gradient, see :meth:`RolloutBuffer.get_state`
    :param gradients: gradients accumulated since the last update (None for a parameter without a gradient)
    :param metrics: metrics of each part of the rollout that these gradients are from, and its number of time steps
    :param local_values: the thread-specific parameters, if there are any
    :param extra: what the algorithm's actor-learner keeps besides
    """

    actor_learner: str
    lanes: range
    update_interval: int
    steps_since_update: int
    rollout: Rollout | None
    gradients: list[th.Tensor | None]
    metrics: list[tuple[dict[str, float], int]]
    local_values: list[th.Tensor] | None
    extra: dict[str, Any] = field(default_factory=dict)

    def __setstate__(self, attributes: dict[str, Any]) -> None:
        if {field.name for field in fields(self)} != set(attributes):
            # From a file of an earlier version. No worker has no name, so none continues from it
            attributes = {"actor_learner": "", "lanes": range(0), "update_interval": 0}
        self.__dict__.update(attributes)


class ActorLearner(ABC, Generic[AnySettings, AnyRollout]):
    """
    A worker: one thread of the paper, which drives a group of env lanes in one batch.

    The gradient is the sum over the time steps of the rollout, as in the paper, and the mean over the lanes, so that
    its size depends on ``update_interval`` alone. A subclass says how it acts and what its loss is.

    :param recipe: what the worker is made from
    :param env: VecEnv with the lanes of this worker
    :param observations: the current observations of these lanes
    :param shared: the parameters that all workers share
    """

    #: Whether the worker has parameters of its own (theta'), which it pulls at the start of each segment
    thread_specific_parameters: ClassVar[bool] = True

    settings: AnySettings

    def __init__(self, recipe: WorkerRecipe, env: VecEnv, observations: Observations, shared: SharedParameters) -> None:
        self.settings = recipe.settings  # type: ignore[assignment]
        self.lanes = recipe.lanes
        self.random_generator = recipe.random_generator
        self.env = env
        self.observations = observations
        self.shared = shared
        self.local = LocalParameters(shared, self.thread_specific_parameters)
        self.rollout: RolloutBuffer[AnyRollout] = RolloutBuffer(self.settings.update_interval)
        self._steps_since_update = 0
        # Of each part of the rollout whose gradient has been accumulated, and its number of time steps
        self._metrics: list[tuple[dict[str, float], int]] = []

    @property
    def n_lanes(self) -> int:
        return len(self.lanes)

    # ------------------------------------------------------------------ what an algorithm says

    @abstractmethod
    def choose_actions(self) -> np.ndarray:
        """
        :return: actions for the current observations, as the network numbers them, shape ``(n_lanes, *action_shape)``
        """

    @abstractmethod
    def to_env_actions(self, actions: np.ndarray) -> np.ndarray:
        """
        :param actions: actions of this worker's lanes
        :return: the same as the env understands them
        """

    @abstractmethod
    def compute_loss(self, rollout: AnyRollout) -> tuple[th.Tensor, dict[str, float]]:
        """
        :param rollout: transitions since the last gradient, time by lane
        :return: mean loss over the transitions, a scalar, and metrics for the logger
        """

    def complete_step(self, step: Rollout, new_obs: Observations) -> AnyRollout:
        """
        Add to a time step what else the algorithm stores.

        :param step: one time step of all lanes; its arrays lack the first axis
        :param new_obs: the observations in which the next actions are taken
        :return: the step to store
        """
        return step  # type: ignore[return-value]

    def begin_segment(self) -> None:
        """Do what is due before the first step after an update."""
        self.local.pull()

    def end_step(self, num_timesteps: int) -> None:
        """
        Do what is due after each step, before an update.

        :param num_timesteps: environment steps of all lanes, including these (the paper's T)
        """

    def get_extra_state(self) -> dict[str, Any]:
        """
        :return: what the algorithm keeps from one step to the next
        """
        return {}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """
        :param state: what :meth:`get_extra_state` returned
        """

    # ------------------------------------------------------------------ the thread

    def step(self, num_timesteps: int) -> Transitions:
        """
        Take one step in every lane, and update the parameters if an update is due.

        :param num_timesteps: environment steps of all lanes, including these (the paper's T)
        :return: the transitions
        :raises ValueError: if a reward, an observation or the gradient is not finite; the shared parameters are not
            changed then
        """
        if self._steps_since_update == 0:
            self._follow_update_interval()
            self.begin_segment()
        actions = self.choose_actions()
        env_actions = self.to_env_actions(actions)
        new_obs, rewards, dones, infos = self._step_env(env_actions)
        self.rollout.add(self.complete_step(self._describe_step(actions, new_obs, rewards, dones, infos), new_obs))
        self.observations = new_obs
        self._steps_since_update += 1

        # As in the paper, a single lane also updates at the end of its episode
        is_due = self._steps_since_update == self.rollout.n_steps or (self.n_lanes == 1 and bool(dones[0]))
        if is_due:
            self.accumulate_gradient()
        self.end_step(num_timesteps)
        updates = [self._update()] if is_due else []
        return Transitions(env_actions, new_obs, rewards, dones, infos, updates)

    def change_settings(self, settings: AnySettings) -> None:
        """
        :param settings: those to follow from the next step on; the update interval from the next segment on
        """
        self.settings = settings

    def _follow_update_interval(self) -> None:
        if self.rollout.n_steps != self.settings.update_interval:
            self.rollout = RolloutBuffer(self.settings.update_interval)

    def _step_env(self, actions: np.ndarray) -> tuple[Observations, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        """
        Step the env. As with SB3's DQN, a VecEnv of the user's own may return whatever numpy makes arrays from.

        :param actions: as the env understands them
        :return: what ``VecEnv.step()`` returns, as arrays
        :raises ValueError: if a reward or an observation is not finite, or there is not one for each lane
        """
        result: Any = self.env.step(actions)
        new_obs, rewards, dones, infos = result
        new_obs = to_arrays(new_obs)
        rewards, dones = self._to_lanes("rewards", rewards), self._to_lanes("dones", dones, dtype=bool)
        self._check_finite("reward", rewards)
        self._check_finite("observation", new_obs)
        self._check_shape(new_obs)
        return new_obs, rewards, dones, list(infos)

    def _to_lanes(self, name: str, values: Any, dtype: type[bool] | None = None) -> np.ndarray:
        array = np.asarray(values, dtype=dtype)
        if array.size != self.n_lanes:
            raise ValueError(
                f"The env returned {name} of shape {array.shape} for {self.n_lanes} lane(s), each of which needs one."
            )
        return array.reshape(self.n_lanes)

    def _check_shape(self, new_obs: Observations) -> None:
        for new, old in zip(list_arrays(new_obs), list_arrays(self.observations), strict=True):
            if new.shape != old.shape:
                raise ValueError(
                    f"The observations of {self.n_lanes} lane(s) had the shape {old.shape}, now {new.shape}."
                )

    def _describe_step(
        self, actions: np.ndarray, new_obs: Any, rewards: np.ndarray, dones: np.ndarray, infos: list[dict[str, Any]]
    ) -> Rollout:
        truncated = np.array([info.get("TimeLimit.truncated", False) for info in infos], dtype=bool) & dones
        # Only truncated lanes need their terminal observation: after a termination, nothing is bootstrapped
        ends = {int(lane): self._get_terminal_observation(int(lane), infos[lane]) for lane in np.flatnonzero(truncated)}
        next_observations = replace_rows(new_obs, ends)
        if ends:
            self._check_finite("terminal observation", next_observations)
        rewards = np.asarray(rewards, dtype=np.float32)
        return Rollout(self.observations, actions, rewards, next_observations, dones & ~truncated, truncated)

    def _get_terminal_observation(self, lane: int, info: dict[str, Any]) -> Observations:
        if info.get("terminal_observation") is None:
            raise ValueError(
                f'The info of env lane {self.lanes[lane]} says "TimeLimit.truncated", but its "terminal_observation" '
                "is missing: the last observation of the episode, on which the return is bootstrapped."
            )
        return info["terminal_observation"]

    def _check_finite(self, name: str, values: Observations) -> None:
        for array in list_arrays(values):
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                lane = int(np.flatnonzero(~np.isfinite(array.reshape(self.n_lanes, -1)).all(axis=1))[0])
                raise ValueError(
                    f"The {name} of env lane {self.lanes[lane]} is not finite: {array[lane]}. Nothing was learned "
                    "from it. Repair the env; stable_baselines3.common.vec_env.VecCheckNan helps to find the cause."
                )

    def accumulate_gradient(self) -> None:
        """Add the gradient of the transitions since the last one: d_theta <- d_theta + ..."""
        n_steps = self.rollout.n_filled
        if n_steps == 0:
            return
        rollout = self.rollout.take()
        # BatchNorm cannot normalize a single transition
        mode = rollout.rewards.size > 1
        if self.local.learning_network.training != mode:
            self.local.learning_network.set_training_mode(mode)
        loss, metrics = self.compute_loss(rollout)
        self.local.share_buffers()
        # Mean over the lanes, sum over the time steps
        (loss * n_steps).backward()
        self._metrics.append((metrics, n_steps))

    def _update(self) -> UpdateStats:
        grad_norm = self._clip_gradient()
        staleness = self.local.push()
        metrics = {**_average(self._metrics), "train/grad_norm": grad_norm}
        self._metrics.clear()
        self._steps_since_update = 0
        return UpdateStats(metrics, staleness)

    def _clip_gradient(self) -> float:
        """Return the norm before."""
        norm = th.nn.utils.clip_grad_norm_(self.local.parameters, self.settings.max_grad_norm)
        if not th.isfinite(norm):
            raise ValueError(
                f"The gradient's norm is {norm.item()}: the training diverges. The update was not applied. "
                "Lower the learning rate, or normalize rewards and observations (VecNormalize)."
            )
        return norm.item()

    # ------------------------------------------------------------------ tensors

    def to_tensor(self, observations: Observations) -> Any:
        """
        :param observations: observations of some lanes
        :return: tensors, as networks take them
        """
        return obs_as_tensor(observations, self.settings.device)

    def to_batch(self, observations: Observations) -> Any:
        """
        :param observations: observations of a rollout, shape ``(n_steps, n_lanes, ...)``
        :return: tensors in shape ``(n_steps * n_lanes, ...)``, as networks take them
        """
        return self.to_tensor(merge_time_and_lanes(observations))

    def to_device(self, array: np.ndarray) -> th.Tensor:
        """
        :param array: an array of a rollout
        :return: a tensor that shares its memory, if the device is the CPU
        """
        return th.as_tensor(array, device=self.settings.device)

    # ------------------------------------------------------------------ saving

    def get_state(self) -> WorkerState:
        """
        :return: a copy of everything that another worker needs to continue in place of this one
        """
        return WorkerState(
            type(self).__name__,
            self.lanes,
            self.rollout.n_steps,
            self._steps_since_update,
            self.rollout.get_state(),
            self.local.get_gradients(),
            list(self._metrics),
            self.local.get_values(),
            self.get_extra_state(),
        )

    def set_state(self, state: WorkerState) -> None:
        """
        Continue where another worker stopped. If its class, its lanes or its update interval differ, its state is
        ignored, and the transitions since its last update are lost.

        :param state: a state returned by :meth:`get_state`
        """
        mine = type(self).__name__, self.lanes, self.rollout.n_steps
        if (state.actor_learner, state.lanes, state.update_interval) != mine:
            return
        self._steps_since_update = state.steps_since_update
        self.rollout.set_state(state.rollout)  # type: ignore[arg-type]
        self.local.set_gradients(state.gradients)
        self._metrics = list(state.metrics)
        self.local.set_values(state.local_values)
        self.set_extra_state(state.extra)


def _average(metrics: list[tuple[dict[str, float], int]]) -> dict[str, float]:
    """Mean of each metric over the parts of a rollout that have it, weighted by their numbers of time steps."""
    keys = {key: None for part, _ in metrics for key in part}
    parts = {key: [(part[key], n_steps) for part, n_steps in metrics if key in part] for key in keys}
    return {key: sum(value * n for value, n in values) / sum(n for _, n in values) for key, values in parts.items()}
