"""A thread for each worker."""

from collections.abc import Iterator, Sequence
from contextvars import copy_context
from threading import Thread

from sb3_async1step.workers.actor_learner import ActorLearner
from sb3_async1step.workers.exceptions import advise_on_threads
from sb3_async1step.workers.gate import Gate
from sb3_async1step.workers.pool import WorkerPool
from sb3_async1step.workers.transitions import Transitions, join


class ThreadWorkerPool(WorkerPool):
    """
    One thread for each worker. Workers do not wait for each other.

    A worker waits only while the calling thread processes a batch, or if that thread is more than one batch behind.

    :param workers: see :class:`~sb3_async1step.workers.pool.WorkerPool`
    :param gate: see :class:`~sb3_async1step.workers.pool.WorkerPool`
    :param num_timesteps: see :class:`~sb3_async1step.workers.pool.WorkerPool`
    :param total_timesteps: see :class:`~sb3_async1step.workers.pool.WorkerPool`
    """

    def __init__(self, workers: Sequence[ActorLearner], gate: Gate, num_timesteps: int, total_timesteps: int) -> None:
        super().__init__(workers, gate, num_timesteps, total_timesteps)
        self._unreported: list[Transitions] = []
        self._n_unreported = 0
        self._batch_is_out = False
        # Numbers of threads inside _run(), and of those that have left it. They are counted there, since start() may
        # be interrupted
        self._n_running = 0
        self._n_ended = 0
        self._exception: BaseException | None = None
        # Each in a copy of the caller's context (np.errstate, decimal's precision), as asyncio.to_thread() does it
        self._threads = [
            Thread(target=copy_context().run, args=(self._run, worker), name=f"actor-learner-{i}", daemon=True)
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
        all_ended = self._n_ended == len(self.workers)
        return self._n_unreported >= self.num_envs or all_ended or self._exception is not None

    def _take_batch(self) -> Transitions:
        """Take ``num_envs`` transitions, or all that are left, in the order in which they were made."""
        n_missing = self.num_envs
        parts = []
        while n_missing > 0 and self._unreported:
            first = self._unreported.pop(0)
            if len(first) > n_missing:
                first, rest = first.split(n_missing)
                self._unreported.insert(0, rest)
            parts.append(first)
            n_missing -= len(first)
        self._n_unreported -= self.num_envs - n_missing
        return join(parts)

    def _run(self, worker: ActorLearner) -> None:
        """Run a worker until the training is over (the target of its thread)."""
        with self._changed:
            self._n_running += 1
        try:
            while (transitions := self._step(worker)) is not None:
                self._report(transitions)
        except BaseException as exception:
            advise_on_threads(exception)
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
        is_ahead = self._batch_is_out or self._n_unreported >= 2 * self.num_envs
        return self._is_stopping or (super()._may_step() and not is_ahead)

    def _report(self, transitions: Transitions) -> None:
        with self._changed:
            self._unreported.append(transitions)
            self._n_unreported += len(transitions)
            if self._n_unreported >= self.num_envs:
                self._changed.notify_all()
