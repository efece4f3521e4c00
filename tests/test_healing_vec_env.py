"""Lanes whose processes fail go on with new ones; those that always fail end the training with the reason."""

import csv
import gc
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partialmethod
from multiprocessing import forkserver
from multiprocessing.connection import wait
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import gymnasium as gym
import numpy as np
import psutil
import pytest
from gymnasium import spaces
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor, load_results
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecMonitor, VecNormalize

from sb3_async1step import A3C, AsyncOneStepQ, HealingVecEnv
from sb3_async1step.vec_envs import healing_lane, lane_process
from sb3_async1step.vec_envs.healing_lane import State
from sb3_async1step.vec_envs.lane_process import LaneProcess, limit_blocking
from sb3_async1step.vec_envs.monitor_file import ContinuedResultsWriter
from sb3_async1step.vec_envs.split import group_lanes, rejoin_vec_env, split_vec_env
from tests.command_line import call_zoo
from tests.envs import BoxWalkEnv, RandomWalkEnv
from tests.helpers import DEADLINE, FOREVER, has_made_steps, meanwhile, press_ctrl_c, wait_until

pytestmark = [
    pytest.mark.filterwarnings("ignore:Env lane"),
    pytest.mark.skipif(os.name != "posix", reason="signals, fork and file descriptors of POSIX"),
]

SEED = 5
SIGKILL = "its process was killed by signal 9 (SIGKILL)"


class FaultyEnv(RandomWalkEnv):
    """
    An env that does something in one of its calls, in whatever process it is; later ones do nothing special.

    :param fault: what it does
    :param folder: a file in it says that it has done so
    :param where: the call: ``"init"``, ``"reset"`` or ``"step"``
    :param at: number of the call, from 1
    """

    render_mode = "rgb_array"

    def __init__(self, fault, folder, where="step", at=3):
        super().__init__(max_steps=10**6, p_terminate=0.0)
        self.fault, self.marker, self.where = fault, Path(folder) / "has failed", where
        self.n_left = at
        self.level = 0
        self.call("init")

    def call(self, what):
        if what != self.where or self.marker.exists():
            return
        self.n_left -= 1
        if self.n_left == 0:
            self.marker.touch()
            self.fault()

    def reset(self, *, seed=None, options=None):
        self.call("reset")
        return super().reset(seed=seed)[0], {"options": options}

    def step(self, action):
        self.call("step")
        return super().step(action)

    def render(self):
        return np.zeros((1, 1, 3))

    def climb(self):
        self.level += 1
        return self.level


class AlwaysFaultyEnv(FaultyEnv):
    def call(self, what):
        if what == self.where:
            self.fault()


class SteadyEnv(FaultyEnv):
    """An env that does not fail."""

    def __init__(self, *args):
        super().__init__(None, ".", where="never")


class KnownError(Exception):
    """An exception that the other process knows, too."""


def raise_an_error():
    raise ZeroDivisionError("the env is broken")


def leave():
    os._exit(3)


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def hang():
    time.sleep(FOREVER)


FAULTS = {
    "raises": (raise_an_error, "it raised ZeroDivisionError: the env is broken"),
    "exits": (leave, "its process ended with exit code 3"),
    "is killed": (kill, SIGKILL),
}


@pytest.fixture(autouse=True)
def no_patience(monkeypatch):
    """Stopped processes heed no SIGTERM, and are killed then."""
    monkeypatch.setattr(lane_process, "SIGTERM_TIMEOUT", 0.1)


@pytest.fixture(autouse=True)
def no_process_left(monkeypatch):
    """After a VecEnv was closed, its processes are gone, and so are their file descriptors."""
    made, initialize = [], HealingVecEnv.__init__

    def note(env, *args, **kwargs):
        initialize(env, *args, **kwargs)
        made.append(env)

    monkeypatch.setattr(HealingVecEnv, "__init__", note)
    # Processes of multiprocessing's own
    forkserver.ensure_running()
    process = psutil.Process()
    children, n_fds = set(process.children()), process.num_fds()
    yield
    for env in made:
        env.close()
    wait_until(lambda: set(process.children()) <= children)
    if process.num_fds() > n_fds:
        # The tracebacks of expected exceptions may hold some
        gc.collect()
    assert process.num_fds() <= n_fds


@pytest.fixture
def make(tmp_path):
    """Makes a healing VecEnv of three lanes, of which the second one fails."""

    def make_it(fault=raise_an_error, env_class=FaultyEnv, env_kwargs=None, **kwargs):
        def make_faulty():
            return env_class(fault, tmp_path, **(env_kwargs or {}))

        defaults = {"start_method": "fork", "step_timeout": FOREVER, "start_timeout": FOREVER}
        env = HealingVecEnv([SteadyEnv, make_faulty, SteadyEnv], **{**defaults, **kwargs})
        env.seed(SEED)
        return env

    return make_it


def restart_seed(n_restarts=1, lane=1):
    return int(np.random.SeedSequence((SEED + lane, n_restarts)).generate_state(1)[0])


def make_twin(n_restarts=1):
    """Lanes that do the same without a process; the second one as if it had been restarted."""
    env = DummyVecEnv([SteadyEnv] * 3)
    env.seed(SEED)
    env._seeds[1] = restart_seed(n_restarts)
    return env


def assert_equal(one, two):
    np.testing.assert_equal(one, two)
    assert type(one) is type(two)


def run_out_of_time(env, lane):
    """A lane that has not answered is late from now on; a new process of it is not."""
    process = env.remotes[lane].process
    process._settings = replace(process._settings, step_timeout=0.0)


def wait_for_answers(env, lanes):
    """These lanes have answered, or their processes have ended."""
    for lane in lanes:
        process = env.remotes[lane].process
        wait([process._connection, process.process.sentinel], DEADLINE)


ACTIONS = np.array([0, 1, 2])


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("n_parts", [1, 3])
def test_a_step_that_fails(make, fault, n_parts):
    """Its episode is truncated, and the others are not disturbed."""
    act, reason = FAULTS[fault]
    env, twin = make(act), make_twin()
    plain = DummyVecEnv([SteadyEnv] * 3)
    plain.seed(SEED)
    assert_equal(env.reset(), plain.reset())
    groups = group_lanes(3, n_parts)
    parts = split_vec_env(env, groups)

    def step():
        results = [part.step(ACTIONS[g.start : g.stop]) for part, g in zip(parts, groups, strict=True)]
        obs, rewards, dones = (np.concatenate([result[i] for result in results]) for i in range(3))
        # DummyVecEnv's rewards are rounded
        return obs, rewards.astype(np.float32), dones, [info for result in results for info in result[3]]

    for _ in range(2):
        (obs, *rest), (expected, *expected_rest) = step(), plain.step(ACTIONS)
        assert_equal((obs, *rest), (expected, *expected_rest))
    last_observation = expected[1]
    new_observations = twin.reset()
    obs, rewards, dones, infos = step()
    expected, expected_rewards, expected_dones, expected_infos = plain.step(ACTIONS)
    expected[1], expected_rewards[1], expected_dones[1] = new_observations[1], 0.0, True
    expected_infos[1] = {
        "lane_restart": reason, "terminal_observation": last_observation, "TimeLimit.truncated": True
    }  # fmt: skip
    assert_equal((obs, rewards, dones, infos), (expected, expected_rewards, expected_dones, expected_infos))
    # It goes on
    for _ in range(5):
        (obs, *rest), (expected, *_) = step(), plain.step(ACTIONS)
        expected[1] = twin.step(ACTIONS)[0][1]
        assert_equal(obs, expected)
        assert not rest[1].any() and not any("lane_restart" in info for info in rest[2])
    rejoin_vec_env(env, parts, groups)
    assert env.reset_infos == [{"options": None}] * 3
    assert env.n_restarts == 1 and len(env.processes) == 3
    # The whole has the new process, too
    assert_equal(env.reset().shape, (3, 4))


@pytest.mark.parametrize("where", ["step", "reset"])
def test_a_lane_that_hangs(make, where):
    env = make(hang, env_kwargs={"where": where, "at": 1 if where == "step" else 2})
    env.reset()
    hung = env.processes[1].pid
    if where == "step":
        env.step_async(ACTIONS)
        wait_for_answers(env, [0, 2])
        run_out_of_time(env, 1)
        obs, _, dones, infos = env.step_wait()
        assert dones.tolist() == [False, True, False] and infos[1]["lane_restart"] == "it did not answer within 0 s"
    else:
        run_out_of_time(env, 1)
        obs = env.reset()
        assert [info.get("lane_restart") for info in env.reset_infos] == [None, "it did not answer within 0 s", None]
    assert_equal(obs[1], make_twin().reset()[1])
    wait_until(lambda: not psutil.pid_exists(hung))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_reset_that_fails(make, fault):
    """It is made again, with the same options and another seed."""
    act, reason = FAULTS[fault]
    env = make(act, env_kwargs={"where": "reset", "at": 1})
    options = [{"lane": lane} for lane in range(3)]
    env.set_options(options)
    assert_equal(env.reset(), make_twin().reset())
    assert [info.pop("lane_restart", None) for info in env.reset_infos] == [None, reason, None]
    assert list(env.reset_infos) == [{"options": option} for option in options]
    # They were for this reset only
    env.reset()
    assert list(env.reset_infos) == [{"options": None}] * 3


def test_the_reset_after_an_episode_fails(make):
    class ShortEnv(FaultyEnv):
        def step(self, action):
            obs, reward, *_ = super().step(action)
            return obs, reward, True, False, {}

    env = make(kill, ShortEnv, {"where": "reset", "at": 2})
    last_observation = env.reset()[1]
    obs, rewards, dones, infos = env.step(ACTIONS)
    assert_equal(obs[1], make_twin().reset()[1])
    assert rewards[1] == 0.0 and dones[1]
    assert_equal(
        dict(infos[1]), {"lane_restart": SIGKILL, "terminal_observation": last_observation, "TimeLimit.truncated": True}
    )


def test_each_restart_has_its_own_seed(make):
    """Those of two runs are the same."""
    env = make(env_class=AlwaysFaultyEnv)
    env.reset()
    seen = [env.step(ACTIONS)[0][1] for _ in range(3)]
    assert_equal(seen, [make_twin(n_restarts).reset()[1] for n_restarts in (1, 2, 3)])


def test_lanes_without_a_seed(make):
    env = make(env_class=AlwaysFaultyEnv)
    env._seeds = [None] * 3
    env.reset()
    first, second = (env.step(ACTIONS)[0][1] for _ in range(2))
    assert not np.array_equal(first, second)


def test_lanes_that_fail_together_are_restarted_together(make, monkeypatch):
    env = make(env_class=SteadyEnv)
    env.reset()
    for process in env.processes:
        process.kill()
    events = []
    for name in ("start", "receive"):

        def note(process, name, method):
            result = method(process)
            events.append(name)
            return result

        monkeypatch.setattr(LaneProcess, name, partialmethod(note, name, getattr(LaneProcess, name)))
    _, _, dones, infos = env.step(ACTIONS)
    assert events == ["start"] * 3 + ["receive"] * 3
    assert dones.all() and [info["lane_restart"] for info in infos] == [SIGKILL] * 3


# ---------------------------------------------------------------------- attributes and methods


def test_attributes_are_set_again_and_method_calls_are_not_repeated(make):
    env = make(kill)
    env.set_attr("level", 7)
    env.set_attr("level", 8, indices=1)
    assert env.env_method("climb") == [8, 9, 8]
    env.reset()
    for _ in range(3):
        env.step(ACTIONS)
    assert env.n_restarts == 1
    assert env.get_attr("level") == [8, 8, 8]
    env.set_attr("level", 1, indices=1)
    env.processes[1].kill()
    assert env.get_attr("level") == [8, 1, 8]


@pytest.mark.parametrize("is_hung", [False, True])
def test_requests_to_a_failed_process_are_made_to_the_new_one(make, is_hung):
    env = make(hang if is_hung else kill, env_class=SteadyEnv)
    requests = {
        "get_attr": (lambda: env.get_attr("level"), [0, 0, 0]),
        "has_attr": (lambda: env.has_attr("level"), True),
        "env_method": (lambda: env.env_method("climb"), [1, 1, 1]),
        "set_attr": (lambda: env.set_attr("level", 3), None),
        "env_is_wrapped": (lambda: env.env_is_wrapped(gym.Wrapper), [False] * 3),
        "get_images": (lambda: [image.shape for image in env.get_images()], [(1, 1, 3)] * 3),
    }
    for request, answer in requests.values():
        env.set_attr("level", 0)
        last_observation = env.reset()[1]
        n_before = env.n_restarts
        process = env.processes[1]
        os.kill(process.pid, signal.SIGSTOP if is_hung else signal.SIGKILL)
        if is_hung:
            run_out_of_time(env, 1)
        assert request() == answer
        assert env.n_restarts == n_before + 1
        # The next step says that the episode has ended
        _, rewards, dones, infos = env.step(ACTIONS)
        assert rewards[1] == 0.0 and dones.tolist() == [False, True, False]
        assert_equal(infos[1]["terminal_observation"], last_observation)
        assert not env.step(ACTIONS)[2].any()


def test_a_reset_after_a_restart(make):
    env = make(env_class=SteadyEnv)
    env.reset()
    env.processes[1].kill()
    assert env.get_attr("level") == [0, 0, 0]
    env.reset()
    assert [info.get("lane_restart") for info in env.reset_infos] == [None, SIGKILL, None]
    assert not env.step(ACTIONS)[2].any()


def test_a_mistaken_request_is_the_callers(make):
    env = make(env_class=SteadyEnv)
    env.reset()
    with pytest.raises(AttributeError, match="no attribute 'no_such'") as caught:
        env.get_attr("no_such")
    assert "get_wrapper_attr" in str(caught.value.__cause__)
    with pytest.raises(TypeError, match="climb"):
        env.env_method("climb", 1, indices=1)
    with pytest.raises(AttributeError, match="pickle"):
        env.set_attr("level", lambda: None)
    # The envs are there again
    assert env.get_attr("level") == [0, 0, 0]
    assert env.step(ACTIONS)[2].all()
    assert not env.step(ACTIONS)[2].any()


# ---------------------------------------------------------------------- too many restarts


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("where", ["step", "reset"])
def test_too_many_restarts(make, fault, where):
    act, reason = FAULTS[fault]
    env = make(act, AlwaysFaultyEnv, {"where": where}, max_restarts=2, restart_window=60.0)

    def use():
        env.reset()
        for _ in range(3):
            env.step(ACTIONS)

    restarts = "It was restarted as often as max_restarts=2 allows within restart_window=60 s."
    # Whoever goes on gets as many restarts again
    for n_restarts in (2, 4):
        with pytest.raises(ZeroDivisionError if fault == "raises" else RuntimeError) as caught:
            use()
        if fault == "raises":
            assert str(caught.value) == "the env is broken"
            assert caught.value.__notes__ == [f"Raised in env lane 1. {restarts}"]
            assert f"in {where}" in str(caught.value.__cause__) and "raise_an_error" in str(caught.value.__cause__)
        else:
            assert str(caught.value) == (
                f"Env lane 1: {reason}. {restarts} Repair the env (what its process printed may say why; signal 9 "
                "often means that the machine ran out of memory), allow it more seconds (step_timeout, start_timeout), "
                "or allow more restarts."
            )
        assert env.n_restarts == n_restarts


def test_no_restart_is_allowed(make):
    env = make(kill, max_restarts=0)
    env.reset()
    env.step(ACTIONS)
    env.step(ACTIONS)
    with pytest.raises(RuntimeError, match=r"^Env lane 1: its process was killed by signal 9 \(SIGKILL\)\. "):
        env.step(ACTIONS)
    assert env.n_restarts == 0


def test_restarts_count_for_some_time(make, monkeypatch):
    """But as long as the lane takes no step, they all do."""
    now = time.monotonic()
    clock = SimpleNamespace(monotonic=lambda: now)
    monkeypatch.setattr(healing_lane, "time", clock)

    class OftenFaultyEnv(SteadyEnv):
        period = 2

        def step(self, action):
            self.n_calls = getattr(self, "n_calls", 0) + 1
            if self.n_calls % self.period == 0:
                kill()
            return super().step(action)

    env = make(kill, OftenFaultyEnv, max_restarts=2, restart_window=10.0)
    env.reset()
    for n_restarts in range(1, 7):
        env.step(ACTIONS)
        assert env.step(ACTIONS)[2].tolist() == [False, True, False]
        assert env.n_restarts == n_restarts
        now += 5.1
    assert not env.step(ACTIONS)[2].any()
    env.set_attr("period", 1)
    now += 1000.0
    for _ in range(2):
        env.step(ACTIONS)
        now += 1000.0
    with pytest.raises(RuntimeError, match="Env lane 1"):
        env.step(ACTIONS)


def test_restarts_before_a_step_do_not_count_beside_those_after_it(make, monkeypatch):
    """If they are long ago."""
    now = time.monotonic()
    monkeypatch.setattr(healing_lane, "time", SimpleNamespace(monotonic=lambda: now))
    env = make(kill, max_restarts=2, restart_window=10.0)
    env.reset()
    lane = env.remotes[1]
    failure = healing_lane.LaneFailure("it was killed")
    for has_stepped, seconds in ((True, 0.0), (True, 5.0), (False, 20.0)):
        now += seconds
        lane.has_stepped = has_stepped
        lane._count_restart(failure)
    assert lane.n_restarts == 3
    now += 20.0
    with pytest.raises(RuntimeError, match=r"max_restarts=2 allows"):
        lane._count_restart(failure)


def test_an_exception_that_can_not_be_pickled(make):
    class Local(Exception):
        """cloudpickle copies the class."""

    class Unpicklable(Exception):
        def __reduce__(self):
            raise TypeError

    class NeedsTwo(Exception):
        def __init__(self, one, two):
            super().__init__(f"{one} {two}")

    for exception, expected in (
        (KnownError("here"), KnownError),
        (Local("here"), Exception),
        (Unpicklable("there"), RuntimeError),
        (NeedsTwo("every", "where"), RuntimeError),
    ):

        def fail(exception=exception):
            raise exception

        env = make(fail, AlwaysFaultyEnv, max_restarts=0)
        env.reset()
        with pytest.raises(expected) as caught:
            env.step(ACTIONS)
        if expected is RuntimeError:
            assert str(caught.value) == f"tests.test_healing_vec_env.{type(exception).__qualname__}: {exception}"
        else:
            assert type(caught.value).__name__ == type(exception).__name__ and str(caught.value) == "here"
        assert "in fail" in str(caught.value.__cause__)


# ---------------------------------------------------------------------- the env is made


@pytest.mark.parametrize("fault", FAULTS)
def test_making_the_env_again_fails(make, tmp_path, fault):
    """Once, and then always."""
    act, reason = FAULTS[fault]

    class Env(SteadyEnv):
        def __init__(self, *args):
            super().__init__()
            if (tmp_path / "makes").exists():
                n_left = int((tmp_path / "makes").read_text())
                (tmp_path / "makes").write_text(str(n_left - 1))
                if n_left > 0:
                    act()

    env = make(act, Env, max_restarts=3)
    env.set_attr("level", 2)
    env.reset()
    (tmp_path / "makes").write_text("1")
    env.processes[1].kill()
    _, _, dones, infos = env.step(ACTIONS)
    assert dones.tolist() == [False, True, False] and infos[1]["lane_restart"] == reason
    assert env.n_restarts == 2 and env.get_attr("level") == [2, 2, 2]
    (tmp_path / "makes").write_text("100")
    env.processes[1].kill()
    with pytest.raises(ZeroDivisionError if fault == "raises" else RuntimeError, match=r"env is broken|Env lane 1"):
        env.step(ACTIONS)


def test_an_env_that_can_not_be_made(make):
    """Nobody waits for restarts that lead nowhere."""
    with pytest.raises(ZeroDivisionError, match="the env is broken") as caught:
        make(env_class=AlwaysFaultyEnv, env_kwargs={"where": "init"})
    assert "in __init__" in str(caught.value.__cause__)
    with pytest.raises(RuntimeError, match=r"^Env lane 1: its process ended with exit code 3\. Its env was to be made"):
        make(leave, env_class=AlwaysFaultyEnv, env_kwargs={"where": "init"})


def test_making_the_env_again_takes_too_long(make, tmp_path):
    class Env(SteadyEnv):
        def __init__(self, *args):
            super().__init__()
            wait_until(lambda: not (tmp_path / "wait").exists(), FOREVER)

    env = make(env_class=Env)
    env.reset()
    (tmp_path / "wait").touch()
    env.remotes[1]._settings = replace(env.settings, start_timeout=0.0, max_restarts=1)
    env.processes[1].kill()
    with pytest.raises(RuntimeError, match=r"Env lane 1: it did not answer within 0 s\."):
        env.step(ACTIONS)


@pytest.mark.parametrize("start_method", ["forkserver", "spawn"])
def test_start_methods(start_method):
    env = HealingVecEnv([RandomWalkEnv], start_method, FOREVER, FOREVER)
    env.seed(SEED)
    last_observation = env.reset()[0]
    env.processes[0].kill()
    obs, rewards, dones, infos = env.step(ACTIONS[:1])
    expected, _ = RandomWalkEnv().reset(seed=restart_seed(lane=0))
    info = {"lane_restart": SIGKILL, "terminal_observation": last_observation, "TimeLimit.truncated": True}
    assert_equal((obs[0], rewards[0], dones[0], infos[0]), (expected, np.float64(0.0), np.True_, info))


@pytest.mark.parametrize(
    ("arguments", "allowed"),
    [
        *(({"step_timeout": wrong}, "a positive number, or None") for wrong in (0, -1.0, math.nan, "3", True)),
        *(({"start_timeout": wrong}, "a positive number, or None") for wrong in (0, -1.0, math.nan, "3", True)),
        *(({"restart_window": wrong}, "a positive number") for wrong in (0, -1.0, math.nan, "3", True, None)),
        *(({"max_restarts": wrong}, "a whole number of at least 0") for wrong in (-1, 1.0, "3", True, None)),
    ],
)
def test_arguments_out_of_range(arguments, allowed):
    ((name, value),) = arguments.items()
    with pytest.raises(ValueError, match=f"{name} must be {allowed}, got {value!r}"):
        HealingVecEnv([SteadyEnv], **arguments)


def test_arguments():
    with pytest.raises(ValueError, match="needs at least one env"):
        HealingVecEnv([])
    # No longer than a pipe can wait
    for forever in (1e30, math.inf):
        env = HealingVecEnv(
            [SteadyEnv],
            start_method="fork",
            step_timeout=forever,
            start_timeout=forever,
            max_restarts=0,
            restart_window=forever,
        )
        assert env.reset().shape == (1, *SteadyEnv().observation_space.shape)
        env.close()
    env = make_vec_env(
        "CartPole-v1", 2, vec_env_cls=HealingVecEnv,
        vec_env_kwargs={"step_timeout": None, "start_timeout": None, "start_method": "fork"},
    )  # fmt: skip
    env.reset()
    env.step([0, 1])
    env.close()


# ---------------------------------------------------------------------- Monitor's files, and wrappers


def make_monitored(folder, fault=kill, **kwargs):
    def make_lane(lane):
        env = FaultyEnv(fault, folder, at=8) if lane == 1 else SteadyEnv()
        env.max_steps = 3
        return Monitor(env, str(folder / str(lane)))

    env_fns = [lambda lane=lane: make_lane(lane) for lane in range(3)]
    return HealingVecEnv(env_fns, start_method="fork", step_timeout=FOREVER, start_timeout=FOREVER, **kwargs)


def read_rows(path):
    first, *lines = path.read_text().splitlines()
    return json.loads(first[1:]), list(csv.DictReader(lines))


def test_the_file_of_a_monitor(tmp_path):
    """It has the episodes that have ended, before and after the restart, and times since its first start."""
    env = make_monitored(tmp_path)
    env.reset()
    header, _ = read_rows(tmp_path / "1.monitor.csv")
    ends, returns = [], []
    for step in range(1, 18):
        if step == 8:
            # What a process leaves that is killed while it writes
            with (tmp_path / "1.monitor.csv").open("a") as file:
                file.write("1.5,")
        _, _, dones, infos = env.step(ACTIONS)
        info = infos[1]
        assert ("episode" in info) == (dones[1] and "lane_restart" not in info)
        ends += [step] if dones[1] else []
        returns += [str(info["episode"]["r"])] if "episode" in info else []
    env.close()
    assert ends == [3, 6, 8, 11, 14, 17]
    # Whichever lane was the first to start
    header_at_the_end, rows = read_rows(tmp_path / "1.monitor.csv")
    assert header_at_the_end == header
    assert [(row["r"], row["l"]) for row in rows] == [(value, "3") for value in returns]
    times = [float(row["t"]) for row in rows]
    assert len(times) == 5 and times == sorted(times)
    assert len(load_results(str(tmp_path))) == 5 + 5 + 5


@pytest.mark.parametrize("content", ["", '#{"t_start": 1.0', '#{"t_start": 1.0, "env_id": "None"}\n'])
def test_a_monitor_file_without_a_header(tmp_path, content):
    """Its process was killed before it had written it."""
    path = tmp_path / "0.monitor.csv"
    path.write_text(content)
    writer = ContinuedResultsWriter(str(tmp_path / "0"), {"t_start": 5.0, "env_id": "None"}, ("level",))
    writer.write_row({"r": 1.0, "l": 2, "t": 0.5, "level": 3})
    writer.close()
    assert path.read_text() == '#{"t_start": 5.0, "env_id": "None"}\nr,l,t,level\n1.0,2,0.5,3\n'
    # As it is now, it goes on
    writer = ContinuedResultsWriter(str(tmp_path / "0"), {"t_start": 7.25, "env_id": "None"}, ("level",))
    writer.write_row({"r": 1.0, "l": 2, "t": 0.5, "level": 3})
    writer.close()
    assert path.read_text().splitlines()[2:] == ["1.0,2,0.5,3", "1.0,2,2.75,3"]


def test_a_monitor_file_that_has_no_header(tmp_path):
    """As with SB3, if it was not to be overwritten."""
    path = tmp_path / "0.monitor.csv"
    path.write_text("1.0,2,0.5\n1.0,")
    writer = ContinuedResultsWriter(str(path), {"t_start": 5.0, "env_id": "None"}, override_existing=False)
    writer.write_row({"r": 1.0, "l": 2, "t": 0.5})
    writer.close()
    assert path.read_text() == "1.0,2,0.5\n" * 2


def test_stacked_frames(make):
    """The stack of the lane begins anew, and its terminal observation is stacked."""
    env = VecFrameStack(make(kill), 3)
    env.seed(SEED)
    seen = [env.reset(), *(env.step(ACTIONS)[0] for _ in range(2))]
    obs, _, _, infos = env.step(ACTIONS)
    first = make_twin().reset()[1]
    assert_equal(obs[1], np.concatenate([np.zeros(8, np.float32), first]))
    assert_equal(infos[1]["terminal_observation"], np.concatenate([seen[-1][1, 4:], seen[-1][1, 8:]]))
    assert_equal(obs[0, :8], seen[-1][0, 4:])


def test_observations_of_several_parts(tmp_path):
    class Env(FaultyEnv):
        observation_space = spaces.Dict({"all": FaultyEnv.observation_space, "one": spaces.Box(-1.0, 1.0, (1,))})

        def reset(self, **kwargs):
            obs, info = super().reset(**kwargs)
            return {"all": obs, "one": obs[:1]}, info

        def step(self, action):
            obs, *rest = super().step(action)
            return {"all": obs, "one": obs[:1]}, *rest

    env = HealingVecEnv([lambda: Env(kill, tmp_path, at=2)], "fork", FOREVER, FOREVER)
    env.seed(SEED)
    env.reset()
    last_observations = env.step(ACTIONS[:1])[0]
    obs, _, _, infos = env.step(ACTIONS[:1])
    expected, _ = RandomWalkEnv().reset(seed=restart_seed(lane=0))
    assert_equal(obs, {"all": expected[None], "one": expected[None, :1]})
    assert_equal(infos[0]["terminal_observation"], {key: values[0] for key, values in last_observations.items()})


def test_normalized_and_monitored(make, tmp_path):
    env = VecNormalize(VecMonitor(make(kill), str(tmp_path / "log")), norm_obs=False)
    env.seed(SEED)
    last_observation = [env.reset(), *(env.step(ACTIONS)[0] for _ in range(2))][-1][1]
    assert (env.returns != 0.0).all()
    _, rewards, _, infos = env.step(ACTIONS)
    assert (env.returns != 0.0).tolist() == [True, False, True]
    assert env.get_original_reward()[1] == 0.0 == rewards[1]
    assert_equal(infos[1]["terminal_observation"], last_observation)
    # VecMonitor counts what it sees
    assert infos[1]["episode"]["l"] == 3
    env.close()


def test_a_vec_monitor_of_what_only_the_env_says(make, tmp_path):
    """Of an episode that a restart has ended, the env says nothing."""
    env = VecMonitor(make(kill), str(tmp_path / "log"), info_keywords=("is_success",))
    env.reset()
    for _ in range(3):
        infos = env.step(ACTIONS)[3]
    assert infos[1]["episode"]["l"] == 3 and infos[1]["episode"]["is_success"] is None
    # It is not there for those who ask whether it is
    assert "is_success" not in infos[1] and infos[1].get("is_success", 5) == 5
    env.close()


class ArrayRewardEnv(FaultyEnv):
    def step(self, action):
        obs, reward, *rest = super().step(action)
        return obs, np.array([reward]), *rest


def test_rewards_that_are_arrays(tmp_path):
    env = HealingVecEnv([lambda: ArrayRewardEnv(kill, tmp_path)] * 2, start_method="fork", step_timeout=FOREVER)
    env.reset()
    for _ in range(3):
        _, rewards, dones, _ = env.step(ACTIONS[:2])
    assert rewards.shape == (2, 1) and dones.sum() >= 1 and not rewards[dones].any()
    env.close()


def raise_attribute_error():
    raise AttributeError("the env has no such thing")


def test_an_attribute_error_of_any_lane_that_can_not_be_made(make):
    """SB3 takes one for a missing render_mode."""
    with pytest.raises(AttributeError, match="the env has no such thing"):
        make(raise_attribute_error, env_class=AlwaysFaultyEnv, env_kwargs={"where": "init"})


# ---------------------------------------------------------------------- closing


@pytest.mark.parametrize("state", ["idle", "dead", "stopped", "hung", "failed"])
def test_closing(make, tmp_path, monkeypatch, state):
    """Whatever the lanes are doing. The fixture looks for what is left."""
    monkeypatch.setattr(healing_lane, "PROCESS_END_TIMEOUT", 0.2)

    class Closing(FaultyEnv):
        def close(self):
            (tmp_path / f"closed by {os.getpid()}").touch()

    env = make(hang, Closing, {"at": 1 if state == "hung" else 1000}, max_restarts=0)
    env.reset()
    pids = [process.pid for process in env.processes]
    if state == "hung":
        env.step_async(ACTIONS)
        wait_for_answers(env, [0, 2])
    elif state == "failed":
        env.processes[1].kill()
        with pytest.raises(RuntimeError, match="Env lane 1"):
            env.step(ACTIONS)
    elif state != "idle":
        os.kill(pids[1], signal.SIGSTOP if state == "stopped" else signal.SIGKILL)
        run_out_of_time(env, 1)
        env.remotes[1]._settings = env.remotes[1].process._settings
    env.close()
    env.close()
    assert env.closed and env.processes == []
    assert (tmp_path / f"closed by {pids[1]}").exists() == (state == "idle")
    assert not any(psutil.pid_exists(pid) for pid in pids)
    with pytest.raises(RuntimeError, match="The env is closed"):
        env.reset()
    with pytest.raises(RuntimeError, match="The env is closed"):
        AsyncOneStepQ("MlpPolicy", env).learn(10)


PROGRAM = """
import os, signal, time
from sb3_async1step import HealingVecEnv
from tests.envs import RandomWalkEnv

if __name__ == "__main__":
    env = HealingVecEnv([RandomWalkEnv] * 3, start_method="fork")
    env.reset()
    env.processes[0].kill()
    env.step([0] * 3)
    print(*[process.pid for process in env.processes], flush=True)
    # One of them hangs, and others have answers that nobody reads
    os.kill(env.processes[0].pid, signal.SIGSTOP)
    env.step_async([0] * 3)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_program_is_killed(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    # Not to pipes, which the hanging process would keep open
    with (tmp_path / "output").open("w") as output, (tmp_path / "errors").open("w") as errors:
        result = subprocess.run(
            [sys.executable, "-W", "ignore", str(tmp_path / "program.py")],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent.parent), *sys.path])},
            stdout=output,
            stderr=errors,
            timeout=DEADLINE,
            check=False,
        )
    pids = [int(word) for word in (tmp_path / "output").read_text().split()]
    assert result.returncode == -signal.SIGKILL and len(pids) == 3
    try:
        wait_until(lambda: not any(is_running(pid) for pid in pids[1:]))
        assert is_running(pids[0])
    finally:
        os.kill(pids[0], signal.SIGCONT)
    wait_until(lambda: not is_running(pids[0]))
    assert (tmp_path / "errors").read_text() == ""


def is_running(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


# ---------------------------------------------------------------------- messages


class BigEnv(FaultyEnv):
    """Its observations do not fit into a pipe."""

    observation_space = spaces.Box(-1.0, 1.0, (1_000_000,), np.float32)

    def reset(self, **kwargs):
        super().reset(**kwargs)
        return np.zeros(1_000_000, np.float32), {}

    def step(self, action):
        return np.ones(1_000_000, np.float32), *super().step(action)[1:]


@pytest.mark.parametrize("what", ["stopped", "killed"])
def test_a_process_that_fails_in_the_middle_of_a_message(tmp_path, what):
    env = HealingVecEnv([lambda: BigEnv(kill, tmp_path, at=1000)], "fork", FOREVER, FOREVER)
    env.reset()
    env.step_async(ACTIONS[:1])
    wait_for_answers(env, [0])
    os.kill(env.processes[0].pid, signal.SIGSTOP if what == "stopped" else signal.SIGKILL)
    if what == "stopped":
        limit_blocking(env.remotes[0].process._connection, 0.1, 0.1)
    obs, _, dones, infos = env.step_wait()
    assert infos[0]["lane_restart"] == ("it did not answer within 3600 s" if what == "stopped" else SIGKILL)
    assert obs.sum() == 0.0 and dones.all()
    assert env.step(ACTIONS[:1])[0].sum() == 1_000_000


@pytest.mark.parametrize("when", ["waiting", "receiving", "sending"])
def test_an_interrupt(make, monkeypatch, when):
    """The answers that it has kept from being received are not mistaken for later ones."""
    env, plain = make(env_class=SteadyEnv), DummyVecEnv([SteadyEnv] * 3)
    plain.seed(SEED)
    env.reset(), plain.reset()

    def interrupt(process, *args):
        method(process, *args)
        if process is env.remotes[1].process:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        name = {"waiting": "wait", "receiving": "receive", "sending": "send"}[when]
        method = getattr(LaneProcess, name)
        patched.setattr(LaneProcess, name, interrupt)
        with pytest.raises(KeyboardInterrupt):
            env.step(ACTIONS)
    plain.step(ACTIONS)
    is_torn = when != "waiting"
    obs, _, dones, infos = env.step(ACTIONS)
    expected, *_ = plain.step(ACTIONS)
    assert dones.tolist() == [False, is_torn, False]
    reason = "an interrupt may have torn its answer" if is_torn else None
    assert infos[1].get("lane_restart") == reason and env.n_restarts == is_torn
    lanes = [0, 2] if is_torn else [0, 1, 2]
    # The last lane was not asked for the step before
    lanes = lanes[:-1] if when == "sending" else lanes
    assert_equal(obs[lanes], expected[lanes])


# ---------------------------------------------------------------------- trainings


def make_faulty_lanes(folder):
    """Four lanes, all of which fail, each in another step and way."""

    def make_lane(lane):
        (folder / str(lane)).mkdir(exist_ok=True)
        fault = (raise_an_error, leave, kill)[lane % 3]
        env = FaultyEnv(fault, folder / str(lane), ("step", "step", "reset")[lane % 3], at=2 + 5 * lane)
        env.max_steps = 5
        return Monitor(env)

    return HealingVecEnv([lambda lane=lane: make_lane(lane) for lane in range(4)], "fork", FOREVER, FOREVER)


WORKERS = [{"n_workers": 1}, {"n_workers": 3}, {"n_workers": 3, "backend": "serial"}]


@pytest.mark.parametrize("n_workers", [1, 3])
def test_a_training_goes_on(algorithm, n_workers, tmp_path):
    env = make_faulty_lanes(tmp_path)
    model = algorithm("MlpPolicy", VecFrameStack(VecNormalize(env), 2), n_workers=n_workers)
    model.set_logger(configure(str(tmp_path), ["json"]))
    reasons = []

    def look(locals_, globals_):
        reasons.extend(info["lane_restart"] for info in locals_["infos"] if "lane_restart" in info)
        return True

    model.learn(400, callback=look, log_interval=1)
    assert 400 <= model.num_timesteps < 404
    # Other workers may have taken the steps of one whose lanes were about to fail
    while n_workers > 1 and env.n_restarts < 4:
        model.learn(40, callback=look, log_interval=1, reset_num_timesteps=False)
    assert env.n_restarts == 4
    error = FAULTS["raises"][1]
    assert sorted(reasons) == sorted([error, error, FAULTS["exits"][1], SIGKILL])
    rows = [json.loads(line) for line in (tmp_path / "progress.json").read_text().splitlines()]
    assert rows[-1]["async/lane_restarts"] == 4
    # Guards and watchers are gone
    env.reset()
    env.step([model.action_space.sample()] * 4)
    model.learn(40, reset_num_timesteps=False)


@pytest.mark.parametrize("sb3_algorithm", [A2C, DQN, PPO])
def test_sb3s_algorithms(sb3_algorithm, tmp_path):
    env = make_faulty_lanes(tmp_path)
    kwargs = {"learning_starts": 50} if sb3_algorithm is DQN else {"n_steps": 20}
    model = sb3_algorithm("MlpPolicy", env, **kwargs).learn(320)
    assert model.num_timesteps == 320
    assert env.n_restarts == 4


def test_continuous_actions(tmp_path):
    class Env(BoxWalkEnv):
        def step(self, action):
            if not (tmp_path / "has failed").exists():
                (tmp_path / "has failed").touch()
                kill()
            return super().step(action)

    env = HealingVecEnv([Env] * 2, "fork", FOREVER, FOREVER)
    assert A3C("MlpPolicy", env, n_workers=2).learn(200).num_timesteps == 200
    assert env.n_restarts >= 1


@pytest.mark.parametrize("workers", WORKERS, ids=["one", "threads", "serial"])
def test_too_many_restarts_end_a_training(workers, make):
    model = AsyncOneStepQ("MlpPolicy", make(env_class=AlwaysFaultyEnv, max_restarts=2), **workers)
    with pytest.raises(ZeroDivisionError, match="the env is broken") as caught:
        model.learn(10_000)
    assert caught.value.__notes__[0].startswith("Raised in env lane 1. It was restarted as often as max_restarts=2 ")
    model.set_env(make_twin())
    assert model.learn(30).num_timesteps == 30


def test_a_slow_restart_holds_up_its_worker_only(tmp_path):
    class Env(SteadyEnv):
        def __init__(self):
            super().__init__()
            wait_until(lambda: not (tmp_path / "wait").exists(), FOREVER)

    env = HealingVecEnv([Env] * 4, "fork", FOREVER, FOREVER)
    model = AsyncOneStepQ("MlpPolicy", env, n_workers=2)

    def kill_one():
        wait_until(lambda: has_made_steps(model, 40))
        (tmp_path / "wait").touch()
        env.processes[0].kill()
        wait_until(lambda: env.n_restarts == 1)
        n_steps = model.num_timesteps
        wait_until(lambda: has_made_steps(model, n_steps + 400))
        (tmp_path / "wait").unlink()
        n_steps = model.num_timesteps
        wait_until(lambda: has_made_steps(model, n_steps + 40))
        press_ctrl_c()

    with meanwhile(kill_one), pytest.raises(KeyboardInterrupt):
        model.learn(10**9, log_interval=None)
    assert model.learn(40).num_timesteps == 40


@pytest.mark.parametrize("workers", WORKERS, ids=["one", "threads", "serial"])
def test_ctrl_c_while_a_lane_hangs(make, tmp_path, workers):
    """Nobody waits for its timeout. A terminal interrupts the processes, too."""

    def hang_until_released():
        (tmp_path / "hangs").touch()
        wait_until((tmp_path / "released").exists, FOREVER)

    env = make(hang_until_released, env_kwargs={"at": 10})
    pids = [process.pid for process in env.processes]
    model = AsyncOneStepQ("MlpPolicy", VecFrameStack(env, 2), **workers)

    def interrupt():
        wait_until((tmp_path / "hangs").exists)
        # An interrupt before that may tear a message, so that its lane has to be restarted
        wait_until(lambda: [lane._state for lane in env.remotes[:2]] == [State.IDLE, State.WAITING])
        for pid in pids:
            os.kill(pid, signal.SIGINT)
        press_ctrl_c()

    with meanwhile(interrupt), pytest.raises(KeyboardInterrupt):
        model.learn(10**9)
    assert env.n_restarts == 0
    (tmp_path / "released").touch()
    assert model.learn(60).num_timesteps == 60
    # Neither the processes nor the timeouts are others. But a single worker steps on the interrupted thread, and may
    # have been in the middle of a message to another lane
    lanes = [1] if workers["n_workers"] == 1 else [0, 1, 2]
    assert [env.processes[lane].pid for lane in lanes] == [pids[lane] for lane in lanes]
    assert env.settings.give_up_at == float("inf")


def test_callbacks_may_ask_failed_lanes(tmp_path):
    env = HealingVecEnv([SteadyEnv] * 4, "fork", FOREVER, FOREVER, max_restarts=100)

    def ask(locals_, globals_):
        env = locals_["self"].get_env()
        env.processes[env.n_restarts % 4].kill()
        assert env.get_attr("level") == [0, 0, 0, 0]
        return True

    model = AsyncOneStepQ("MlpPolicy", env, n_workers=2).learn(80, callback=ask)
    assert model.num_timesteps == 80 and env.n_restarts == 20


def test_the_zoo(tmp_path):
    train = (
        "sb3-async1step train --algo a3c --env CartPole-v1 -n 200 --eval-freq 100 --eval-episodes 1 --vec-env healing "
        "--vec-env-kwargs step_timeout:50.0 start_method:\"'fork'\" "
        "-params n_envs:2 callback:\"'tests.test_healing_vec_env.KillALane'\""
    )
    code, output = call_zoo(shlex.split(train), tmp_path)
    assert code == 0, output
    folder = tmp_path / "logs" / "a3c" / "CartPole-v1_1"
    assert A3C.load(folder / "CartPole-v1.zip").num_timesteps == 200
    # The Zoo itself calls the hook a second time
    assert KillALane.seen[0] == (1, 50.0)


class KillALane(BaseCallback):
    """For the Zoo, which finds it by its name."""

    seen: ClassVar[list] = []

    def _on_step(self):
        if self.n_calls == 10:
            self.training_env.unwrapped.processes[1].kill()
        return True

    def _on_training_end(self):
        env = self.training_env.unwrapped
        self.seen.append((env.n_restarts, env.settings.step_timeout))


def test_a_program_that_was_suspended_does_not_blame_its_lanes(make, tmp_path, monkeypatch):
    """The clock has gone on; the lanes answer as soon as they go on, too."""
    env = make(lambda: wait_until((tmp_path / "goes on").exists, FOREVER), env_kwargs={"at": 1}, step_timeout=60.0)
    env.reset()
    clock = SimpleNamespace(monotonic=time.monotonic)
    monkeypatch.setattr(lane_process, "time", clock)

    def look(waitables, timeout):
        if waitables == env.remotes[1].process.waitables and not (tmp_path / "goes on").exists():
            clock.monotonic = lambda: time.monotonic() + 1000.0
            (tmp_path / "goes on").touch()
            return []
        return wait(waitables, DEADLINE)

    monkeypatch.setattr(lane_process, "wait", look)
    assert not env.step(ACTIONS)[2].any()
    assert env.n_restarts == 0 and (tmp_path / "goes on").exists()
