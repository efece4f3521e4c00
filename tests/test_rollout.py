"""The transitions between two updates."""

import numpy as np
import pytest
import torch as th

from sb3_async1step.workers.rollout import Rollout, RolloutBuffer, merge_time_and_lanes


def make_steps(shape, n_steps=3):
    rng = np.random.default_rng(0)
    seen = rng.integers(0, 255, (n_steps + 1, 2, *shape), dtype=np.uint8)
    actions, rewards = rng.integers(0, 3, (n_steps, 2)), rng.random((n_steps, 2), dtype=np.float32)
    return [
        Rollout(seen[i], actions[i], rewards[i], seen[i + 1], np.array([False, i == 1]), np.array([i == 2, False]))
        for i in range(n_steps)
    ]


def assert_is(rollout, steps):
    for name in Rollout.__annotations__:
        np.testing.assert_array_equal(getattr(rollout, name), np.stack([getattr(step, name) for step in steps]))


@pytest.mark.parametrize("shape", [(4,), (4, 6, 5), (2, 3)])
def test_takes_what_was_added(shape):
    steps = make_steps(shape)
    buffer = RolloutBuffer(5, 2)
    for _ in range(2):
        for step in steps:
            buffer.add(step)
        assert buffer.n_filled == 3
        rollout = buffer.take()
        assert len(rollout) == 3
        assert_is(rollout, steps)
        assert rollout.terminated.tolist() == [[False, False], [False, True], [False, False]]
        assert rollout.truncated.tolist() == [[False, False], [False, False], [True, False]]
        assert buffer.n_filled == 0


def test_another_buffer_goes_on_from_a_state():
    steps = make_steps((4,))
    buffer, other = RolloutBuffer(5, 2), RolloutBuffer(5, 2)
    assert buffer.get_state() is None
    other.set_state(None)
    assert other.n_filled == 0
    for step in steps[:2]:
        buffer.add(step)
    other.set_state(buffer.get_state())
    buffer.take()
    other.add(steps[2])
    assert_is(other.take(), steps)


def test_lanes_of_different_lengths():
    """Some lanes take steps, then all of them, also in another buffer that goes on from there."""
    steps = make_steps((4,))
    only_second = Rollout(**{name: values[1:] for name, values in vars(steps[0]).items()})
    buffer, other = RolloutBuffer(5, 2), RolloutBuffer(5, 2)
    buffer.add(only_second, np.array([1]))
    other.set_state(buffer.get_state())
    for each in (buffer, other):
        each.add(steps[1])
        each.add(steps[2], np.array([0, 1]))
        assert each.n_filled == 3
        rollout = each.take()
        assert rollout.lengths.tolist() == [2, 3] and rollout.n_transitions == 5
        assert rollout.is_filled.tolist() == [[True, True], [True, True], [False, True]]
        assert rollout.is_last.tolist() == [[False, False], [True, False], [False, True]]
        for name, values in vars(steps[0]).items():
            of_second = np.stack([values[1], *(getattr(step, name)[1] for step in steps[1:])])
            np.testing.assert_array_equal(getattr(rollout, name)[:, 1], of_second)
            of_first = np.stack([getattr(step, name)[0] for step in steps[1:]])
            np.testing.assert_array_equal(getattr(rollout, name)[:2, 0], of_first)
        flat = rollout.flatten(rollout.rewards)
        np.testing.assert_array_equal(flat, [r for t in range(3) for r in rollout.rewards[t][rollout.is_filled[t]]])
        spread = rollout.unflatten(th.as_tensor(flat)).numpy()
        np.testing.assert_array_equal(spread[rollout.is_filled], flat)
        assert not spread[~rollout.is_filled].any()
        # Even again
        each.add(steps[0])
        assert each.take().lengths is None


def test_images_are_stored_for_fast_convolutions():
    observations = {"image": np.zeros((2, 4, 6, 5), np.uint8), "speed": np.zeros((2, 1))}
    zeros = np.zeros(2, np.float32)
    buffer = RolloutBuffer(3, 2)
    for _ in range(3):
        buffer.add(Rollout(observations, zeros, zeros, observations, zeros > 1, zeros > 1))
    images = th.as_tensor(merge_time_and_lanes(buffer.take().observations)["image"])
    assert images.shape == (6, 4, 6, 5)
    assert images.is_contiguous(memory_format=th.channels_last)
