"""
Run the workers, in threads or in turn, and hand their transitions to the thread that called ``learn()``.

Both pools give that thread batches of exactly ``num_envs`` transitions. While it processes a batch (callbacks, logger),
no worker begins another step.
"""

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import TracebackType

import numpy as np
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_async1step.common.actor_learner import ActorLearner, Transitions, UpdateStats
from sb3_async1step.common.rollout import concatenate_observations, slice_observations


class WorkerPool(ABC):
    """
    A group of workers and their common step counter.

    :param workers: the workers
    :param num_timesteps: number of environment steps before this training
    :param total_timesteps: number of environment steps, including those before, after which no worker begins another
        step; rounded up to a vector step of all lanes, as in SB3
    """

    def __init__(self, workers: list[ActorLearner], num_timesteps: int, total_timesteps: int) -> None:
        self.workers = workers
        self.batch_size = sum(worker.n_lanes for worker in workers)
        self.total_timesteps = total_timesteps
        n_vector_steps = -(-(total_timesteps - num_timesteps) // self.batch_size)
        self._last_timestep = num_timesteps + n_vector_steps * self.batch_size
        # Guards the attributes below, and is notified of every change that a thread may wait for
        self._changed = threading.Condition()
        self._claimed_timesteps = num_timesteps
        self._n_pauses = 0
        # Threads that are changing the model or the environments
        self._busy_threads: list[threading.Thread] = []
        self._is_stopping = False
        # Idle time of the waits that have ended, and the start of each wait that has not
        self._idle_seconds = 0.0
        self._idle_counted_since = time.perf_counter()
        self._waiting_since: dict[threading.Thread, float] = {}

    @abstractmethod
    def batches(self) -> Iterator[Transitions]:
        """
        Run the workers.

        :return: batches of ``num_envs`` transitions; the last one may be smaller if the groups of lanes are unequal
        :raises BaseException: the first exception that a worker raised, with its own traceback
        """

    def take_idle_fraction(self) -> float:
        """
        :return: fraction of the time since the last call that a worker spent waiting for other threads, mean over the
            workers
        """
        with self._changed:
            now = time.perf_counter()
            for thread in list(self._waiting_since):
                self._end_wait(thread, now)
                self._waiting_since[thread] = now
            fraction = self._idle_seconds / max(now - self._idle_counted_since, 1e-9) / len(self.workers)
            self._idle_seconds, self._idle_counted_since = 0.0, now
        return fraction

    def _end_wait(self, thread: threading.Thread, now: float) -> None:
        self._idle_seconds += now - self._waiting_since.pop(thread)

    @contextmanager
    def standing_still(self) -> Iterator[None]:
        """
        Pause: wait until no thread changes the model or steps an environment, and keep all threads from beginning to
        until the end of the ``with`` block. Any thread may call this.

        :return: a context manager
        """
        # A call from inside a step (from an env that plays against the model, say) would wait for itself
        if threading.current_thread() in self._busy_threads:
            yield
            return
        with self._changed:
            self._n_pauses += 1
        try:
            with self._changed:
                self._changed.wait_for(lambda: not self._busy_threads)
            yield
        finally:
            self._resume()

    @contextmanager
    def changing_the_model(self) -> Iterator[None]:
        """
        Wait until no thread pauses the pool, and keep threads from pausing it until the end of the ``with`` block, in
        which the calling thread changes the model.

        :return: a context manager
        """
        with self._changed:
            self._changed.wait_for(lambda: self._n_pauses == 0)
            self._busy_threads.append(threading.current_thread())
        try:
            yield
        finally:
            self._is_no_longer_busy()

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc_value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    @abstractmethod
    def stop(self) -> None:
        """Stop all workers, and wait until they have ended."""

    def _step(self, worker: ActorLearner) -> Transitions | None:
        """
        Let a worker take a step as soon as it may.

        :param worker: the worker
        :return: its transitions, None if the training is over
        """
        with self._changed:
            if not self._may_step():
                thread = threading.current_thread()
                self._waiting_since[thread] = time.perf_counter()
                try:
                    self._changed.wait_for(self._may_step)
                finally:
                    self._end_wait(thread, time.perf_counter())
            num_timesteps = None if self._is_stopping else self._claim(worker.n_lanes)
            if num_timesteps is None:
                return None
            self._busy_threads.append(threading.current_thread())
        try:
            return run_step(worker, num_timesteps)
        finally:
            self._is_no_longer_busy()

    def _may_step(self) -> bool:
        return self._is_stopping or self._n_pauses == 0

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

    def _is_no_longer_busy(self) -> None:
        with self._changed:
            self._busy_threads.remove(threading.current_thread())
            if self._n_pauses > 0:
                self._changed.notify_all()

    def _resume(self) -> None:
        with self._changed:
            self._n_pauses -= 1
            if self._n_pauses == 0:
                self._changed.notify_all()


class SerialWorkerPool(WorkerPool):
    """The workers take turns on the calling thread, which is reproducible bit for bit."""

    def batches(self) -> Iterator[Transitions]:
        while parts := [part for part in map(self._step, self.workers) if part is not None]:
            yield concatenate(parts)

    def stop(self) -> None:
        pass


class ThreadWorkerPool(WorkerPool):
    """
    One thread for each worker. Workers do not wait for each other.

    A worker waits only while the calling thread processes a batch, or if that thread is more than one batch behind.
    """

    def __init__(self, workers: list[ActorLearner], num_timesteps: int, total_timesteps: int) -> None:
        super().__init__(workers, num_timesteps, total_timesteps)
        self._unreported: list[Transitions] = []
        self._n_unreported = 0
        self._batch_is_out = False
        # Numbers of threads inside _run(), and of those that have left it. They are counted there, since start() may
        # be interrupted
        self._n_running = 0
        self._n_ended = 0
        self._exception: BaseException | None = None
        self._threads = [
            threading.Thread(target=self._run, args=(worker,), name=f"actor-learner-{i}", daemon=True)
            for i, worker in enumerate(workers)
        ]

    def __enter__(self) -> "ThreadWorkerPool":
        try:
            for thread in self._threads:
                thread.start()
        except BaseException:
            self.stop()
            raise
        return self

    def batches(self) -> Iterator[Transitions]:
        while True:
            with self._changed:
                self._changed.wait_for(self._has_news)
                if self._exception is not None:
                    raise self._exception
                if not self._unreported:
                    return
                batch = self._take_batch()
                self._batch_is_out = True
            yield batch
            with self._changed:
                self._batch_is_out = False
                self._changed.notify_all()

    def stop(self) -> None:
        with self._changed:
            self._is_stopping = True
            self._changed.notify_all()
        try:
            self._wait_for_the_end()
        except KeyboardInterrupt:
            # Wait in spite of a second Ctrl-C: a running worker would step environments that the next learn() resets
            self.stop()
            raise

    def _wait_for_the_end(self) -> None:
        # Thread.join() is not enough: when interrupted, it marks the thread as stopped. Threads that do not run yet
        # will not take a step any more
        with self._changed:
            self._changed.wait_for(lambda: self._n_running == 0)
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    def _has_news(self) -> bool:
        return (
            self._n_unreported >= self.batch_size or self._n_ended == len(self.workers) or self._exception is not None
        )

    def _take_batch(self) -> Transitions:
        """Take ``num_envs`` transitions, or all that are left, in the order in which they were made."""
        n_missing = self.batch_size
        parts = []
        while n_missing > 0 and self._unreported:
            first = self._unreported.pop(0)
            if len(first) > n_missing:
                first, rest = split(first, n_missing)
                self._unreported.insert(0, rest)
            parts.append(first)
            n_missing -= len(first)
        self._n_unreported -= self.batch_size - n_missing
        return concatenate(parts)

    def _run(self, worker: ActorLearner) -> None:
        """Run a worker until the training is over (the target of its thread)."""
        with self._changed:
            self._n_running += 1
        try:
            while (transitions := self._step(worker)) is not None:
                self._report(transitions)
        except BaseException as exception:
            with self._changed:
                self._exception = self._exception or exception
                self._is_stopping = True
        finally:
            with self._changed:
                self._n_running -= 1
                self._n_ended += 1
                self._changed.notify_all()

    def _may_step(self) -> bool:
        # No steps while the calling thread processes a batch. Otherwise, one batch may be waiting while another fills
        is_ahead = self._batch_is_out or self._n_unreported >= 2 * self.batch_size
        return self._is_stopping or (super()._may_step() and not is_ahead)

    def _report(self, transitions: Transitions) -> None:
        with self._changed:
            self._unreported.append(transitions)
            self._n_unreported += len(transitions)
            if self._n_unreported >= self.batch_size:
                self._changed.notify_all()


class Lookers:
    """
    The threads that are reading or replacing the parameters of a model, each with the pool that it has paused.

    Pausing a pool stops its own workers only. A thread that began before there was a pool is registered here, and a new
    pool waits until it has finished.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._pools: list[WorkerPool | None] = []

    def __reduce__(self) -> tuple[type["Lookers"], tuple]:
        # A copy of the model starts with no threads
        return type(self), ()

    @contextmanager
    def look(self, find_pool: Callable[[], WorkerPool | None]) -> Iterator[None]:
        """
        Keep the model unchanged inside the ``with`` block.

        :param find_pool: function that returns the running pool, or None
        :return: a context manager
        """
        with self._changed:
            pool = find_pool()
            self._pools.append(pool)
        try:
            with pool.standing_still() if pool is not None else nullcontext():
                yield
        finally:
            with self._changed:
                self._pools.remove(pool)
                self._changed.notify_all()

    def wait_for_earlier_ones(self, pool: WorkerPool) -> None:
        """
        Wait for the threads that began before there was this pool.

        :param pool: the new pool, which ``find_pool`` already returns
        """
        with self._changed:
            self._changed.wait_for(lambda: all(other is pool for other in self._pools))


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
        exception.add_note(f"Raised in {describe_lanes(worker, exception)}.")
        raise


def describe_lanes(worker: ActorLearner, exception: Exception) -> str:
    """
    :param worker: the worker that raised an exception
    :param exception: the exception
    :return: the env lane that it came from, or all lanes of the worker if the lane is not known
    """
    traceback = exception.__traceback__
    while traceback is not None:
        # DummyVecEnv steps its environments in a loop, whose variable tells which of them raised the exception
        if traceback.tb_frame.f_code is DummyVecEnv.step_wait.__code__:
            return f"env lane {worker.lanes[traceback.tb_frame.f_locals['env_idx']]}"
        traceback = traceback.tb_next
    if worker.n_lanes == 1:
        return f"env lane {worker.lanes[0]}"
    return f"the worker of env lanes {worker.lanes[0]} to {worker.lanes[-1]}"


def concatenate(parts: list[Transitions]) -> Transitions:
    """
    :param parts: transitions in several parts
    :return: all of them
    """
    if len(parts) == 1:
        return parts[0]
    return Transitions(
        np.concatenate([part.actions for part in parts]),
        concatenate_observations([part.new_obs for part in parts]),
        np.concatenate([part.rewards for part in parts]),
        np.concatenate([part.dones for part in parts]),
        [info for part in parts for info in part.infos],
        [update for part in parts for update in part.updates],
    )


def split(transitions: Transitions, n_first: int) -> tuple[Transitions, Transitions]:
    """
    :param transitions: transitions
    :param n_first: number of transitions in the first part
    :return: the first part, with the statistics of all updates, and the rest
    """
    return _rows(transitions, range(n_first), transitions.updates), _rows(
        transitions, range(n_first, len(transitions)), []
    )


def _rows(transitions: Transitions, rows: range, updates: list[UpdateStats]) -> Transitions:
    return Transitions(
        transitions.actions[rows.start : rows.stop],
        slice_observations(transitions.new_obs, rows),
        transitions.rewards[rows.start : rows.stop],
        transitions.dones[rows.start : rows.stop],
        transitions.infos[rows.start : rows.stop],
        updates,
    )
