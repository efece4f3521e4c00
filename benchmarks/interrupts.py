"""
Interrupt a model at random moments, as a user's Ctrl-C or a timer does, and check that it learns on.

``python -m benchmarks.interrupts --interrupts 20000``

Each trial calls ``predict()``, ``evaluate_policy()``, ``save()`` or ``learn()``; a timer raises ``KeyboardInterrupt``
in it. After each, the model has to learn on, PyTorch must have its threads, and the env must be free. A trial that does
not end within the time limit ends the program with the stacks of all threads.
"""

import argparse
import faulthandler
import io
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.callbacks import CheckpointCallback, EvalCallback
from stable_baselines3.common.env_util import make_atari_env, make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv

from sb3_async1step import AsyncOneStepQ, HealingVecEnv
from sb3_async1step.vec_envs.ale_vec_env import AleVecEnv

FORK = "SubprocVecEnv, fork"
TIME_LIMIT = 120
N_LANES = 4


def make_envs() -> dict[str, Callable[[], VecEnv]]:
    """
    :return: functions that make a VecEnv of each kind
    """

    ale: Any = AleVecEnv

    def make(vec_env_class: Any, **kwargs: Any) -> VecEnv:
        return make_vec_env("CartPole-v1", n_envs=N_LANES, vec_env_cls=vec_env_class, vec_env_kwargs=kwargs)

    return {
        "DummyVecEnv": lambda: make(DummyVecEnv),
        FORK: lambda: make(SubprocVecEnv, start_method="fork"),
        "SubprocVecEnv, forkserver": lambda: make(SubprocVecEnv, start_method="forkserver"),
        "HealingVecEnv, fork": lambda: make(HealingVecEnv, start_method="fork", max_restarts=10**6),
        "AleVecEnv": lambda: make_atari_env("PongNoFrameskip-v4", n_envs=N_LANES, vec_env_cls=ale),
    }


def make_calls(model: AsyncOneStepQ, folder: str) -> dict[str, Callable[[], Any]]:
    """
    :param model: a model
    :param folder: for checkpoints
    :return: what is interrupted
    """
    assert model.env is not None
    observations = np.stack([model.observation_space.sample()] * N_LANES)
    evaluation_env = make_vec_env("CartPole-v1") if model.observation_space.shape == (4,) else None

    def predict() -> None:
        for _ in range(50):
            model.predict(observations)

    def save() -> None:
        for _ in range(5):
            model.save(io.BytesIO())

    calls: dict[str, Callable[[], Any]] = {
        "predict": predict,
        "save": save,
        "learn": lambda: model.learn(2000, reset_num_timesteps=False),
        "learn with checkpoints": lambda: model.learn(2000, CheckpointCallback(50, folder), reset_num_timesteps=False),
    }
    if evaluation_env is not None:
        calls["evaluate_policy"] = lambda: evaluate_policy(model, evaluation_env, n_eval_episodes=2)
        calls["learn with evaluations"] = lambda: model.learn(
            2000, EvalCallback(evaluation_env, eval_freq=20, n_eval_episodes=1, verbose=0), reset_num_timesteps=False
        )
    return calls


def check(model: AsyncOneStepQ, n_torch_threads: int) -> None:
    """
    :param model: was interrupted
    :param n_torch_threads: number of PyTorch's threads before
    :raises AssertionError: if it does not learn on. If a worker's thread is left, this does not return
    """
    n_steps = model.num_timesteps
    model.learn(2 * N_LANES, reset_num_timesteps=False)
    assert model.num_timesteps == n_steps + 2 * N_LANES
    assert th.get_num_threads() == n_torch_threads
    # A thread whose start was interrupted may begin only now, and ends at once. Python lists those that never will, too
    while [t for t in threading.enumerate() if t.name.startswith("actor-learner") and t.is_alive()]:
        time.sleep(0.01)
    assert model.env is not None
    model.env.reset()


def interrupt(call: Callable[[], Any], longest: float) -> bool:
    """
    :param call: what is interrupted
    :param longest: longest time before the interrupt, in seconds
    :return: whether it was interrupted before it ended
    """
    try:
        signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-5, longest))
        call()
        signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        return True
    return False


def raise_keyboard_interrupt(*_: object) -> None:
    """Handle the timer's signal."""
    raise KeyboardInterrupt


def main() -> None:
    """Interrupt each call on each kind of VecEnv, with 1, 2 and 4 workers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--interrupts", type=int, default=20_000, help="number of trials in all")
    parser.add_argument("--vec-envs", nargs="+", choices=make_envs(), default=list(make_envs()), help="kinds of VecEnv")
    parser.add_argument("--longest", type=float, default=0.03, help="seconds until the interrupt, at most")
    parser.add_argument("--folder", default="logs/interrupts", help="for checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    signal.signal(signal.SIGALRM, raise_keyboard_interrupt)
    settings = [(name, make, n) for name, make in make_envs().items() if name in arguments.vec_envs for n in (1, 2, 4)]
    n_torch_threads = th.get_num_threads()
    interrupted: Counter[str] = Counter()
    for name, make_env, n_workers in settings:
        policy = "CnnPolicy" if name == "AleVecEnv" else "MlpPolicy"
        model = AsyncOneStepQ(policy, make_env(), n_workers=n_workers, seed=0)
        calls = make_calls(model, arguments.folder)
        n_trials = arguments.interrupts // len(settings)
        for trial in range(n_trials):
            call_name = list(calls)[trial % len(calls)]
            faulthandler.dump_traceback_later(TIME_LIMIT, exit=True)
            interrupted[call_name] += interrupt(calls[call_name], arguments.longest)
            check(model, n_torch_threads)
        faulthandler.cancel_dump_traceback_later()
        assert model.env is not None
        model.env.close()
        print(f"{name}, {n_workers} worker(s): {n_trials} trials, no failure", flush=True)
    print("interrupted before they ended:", dict(interrupted))


if __name__ == "__main__":
    main()
