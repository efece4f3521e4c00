"""Send the wrappers of a VecEnv to nodes, without the lanes inside, which the nodes have."""

import pickle
from collections.abc import Sequence
from dataclasses import dataclass

from stable_baselines3.common.vec_env import (
    VecCheckNan,
    VecEnv,
    VecEnvWrapper,
    VecExtractDictObs,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
    VecTransposeImage,
)

from sb3_async1step.sb3_internals import read_wrapper, rebuild_wrapper
from sb3_async1step.vec_envs.split import take_lanes, take_stack

#: Wrappers that nodes can have; subclasses may keep more for each lane
WRAPPERS = (VecCheckNan, VecExtractDictObs, VecFrameStack, VecMonitor, VecNormalize, VecTransposeImage)


@dataclass
class PackedWrapper:
    """
    A wrapper on its way to a node.

    :param wrapper_class: its class
    :param attributes: its attributes, without the VecEnv that it wraps; pickled, since arrays that Ray unpickles can't
        be written to
    """

    wrapper_class: type[VecEnvWrapper]
    attributes: bytes


def pack_wrappers(env: VecEnv, lanes: range) -> list[PackedWrapper]:
    """
    :param env: a VecEnv with its wrappers
    :param lanes: some of its lanes
    :return: the wrappers for these lanes, the innermost first
    :raises TypeError: if nodes can't have one of the wrappers
    """
    packed: list[PackedWrapper] = []
    while isinstance(env, VecEnvWrapper):
        if type(env) not in WRAPPERS:
            raise TypeError(
                f"{type(env).__name__} can't be sent to other machines. The wrappers of a RayVecEnv may be "
                f"{', '.join(wrapper.__name__ for wrapper in WRAPPERS)}; any other has to wrap each env by itself "
                "(make_vec_env(..., wrapper_class=...))."
            )
        packed.insert(0, _pack(env, lanes))
        env = env.venv
    return packed


def _pack(wrapper: VecEnvWrapper, lanes: range) -> PackedWrapper:
    part = take_lanes(wrapper, lanes)
    if isinstance(part, VecMonitor):
        # The driver writes the file
        part.results_writer, part.episode_count = None, 0
    if isinstance(part, VecFrameStack):
        part.stacked_obs = take_stack(part.stacked_obs, lanes)
    return PackedWrapper(type(wrapper), pickle.dumps(read_wrapper(part)))


def wrap(env: VecEnv, wrappers: Sequence[PackedWrapper]) -> VecEnv:
    """
    :param env: a VecEnv
    :param wrappers: what :func:`pack_wrappers` returned for its lanes
    :return: the env in these wrappers
    """
    for wrapper in wrappers:
        env = rebuild_wrapper(wrapper.wrapper_class, pickle.loads(wrapper.attributes), env)
    return env
