"""A KeyboardInterrupt wherever it can come: the model predicts, saves and learns on, and the env is free."""

import _imp
import copy
import importlib
import io
import signal
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3.common.callbacks import CheckpointCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env

from benchmarks.interrupts import interrupt, raise_keyboard_interrupt
from sb3_async1step import AsyncOneStepQ, BackgroundEvalCallback
from sb3_async1step.common import async_algorithm
from sb3_async1step.common.model_file import pack_model
from sb3_async1step.workers import gate
from sb3_async1step.workers.gate import Call
from tests.helpers import actor_learners, wait_until

PACKAGE = "sb3_async1step"
N_THREADS = th.get_num_threads()


class Interrupter:
    """
    Raises a ``KeyboardInterrupt`` at an event of this thread in the code of this package.

    :param n_events: number of events before it, None to count only
    :param every_bytecode: whether each bytecode is an event; otherwise each line
    """

    def __init__(self, n_events: int | None, every_bytecode: bool) -> None:
        self.n_left = n_events
        self.n_seen = 0
        self.event = "opcode" if every_bytecode else "line"

    def __enter__(self) -> "Interrupter":
        sys.settrace(self._trace)
        return self

    def __exit__(self, *args: object) -> None:
        sys.settrace(None)

    def _trace(self, frame: FrameType, event: str, arg: Any) -> Any:
        if not frame.f_globals.get("__name__", "").startswith(PACKAGE):
            return None
        frame.f_trace_opcodes = self.event == "opcode"
        if event == self.event:
            self.n_seen += 1
            if self.n_left is not None and self.n_seen > self.n_left:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self._trace


def learn_on(model: AsyncOneStepQ) -> None:
    """Check that the model learns on, and what the interrupted call may have left behind."""
    assert model.env is not None
    n_steps_before = model.num_timesteps
    model.learn(4, reset_num_timesteps=False)
    assert model.num_timesteps == n_steps_before + 4
    wait_until(lambda: not actor_learners())
    assert th.get_num_threads() == N_THREADS
    assert th.is_grad_enabled()
    # Nobody guards it
    model.env.reset()
    model.env.step([0, 0])


def make_calls(model: AsyncOneStepQ, path: Path) -> dict[str, Callable[[], Any]]:
    """
    :param model: a model
    :param path: a file
    :return: what is interrupted
    """
    observations = np.zeros((2, 4), np.float32)
    parameters = copy.deepcopy(model.get_parameters())
    callbacks = [
        CheckpointCallback(1, str(path.parent)),
        EvalCallback(make_vec_env("CartPole-v1"), eval_freq=1),
        BackgroundEvalCallback(make_vec_env("CartPole-v1"), eval_freq=1, best_model_save_path=str(path.parent)),
    ]
    return {
        "predict": lambda: model.predict(observations),
        "save": lambda: model.save(path),
        "set_parameters": lambda: model.set_parameters(parameters),
        "learn": lambda: model.learn(4, reset_num_timesteps=False),
        "learn_with_callbacks": lambda: model.learn(4, callbacks, reset_num_timesteps=False),
    }


@pytest.mark.parametrize("name", ["predict", "save", "set_parameters", "learn", "learn_with_callbacks"])
@pytest.mark.parametrize("n_workers", [1, 2])
@pytest.mark.parametrize(
    ("every_bytecode", "n_interrupts"),
    [(False, 20), pytest.param(True, None, marks=pytest.mark.slow)],
    ids=["some_lines", "every_bytecode"],
)
def test_model_learns_on(tmp_path, name, n_workers, every_bytecode, n_interrupts):
    env = make_vec_env("CartPole-v1", n_envs=2, seed=0)
    model = AsyncOneStepQ("MlpPolicy", env, n_workers=n_workers, seed=0, policy_kwargs={"net_arch": [4]})
    call = make_calls(model, tmp_path / "model.zip")[name]
    call()
    with Interrupter(None, every_bytecode) as counter:
        call()
    stride = 1 if n_interrupts is None else max(counter.n_seen // n_interrupts, 1)
    for n_events in range(0, counter.n_seen, stride):
        with suppress(KeyboardInterrupt), Interrupter(n_events, every_bytecode):
            call()
        learn_on(model)


def test_an_interrupt_at_the_end_of_a_forward_pass_without_gradients(monkeypatch):
    """That before the training begins."""

    def count(policy, forward):
        th.set_grad_enabled(False)
        raise KeyboardInterrupt

    monkeypatch.setattr(async_algorithm, "count_multiplications", count)
    with pytest.raises(KeyboardInterrupt):
        AsyncOneStepQ("MlpPolicy", "CartPole-v1", n_envs=2).learn(4)
    assert th.is_grad_enabled()


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="Windows has no such timer")
@pytest.mark.parametrize("as_file", [False, True])
def test_save_at_any_moment(tmp_path, as_file):
    """A KeyboardInterrupt in the C++ code of ``torch.save()`` would end the process, or become another error."""
    env = make_vec_env("CartPole-v1", n_envs=2, seed=0)
    model = AsyncOneStepQ("MlpPolicy", env, n_workers=2, seed=0, policy_kwargs={"net_arch": [500, 500]})
    path = tmp_path / "model.zip"
    model.save(path)
    started = time.monotonic()
    model.save(path)
    duration = time.monotonic() - started
    handler = signal.signal(signal.SIGALRM, raise_keyboard_interrupt)
    try:
        for _ in range(60):
            interrupt(lambda: model.save(io.BytesIO() if as_file else path), longest=1.2 * duration)
    finally:
        signal.signal(signal.SIGALRM, handler)
    AsyncOneStepQ.load(path)
    learn_on(model)


def test_an_interrupted_import(tmp_path, monkeypatch):
    """It may leave the import system locked, so that the workers could not import anything."""
    (tmp_path / "imported_by_workers.py").touch()
    monkeypatch.syspath_prepend(tmp_path)

    class Importing(gym.Wrapper):
        def step(self, action):
            importlib.import_module("imported_by_workers")
            return super().step(action)

    model = AsyncOneStepQ("MlpPolicy", make_vec_env("CartPole-v1", n_envs=2, wrapper_class=Importing), n_workers=2)
    _imp.acquire_lock()
    _imp.acquire_lock()
    model.learn(20)
    # Other threads may hold it at any time
    with pytest.raises(RuntimeError, match="not holding the import lock"):
        _imp.release_lock()
    assert sys.modules.pop("imported_by_workers")


def test_a_call_runs_until_it_ends():
    calls, may_end = [], threading.Event()

    def function(fails):
        calls.append(Call(sys._getframe()))
        assert calls[-1].is_running
        may_end.wait()
        if fails:
            raise KeyError

    threads = [threading.Thread(target=function, args=(False,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(calls) == 2)
    assert [call.is_running for call in calls] == [True, True]
    may_end.set()
    for thread in threads:
        thread.join()
    # The traceback keeps the frame, but not the call
    with pytest.raises(KeyError) as raised:
        function(True)
    assert raised.traceback[-1].frame.raw is calls[-1].frame
    assert [call.is_running for call in calls] == [False, False, False]


def test_a_generator_that_forks_goes_on():
    model = AsyncOneStepQ("MlpPolicy", make_vec_env("CartPole-v1", n_envs=2))

    def fork():
        # What Python calls before and after os.fork(); the second may be missing
        gate._close_gates()
        yield 1
        yield 2

    numbers = fork()
    assert next(numbers) == 1
    model._gate._forget_interrupted_calls()
    assert list(numbers) == [2]
    gate._open_gates()
    model.learn(10)


def test_an_interrupt_in_the_middle_of_a_write(monkeypatch):
    handles = []

    def write_and_interrupt(archive, *args):
        handles.append(archive.open("data", "w"))
        raise KeyboardInterrupt

    monkeypatch.setattr(zipfile.ZipFile, "writestr", write_and_interrupt)
    # zipfile refuses to close an archive that is being written to, which would hide the interrupt
    with pytest.raises(KeyboardInterrupt):
        pack_model({}, {})
