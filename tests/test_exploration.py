from collections import Counter

import numpy as np
import pytest

from sb3_async1step.value_based.exploration import BehaviourPolicy, ExplorationSchedule, allot_final_epsilons

MIX = ((0.1, 0.01, 0.5), (0.4, 0.3, 0.3))


@pytest.mark.parametrize(
    ("n_lanes", "counts"),
    [(1, (1, 0, 0)), (2, (1, 1, 0)), (3, (1, 1, 1)), (10, (4, 3, 3)), (16, (6, 5, 5)), (100, (40, 30, 30))],
)
def test_the_mix_is_right_at_any_number_of_lanes(n_lanes, counts):
    epsilons = allot_final_epsilons(*MIX, n_lanes)
    assert epsilons.shape == (n_lanes,)
    assert Counter(epsilons) == {eps: count for eps, count in zip(MIX[0], counts, strict=True) if count}


@pytest.mark.parametrize("n_lanes", range(1, 40))
def test_no_share_is_off_by_one_lane(n_lanes):
    epsilons = allot_final_epsilons(*MIX, n_lanes)
    for eps, proportion in zip(*MIX, strict=True):
        assert abs((epsilons == eps).sum() - proportion * n_lanes) < 1


def test_both_workers_get_a_mix():
    epsilons = allot_final_epsilons(*MIX, 16)
    assert set(epsilons[:8]) == set(epsilons[8:]) == set(MIX[0])


def test_one_value_for_all_lanes():
    np.testing.assert_array_equal(allot_final_epsilons(0.05, MIX[1], 3), [0.05, 0.05, 0.05])


def test_schedule_is_linear_then_constant():
    schedule = ExplorationSchedule(1.0, np.array([0.1, 0.5]), fraction=0.2)
    second_lane = schedule.take_lanes(range(1, 2))
    for progress, expected in [(1.0, [1.0, 1.0]), (0.9, [0.55, 0.75]), (0.8, [0.1, 0.5]), (0.0, [0.1, 0.5])]:
        np.testing.assert_allclose(schedule(progress), expected)
        np.testing.assert_allclose(second_lane(progress), expected[1:])


def test_behaviour_policy_explores_as_often_as_epsilon_says():
    n = 20_000
    exploration = ExplorationSchedule(1.0, np.repeat([0.0, 0.4, 1.0], n), fraction=0.2)
    policy = BehaviourPolicy(exploration, 4, np.random.default_rng(0))
    q_values = np.tile([0.0, 3.0, 1.0, 2.0], (3 * n, 1))
    actions = policy.choose_actions(q_values, 0.0, slice(None)).reshape(3, n)
    # Exploration picks the greedy action, too
    np.testing.assert_allclose((actions == 1).mean(axis=1), [1.0, 0.6 + 0.1, 0.25], atol=0.02)
    np.testing.assert_allclose(np.bincount(actions[2]) / n, 0.25, atol=0.02)


def test_behaviour_policy_uses_the_epsilon_of_the_lanes_asked_for():
    policy = BehaviourPolicy(ExplorationSchedule(1.0, np.array([0.0, 1.0]), 0.2), 2, np.random.default_rng(0))
    q_values = np.array([[0.0, 1.0]])
    assert {policy.choose_actions(q_values, 0.0, np.array([0]))[0] for _ in range(50)} == {1}
    assert {policy.choose_actions(q_values, 0.0, np.array([1]))[0] for _ in range(50)} == {0, 1}
