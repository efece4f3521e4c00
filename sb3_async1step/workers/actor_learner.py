"""One thread of the paper: pull, act, step, store, gradient, push."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import torch as th
from stable_baselines3.common.utils import obs_as_tensor

from sb3_async1step.vec_envs.observations import Observations, map_arrays, store_rows, take_rows
from sb3_async1step.workers.lanes import Lanes, Rows
from sb3_async1step.workers.rollout import AnyRollout, Rollout, RolloutBuffer
from sb3_async1step.workers.shared_parameters import LocalParameters, SharedParameters
from sb3_async1step.workers.step_result import check_result, make_time_step
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


@dataclass
class WorkerState:
    """
    The state of a worker between two steps, from which it can continue.

    :param actor_learner: name of the worker's class
    :param lanes: the lanes of the worker
    :param update_interval: vector steps between two updates
    :param steps_since_update: transitions since the last update, divided by the number of lanes
    :param rollout: the transitions since the last gradient, see :meth:`RolloutBuffer.get_state`
    :param gradients: gradients accumulated since the last update (None for a parameter without a gradient)
    :param metrics: metrics of each part of the rollout that these gradients are from, and its number of time steps
    :param local_values: the thread-specific parameters, if there are any
    :param extra: what the algorithm's actor-learner keeps besides
    """

    actor_learner: str
    lanes: range
    update_interval: int
    steps_since_update: float
    rollout: Rollout | None
    gradients: list[th.Tensor | None]
    metrics: list[tuple[dict[str, float], float]]
    local_values: list[th.Tensor] | None
    extra: dict[str, Any]


class ActorLearner(ABC, Generic[AnySettings, AnyRollout]):
    """
    A worker: one thread of the paper, which drives a group of env lanes in one batch.

    The gradient is the sum over the time steps of the rollout, as in the paper, and the mean over the lanes, so that
    its size depends on ``update_interval`` alone. A subclass says how it acts and what its loss is.

    :param settings: those of the algorithm
    :param lanes: the numbers of the worker's lanes among all lanes of the model
    :param random_generator: the worker's own
    :param env: the lanes of this worker
    :param observations: the current observations of these lanes
    :param shared: the parameters that all workers share
    """

    #: Whether the worker has parameters of its own (theta'), which it pulls at the start of each segment
    thread_specific_parameters: ClassVar[bool] = True

    settings: AnySettings

    def __init__(
        self,
        settings: AnySettings,
        lanes: range,
        random_generator: np.random.Generator,
        env: Lanes,
        observations: Observations,
        shared: SharedParameters,
    ) -> None:
        self.settings = settings
        self.lanes = lanes
        self._lane_numbers = np.array(self.lanes)
        self.random_generator = random_generator
        self.env = env
        self.observations = observations
        self.shared = shared
        self.local = LocalParameters(shared, self.thread_specific_parameters)
        if env.is_async:
            # Of its own, since lanes get their next observations at different times
            self.observations = map_arrays(np.copy, observations)
        self._update_interval = self.settings.update_interval
        self.rollout: RolloutBuffer[AnyRollout] = self._make_buffer()
        self._is_in_segment = False
        self._n_since_update = 0
        # Actions of the steps in flight
        self._actions: Any = None
        self._env_actions: Any = None
        # Metrics and number of time steps of each gradient since the last update
        self._metrics: list[tuple[dict[str, float], float]] = []
        # Updates of this step
        self._updates: list[UpdateStats] = []
        self._graph_is_checked = False

    @property
    def n_lanes(self) -> int:
        return len(self.lanes)

    # ------------------------------------------------------------------ what an algorithm says

    @abstractmethod
    def choose_actions(self, lanes: Rows) -> np.ndarray:
        """
        :param lanes: some of this worker's lanes
        :return: actions for their current observations, as the network numbers them, shape ``(n, *action_shape)``
        """

    @abstractmethod
    def to_env_actions(self, actions: np.ndarray) -> np.ndarray:
        """
        :param actions: actions of some of this worker's lanes
        :return: the same as the env understands them
        """

    @abstractmethod
    def compute_loss(self, rollout: AnyRollout) -> tuple[th.Tensor, dict[str, float]]:
        """
        :param rollout: transitions since the last gradient, time by lane
        :return: mean loss over the transitions, a scalar, and metrics for the logger
        """

    def make_minibatches(self, rollout: AnyRollout) -> Iterable[AnyRollout]:
        """
        Split a rollout into parts that are learned from one after another, with an update after each.

        :param rollout: transitions since the last gradient, time by lane
        :return: the parts; by default, the rollout as a whole
        """
        return [rollout]

    def complete_step(self, step: Rollout, new_obs: Observations, lanes: Rows) -> AnyRollout:
        """
        Add what else the algorithm stores to a time step.

        :param step: one time step of some lanes; its arrays lack the first axis
        :param new_obs: the observations in which the next actions are taken
        :param lanes: which of this worker's lanes these are
        :return: the step to store
        """
        return step  # type: ignore[return-value]

    def begin_segment(self) -> None:
        """Called before the first step after an update."""
        self.local.pull()

    def pull_for_gradient(self) -> None:
        """Called before a gradient is computed. If workers learn in turns, it is that of the newest parameters."""
        if self.shared.lock_updates:
            self.local.pull()

    def after_step(self, num_timesteps: int | float, n_new: int | float) -> None:
        """
        Called after each step, before the update if one is due.

        :param num_timesteps: environment steps of all lanes, including these (the paper's T)
        :param n_new: by how many of them T has grown by this step
        """

    @property
    def max_segment(self) -> int:
        """Steps of a lane after which an update is due, even if other lanes have taken few."""
        return self._update_interval

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

    def begin_step(self, n_lanes: int) -> None:
        """
        Act in lanes that wait for an action.

        :param n_lanes: in how many of them
        """
        if not self._is_in_segment:
            self._follow_update_interval()
            self.begin_segment()
            self._is_in_segment = True
        lanes = self.env.next_idle(n_lanes)
        actions = self.choose_actions(lanes)
        env_actions = self.to_env_actions(actions)
        self._actions = self._put(self._actions, lanes, actions)
        self._env_actions = self._put(self._env_actions, lanes, env_actions)
        self.env.begin_step(lanes, env_actions)

    def finish_step(self, count: Callable[[int], int | float]) -> Transitions | None:
        """
        Take the results of the lanes that are ready, and update the parameters if an update is due.

        :param count: given the number of lanes that have taken a step, returns that of all steps of all workers, with
            these (the paper's T)
        :return: the transitions, None if no lane is ready
        :raises ValueError: if a reward, an observation or the gradient is not finite; the shared parameters are not
            changed then, but by earlier minibatches of the same segment
        """
        result = self.env.end_step()
        if result is None:
            return None
        lanes, returned = result
        observations, actions = take_rows(self.observations, lanes), self._actions[lanes]
        arrived = check_result(returned, observations, self._lane_numbers[lanes])
        step = make_time_step(observations, actions, arrived, self._lane_numbers[lanes])
        self.rollout.add(self.complete_step(step, arrived.new_obs, lanes), lanes)
        self.observations = self._put(self.observations, lanes, arrived.new_obs)
        n_new = len(arrived.dones)
        self._n_since_update += n_new

        if self._is_update_due(arrived.dones):
            with self.shared.turn:
                self.accumulate_gradient()
                self.after_step(count(n_new), n_new * self.shared.pace)
                self._update()
        else:
            self.after_step(count(n_new), n_new * self.shared.pace)
        updates, self._updates = self._updates, []
        return Transitions(self._env_actions[lanes], **vars(arrived), updates=updates)

    def _is_update_due(self, dones: np.ndarray) -> bool:
        # As in the paper, a single lane also updates at the end of its episode
        return (
            self._n_since_update >= self._update_interval * self.n_lanes
            or self.rollout.n_filled == self.rollout.n_steps
            or (self.n_lanes == 1 and bool(dones[0]))
        )

    def _put(self, values: Any, lanes: Rows, new: Any) -> Any:
        """Replace the values of some lanes, or all of them."""
        if isinstance(lanes, slice):
            return new
        if values is None:
            values = map_arrays(lambda array: np.zeros((self.n_lanes, *array.shape[1:]), array.dtype), new)
        store_rows(values, lanes, new)
        return values

    def change_settings(self, settings: AnySettings) -> None:
        """
        Follow other settings: the update interval from the next segment on, all others from the next step on.

        :param settings: the other settings
        """
        self.settings = settings

    def _follow_update_interval(self) -> None:
        if self._update_interval != self.settings.update_interval:
            self._update_interval = self.settings.update_interval
            self.rollout = self._make_buffer()

    def _make_buffer(self) -> RolloutBuffer[AnyRollout]:
        n_steps = self.max_segment if self.env.is_async else self._update_interval
        return RolloutBuffer(n_steps, self.n_lanes)

    def accumulate_gradient(self) -> None:
        """
        Add the gradient of the transitions since the last one: d_theta <- d_theta + ... Of several minibatches, each
        but the last is followed by an update and a pull here.
        """
        if self.rollout.n_filled == 0:
            return
        self.pull_for_gradient()
        rollout = self.rollout.take()
        n_steps = rollout.n_transitions / self.n_lanes
        for number, minibatch in enumerate(self.make_minibatches(rollout)):
            if number > 0:
                self._update()
                self.local.pull()
            self._add_gradient(minibatch, n_steps)

    def _add_gradient(self, rollout: AnyRollout, n_steps: float) -> None:
        # BatchNorm cannot normalize a single transition
        mode = rollout.n_transitions > 1
        if self.local.learning_network.training != mode:
            self.local.learning_network.set_training_mode(mode)
        loss, metrics = self.compute_loss(rollout)
        if not self._graph_is_checked:
            self.local.check_graph(loss)
            self._graph_is_checked = True
        self.local.share_buffers()
        # Mean over the lanes, sum over the time steps
        (loss * n_steps).backward()
        self._metrics.append((metrics, n_steps))

    def _update(self) -> None:
        grad_norm = self._clip_gradient()
        staleness = self.local.push()
        metrics = {**_average(self._metrics), "train/grad_norm": grad_norm}
        self._metrics.clear()
        self._n_since_update = 0
        self._is_in_segment = False
        self._updates.append(UpdateStats(metrics, staleness))

    def _clip_gradient(self) -> float:
        """Clip the gradient, and return its norm before."""
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
        # A features extractor may change its input in place. Arrays of other dtypes are copied by SB3's preprocessing
        return obs_as_tensor(map_arrays(copy_if_float32, observations), self.settings.device)

    def to_batch(self, rollout: Rollout, observations: Observations) -> Any:
        """
        :param rollout: transitions, time by lane
        :param observations: its observations, or another of its arrays, shape ``(n_steps, n_lanes, ...)``
        :return: tensors in shape ``(n_transitions, ...)``, as networks take them
        """
        return self.to_tensor(rollout.flatten(observations))

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
            self._update_interval,
            self._n_since_update / self.n_lanes,
            self.rollout.get_state(),
            self.local.get_gradients(),
            list(self._metrics),
            self.local.get_values(),
            self.get_extra_state(),
        )

    def set_state(self, state: WorkerState) -> None:
        """
        Continue where another worker stopped. If its class, its lanes, its update interval or its network differ, its
        state is ignored, and the transitions since its last update are lost.

        :param state: a state returned by :meth:`get_state`
        """
        mine = type(self).__name__, self.lanes, self._update_interval
        is_mine = (state.actor_learner, state.lanes, state.update_interval) == mine
        if not is_mine or not self.local.can_take(state.gradients, state.local_values):
            return
        self._n_since_update = round(state.steps_since_update * self.n_lanes)
        self._is_in_segment = self._n_since_update > 0
        self.rollout.set_state(state.rollout)  # type: ignore[arg-type]
        self.local.set_gradients(state.gradients)
        self._metrics = list(state.metrics)
        self.local.set_values(state.local_values)
        self.set_extra_state(state.extra)


def copy_if_float32(array: np.ndarray) -> np.ndarray:
    """
    :param array: an array
    :return: a copy if it is in float32, else itself
    """
    return array.copy() if array.dtype == np.float32 else array


def _average(metrics: list[tuple[dict[str, float], float]]) -> dict[str, float]:
    """Mean of each metric over the parts of a rollout that have it, weighted by their numbers of time steps."""
    keys = {key: None for part, _ in metrics for key in part}
    parts = {key: [(part[key], n_steps) for part, n_steps in metrics if key in part] for key in keys}
    return {key: sum(value * n for value, n in values) / sum(n for _, n in values) for key, values in parts.items()}
