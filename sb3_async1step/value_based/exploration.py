"""Epsilon-greedy exploration, with a final epsilon for each env lane and a random generator for each worker."""

from collections.abc import Sequence

import numpy as np
from stable_baselines3.common.utils import LinearSchedule


def allot_final_epsilons(
    final_eps: float | Sequence[float], final_probs: Sequence[float] | None, n_lanes: int
) -> np.ndarray:
    """
    Give each env lane its final epsilon, in the right proportions for any number of lanes.

    The paper samples a value for each thread (section 5.1). The largest remainder method gives the same proportions
    without their variance. The values are spread evenly over the lanes, so that each worker gets a mix of them.

    :param final_eps: one value for all lanes, or the values to choose from
    :param final_probs: the proportion of lanes for each value (not used for a single value)
    :param n_lanes: number of env lanes
    :return: final epsilon of each lane, shape ``(n_lanes,)``
    """
    if np.ndim(final_eps) == 0:
        return np.full(n_lanes, final_eps, dtype=float)
    assert isinstance(final_eps, Sequence)
    quotas = np.asarray(final_probs, dtype=float) * n_lanes
    counts = np.floor(quotas).astype(int)
    # Ties go to the value with the larger proportion; rounding keeps floating-point noise from deciding them
    by_remainder = np.lexsort((-quotas, -np.round(quotas - counts, 9)))
    counts[by_remainder[: n_lanes - counts.sum()]] += 1
    places = [((i + 0.5) / count, value) for value, count in zip(final_eps, counts, strict=True) for i in range(count)]
    return np.array([value for _, value in sorted(places, key=lambda place: place[0])], dtype=float)


class ExplorationSchedule:
    """
    The exploration schedule of several lanes: linear from the initial epsilon to the final one of each lane, as in DQN.

    :param initial_eps: epsilon of every lane at the start
    :param final_eps: final epsilon of each lane, shape ``(n_lanes,)``
    :param fraction: fraction of the training over which epsilon is annealed
    """

    def __init__(self, initial_eps: float, final_eps: np.ndarray, fraction: float) -> None:
        self.initial_eps = initial_eps
        self.final_eps = final_eps
        self.fraction = fraction
        # LinearSchedule works with arrays as well as with floats
        self._schedule = LinearSchedule(initial_eps, final_eps, fraction)  # type: ignore[arg-type]

    def __call__(self, progress_remaining: float) -> np.ndarray:
        """
        :param progress_remaining: progress remaining, from 1 (start) to 0 (end)
        :return: epsilon of each lane, shape ``(n_lanes,)``
        """
        return np.broadcast_to(self._schedule(progress_remaining), self.final_eps.shape)

    def take_lanes(self, lanes: range) -> "ExplorationSchedule":
        """
        :param lanes: consecutive lanes
        :return: the schedule of these lanes
        """
        return ExplorationSchedule(self.initial_eps, self.final_eps[lanes.start : lanes.stop], self.fraction)


class BehaviourPolicy:
    """
    Epsilon-greedy behaviour policy of the lanes of one worker.

    :param exploration: the exploration schedule of these lanes
    :param n_actions: number of actions
    :param random_generator: the random generator of this worker
    """

    def __init__(self, exploration: ExplorationSchedule, n_actions: int, random_generator: np.random.Generator) -> None:
        self.exploration = exploration
        self.n_actions = n_actions
        self.random_generator = random_generator

    def choose_actions(self, q_values: np.ndarray, progress_remaining: float, lanes: np.ndarray | slice) -> np.ndarray:
        """
        Choose an action for each lane.

        :param q_values: action values, shape ``(n, n_actions)``
        :param progress_remaining: progress remaining, from 1 (start) to 0 (end of the training)
        :param lanes: the lanes of the worker to which the rows belong
        :return: indices of the actions, shape ``(n,)``
        """
        n_rows = len(q_values)
        explores = self.random_generator.random(n_rows) < self.exploration(progress_remaining)[lanes]
        random_actions = self.random_generator.integers(self.n_actions, size=n_rows)
        return np.where(explores, random_actions, q_values.argmax(axis=1))
