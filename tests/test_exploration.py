from collections import Counter

import numpy as np
import pytest
import torch as th

from sb3_async1step import AsyncOneStepQ
from sb3_async1step.value_based.exploration import (
    allot_final_epsilons,
    choose_epsilon_greedily,
    make_exploration_schedule,
)
from sb3_async1step.vec_envs.split import split_vec_env
from sb3_async1step.workers.lanes import Lanes
from tests.envs import make_env

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


def test_epsilon_is_annealed_linearly_and_then_constant():
    epsilons = make_exploration_schedule(1.0, np.array([0.1, 0.5]), fraction=0.2)
    for progress, expected in [(1.0, [1.0, 1.0]), (0.9, [0.55, 0.75]), (0.8, [0.1, 0.5]), (0.0, [0.1, 0.5])]:
        np.testing.assert_allclose(epsilons(progress), expected)


def test_lanes_explore_as_often_as_their_epsilon_says():
    n = 20_000
    q_values = np.tile([0.0, 3.0, 1.0, 2.0], (3 * n, 1))
    epsilons = np.repeat([0.0, 0.4, 1.0], n)
    actions = choose_epsilon_greedily(q_values, epsilons, np.random.default_rng(0)).reshape(3, n)
    # Exploration picks the greedy action, too
    np.testing.assert_allclose((actions == 1).mean(axis=1), [1.0, 0.6 + 0.1, 0.25], atol=0.02)
    np.testing.assert_allclose(np.bincount(actions[2]) / n, 0.25, atol=0.02)


def test_workers_use_the_epsilons_of_the_lanes_asked_for():
    finals = {"exploration_final_eps": [0.0, 1.0], "exploration_final_probs": [0.5, 0.5]}
    model = AsyncOneStepQ("MlpPolicy", make_env(4), exploration_initial_eps=0.0, **finals)
    model._last_obs = model.env.reset()
    groups = [range(2), range(2, 4)]
    workers = model._make_workers([Lanes(env) for env in split_vec_env(model.env, groups)], groups, model._last_obs)
    # Each worker has a lane that acts greedily and another one that acts at random
    assert model._get_exploration_schedule(4)(0.0).tolist() == [0.0, 1.0, 0.0, 1.0]
    for worker in workers:
        worker.shared.progress_remaining = 0.0
        q_values = th.tensor([[0.0, 1.0]])
        assert {worker.explore(q_values, np.array([0]))[0] for _ in range(50)} == {1}
        assert {worker.explore(q_values, np.array([1]))[0] for _ in range(50)} == {0, 1}
