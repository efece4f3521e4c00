"""Callbacks and the training env while workers step it; processes that die."""

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import psutil
import pytest
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecFrameStack, VecMonitor, VecNormalize

from sb3_async1step import AsyncOneStepQ, split_vec_env
from sb3_async1step.vec_envs import process_watcher
from sb3_async1step.vec_envs.guard import NOBODY_ELSE, QUERIES, STEPS
from sb3_async1step.vec_envs.process_watcher import ProcessWatcher
from tests.envs import RaisingEnv, RandomWalkEnv, make_env
from tests.helpers import (
    DEADLINE,
    FOREVER,
    functions_of,
    has_made_steps,
    meanwhile,
    press_ctrl_c,
    wait_until,
    with_worker,
)

needs_posix = pytest.mark.skipif(os.name != "posix", reason="signals, fork and file descriptors of POSIX")


class ForkedVecEnv(SubprocVecEnv):
    """Starts fast, and its processes inherit each other's pipes (on systems that can fork)."""

    def __init__(self, env_fns):
        super().__init__(env_fns, start_method="fork" if os.name == "posix" else "spawn")


@split_vec_env.register
def _(env: ForkedVecEnv, groups):
    return split_vec_env.dispatch(SubprocVecEnv)(env, groups)


class AskableEnv(RandomWalkEnv):
    """Notices when it is asked while it steps."""

    render_mode = "rgb_array"
    is_stepping = False
    difficulty = 0

    def step(self, action):
        self.is_stepping = True
        time.sleep(1e-4)
        result = super().step(action)
        self.is_stepping = False
        return result

    def set_difficulty(self, value):
        assert not self.is_stepping
        self.difficulty = value
        return os.getpid()

    def render(self):
        assert not self.is_stepping
        return np.full((2, 2, 3), self.difficulty, np.uint8)


class AskInEachCall(BaseCallback):
    def _on_step(self):
        env = self.training_env
        # The first one, before the lanes have settled
        assert env.has_attr("difficulty") and not env.has_attr("no_such_thing")
        assert len(env.env_method("set_difficulty", self.n_calls)) == 4
        assert env.get_attr("difficulty") == [self.n_calls] * 4
        env.set_attr("p_terminate", 0.2, indices=[1, 3])
        assert env.get_attr("p_terminate") == [0.05, 0.2, 0.05, 0.2]
        assert env.env_is_wrapped(gym.Wrapper) == [False] * 4
        assert (env.get_images()[3] == self.n_calls).all()
        return True


@pytest.mark.parametrize("n_workers", [1, 4])
@pytest.mark.parametrize("vec_env", [DummyVecEnv, ForkedVecEnv])
def test_callbacks_may_ask_the_training_env(algorithm, vec_env, n_workers):
    env = VecFrameStack(VecMonitor(vec_env([AskableEnv] * 4)), 2)
    env.set_attr("p_terminate", 0.05)
    model = algorithm("MlpPolicy", env, n_workers=n_workers).learn(200, callback=AskInEachCall())
    assert model.num_timesteps == 200
    # Nothing of the guard is left
    assert not {"get_attr", "env_method", "reset", "step_async"} & set(vars(env.unwrapped))
    env.reset()
    env.step(np.zeros(4, dtype=int))
    env.close()


def test_learning_twice_at_once(algorithm):
    def learn_again(locals_, globals_):
        locals_["self"].learn(10)

    with pytest.raises(RuntimeError, match="is running already"):
        algorithm("MlpPolicy", make_env(4), n_workers=2).learn(100, callback=learn_again)


def test_two_models_on_one_env(algorithm):
    """At the same moment, one of them learns and the other is told why not; one after the other, both learn."""
    env = make_env(4)
    models = [algorithm("MlpPolicy", env, n_workers=2) for _ in range(2)]
    barrier = threading.Barrier(2)

    def learn(model):
        barrier.wait()
        try:
            outcomes.append(model.learn(400).num_timesteps)
        except RuntimeError as error:
            outcomes.append(str(error))

    def learn_other(locals_, globals_):
        other = models[1] if locals_["self"] is models[0] else models[0]
        with pytest.raises(RuntimeError, match="nobody else may step or reset it until learn"):
            other.learn(10)
        return True

    for _ in range(3):
        outcomes = []
        threads = [threading.Thread(target=learn, args=(model,)) for model in models]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        # The two may have missed each other on a busy machine
        assert len(outcomes) == 2 and 400 in outcomes and set(outcomes) <= {400, NOBODY_ELSE}
    for model in models:
        assert model.learn(40, callback=learn_other).num_timesteps == 40
    env.step(np.zeros(4, dtype=int))


def test_the_eval_env_is_kept_in_sync(algorithm):
    env, eval_env = VecNormalize(make_env(4)), VecNormalize(make_env(1), training=False)
    callback = EvalCallback(eval_env, eval_freq=20, n_eval_episodes=1, verbose=0)
    algorithm("MlpPolicy", env, n_workers=2).learn(400, callback=callback)
    assert eval_env.obs_rms.count > 300
    assert eval_env.obs_rms.count <= env.obs_rms.count


def processes_of(env):
    return [psutil.Process(process.pid) for process in env.unwrapped.processes]


@needs_posix
@pytest.mark.parametrize(
    ("backend", "n_workers", "lane"), [("threads", 3, 0), ("threads", 1, 2), ("serial", 3, 0), ("threads", 2, 2)]
)
def test_a_killed_process(algorithm, backend, n_workers, lane, tmp_path):
    # The default start method, too, where pipes are not inherited
    has_slow_start = algorithm is AsyncOneStepQ and (backend, n_workers) == ("threads", 3)
    make = SubprocVecEnv if has_slow_start else ForkedVecEnv
    env = VecFrameStack(make([RandomWalkEnv] * 3), 2)
    processes = processes_of(env)
    model = algorithm("MlpPolicy", env, n_workers=n_workers, backend=backend)

    def kill_one():
        wait_until(lambda: has_made_steps(model, 60))
        processes[lane].send_signal(signal.SIGKILL)

    death = pytest.raises(RuntimeError, match=f"The process of env lane {lane} was killed by signal 9")
    with meanwhile(kill_one), death as caught:
        model.learn(10**9, log_interval=None)
    assert isinstance(caught.value.__cause__, (EOFError, OSError))
    _, alive = psutil.wait_procs(processes, timeout=DEADLINE)
    assert alive == []
    env.close()
    # With a new env, it goes on
    obs = np.zeros(8, np.float32)
    action = model.predict(obs, deterministic=True)[0]
    model.save(tmp_path / "model")
    assert algorithm.load(tmp_path / "model").predict(obs, deterministic=True)[0] == action
    model.set_env(VecFrameStack(make_env(3), 2))
    before = model.num_timesteps
    model.learn(30, reset_num_timesteps=False)
    assert before + 30 <= model.num_timesteps < before + 33


def test_an_exception_in_a_process(algorithm, capfd):
    env = ForkedVecEnv([RandomWalkEnv, lambda: RaisingEnv(at_step=9), RandomWalkEnv])
    processes = processes_of(env)
    with pytest.raises(
        RuntimeError,
        match=r"The process of env lane 1 ended with exit code 1\. If it raised an exception, its traceback",
    ):
        algorithm("MlpPolicy", env, n_workers=3).learn(10_000)
    assert psutil.wait_procs(processes, timeout=DEADLINE)[1] == []
    assert "the env is broken" in capfd.readouterr().err


@pytest.mark.parametrize("where", ["reset", "render"])
@pytest.mark.parametrize("n_workers", [1, 3])
def test_an_env_that_raises_elsewhere(algorithm, where, n_workers):
    class Breaking(AskableEnv):
        def __init__(self, is_broken):
            super().__init__()
            self.is_broken = is_broken
            self.n_resets = 0

        def render(self):
            raise ZeroDivisionError("no picture")

        def reset(self, **kwargs):
            self.n_resets += 1
            if self.is_broken and where == "reset" and self.n_resets > 1:
                raise ZeroDivisionError("no picture")
            return super().reset(**kwargs)

    def look(locals_, globals_):
        if where == "render":
            locals_["self"].get_env().get_images()
        return True

    env = DummyVecEnv([lambda is_broken=is_broken: Breaking(is_broken) for is_broken in (False, False, True)])
    model = algorithm("MlpPolicy", env, n_workers=n_workers)
    with pytest.raises(ZeroDivisionError, match="no picture") as caught:
        model.learn(1000, callback=look)
    if where == "reset":
        assert caught.value.__notes__ == ["Raised in env lane 2."]
    model.set_env(make_env(3))
    model.learn(30)


@pytest.mark.parametrize("n_workers", [1, 3])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_observations_that_are_not_finite(algorithm, n_workers, value):
    class Broken(RandomWalkEnv):
        def step(self, action):
            obs, *rest = super().step(action)
            obs[2] = value if self.n_steps == 5 else obs[2]
            return obs, *rest

    model = algorithm("MlpPolicy", DummyVecEnv([RandomWalkEnv, Broken, RandomWalkEnv]), n_workers=n_workers)
    with pytest.raises(ValueError, match="The observation of env lane 1 is not finite"):
        model.learn(1000)
    assert all(bool(p.isfinite().all()) for p in model.policy.parameters())


def test_a_training_that_diverges_stops_before_the_weights_are_touched(algorithm):
    def compute_loss(parents, worker, rollout):
        loss, metrics = parents(rollout)
        return loss * (float("nan") if worker.shared.n_updates > 20 else 1.0), metrics

    model = with_worker(algorithm, compute_loss=compute_loss)("MlpPolicy", make_env(4), n_workers=2)
    with pytest.raises(ValueError, match="gradient's norm is nan: the training diverges"):
        model.learn(1000)
    assert all(bool(p.isfinite().all()) for p in model.policy.parameters())


def test_two_models_learn_at_the_same_time(algorithm):
    """Neither disturbs the other: in serial mode, each gets the weights that it gets alone."""

    def train(seed, results):
        env = make_env(2)
        env.seed(seed)
        model = algorithm("MlpPolicy", env, n_workers=2, backend="serial", policy_kwargs={"net_arch": [8]})
        model.policy.load_state_dict(initial[seed])
        model.set_random_seed(seed)
        model.learn(200)
        results[seed] = [p.tolist() for p in model.policy.parameters()]

    initial = {
        seed: algorithm("MlpPolicy", make_env(2), seed=seed, policy_kwargs={"net_arch": [8]}).policy.state_dict()
        for seed in (1, 2)
    }
    alone, together = {}, {}
    for seed in (1, 2):
        train(seed, alone)
    threads = [threading.Thread(target=train, args=(seed, together)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert alone == together
    assert alone[1] != alone[2]


@needs_posix
@pytest.mark.parametrize(("backend", "n_workers"), [("threads", 1), ("serial", 3), ("threads", 3)])
def test_learning_on_after_ctrl_c(algorithm, backend, n_workers):
    """The answers to the interrupted step are not mistaken for those to later ones."""

    class Slow(RandomWalkEnv):
        def step(self, action):
            time.sleep(0.02)
            return super().step(action)

    env = ForkedVecEnv([Slow] * 3)
    model = algorithm("MlpPolicy", env, n_workers=n_workers, backend=backend)

    def interrupt():
        wait_until(lambda: has_made_steps(model, 6))
        press_ctrl_c()

    for _ in range(3):
        with meanwhile(interrupt), pytest.raises(KeyboardInterrupt):
            model.learn(10**9)
    assert model.learn(30).num_timesteps == 30
    env.close()


@needs_posix
@pytest.mark.parametrize(
    "request_",
    [("is_wrapped", gym.Wrapper), ("get_attr", "render_mode"), ("env_method", ("has_wrapper_attr", ("s",), {}))],
)
@pytest.mark.parametrize("n_asked", [1, 2])
def test_learning_on_after_an_interrupted_question(request_, n_asked):
    """Whatever the answers are: those to ``env_is_wrapped()`` are ``False``, say."""
    env = ForkedVecEnv([RandomWalkEnv] * 2)
    model = AsyncOneStepQ("MlpPolicy", env, n_workers=1)

    def ask(locals_, globals_):
        for remote in env.remotes[:n_asked]:
            remote.send(request_)
        raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            model.learn(100, callback=ask)
        assert not any(remote.poll() for remote in env.remotes)
        assert env.env_is_wrapped(gym.Wrapper) == [False] * 2
    assert model.learn(30).num_timesteps == 30
    env.close()


@needs_posix
def test_a_watcher_whose_start_was_interrupted_touches_nothing(monkeypatch):
    """Its thread may begin when the next learn() is running, whose answers it would take."""
    release = threading.Event()

    class LateThread(threading.Thread):
        def start(self):
            self.late = threading.Thread(target=lambda: release.wait() and self.run())
            self.late.start()
            raise KeyboardInterrupt

    touched = []
    monkeypatch.setattr(process_watcher, "Thread", LateThread)
    monkeypatch.setattr(process_watcher, "heed_ctrl_c", touched.append)
    env = ForkedVecEnv([RandomWalkEnv] * 2)
    watcher = ProcessWatcher(env)
    with pytest.raises(KeyboardInterrupt):
        watcher.start()
    watcher.end()
    release.set()
    watcher._thread.late.join()
    assert touched == []
    assert env.get_attr("max_steps") == [11] * 2
    env.close()


class PipeOfWindows:
    """
    What ``multiprocessing.Pipe()`` gives on Windows: it keeps the boundaries of messages, and has no file descriptor.

    :param connection: of this system
    """

    def __init__(self, connection):
        self.connection = connection
        self.send, self.close = connection.send, connection.close
        self.rest = b""
        self.n_to_take = None

    def fileno(self):
        raise AssertionError("a handle, nothing that os.read() can read")

    def recv_bytes(self):
        message, self.rest = self.rest or self.connection.recv_bytes(), b""
        if self.n_to_take is not None:
            self.rest, self.n_to_take = message[self.n_to_take :], None
            raise KeyboardInterrupt
        return message

    def recv(self):
        return pickle.loads(self.recv_bytes())


@pytest.mark.parametrize("n_taken", [0, 4, 10**6])
def test_learning_on_after_a_broken_message_on_windows(algorithm, n_taken):
    """Ctrl-C before, while and after a message is received."""
    env = ForkedVecEnv([RandomWalkEnv] * 2)
    env.remotes = tuple(PipeOfWindows(remote) for remote in env.remotes)
    # In step: this system can't wait for such pipes
    model = algorithm("MlpPolicy", env, n_workers=1, backend="serial")

    def interrupt_later(locals_, globals_):
        env.remotes[1].n_to_take = n_taken
        return True

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            model.learn(100, callback=interrupt_later)
        assert all(remote.rest == b"" for remote in env.remotes)
        assert not env.waiting
    assert model.learn(30).num_timesteps == 30
    env.close()


@needs_posix
@pytest.mark.parametrize("n_taken", [1, 4, 100])
def test_learning_on_after_a_broken_message(algorithm, monkeypatch, n_taken):
    """Ctrl-C may come when a part of an answer was read, and is lost."""
    env = ForkedVecEnv([RandomWalkEnv] * 2)
    model = algorithm("MlpPolicy", env, n_workers=1)

    def interrupted_recv():
        os.read(env.remotes[1].fileno(), n_taken)
        raise KeyboardInterrupt

    def interrupt_later(locals_, globals_):
        patched.setattr(env.remotes[1], "recv", interrupted_recv)
        return True

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        model.learn(100, callback=interrupt_later)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(env.remotes[1], "recv", interrupted_recv)
        # In its reset
        model.learn(100)
    assert model.learn(30).num_timesteps == 30
    env.close()


@needs_posix
@pytest.mark.parametrize("n_workers", [1, 2])
@pytest.mark.parametrize("before_its_message", [False, True])
def test_ctrl_c_at_the_very_end(n_workers, before_its_message, monkeypatch):
    """The processes answer, so they need not be ended."""
    env = SubprocVecEnv([RandomWalkEnv] * 2, start_method="fork")
    processes = processes_of(env)
    model = AsyncOneStepQ("MlpPolicy", env, n_workers=n_workers)
    stop = ProcessWatcher._stop

    def interrupted_stop(watcher, patience):
        monkeypatch.setattr(ProcessWatcher, "_stop", stop)
        if not before_its_message:
            stop(watcher, 0.0)
        raise KeyboardInterrupt

    monkeypatch.setattr(ProcessWatcher, "_stop", interrupted_stop)
    # A busy machine may need long for an answer
    monkeypatch.setattr(process_watcher, "INTERRUPT_TIMEOUT", DEADLINE)
    with pytest.raises(KeyboardInterrupt):
        model.learn(30)
    assert model.learn(30).num_timesteps == 30
    assert processes_of(env) == processes and all(process.is_running() for process in processes)
    env.close()


@needs_posix
def test_learn_ends_though_a_process_was_forked_meanwhile():
    env = SubprocVecEnv([RandomWalkEnv] * 2, start_method="fork")
    children = []

    def fork(locals_, globals_):
        if not children:
            children.append(multiprocessing.get_context("fork").Process(target=time.sleep, args=(FOREVER,)))
            children[0].start()
        return True

    AsyncOneStepQ("MlpPolicy", env, n_workers=2).learn(40, callback=fork)
    assert children[0].is_alive()
    children[0].kill()
    children[0].join()
    env.close()


@pytest.mark.parametrize("n_workers", [1, 2])
def test_callbacks_see_what_wrappers_keep(algorithm, n_workers):
    env = VecNormalize(VecMonitor(make_env(4)))
    rewards, lengths = [], []

    def look(locals_, globals_):
        rewards.append(env.get_original_reward().sum())
        lengths.append(env.venv.episode_lengths.max())
        assert env.get_original_obs().shape == (4, 4)
        return True

    model = algorithm("MlpPolicy", env, n_workers=n_workers).learn(200, callback=look)
    assert len(set(rewards)) > 20
    assert max(lengths) > 3
    assert model.num_timesteps == 200


def press_ctrl_c_in_a_terminal(processes):
    """It interrupts all processes of the program."""
    for process in processes:
        process.send_signal(signal.SIGINT)
    press_ctrl_c()


@needs_posix
@pytest.mark.parametrize("n_workers", [1, 3])
def test_the_processes_outlive_a_terminals_ctrl_c(n_workers):
    env = VecFrameStack(ForkedVecEnv([RandomWalkEnv] * 3), 2)
    processes = processes_of(env)
    model = AsyncOneStepQ("MlpPolicy", env, n_workers=n_workers)

    def interrupt():
        wait_until(lambda: has_made_steps(model, 30))
        press_ctrl_c_in_a_terminal(processes)

    for _ in range(3):
        with meanwhile(interrupt), pytest.raises(KeyboardInterrupt):
            model.learn(10**9, log_interval=None)
        assert model.learn(30).num_timesteps == 30
    # When nobody trains, it ends them as it did before
    processes[1].send_signal(signal.SIGINT)
    processes[1].wait(DEADLINE)
    with pytest.raises(RuntimeError, match=r"The process of env lane 1 ended\. .* make the env anew .* set_env\(\)"):
        model.learn(30)
    assert psutil.wait_procs(processes, timeout=DEADLINE)[1] == []
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"The env is closed, or one of its .* make the env anew"):
            model.learn(30)
    env.close()
    model.set_env(VecFrameStack(make_env(3), 2))
    assert model.learn(30).num_timesteps == 30


PROGRAM = """
import os, signal, threading
from stable_baselines3.common.vec_env import SubprocVecEnv
from sb3_async1step import AsyncOneStepQ
from tests.envs import RandomWalkEnv
from tests.helpers import has_made_steps, wait_until

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    env = SubprocVecEnv([RandomWalkEnv] * 3, start_method="fork")
    model = AsyncOneStepQ("MlpPolicy", env, n_workers=3)

    def press():
        wait_until(lambda: has_made_steps(model, 30))
        os.killpg(0, signal.SIGINT)

    for _ in range(2):
        threading.Thread(target=press).start()
        try:
            model.learn(10**9)
        except KeyboardInterrupt:
            print("interrupted", [process.is_alive() for process in env.processes], flush=True)
    print("learned", model.learn(30).num_timesteps)
    env.close()
"""


@needs_posix
def test_ctrl_c_of_a_process_group(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    result = subprocess.run(
        [sys.executable, str(tmp_path / "program.py")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent.parent), *sys.path])},
        start_new_session=True,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [*["interrupted [True, True, True]"] * 2, "learned 30"]


@needs_posix
@pytest.mark.parametrize("n_workers", [1, 3])
def test_a_process_that_hangs_while_ctrl_c_comes(n_workers, tmp_path):
    """With one worker, a second Ctrl-C ends the processes that do not answer."""

    class Hanging(RandomWalkEnv):
        def step(self, action):
            if self.n_steps == 2 and not (tmp_path / "go on").exists():
                (tmp_path / "hangs").touch()
                wait_until((tmp_path / "go on").exists)
            return super().step(action)

    env = ForkedVecEnv([RandomWalkEnv, Hanging, RandomWalkEnv])
    processes = processes_of(env)
    model = AsyncOneStepQ("MlpPolicy", env, n_workers=n_workers)

    def interrupt():
        wait_until((tmp_path / "hangs").exists)
        press_ctrl_c_in_a_terminal(processes)
        if n_workers == 1:
            wait_until(lambda: "end" in functions_of(threading.main_thread())[:2])
            press_ctrl_c_in_a_terminal(processes)
        else:
            (tmp_path / "go on").touch()

    with meanwhile(interrupt), pytest.raises(KeyboardInterrupt):
        model.learn(10**9)
    if n_workers == 1:
        assert psutil.wait_procs(processes, timeout=DEADLINE)[1] == []
        env.close()
        model.set_env(make_env(3))
    assert model.learn(30).num_timesteps == 30
    model.get_env().close()


class DyingEnv(RandomWalkEnv):
    """
    An env that ends its process in some step.

    :param die: what it does then
    """

    def __init__(self, die):
        super().__init__()
        self.die, self.n_steps_in_all = die, 0

    def step(self, action):
        self.n_steps_in_all += 1
        if self.n_steps_in_all == 9:
            self.die()
        return super().step(action)


def run_out_of_memory():
    raise MemoryError


DEATHS = {
    "exit": (lambda: os._exit(3), "ended"),
    "memory": (run_out_of_memory, "ended"),
    "kill": (lambda: os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM)), "was killed by signal 9"),
}


@needs_posix
@pytest.mark.parametrize("n_workers", [1, 3])
@pytest.mark.parametrize("death", DEATHS)
def test_an_env_that_ends_its_process(death, n_workers):
    die, what = DEATHS[death]
    env = ForkedVecEnv([RandomWalkEnv, lambda: DyingEnv(die), RandomWalkEnv])
    processes = processes_of(env)
    model = AsyncOneStepQ("MlpPolicy", env, n_workers=n_workers)
    with pytest.raises(RuntimeError, match=f"The process of env lane 1 {what}"):
        model.learn(10_000)
    assert psutil.wait_procs(processes, timeout=DEADLINE)[1] == []
    env.close()
    model.set_env(make_env(3))
    assert model.learn(30).num_timesteps == 30


def test_all_that_talks_to_the_processes_is_guarded():
    """But for what workers, and who makes or closes a VecEnv, call."""
    talking = {
        name
        for name, method in vars(SubprocVecEnv).items()
        if callable(method) and {"remotes", "_get_target_remotes"} & set(method.__code__.co_names)
    }
    others = {"__init__", "_get_target_remotes", "close", "step_wait", "get_images"}
    assert talking - others <= set(QUERIES) | set(STEPS) and "has_attr" in talking
