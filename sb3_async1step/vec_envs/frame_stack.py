"""SB3's stack of frames, faster for the images of Atari games."""

import sys
import warnings
from typing import Any

import numpy as np
from stable_baselines3.common.vec_env.stacked_observations import StackedObservations

#: An unsigned integer with as many bytes as a pixel's frames, whose bits are shifted as a whole
WORDS = {2: np.uint16, 4: np.uint32, 8: np.uint64}


class StackedBytes(StackedObservations[np.ndarray]):
    """Frames of bytes in the last axis, as many as a machine word has. SB3 would move them one by one."""

    stacked_obs: np.ndarray

    def update(
        self, observations: np.ndarray, dones: np.ndarray, infos: list[dict[str, Any]]
    ) -> tuple[np.ndarray, list[dict[str, Any]]]:
        """
        :param observations: the new frames, shape ``(n_lanes, ..., n_new)``
        :param dones: whether an episode ended, shape ``(n_lanes,)``
        :param infos: of each lane, changed in place: the terminal observations are stacked, too
        :return: the stacked observations, shape ``(n_lanes, ..., n_frames)``, and the infos
        """
        n_new = observations.shape[-1]
        words = self.stacked_obs.view(WORDS[self.stacked_obs.shape[-1]])
        shift = np.right_shift if sys.byteorder == "little" else np.left_shift
        self.stacked_obs = shift(words, words.dtype.type(8 * n_new)).view(np.uint8)
        for lane in np.flatnonzero(dones):
            if "terminal_observation" in infos[lane]:
                previous = self.stacked_obs[lane, ..., :-n_new]
                terminal = infos[lane]["terminal_observation"]
                infos[lane]["terminal_observation"] = np.concatenate((previous, terminal), axis=-1)
            else:
                warnings.warn("VecFrameStack wrapping a VecEnv without terminal_observation info", stacklevel=2)
            self.stacked_obs[lane] = 0
        self.stacked_obs[..., -n_new:] = observations
        return self.stacked_obs, infos


def accelerate(stack: StackedObservations) -> None:
    """
    Replace a stack of one array by a faster one, in place, if there is one for its frames.

    :param stack: the stack
    """
    frames = stack.stacked_obs
    if not stack.channels_first and frames.dtype == np.uint8 and frames.shape[-1] in WORDS:
        stack.__class__ = StackedBytes
