"""Asks the server for news, whatever the driver's thread does meanwhile."""

import threading
from collections.abc import Callable

from sb3_async1step.nodes.messages import News


class NewsReader:
    """
    Asks the server now and then on a thread of its own: while a callback takes its time, what nodes have done would
    otherwise be known to the server alone, and lost with it.

    :param ask: returns the server's news, None if it has been started again and knows nothing
    :param interval: seconds between two questions of the thread
    """

    def __init__(self, ask: Callable[[], News | None], interval: float) -> None:
        self._ask, self._interval = ask, interval
        self._unread: list[News | None] = []
        self._lock = threading.Lock()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="news-reader", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def end(self, timeout: float) -> None:
        """
        End the thread, if it was started.

        :param timeout: seconds that its last question may take
        """
        self._end.set()
        if self._thread.ident is not None:
            self._thread.join(timeout)

    def take(self) -> list[News | None]:
        """
        Ask the server.

        :return: the news that nobody has taken yet, the newest last
        :raises Exception: that of Ray, if the server is away; what has been read is returned by the next call
        """
        with self._lock:
            self._unread.append(self._ask())
            unread, self._unread = self._unread, []
        return unread

    def _run(self) -> None:
        while not self._end.wait(self._interval):
            with self._lock:
                try:
                    news = self._ask()
                except Exception:
                    # The driver's thread asks as well, and sees to it
                    continue
                if news is not None:
                    self._unread.append(news)
