"""What the logger records of the exchanges between nodes and server."""

import time

import numpy as np

from sb3_async1step.nodes.messages import News


class ExchangeMetrics:
    """Statistics of the exchanges since the last log."""

    def __init__(self) -> None:
        self._n_dropped = 0
        self._clear()

    def _clear(self) -> None:
        self._staleness: list[int] = []
        self._pull_seconds: list[float] = []
        self._n_bytes = 0
        self._since = time.monotonic()

    def add(self, news: News) -> None:
        """
        :param news: what the server says
        """
        self._staleness += news.staleness
        self._pull_seconds += news.pull_seconds
        self._n_bytes += news.n_bytes
        self._n_dropped += news.n_dropped

    def take(self) -> dict[str, float]:
        """
        :return: means and rates since the last call, and the number of dropped pushes
        """
        seconds = max(time.monotonic() - self._since, 1e-9)
        metrics = {"ray/bytes_per_second": self._n_bytes / seconds, "ray/dropped_pushes": float(self._n_dropped)}
        if self._staleness:
            metrics["ray/staleness"] = float(np.mean(self._staleness))
        if self._pull_seconds:
            metrics["ray/pull_seconds"] = float(np.mean(self._pull_seconds))
        self._clear()
        return metrics
