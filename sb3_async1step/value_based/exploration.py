"""Epsilon-greedy exploration, with a final epsilon for each env lane."""

from collections.abc import Callable, Sequence

import numpy as np
from stable_baselines3.common.utils import LinearSchedule

#: Given the progress remaining (from 1 to 0), returns the epsilon of each lane
Exploration = Callable[[float], np.ndarray]


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


def make_exploration_schedule(initial_eps: float, final_epsilons: np.ndarray, fraction: float) -> Exploration:
    """
    :param initial_eps: epsilon of every lane at the start
    :param final_epsilons: final epsilon of each lane, shape ``(n_lanes,)``
    :param fraction: fraction of the training over which epsilon is annealed, linearly as in DQN
    :return: the schedule of these lanes
    """
    # LinearSchedule works with arrays as well as with floats
    return LinearSchedule(initial_eps, final_epsilons, fraction)  # type: ignore[arg-type, return-value]


def choose_epsilon_greedily(
    q_values: np.ndarray, epsilons: np.ndarray, random_generator: np.random.Generator
) -> np.ndarray:
    """
    :param q_values: action values of some lanes, shape ``(n, n_actions)``
    :param epsilons: epsilons of these lanes, shape ``(n,)``
    :param random_generator: from which to draw
    :return: indices of the actions, shape ``(n,)``
    """
    n_lanes, n_actions = q_values.shape
    explores = random_generator.random(n_lanes) < epsilons
    random_actions = random_generator.integers(n_actions, size=n_lanes)
    return np.where(explores, random_actions, q_values.argmax(axis=1))
