"""The transitions between two updates."""

import numpy as np
import pytest
import torch as th

from sb3_async1step.workers.rollout import RolloutBuffer


@pytest.mark.parametrize("shape", [(4,), (4, 6, 5), (2, 3)])
def test_takes_what_was_added(shape):
    rng = np.random.default_rng(0)
    seen = rng.integers(0, 255, (4, 2, *shape), dtype=np.uint8)
    actions, rewards = rng.integers(0, 3, (3, 2)), rng.random((3, 2), dtype=np.float32)
    buffer = RolloutBuffer(5, seen[0])
    for i in range(3):
        buffer.add(seen[i], actions[i], rewards[i], seen[i + 1], np.array([False, i == 1]), actions[i] + 1)
    rollout = buffer.take(th.device("cpu"))
    np.testing.assert_array_equal(rollout.observations, seen[:3].reshape(6, *shape))
    np.testing.assert_array_equal(rollout.next_observations, seen[1:].reshape(6, *shape))
    assert rollout.actions.tolist() == actions.flatten().tolist()
    assert rollout.next_actions.tolist() == (actions + 1).flatten().tolist()
    assert rollout.rewards.tolist() == rewards.flatten().tolist()
    assert rollout.terminated.tolist() == [0, 0, 0, 1, 0, 0]
    assert buffer.n_filled == 0


def test_images_are_stored_for_fast_convolutions():
    images = np.zeros((2, 4, 6, 5), np.uint8)
    buffer = RolloutBuffer(3, {"image": images, "speed": np.zeros((2, 1))})
    for _ in range(3):
        observations = {"image": images, "speed": np.zeros((2, 1))}
        buffer.add(observations, np.zeros(2), np.zeros(2), observations, np.zeros(2, bool), 0)
    rollout = buffer.take(th.device("cpu"))
    assert rollout.observations["image"].shape == (6, 4, 6, 5)
    assert rollout.observations["image"].is_contiguous(memory_format=th.channels_last)
