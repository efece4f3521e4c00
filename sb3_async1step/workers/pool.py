"""
Run the workers, and hand their transitions to the thread that called ``learn()``.

A pool gives that thread batches of exactly ``num_envs`` transitions. While it processes a batch (callbacks, logger), no
worker begins another step.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

from sb3_async1step.sb3_internals import find_lane_of_exception
from sb3_async1step.vec_envs.exceptions import add_note
from sb3_async1step.vec_envs.observations import Observations, concatenate
from sb3_async1step.workers.actor_learner import ActorLearner
from sb3_async1step.workers.gate import Gate
from sb3_async1step.workers.transitions import Transitions


class WorkerPool(ABC):
    """
    A group of workers and their common step counter.

    :param workers: the workers
    :param gate: the model's gate, which a worker passes for each step
    :param num_timesteps: number of environment steps before this training
    :param total_timesteps: number of environment steps, including those before, after which no worker begins another
        step; rounded up to a vector step of all lanes, as in SB3
    """

    def __init__(self, workers: Sequence[ActorLearner], gate: Gate, num_timesteps: int, total_timesteps: int) -> None:
        self.workers = workers
        self.num_envs = sum(worker.n_lanes for worker in workers)
        self.total_timesteps = total_timesteps
        n_vector_steps = -(-(total_timesteps - num_timesteps) // self.num_envs)
        self._last_timestep = num_timesteps + n_vector_steps * self.num_envs
        self._gate = gate
        self._claimed_timesteps = num_timesteps
        self._is_stopping = False
        # Of each worker: seconds that it has spent waiting, and when it began to wait if it does
        self._idle_seconds = dict.fromkeys(workers, 0.0)
        self._waiting_since: dict[ActorLearner, float] = {}
        self._idle_before = 0.0, time.perf_counter()

    @property
    def observations(self) -> Observations:
        """The current observations of all lanes."""
        return concatenate([worker.observations for worker in self.workers])

    @abstractmethod
    def batches(self) -> Iterator[Transitions]:
        """
        Run the workers.

        :return: batches of ``num_envs`` transitions; the last one may be smaller if the groups of lanes are unequal
        :raises BaseException: the first exception that a worker raised, with its own traceback
        """

    @abstractmethod
    def stop(self) -> None:
        """Stop all workers, and wait until they have ended. It can be called again if it was interrupted."""

    def take_idle_fraction(self) -> float:
        """
        :return: fraction of the time since the last call that a worker spent waiting for other threads, mean over the
            workers
        """
        now = time.perf_counter()
        idle_seconds = sum(self._idle_seconds.values()) + sum(
            now - start for start in list(self._waiting_since.values())
        )
        idle_seconds_before, then = self._idle_before
        self._idle_before = idle_seconds, now
        return max(idle_seconds - idle_seconds_before, 0.0) / max(now - then, 1e-9) / len(self.workers)

    def _step(self, worker: ActorLearner) -> Transitions | None:
        """
        Let a worker take a step as soon as it may.

        :param worker: the worker
        :return: its transitions, None if the training is over
        """
        self._waiting_since[worker] = time.perf_counter()
        with self._gate.passed(self._may_step):
            self._idle_seconds[worker] += time.perf_counter() - self._waiting_since.pop(worker)
            num_timesteps = None if self._is_stopping else self._claim(worker.n_lanes)
            return None if num_timesteps is None else run_step(worker, num_timesteps)

    def _may_step(self) -> bool:
        return True

    def _claim(self, n_lanes: int) -> int | None:
        """
        Count the next step of a worker before it is taken.

        :param n_lanes: number of lanes of the worker
        :return: number of environment steps up to and including this one, None if the training is over
        """
        claimed = self._claimed_timesteps + n_lanes
        # The steps of groups of unequal size may not add up exactly: once total_timesteps is reached, do not go beyond
        # the last vector step
        if self._claimed_timesteps >= self.total_timesteps and claimed > self._last_timestep:
            return None
        self._claimed_timesteps = claimed
        return claimed


def run_step(worker: ActorLearner, num_timesteps: int) -> Transitions:
    """
    Let a worker take a step.

    :param worker: the worker
    :param num_timesteps: environment steps of all lanes, including these
    :return: the transitions
    :raises Exception: any exception of the step, with a note that names the lane
    """
    try:
        return worker.step(num_timesteps)
    except StopIteration as exception:
        # Unchanged, it would end the loop over the batches as if the training were over
        raise RuntimeError(f"StopIteration was raised in {describe_lanes(worker, exception)}.") from exception
    except Exception as exception:
        add_note(exception, f"Raised in {describe_lanes(worker, exception)}.")
        raise


def describe_lanes(worker: ActorLearner, exception: Exception) -> str:
    """
    :param worker: the worker that raised an exception
    :param exception: the exception
    :return: the env lane that it came from, or all lanes of the worker if the lane is not known
    """
    lane = 0 if worker.n_lanes == 1 else find_lane_of_exception(exception)
    if lane is not None:
        return f"env lane {worker.lanes[lane]}"
    return f"the worker of env lanes {worker.lanes[0]} to {worker.lanes[-1]}"
