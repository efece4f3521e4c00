import signal
import threading
from collections.abc import Iterator

import pytest
import torch as th

# Shells start background jobs with Ctrl-C ignored, and tests press it
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(params=["q", "sarsa"])
def algorithm(request: pytest.FixtureRequest) -> type:
    from sb3_async1step import AsyncOneStepQ, AsyncOneStepSarsa

    return {"q": AsyncOneStepQ, "sarsa": AsyncOneStepSarsa}[request.param]


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """After every test: no worker is alive, and torch has as many threads as before."""
    n_threads = th.get_num_threads()
    yield
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("actor-learner")] == []
    assert th.get_num_threads() == n_threads
