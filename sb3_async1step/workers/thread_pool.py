"""A thread for each worker."""

import _imp
from collections.abc import Iterator, Sequence
from contextlib import suppress
from contextvars import copy_context
from threading import Lock, Thread, current_thread

from sb3_async1step.vec_envs.exceptions import advise_on_threads
from sb3_async1step.workers.actor_learner import ActorLearner
from sb3_async1step.workers.gate import Gate
from sb3_async1step.workers.pool import WorkerPool
from sb3_async1step.workers.transitions import Transitions


class ThreadWorkerPool(WorkerPool):
    """
    One thread for each worker. Workers do not wait for each other, unless they learn in turns (``lock_updates``).

    A worker waits only while the calling thread processes a batch, or if that thread is more than one batch behind.

    The calling thread may be interrupted anywhere. So it takes no lock; workers have one for what they count together.

    :param workers: see :class:`~sb3_async1step.workers.pool.WorkerPool`
    :param gate: see :class:`~sb3_async1step.workers.pool.WorkerPool`
    :param num_timesteps: see :class:`~sb3_async1step.workers.pool.WorkerPool`
    :param total_timesteps: see :class:`~sb3_async1step.workers.pool.WorkerPool`
    """

    def __init__(self, workers: Sequence[ActorLearner], gate: Gate, num_timesteps: int, total_timesteps: int) -> None:
        super().__init__(workers, gate, num_timesteps, total_timesteps)
        self._batch_is_out = False
        self._exceptions: list[BaseException] = []
        self._worker_lock = Lock()
        # Threads that have begun to run their worker, and those that have ended
        self._begun: list[Thread] = []
        self._ended: list[Thread] = []
        self._threads: list[Thread] = []

    def batches(self) -> Iterator[Transitions]:
        release_import_lock()
        for i, worker in enumerate(self.workers):
            # In a copy of the caller's context (np.errstate, decimal's precision), as asyncio.to_thread() does it
            run = copy_context().run
            thread = Thread(target=run, args=(self._run, worker), name=f"actor-learner-{i}", daemon=True)
            self._threads.append(thread)
            thread.start()
        while True:
            self._gate.wait_for(self._has_news)
            self.check()
            if not self._unreported:
                return
            self._batch_is_out = True
            yield self._take_batch()
            self._batch_is_out = False
            self._gate.notify()

    def stop(self) -> None:
        self._is_stopping = True
        self._gate.notify()
        try:
            self._wait_for_the_end()
        except KeyboardInterrupt:
            # Go on waiting although Ctrl-C was pressed again: a running worker would step envs that the next learn()
            # resets
            self.stop()
            raise

    def check(self) -> None:
        if self._exceptions:
            raise self._exceptions[0]

    def _wait_for_the_end(self) -> None:
        # A thread that has not begun yet will not take a step any more
        self._gate.wait_for(lambda: len(self._ended) == len(self._begun))
        # join() is not enough: when interrupted, it takes a thread for ended that is not
        for thread in self._threads:
            if thread.is_alive():
                thread.join()

    def _has_news(self) -> bool:
        return self._batch_is_full() or len(self._ended) == len(self.workers) or bool(self._exceptions)

    def _run(self, worker: ActorLearner) -> None:
        """Run a worker until the training is over (the target of its thread)."""
        self._begun.append(current_thread())
        try:
            while (transitions := self._step(worker)) is not None:
                self._report(transitions)
        except BaseException as exception:
            self._exceptions.append(exception)
            self._is_stopping = True
            # learn() waits for the end of this thread before it raises it
            advise_on_threads(exception)
        finally:
            self._ended.append(current_thread())
            self._gate.notify()

    def _may_step(self) -> bool:
        # No steps while the calling thread processes a batch. Otherwise, one batch may be waiting while another fills
        is_ahead = self._batch_is_out or self._n_reported - self._n_taken >= 2 * self.num_envs
        return self._is_stopping or not is_ahead

    def _claim(self, worker: ActorLearner) -> int:
        with self._worker_lock:
            return super()._claim(worker)

    def _count(self, n_lanes: int) -> int | float:
        with self._worker_lock:
            return super()._count(n_lanes)

    def _report(self, transitions: Transitions) -> None:
        with self._worker_lock:
            super()._report(transitions)
        if self._has_news():
            self._gate.notify()


def release_import_lock() -> None:
    """
    Release the lock of Python's import system if the calling thread holds it. It does so inside of importlib alone,
    and an import that was interrupted there (by Ctrl-C) leaves it locked: every other thread that imports something,
    as PyTorch does when a worker takes its first step, would wait forever.
    """
    with suppress(RuntimeError):
        while True:
            _imp.release_lock()
