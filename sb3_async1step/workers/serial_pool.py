"""All workers on the thread that called ``learn()``."""

from collections.abc import Iterator

from sb3_async1step.workers.pool import WorkerPool
from sb3_async1step.workers.transitions import Transitions, join


class SerialWorkerPool(WorkerPool):
    """
    The workers take turns on the calling thread, which is reproducible bit for bit if their lanes step together.
    """

    def batches(self) -> Iterator[Transitions]:
        while parts := [part for part in map(self._step, self.workers) if part is not None]:
            self._report(join(parts))
            while self._batch_is_full():
                yield self._take_batch()
        if self._unreported:
            yield self._take_batch()

    def stop(self) -> None:
        self._is_stopping = True
