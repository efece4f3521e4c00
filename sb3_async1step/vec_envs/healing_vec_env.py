"""A SubprocVecEnv that replaces processes that fail."""

import math
import multiprocessing
import time
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvStepReturn

from sb3_async1step.parameter_checks import check_positive, check_whole
from sb3_async1step.vec_envs.healing_lane import HealingLane
from sb3_async1step.vec_envs.lane_process import LaneSettings
from sb3_async1step.vec_envs.split import split_vec_env, take_lanes

#: Seconds that lanes still have to answer when a training has been interrupted
LAST_ANSWER_TIMEOUT = 1.0
# Seconds; pipes count milliseconds with 32 bits
LONGEST_TIMEOUT = 1e6


class HealingVecEnv(SubprocVecEnv):
    """
    A process for each env, as with ``SubprocVecEnv``. But a process that ends, an env that raises an exception in a
    step or reset, and one that does not answer in time do not end the training. The process is replaced by a new one,
    in which the env is made and reset again. ::

        make_vec_env("CartPole-v1", n_envs=16, vec_env_cls=HealingVecEnv, vec_env_kwargs=dict(step_timeout=10.0))

    **The episode** ends as truncated, with reward 0: ``info["TimeLimit.truncated"]`` is True, and
    ``info["terminal_observation"]`` is the last observation that there was. ``info["lane_restart"]`` says what happened
    (after a failed reset, it is in ``reset_infos``). ``Monitor`` does not count the episode, and its file goes on.

    **The new env** has the attributes that were set by ``set_attr``; what ``env_method`` has done is lost. If the lane
    was seeded, its seed follows from the lane's and from the number of its restarts. Options are used again only if the
    reset that they were for has failed.

    **Other requests** (``get_attr``, ``env_method``, ...) to a process that ends or does not answer are made to the new
    one again. An exception that they raise in the env is raised here, and ends the process, too.

    **Too many restarts** of a lane end the training with the env's own exception, or with a ``RuntimeError`` that says
    what happened. So does any failure when the envs are made for the first time.

    The processes ignore Ctrl-C. One that was interrupted in the middle of an answer may have to be replaced.

    :param env_fns: functions that make the envs
    :param start_method: how processes are started, see
        :class:`SubprocVecEnv <stable_baselines3.common.vec_env.SubprocVecEnv>`; with ``"fork"``, restarts fork the
        program while its workers run
    :param step_timeout: seconds that an env has for a step, a reset or any other request, None for no limit
    :param start_timeout: seconds until a new process has made its env, None for no limit
    :param max_restarts: number of restarts of a lane within ``restart_window``, or one after another without a step
        between them, that do not end the training
    :param restart_window: seconds for which a restart counts
    :raises ValueError: if a parameter is out of range
    """

    def __init__(
        self,
        env_fns: Sequence[Callable[[], gym.Env]],
        start_method: str | None = None,
        step_timeout: float | None = 60.0,
        start_timeout: float | None = 300.0,
        max_restarts: int = 10,
        restart_window: float = 600.0,
    ) -> None:
        if len(env_fns) == 0:
            raise ValueError("HealingVecEnv needs at least one env.")
        self.waiting = False
        self.closed = False
        self.settings = make_settings(start_method, step_timeout, start_timeout, max_restarts, restart_window)
        # What SubprocVecEnv takes for the ends of pipes
        self.remotes: Any = [HealingLane(number, make, self.settings) for number, make in enumerate(env_fns)]
        try:
            for lane in self.remotes:
                lane.start()
            # Here, any failure in making an env is raised
            for lane in self.remotes:
                lane.send(("get_spaces", None))
            spaces = [lane.recv() for lane in self.remotes]
            observation_space, action_space = spaces[0]
            VecEnv.__init__(self, len(env_fns), observation_space, action_space)
        except BaseException:
            self.close()
            raise

    @property
    def processes(self) -> list[Any]:  # type: ignore[override]
        """The processes of the lanes, but for those that have ended and have not been replaced yet."""
        return [
            lane.process.process for lane in self.remotes if lane.process is not None and lane.process.exitcode is None
        ]

    @property
    def n_restarts(self) -> int:
        """Number of restarts of all lanes."""
        return sum(lane.n_restarts for lane in self.remotes)

    def step_wait(self) -> VecEnvStepReturn:
        """
        :return: observations, rewards, dones and infos, as for every VecEnv
        :raises Exception: if a lane was restarted too often
        """
        # Processes that failed in the same step start at the same time
        for lane in self.remotes:
            lane.settle()
        return super().step_wait()

    def close(self) -> None:
        """Close the envs, and end the processes that do not end by themselves."""
        if self.closed:
            return
        for lane in self.remotes:
            lane.begin_closing()
        for lane in self.remotes:
            lane.end()
        self.closed = True

    def hurry(self) -> None:
        """Whoever waits for an answer gets an exception if it does not come soon."""
        self.settings.give_up_at = time.monotonic() + LAST_ANSWER_TIMEOUT

    def end_hurry(self) -> None:
        """Undo :meth:`hurry`."""
        self.settings.give_up_at = math.inf


def make_settings(
    start_method: str | None,
    step_timeout: float | None,
    start_timeout: float | None,
    max_restarts: int,
    restart_window: float,
) -> LaneSettings:
    """
    :param start_method: see :class:`HealingVecEnv`, as for the other parameters
    :return: what all lanes need to know
    :raises ValueError: if a parameter is out of range
    """
    check_positive(or_none=True, or_infinite=True, step_timeout=step_timeout, start_timeout=start_timeout)
    check_positive(or_infinite=True, restart_window=restart_window)
    check_whole(at_least=0, max_restarts=max_restarts)
    if start_method is None:
        # SubprocVecEnv's choice
        start_method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    return LaneSettings(
        multiprocessing.get_context(start_method),
        to_limit(step_timeout),
        to_limit(start_timeout),
        max_restarts,
        restart_window,
    )


def to_limit(timeout: float | None) -> float:
    """
    :param timeout: seconds, None for no limit
    :return: the same, infinite if a pipe could not wait that long
    """
    return math.inf if timeout is None or timeout > LONGEST_TIMEOUT else timeout


@split_vec_env.register
def _(env: HealingVecEnv, groups: Sequence[range]) -> list[VecEnv]:
    # The parts share the lanes, whose processes may be replaced while they are split
    return [take_lanes(env, lanes, "remotes") for lanes in groups]
