"""All workers on the thread that called ``learn()``."""

from collections.abc import Iterator

from sb3_async1step.workers.pool import WorkerPool
from sb3_async1step.workers.transitions import Transitions, join


class SerialWorkerPool(WorkerPool):
    """The workers take turns on the calling thread, which is reproducible bit for bit."""

    def batches(self) -> Iterator[Transitions]:
        while parts := [part for part in map(self._step, self.workers) if part is not None]:
            yield join(parts)

    def stop(self) -> None:
        self._is_stopping = True
