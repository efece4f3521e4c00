"""The gate between the threads that change a model or step its environments, and those that want it to stand still."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Gate:
    """
    Whoever changes the model is inside; whoever reads or replaces it as a whole waits until nobody is, and keeps the
    gate closed meanwhile. A model has one gate all its life, so that a training waits for those that closed it before.
    """

    def __init__(self) -> None:
        #: Guards this object and its pool, and is notified of every change that a thread may wait for
        self.changed = threading.Condition()
        self._n_closed = 0
        self._inside: list[threading.Thread] = []

    def __reduce__(self) -> tuple[type["Gate"], tuple]:
        # A copy of the model starts with no threads
        return type(self), ()

    @property
    def is_open(self) -> bool:
        return self._n_closed == 0

    @contextmanager
    def closed(self) -> Iterator[None]:
        """
        Wait until no thread is inside, and keep all threads from entering until the end of the ``with`` block. Any
        thread may call this.

        :return: a context manager
        """
        # A call from inside a step (from an env that plays against the model, say) would wait for itself
        if threading.current_thread() in self._inside:
            yield
            return
        with self.changed:
            self._n_closed += 1
        try:
            with self.changed:
                self.changed.wait_for(lambda: not self._inside)
            yield
        finally:
            with self.changed:
                self._n_closed -= 1
                if self.is_open:
                    self.changed.notify_all()

    @contextmanager
    def passed(self) -> Iterator[None]:
        """
        Wait until the gate is open, and be inside until the end of the ``with`` block, in which the calling thread
        changes the model.

        :return: a context manager
        """
        with self.changed:
            self.changed.wait_for(lambda: self.is_open)
            self.enter()
        try:
            yield
        finally:
            self.leave()

    def enter(self) -> None:
        """Enter; the caller holds ``changed``, and has seen that the gate is open."""
        self._inside.append(threading.current_thread())

    def leave(self) -> None:
        """Leave."""
        with self.changed:
            self._inside.remove(threading.current_thread())
            if not self.is_open:
                self.changed.notify_all()
