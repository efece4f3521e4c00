"""Keep a VecEnv whole while workers step its parts."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from stable_baselines3.common.vec_env import VecEnv

from sb3_async1step.vec_envs.split import find_base

# What callbacks may call on the training env. These reach the envs (or their pipes), which workers use
QUERIES = ("env_is_wrapped", "env_method", "get_attr", "get_images", "has_attr", "set_attr")
STEPS = ("reset", "step", "step_async")
NOBODY_ELSE = (
    "learn() steps this env: nobody else may step or reset it until learn() ends. "
    "A callback that evaluates the model (EvalCallback) needs an env of its own."
)


class GuardedMethod(partial):
    """A function that takes a method's place. In a copy of the env, there are no workers: it is the method again."""

    def __reduce__(self) -> tuple[Callable, tuple]:
        method = self.args[0]
        return getattr, (method.__self__, method.__name__)


def guard_vec_env(
    env: VecEnv,
    standing_still: Callable[[], AbstractContextManager[object]],
    settle: Callable[[], None],
    may_step: Callable[[], bool],
) -> None:
    """
    Until :func:`unguard_vec_env`, calls of the VecEnv's methods wait until no worker steps, and steps and resets are
    for workers only.

    :param env: the training env
    :param standing_still: makes the workers stand still
    :param settle: waits until no lane steps by itself
    :param may_step: whether the calling thread may step or reset the env
    """
    base = find_base(env)

    def wait(method: Callable, *args: Any, **kwargs: Any) -> Any:
        with standing_still():
            settle()
            return method(*args, **kwargs)

    def refuse(method: Callable, *args: Any, **kwargs: Any) -> Any:
        if may_step():
            return method(*args, **kwargs)
        raise RuntimeError(NOBODY_ELSE)

    for name in QUERIES:
        setattr(base, name, GuardedMethod(wait, getattr(base, name)))
    for name in STEPS:
        setattr(base, name, GuardedMethod(refuse, getattr(base, name)))


def unguard_vec_env(env: VecEnv) -> None:
    """
    Undo :func:`guard_vec_env`. Nothing happens if the VecEnv is not guarded.

    :param env: the training env
    """
    for name in (*QUERIES, *STEPS):
        find_base(env).__dict__.pop(name, None)
