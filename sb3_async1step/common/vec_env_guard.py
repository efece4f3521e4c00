"""Keep a VecEnv whole while workers step its parts, and say what happened when one of its processes died."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from typing import Any, NoReturn

from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv

# What callbacks may call on the training env. It would talk to envs (or to pipes) that workers use
QUERIES = ("env_is_wrapped", "env_method", "get_attr", "get_images", "set_attr")
STEPS = ("reset", "step_async")


@contextmanager
def guard_vec_env(env: VecEnv, standing_still: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """
    Inside the ``with`` block, calls of the VecEnv's methods wait until no worker steps, and steps and resets raise.

    :param env: the VecEnv whose parts are stepped by workers
    :param standing_still: makes the workers stand still
    """
    base = env.unwrapped

    def make_wait(method: Callable) -> Callable:
        @wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            with standing_still():
                return method(*args, **kwargs)

        return call

    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise RuntimeError("The workers of learn() step this env: nobody else may step or reset it until learn() ends.")

    for name in QUERIES:
        setattr(base, name, make_wait(getattr(base, name)))
    for name in STEPS:
        setattr(base, name, refuse)
    try:
        yield
    finally:
        for name in (*QUERIES, *STEPS):
            delattr(base, name)


def describe_dead_process(env: VecEnv, lanes: range) -> str | None:
    """
    :param env: a worker's VecEnv
    :param lanes: its lanes
    :return: which lane's process ended and how, None if all run or there are none
    """
    base = env.unwrapped
    if isinstance(base, SubprocVecEnv):
        for lane, process in zip(lanes, base.processes, strict=True):
            # A pipe may break before the process is seen to have ended
            process.join(timeout=0.1)
            if process.exitcode is not None:
                how = f"was killed by signal {-process.exitcode}" if process.exitcode < 0 else "ended"
                return f"The process of env lane {lane} {how}"
    return None


def close_if_broken(env: VecEnv) -> None:
    """
    End the other processes of a VecEnv when one of them died: it can't be used (nor closed in SB3's way) any more.

    :param env: the VecEnv
    """
    base = env.unwrapped
    if not isinstance(base, SubprocVecEnv) or all(process.is_alive() for process in base.processes):
        return
    for process, remote in zip(base.processes, base.remotes, strict=True):
        process.terminate()
        process.join()
        remote.close()
    base.closed = True
