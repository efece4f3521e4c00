"""Tests of threads wait for what they need to have happened: no outcome depends on how busy the machine is."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm

#: Seconds after which something that should have happened is taken for hanging; only a test that fails waits so long
DEADLINE = 300.0
#: Seconds that nobody waits for: what ends before them was interrupted
FOREVER = 3600.0


def wait_until(condition: Callable[[], Any], deadline: float = DEADLINE) -> None:
    """
    :param condition: asked again and again until it holds
    :param deadline: seconds
    :raises AssertionError: if it does not hold by then
    """
    end = time.monotonic() + deadline
    while not condition():
        assert time.monotonic() < end, f"waited for {deadline:.0f} s in vain"
        time.sleep(0.005)


@contextmanager
def meanwhile(function: Callable[[], Any]) -> Iterator[None]:
    """
    :param function: runs on another thread inside the ``with`` block, which ends when both have
    :raises BaseException: what the function raised
    """
    with ThreadPoolExecutor(1) as executor:
        future = executor.submit(function)
        yield
    future.result()


def press_ctrl_c() -> None:
    """Interrupt the main thread."""
    os.kill(os.getpid(), signal.SIGINT)


def press_ctrl_c_outside_of(function: str) -> None:
    """
    Interrupt the main thread when it has left a function.

    :param function: its name
    """
    wait_until(lambda: function not in functions_of(threading.main_thread()))
    press_ctrl_c()


@contextmanager
def insistent_ctrl_c() -> Iterator[None]:
    """
    Press Ctrl-C again if Python drops it: a ``KeyboardInterrupt`` that is raised in a destructor or in a callback of
    the garbage collector (Hypothesis has one) is reported to ``sys.unraisablehook``, and the main thread goes on.
    """
    report = sys.unraisablehook

    def press_again(unraisable: "sys.UnraisableHookArgs") -> None:
        if unraisable.exc_type is KeyboardInterrupt:
            threading.Thread(target=press_ctrl_c_outside_of, args=("press_again",)).start()
        else:
            report(unraisable)

    sys.unraisablehook = press_again
    try:
        yield
    finally:
        sys.unraisablehook = report


def with_worker(algorithm: type[BaseAlgorithm], **methods: Callable) -> type[BaseAlgorithm]:
    """
    :param algorithm: one of our algorithms
    :param methods: methods of its workers to replace; each gets the method that it replaces as its first argument
    :return: a subclass of the algorithm with other workers
    """
    worker_class = algorithm.actor_learner_class

    def bind(name: str, method: Callable) -> Callable:
        return lambda self, *args: method(getattr(super(changed, self), name), self, *args)

    changed: type = type(worker_class.__name__, (worker_class,), {})
    for name, method in methods.items():
        setattr(changed, name, bind(name, method))
    return type(algorithm.__name__, (algorithm,), {"actor_learner_class": changed})


def trained_parameters(model: BaseAlgorithm) -> list[th.Tensor]:
    """
    :param model: a model of any algorithm
    :return: the parameters that its optimizer changes, the first layer's first
    """
    return [parameter for group in model.policy.optimizer.param_groups for parameter in group["params"]]


def weights_of(model: BaseAlgorithm) -> dict[str, th.Tensor]:
    """
    :param model: a model of any algorithm
    :return: a copy of all its parameters and buffers, also of those that are not trained
    """
    return {name: value.clone() for name, value in model.policy.state_dict().items()}


def are_equal(one: dict[str, th.Tensor], two: dict[str, th.Tensor]) -> bool:
    """
    :param one: what :func:`weights_of` returned
    :param two: the same of another model, or at another time
    :return: whether they are equal bit for bit
    """
    return list(one) == list(two) and all(th.equal(one[name], two[name]) for name in one)


def functions_of(thread: threading.Thread) -> list[str]:
    """
    :param thread: a thread
    :return: names of the functions that it is inside of, innermost first
    """
    # Of a thread that goes on meanwhile, frames may be anything (CPython 3.11): then look again
    while True:
        frame = sys._current_frames().get(thread.ident or 0)
        names = []
        with suppress(AttributeError):
            while frame is not None:
                names.append(frame.f_code.co_name)
                frame = frame.f_back
            return names


def is_waiting(thread: threading.Thread) -> bool:
    """
    :param thread: a thread
    :return: whether it waits at a gate, or for something that other threads do there
    """
    return "wait_for" in functions_of(thread)[:2]


def has_made_steps(model: BaseAlgorithm, n_steps: int) -> bool:
    """
    :param model: learns, perhaps
    :param n_steps: environment steps
    :return: whether it learns and has made so many
    """
    return model._pool is not None and model.num_timesteps >= n_steps


def actor_learners() -> list[str]:
    """
    :return: names of the workers' threads that are alive
    """
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("actor-learner")]


def knows_identity(model: BaseAlgorithm) -> bool:
    """
    :param model: learns on SB3's ``IdentityEnv(dim=4)``, whose best action is its state
    :return: whether it has learned that
    """
    return model.predict(np.arange(4), deterministic=True)[0].tolist() == [0, 1, 2, 3]


def learns_identity(model: BaseAlgorithm) -> bool:
    """
    :param model: is trained on SB3's ``IdentityEnv(dim=4)`` until it knows it. How many steps that takes depends on the
        order of the updates
    :return: whether it has learned it in fewer than 40 000 steps
    """
    model.learn(40_000, callback=lambda *_: model.num_timesteps % 400 > 0 or not knows_identity(model))
    return model.num_timesteps < 40_000


class CountingOptimizer(th.optim.SGD):
    """Each update adds one to every weight, in two halves."""

    @th.no_grad()
    def step(self, closure: Callable | None = None) -> None:  # type: ignore[override]
        """
        :param closure: not used
        """
        for group in self.param_groups:
            for _ in range(2):
                for parameter in group["params"]:
                    parameter.add_(0.5)
                # Whoever does not wait for the end of the update comes here
                time.sleep(0.001)


def count_additions(model: BaseAlgorithm, start: list[th.Tensor]) -> set[float]:
    """
    :param model: has a :class:`CountingOptimizer`
    :param start: its trained parameters before
    :return: by how much its weights have grown: one whole number, unless it was looked at in the middle of an update
    """
    weights = zip(trained_parameters(model), start, strict=True)
    return {round(difference, 3) for p, q in weights for difference in (p - q).flatten().tolist()}
