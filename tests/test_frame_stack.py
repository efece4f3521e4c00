"""Frames that are shifted in machine words are stacked as SB3 stacks them."""

import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.vec_env.stacked_observations import StackedObservations

from sb3_async1step.vec_envs.frame_stack import StackedBytes, accelerate

N_LANES = 5


def make_stack(n_frames, n_channels=1, dtype=np.uint8, channels_order=None):
    space = spaces.Box(0, 255, (9, 7, n_channels), dtype)
    return StackedObservations(N_LANES, n_frames, space, channels_order)


@pytest.mark.parametrize(("n_frames", "n_channels"), [(2, 1), (4, 1), (2, 2), (1, 2), (4, 2), (2, 4), (8, 1)])
def test_as_sb3(n_frames, n_channels):
    theirs, ours = make_stack(n_frames, n_channels), make_stack(n_frames, n_channels)
    accelerate(ours)
    assert type(ours) is StackedBytes
    rng = np.random.default_rng(0)

    def draw(*shape):
        return rng.integers(0, 256, (*shape, 9, 7, n_channels), dtype=np.uint8)

    first = draw(N_LANES)
    kept = []
    np.testing.assert_array_equal(ours.reset(first), theirs.reset(first))
    for t in range(20):
        frames, dones = draw(N_LANES), rng.random(N_LANES) < 0.3
        ends = [{"terminal_observation": draw()} if done else {"step": t} for done in dones]
        stacked, infos = ours.update(frames, dones, [dict(info) for info in ends])
        expected, their_infos = theirs.update(frames, dones, [dict(info) for info in ends])
        np.testing.assert_array_equal(stacked, expected)
        for info, their_info in zip(infos, their_infos, strict=True):
            np.testing.assert_equal(info, their_info)
        # What was returned before stays as it is
        kept.append((stacked, stacked.copy()))
    for stacked, copy in kept:
        np.testing.assert_array_equal(stacked, copy)


def test_missing_terminal_observation_is_said():
    sb3s, ours = make_stack(4), make_stack(4)
    accelerate(ours)
    frames, dones = np.ones((N_LANES, 9, 7, 1), np.uint8), np.arange(N_LANES) == 1
    for stack in (sb3s, ours):
        stack.reset(frames)
        with pytest.warns(UserWarning, match="without terminal_observation"):
            stacked, infos = stack.update(frames, dones, [{}] * N_LANES)
        assert infos == [{}] * N_LANES
        assert stacked[1].sum() == 9 * 7
        assert stacked[0].sum() == 2 * 9 * 7


@pytest.mark.parametrize(
    "stack",
    [make_stack(3), make_stack(4, dtype=np.float32), make_stack(4, channels_order="first")],
    ids=["three frames", "floats", "channels first"],
)
def test_others_stay_sb3s(stack):
    accelerate(stack)
    assert type(stack) is StackedObservations
