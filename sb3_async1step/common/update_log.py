"""Statistics of the updates between two logs."""

import time
from collections.abc import Iterable

from sb3_async1step.workers.transitions import UpdateStats


class UpdateLog:
    """Sums up the statistics of the updates since the last log."""

    def __init__(self) -> None:
        self.n_updates = 0
        # Sum and number of the values of each key, which not every update has
        self._sums: dict[str, tuple[float, int]] = {}
        self._last_take = time.perf_counter()

    def add(self, updates: Iterable[UpdateStats]) -> None:
        """
        :param updates: statistics of new updates
        """
        for update in updates:
            self.n_updates += 1
            for key, value in {**update.metrics, "async/gradient_staleness": update.gradient_staleness}.items():
                total, n_values = self._sums.get(key, (0.0, 0))
                self._sums[key] = total + value, n_values + 1

    def take(self, is_learning: bool) -> dict[str, float]:
        """
        :param is_learning: whether workers run
        :return: means over the updates since the last call that had a value, and the rate of updates
        """
        now = time.perf_counter()
        seconds, self._last_take = now - self._last_take, now
        means = {key: total / n_values for key, (total, n_values) in self._sums.items()}
        if is_learning:
            means["async/updates_per_second"] = self.n_updates / seconds
        self.n_updates, self._sums = 0, {}
        return means
