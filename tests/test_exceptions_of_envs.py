"""What learn() raises when an env does: its own exception, and a note that says where, and perhaps what to do."""

import asyncio
import contextvars
import dataclasses
import decimal
import signal
import sqlite3
import threading

import numpy as np
import pytest
import torch as th
from packaging.version import Version
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import FakeImageEnv

from sb3_async1step import AsyncOneStepQ
from tests.envs import RandomWalkEnv, Speechless, make_env
from tests.helpers import are_equal, weights_of

USERS_VARIABLE = contextvars.ContextVar("USERS_VARIABLE", default="not set")


@dataclasses.dataclass(frozen=True)
class FrozenError(Exception):
    """Assigning to its attributes raises: ``add_note()`` does, and contextlib."""

    code: int


class Refusing(Exception):
    def __setattr__(self, name, value):
        raise AttributeError(f"can't set {name}")

    def add_note(self, note):
        raise TypeError("no notes")


@pytest.mark.parametrize("n_workers", [1, 3])
@pytest.mark.parametrize("where", ["step", "reset", "callback", "first reset"])
@pytest.mark.parametrize(
    "exception", [FrozenError(3), Refusing(3), Speechless(3)], ids=["frozen", "refusing", "speechless"]
)
def test_an_exception_that_refuses_attributes_or_has_no_text(n_workers, where, exception):
    class Raising(RandomWalkEnv):
        n_resets = 0

        def reset(self, **kwargs):
            self.n_resets += 1
            if where == "first reset" or (where == "reset" and self.n_resets > 1):
                raise exception
            return super().reset(**kwargs)

        def step(self, action):
            if where == "step" and self.n_steps == 2:
                raise exception
            return super().step(action)

    def fail(locals_, globals_):
        if where == "callback":
            raise exception
        return True

    model = AsyncOneStepQ("MlpPolicy", make_env(3, Raising), n_workers=n_workers)
    for _ in range(2):
        with pytest.raises(type(exception)) as caught:
            model.learn(10**6, callback=fail)
        assert caught.value is exception
    model.set_env(make_env(3))
    model.learn(30)


def test_an_attribute_error_of_the_envs_own(algorithm):
    class Raising(RandomWalkEnv):
        def step(self, action):
            try:
                raise KeyError("first")
            except KeyError:
                return self.missing

    with pytest.raises(AttributeError, match="missing"):
        algorithm("MlpPolicy", make_env(2, Raising), n_workers=2).learn(100)


class SqliteEnv(RandomWalkEnv):
    def __init__(self):
        super().__init__()
        self.connection = sqlite3.connect(":memory:")

    def step(self, action):
        self.connection.execute("select 1")
        return super().step(action)


class EventLoopEnv(RandomWalkEnv):
    def step(self, action):
        asyncio.get_event_loop_policy().get_event_loop()
        return super().step(action)


class SignalEnv(RandomWalkEnv):
    def step(self, action):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        return super().step(action)


class ContextEnv(RandomWalkEnv):
    """OpenGL has a current context for each thread."""

    def __init__(self):
        super().__init__()
        self.thread = threading.current_thread()

    def step(self, action):
        if threading.current_thread() is not self.thread:
            raise RuntimeError("Attempt to retrieve context when no valid context")
        return super().step(action)


@pytest.mark.parametrize("env_class", [SqliteEnv, EventLoopEnv, SignalEnv, ContextEnv])
def test_envs_that_are_bound_to_one_thread(env_class):
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    with pytest.raises((sqlite3.ProgrammingError, RuntimeError, ValueError)) as caught:
        AsyncOneStepQ("MlpPolicy", make_env(2, env_class), n_workers=2).learn(10**6)
    where, advice = caught.value.__notes__
    assert where.startswith("Raised in env lane ")
    assert "n_workers=1" in advice
    assert "SubprocVecEnv" in advice
    # The remedy
    assert AsyncOneStepQ("MlpPolicy", make_env(2, env_class), n_workers=1).learn(20).num_timesteps == 20
    asyncio.set_event_loop(None)
    loop.close()


@pytest.mark.parametrize("n_workers", [1, 3])
def test_workers_run_in_a_copy_of_the_callers_context(algorithm, n_workers):
    seen = set()

    class Looking(RandomWalkEnv):
        def step(self, action):
            seen.add((USERS_VARIABLE.get(), decimal.getcontext().prec, np.geterr()["divide"]))
            USERS_VARIABLE.set("by an env")
            return super().step(action)

    USERS_VARIABLE.set("before")
    with decimal.localcontext() as context, np.errstate(divide="raise"):
        context.prec = 5
        algorithm("MlpPolicy", make_env(3, Looking), n_workers=n_workers).learn(60)
    # NumPy 1 keeps its state for each thread
    is_carried = n_workers == 1 or Version(np.__version__) >= Version("2")
    divide = "raise" if is_carried else "warn"
    assert seen == {("before", 5, divide), ("by an env", 5, divide)}
    # As on one thread, unless the threads are others
    assert USERS_VARIABLE.get() == ("by an env" if n_workers == 1 else "before")


@pytest.mark.parametrize("n_workers", [1, 2])
@pytest.mark.parametrize("mixed_precision", [False, True])
def test_torch_autocast_around_a_training_is_not_followed(mixed_precision, n_workers):
    """It would keep what it has converted of the weights, and so hide all updates."""

    def make():
        env = FakeImageEnv(screen_height=36, screen_width=36)
        env.observation_space.seed(0)
        return env

    def train():
        env = make_vec_env(make, n_envs=2, seed=0)
        kwargs = {"mixed_precision": mixed_precision, "net_arch": [8]}
        model = AsyncOneStepQ("CnnPolicy", env, n_workers=n_workers, backend="serial", seed=0, policy_kwargs=kwargs)
        return weights_of(model.learn(40))

    expected = train()
    with th.autocast("cpu", dtype=th.bfloat16), pytest.warns(UserWarning, match=r"learn\(\) ignores torch.autocast"):
        assert are_equal(train(), expected)
