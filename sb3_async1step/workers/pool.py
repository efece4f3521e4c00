"""
Run the workers, and hand their transitions to the thread that called ``learn()``.

A pool gives that thread batches of exactly ``num_envs`` transitions. While it processes a batch (callbacks, logger), no
worker begins another step.
"""

import os
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from sb3_async1step.sb3_internals import find_lane_of_exception
from sb3_async1step.vec_envs.exceptions import add_note
from sb3_async1step.vec_envs.observations import Observations, concatenate
from sb3_async1step.workers.actor_learner import ActorLearner
from sb3_async1step.workers.gate import Gate
from sb3_async1step.workers.transitions import Transitions, join


class Pool(ABC):
    """
    What ``learn()`` runs: workers, or nodes that have workers of their own.
    """

    #: Workers in this process
    workers: Sequence[ActorLearner]
    #: Number of env lanes
    num_envs: int

    @property
    @abstractmethod
    def observations(self) -> Observations | None:
        """The current observations of all lanes, None if they are elsewhere."""

    @property
    @abstractmethod
    def reset_infos(self) -> list[dict[str, Any]]:
        """What the envs of all lanes said at their last resets."""

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

    def check(self) -> None:  # noqa: B027
        """
        Look at what became of the workers, also after their end: the calling thread may have left :meth:`batches`
        before one failed.

        :raises BaseException: the first exception that a worker raised, with its own traceback
        """

    @abstractmethod
    def settle(self) -> None:
        """Wait until no lane steps. The workers stand still meanwhile."""

    @abstractmethod
    def take_metrics(self) -> dict[str, float]:
        """
        :return: what the logger shall record of the workers, since the last call
        """

    def refresh(self) -> None:  # noqa: B027
        """Fetch the newest parameters, if they are elsewhere. This is called before the model is read."""

    def check_change(self, name: str) -> None:  # noqa: B027
        """
        :param name: name of what shall be changed while the workers learn
        :raises RuntimeError: if they would not follow
        """


class WorkerPool(Pool):
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
        self._process_id = os.getpid()
        # Steps that the workers have begun, and that they have taken (the paper's T)
        self._claimed_timesteps = num_timesteps
        self._taken_timesteps: int | float = num_timesteps
        self._is_stopping = False
        # Steps that each worker may still begin, None if only total_timesteps limits them
        self._quotas: dict[ActorLearner, int] | None = None
        # Transitions for the calling thread. The workers write the first number, that thread the second
        self._unreported: deque[Transitions] = deque()
        self._n_reported = 0
        self._n_taken = 0
        # Seconds that each worker has spent waiting, and when those that wait began to
        self._idle_seconds = dict.fromkeys(workers, 0.0)
        self._waiting_since: dict[ActorLearner, float] = {}
        self._idle_before = 0.0, time.perf_counter()

    @property
    def observations(self) -> Observations:
        """The current observations of all lanes."""
        return concatenate([worker.observations for worker in self.workers])

    def grant(self, n_vector_steps: int) -> None:
        """
        Let each worker take so many more steps in its lanes, whatever ``total_timesteps`` is. When all have taken them,
        the workers stand still, and all of their transitions are in batches that the calling thread has been given.

        :param n_vector_steps: number of steps for each lane, on average over the lanes of a worker
        """
        quotas = self._quotas or dict.fromkeys(self.workers, 0)
        self._quotas = {worker: quotas[worker] + n_vector_steps * worker.n_lanes for worker in self.workers}

    def jump(self, num_timesteps: int) -> None:
        """
        Count what others have learned, while the workers stand still: a target network is updated if the jump crossed a
        multiple of its interval.

        :param num_timesteps: environment steps of all pools (the paper's T); nothing happens if it is not later
        """
        n_new = num_timesteps - self._taken_timesteps
        if n_new > 0:
            self._taken_timesteps = num_timesteps
            self.workers[0].after_step(num_timesteps, n_new)

    @property
    def num_timesteps(self) -> int | float:
        """Environment steps taken (the paper's T), those that other nodes may have taken meanwhile included."""
        return self._taken_timesteps

    def take_metrics(self) -> dict[str, float]:
        """
        :return: what the logger shall record of the workers, since the last call
        """
        return {"async/worker_idle_fraction": self._take_idle_fraction(), "async/n_workers": len(self.workers)}

    @property
    def reset_infos(self) -> list[dict[str, Any]]:
        """What the envs of all lanes said at their last resets."""
        return [info for worker in self.workers for info in worker.env.reset_infos]

    def settle(self) -> None:
        """
        Wait until no lane steps. The workers stand still meanwhile.

        :raises RuntimeError: in a forked process, whose copies of the workers can't wait for their lanes
        """
        if os.getpid() != self._process_id and any(worker.env.n_idle < worker.n_lanes for worker in self.workers):
            raise RuntimeError(
                "The lanes of this env step in processes of their own, which answer to the process that learns, not to "
                "one that was forked from it. Ask them before the fork, or make another env."
            )
        for worker in self.workers:
            worker.env.settle()

    def finish_steps(self) -> None:
        """Once all workers have ended, take what their lanes have done, so that the envs are where the workers are."""
        for worker in self.workers:
            if worker.env.n_idle < worker.n_lanes:
                run_step(worker, 0, self._count)

    def _take_idle_fraction(self) -> float:
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
        while True:
            self._waiting_since[worker] = time.perf_counter()
            with self._gate.passed(partial(self._may_begin, worker)):
                self._idle_seconds[worker] += time.perf_counter() - self._waiting_since.pop(worker)
                n_lanes = 0 if self._is_stopping else self._claim(worker)
                if self._is_stopping or (n_lanes == 0 and worker.env.n_idle == worker.n_lanes):
                    return None
                transitions = run_step(worker, n_lanes, self._count)
            if transitions is not None:
                return transitions
            # Outside of the gate: somebody may want the model to stand still while an env takes its time
            worker.env.wait()

    def _may_begin(self, worker: ActorLearner) -> bool:
        """Whether a worker may step, has steps to finish, or has to notice that the training is over."""
        has_quota = self._quotas is None or self._quotas[worker] > 0 or worker.env.n_idle < worker.n_lanes
        return self._may_step() and (has_quota or self._is_stopping)

    def _may_step(self) -> bool:
        return True

    def _report(self, transitions: Transitions) -> None:
        """Hand transitions to the calling thread."""
        self._unreported.append(transitions)
        self._n_reported += len(transitions)

    def _batch_is_full(self) -> bool:
        return self._n_reported - self._n_taken >= self.num_envs

    def _take_batch(self) -> Transitions:
        """Take ``num_envs`` transitions, or all that are left, in the order in which they were made."""
        n_missing = self.num_envs
        parts = []
        while n_missing > 0 and self._unreported:
            first = self._unreported.popleft()
            if len(first) > n_missing:
                first, rest = first.split(n_missing)
                self._unreported.appendleft(rest)
            parts.append(first)
            n_missing -= len(first)
        self._n_taken += self.num_envs - n_missing
        return join(parts)

    def _claim(self, worker: ActorLearner) -> int:
        """
        Count the next step of a worker before it is taken.

        :param worker: the worker
        :return: number of lanes that may take a step, 0 if none waits for it or the training is over
        """
        n_lanes = worker.env.n_idle
        if self._quotas is not None:
            n_lanes = min(n_lanes, self._quotas[worker])
            self._quotas[worker] -= n_lanes
            self._claimed_timesteps += n_lanes
            return n_lanes
        # The steps of groups of unequal size may not add up exactly: once total_timesteps is reached, do not go beyond
        # the last vector step
        n_left = self._last_timestep - self._claimed_timesteps
        if worker.env.is_async:
            n_lanes = min(n_lanes, n_left)
        elif self._claimed_timesteps >= self.total_timesteps and n_lanes > n_left:
            n_lanes = 0
        self._claimed_timesteps += n_lanes
        return n_lanes

    def _count(self, n_lanes: int) -> int | float:
        """
        :param n_lanes: number of lanes that have taken a step
        :return: number of environment steps up to and including these (the paper's T)
        """
        self._taken_timesteps += n_lanes * self.workers[0].shared.pace
        return self._taken_timesteps


def run_step(worker: ActorLearner, n_lanes: int, count: Callable[[int], int | float]) -> Transitions | None:
    """
    Let a worker learn from the lanes that are ready, and act in those that wait for an action.

    :param worker: the worker
    :param n_lanes: number of lanes in which it may act
    :param count: see :meth:`ActorLearner.finish_step`
    :return: the transitions, None if no lane was ready
    :raises Exception: any exception of the step, with a note that names the lane
    """
    try:
        if n_lanes > 0:
            worker.begin_step(n_lanes)
        return worker.finish_step(count)
    except StopIteration as exception:
        # Inside of a generator, StopIteration would look like its normal end
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
