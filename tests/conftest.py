import multiprocessing
import os
import signal
from collections.abc import Generator, Iterator
from typing import Any

import pytest
import torch as th

from sb3_async1step.common import async_algorithm
from sb3_async1step.registry import ALGORITHMS
from sb3_async1step.value_based.algorithm import ValueBasedAlgorithm
from sb3_async1step.vec_envs import process_watcher
from tests.helpers import DEADLINE, actor_learners, insistent_ctrl_c, wait_until

# Shells start background jobs with Ctrl-C ignored, and tests press it
signal.signal(signal.SIGINT, signal.default_int_handler)

# Else each process of a SubprocVecEnv takes seconds to import PyTorch
multiprocessing.set_forkserver_preload(["stable_baselines3"])


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_call() -> Generator[None]:
    """Inside of pytest's own hooks, which replace ``sys.unraisablehook`` too."""
    with insistent_ctrl_c():
        return (yield)


@pytest.fixture(autouse=True)
def patience_after_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine, processes may need more than a second to answer after Ctrl-C, and their watcher to wake up."""
    monkeypatch.setattr(async_algorithm, "INTERRUPT_TIMEOUT", DEADLINE)
    monkeypatch.setattr(process_watcher, "DEATH_TIMEOUT", DEADLINE)


@pytest.fixture(scope="session", autouse=True)
def log_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Without a ``tensorboard_log``, SB3 makes an empty folder for each ``learn()``: not thousands of them in /tmp."""
    os.environ["SB3_LOGDIR"] = str(tmp_path_factory.mktemp("logs"))


# Tests of what all workers do alike. One-step Q-learning stands for Sarsa there, which only acts in another way
TESTS_OF_ALL_WORKERS = (
    *("test_background_eval", "test_callbacks", "test_copies", "test_failures", "test_healing_vec_env"),
    *("test_live_algorithm", "test_users_vec_envs", "test_vec_env_guard"),
)


def pytest_collection_modifyitems(items: list[Any]) -> None:
    def is_left_out(item: Any) -> bool:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        return item.path.stem in TESTS_OF_ALL_WORKERS and parameters.get("algorithm") == "async_one_step_sarsa"

    items[:] = [item for item in items if not is_left_out(item)]
    # One process should run all tests that share a cluster of Ray. Those that come first are never given to another
    items.sort(key=lambda item: item.path.stem != "test_ray")


@pytest.fixture(params=list(ALGORITHMS))
def algorithm(request: pytest.FixtureRequest) -> type:
    return ALGORITHMS[request.param].model_class


@pytest.fixture(
    params=[name for name, entry in ALGORITHMS.items() if issubclass(entry.model_class, ValueBasedAlgorithm)]
)
def value_based(request: pytest.FixtureRequest) -> type:
    """For what A3C has not: epsilon, a target network, the loss of TD errors, and DQN's policies and log keys."""
    return ALGORITHMS[request.param].model_class


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """After every test: all workers end, and torch has as many threads as before."""
    n_threads = th.get_num_threads()
    yield
    wait_until(lambda: not actor_learners())
    assert th.get_num_threads() == n_threads
