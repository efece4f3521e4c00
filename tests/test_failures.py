"""However the training ends: the right exception, no thread left, and a model that goes on."""

import multiprocessing
import threading
import time
import traceback

import numpy as np
import psutil
import pytest
import torch as th
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, EvalCallback, ProgressBarCallback
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecCheckNan, VecEnvWrapper

from sb3_async1step import AsyncOneStepQ
from sb3_async1step.registry import ALGORITHMS
from tests.envs import BlockingEnv, RaisingEnv, RandomWalkEnv, make_env
from tests.helpers import (
    DEADLINE,
    FOREVER,
    actor_learners,
    functions_of,
    has_made_steps,
    is_waiting,
    meanwhile,
    press_ctrl_c,
    wait_until,
)

WORKERS = [("threads", 3), ("threads", 1), ("serial", 3)]


@pytest.fixture
def workers(request):
    return dict(zip(("backend", "n_workers"), request.param, strict=True))


# All layouts of workers for one algorithm, and threads for the others: what handles failures is the same
FIRST, *OTHERS = ALGORITHMS
PAIRS = [(FIRST, layout) for layout in WORKERS] + [(name, WORKERS[0]) for name in OTHERS]
with_workers = pytest.mark.parametrize(
    ("algorithm", "workers"), PAIRS, indirect=True, ids=[f"{name}-{layout[0]}-{layout[1]}" for name, layout in PAIRS]
)


def assert_goes_on(model, tmp_path):
    """The model predicts, saves, loads and learns again (that no thread is left, the fixture asserts)."""
    observation = np.zeros(4, np.float32)
    action = model.predict(observation, deterministic=True)[0]
    model.save(tmp_path / "model")
    assert type(model).load(tmp_path / "model").predict(observation, deterministic=True)[0] == action
    before = model.num_timesteps
    model.learn(60, reset_num_timesteps=False)
    assert model.num_timesteps >= before + 60


class NonFiniteRewardEnv(RandomWalkEnv):
    def __init__(self, reward, at_step=20):
        super().__init__()
        self.reward, self.at_step, self.n_steps_in_all = reward, at_step, 0

    def step(self, action):
        self.n_steps_in_all += 1
        obs, reward, *rest = super().step(action)
        return obs, self.reward if self.n_steps_in_all == self.at_step else reward, *rest


def with_one(env_class, *args, lane=1):
    """Three lanes, one of them of another class."""
    classes = [lambda: RandomWalkEnv() for _ in range(3)]
    classes[lane] = lambda: env_class(*args)
    return DummyVecEnv([lambda make=make: Monitor(make()) for make in classes])


@with_workers
@pytest.mark.parametrize("lane", [0, 1, 2])
def test_an_env_that_raises(algorithm, workers, lane, tmp_path):
    model = algorithm("MlpPolicy", with_one(RaisingEnv, 20, lane=lane), **workers)
    with pytest.raises(ZeroDivisionError, match="the env is broken") as caught:
        model.learn(10_000)
    assert traceback.extract_tb(caught.value.__traceback__)[-1].line == 'raise ZeroDivisionError("the env is broken")'
    assert caught.value.__notes__ == [f"Raised in env lane {lane}."]
    assert_goes_on(model, tmp_path)


@with_workers
def test_an_env_that_raises_in_its_first_step(algorithm, workers, tmp_path):
    model = algorithm("MlpPolicy", with_one(RaisingEnv, 1), **workers)
    with pytest.raises(ZeroDivisionError):
        model.learn(10_000)
    assert_goes_on(model, tmp_path)


@with_workers
def test_all_envs_raise_at_once(algorithm, workers):
    env = make_env(3, RaisingEnv, at_step=5)
    with pytest.raises(ZeroDivisionError) as caught:
        algorithm("MlpPolicy", env, **workers).learn(10_000)
    assert len(caught.value.__notes__) == 1


def test_an_env_that_raises_while_a_callback_ends_the_training(algorithm, tmp_path):
    class Raising(BlockingEnv):
        def _hang(self):
            super()._hang()
            raise ZeroDivisionError("the env is broken")

    env = with_one(Raising, threading.Event(), "step")
    broken = env.envs[1].unwrapped

    def end(locals_, globals_):
        if not broken.hangs.is_set():
            return True
        broken.release.set()
        wait_until(lambda: "actor-learner-1" not in actor_learners())
        return False

    model = algorithm("MlpPolicy", env, n_workers=3)
    with pytest.raises(ZeroDivisionError, match="the env is broken"):
        model.learn(10**6, callback=end)
    # The next training resets the env
    assert model._last_obs is None
    broken.where = "nowhere"
    assert_goes_on(model, tmp_path)


@pytest.mark.parametrize("reward", [1e39, None])
def test_rewards_that_float32_does_not_hold(algorithm, reward):
    """An env of the user's own may return what numpy makes float64 or objects from."""

    class OtherRewards(VecEnvWrapper):
        def reset(self):
            return self.venv.reset()

        def step_wait(self):
            obs, rewards, dones, infos = self.venv.step_wait()
            return obs, [reward if lane == 1 else float(r) for lane, r in enumerate(rewards)], dones, infos

    model = algorithm("MlpPolicy", OtherRewards(make_env(2)), n_workers=1)
    before = {name: value.clone() for name, value in model.policy.state_dict().items()}
    with pytest.raises(ValueError, match=r"The reward of env lane 1 is not finite: (nan|inf)"):
        model.learn(100)
    assert all(th.equal(value, before[name]) for name, value in model.policy.state_dict().items())


@with_workers
def test_a_first_observation_that_is_not_finite(algorithm, workers):
    class NonFiniteStartEnv(RandomWalkEnv):
        def reset(self, **kwargs):
            obs, info = super().reset(**kwargs)
            return obs * np.float32("nan"), info

    model = algorithm("MlpPolicy", with_one(NonFiniteStartEnv), **workers)
    with pytest.raises(ValueError, match="The observation of env lane 1 is not finite"):
        model.learn(100)


@with_workers
@pytest.mark.parametrize("reward", [float("nan"), float("inf"), -float("inf")])
def test_a_reward_that_is_not_finite_never_reaches_the_weights(algorithm, workers, reward, tmp_path):
    model = algorithm("MlpPolicy", with_one(NonFiniteRewardEnv, reward), **workers)
    with pytest.raises(ValueError, match=r"The reward of env lane 1 is not finite: -?(nan|inf)"):
        model.learn(10_000)
    assert all(bool(p.isfinite().all()) for p in model.policy.parameters())
    statistics = [th.as_tensor(value) for s in model.policy.optimizer.state.values() for value in s.values()]
    assert statistics and all(bool(value.isfinite().all()) for value in statistics)
    assert_goes_on(model, tmp_path)


@with_workers
def test_vec_check_nan(algorithm, workers):
    env = VecCheckNan(with_one(NonFiniteRewardEnv, float("nan")), raise_exception=True)
    with pytest.raises(ValueError, match="found nan in rewards"):
        algorithm("MlpPolicy", env, **workers).learn(10_000)


@with_workers
def test_a_callback_that_returns_false(algorithm, workers, tmp_path):
    model = algorithm("MlpPolicy", make_env(3), **workers)
    ended = []

    class Stop(BaseCallback):
        def _on_step(self):
            return self.n_calls < 7

        def _on_training_end(self):
            ended.append(self.num_timesteps)

    assert model.learn(10_000, callback=Stop()) is model
    assert ended == [21]
    assert model.num_timesteps == 21
    assert_goes_on(model, tmp_path)


@with_workers
@pytest.mark.parametrize(
    "when",
    ["_init_callback", "_on_training_start", "_on_rollout_start", "_on_step", "_on_rollout_end", "_on_training_end"],
)
def test_a_callback_that_raises(algorithm, workers, when, tmp_path):
    class Raise(BaseCallback):
        def _on_step(self):
            return True

    def fail(self):
        raise KeyError("the callback is broken")

    setattr(Raise, when, fail)
    model = algorithm("MlpPolicy", make_env(3), **workers)
    with pytest.raises(KeyError, match="the callback is broken") as caught:
        model.learn(100, callback=Raise())
    assert caught.traceback[-1].name == "fail"
    assert_goes_on(model, tmp_path)


@with_workers
def test_a_progress_bar_is_closed(algorithm, workers):
    bar = ProgressBarCallback()
    model = algorithm("MlpPolicy", with_one(RaisingEnv, 20), **workers)
    with pytest.raises(ZeroDivisionError):
        model.learn(10_000, callback=CallbackList([bar]))
    assert bar.pbar.disable


@with_workers
@pytest.mark.parametrize("n_steps", [3, 300])
def test_ctrl_c(algorithm, workers, n_steps, tmp_path):
    model = algorithm("MlpPolicy", make_env(3), **workers)

    def interrupt():
        wait_until(lambda: has_made_steps(model, n_steps))
        press_ctrl_c()

    # Without it, this would take a day
    with meanwhile(interrupt), pytest.raises(KeyboardInterrupt):
        model.learn(10**9, log_interval=None)
    assert actor_learners() == []
    assert_goes_on(model, tmp_path)


@with_workers
def test_ctrl_c_while_gradients_are_switched_off(algorithm, workers, tmp_path):
    """Between the two halves of a ``th.no_grad()`` block, when nothing would switch them on again."""

    def interrupt(locals_, globals_):
        th.set_grad_enabled(False)
        raise KeyboardInterrupt

    model = algorithm("MlpPolicy", make_env(3), **workers)
    with pytest.raises(KeyboardInterrupt):
        model.learn(10**9, callback=interrupt)
    assert th.is_grad_enabled()
    assert_goes_on(model, tmp_path)


@with_workers
def test_ctrl_c_in_a_callback(algorithm, workers, tmp_path):
    def interrupt(locals_, globals_):
        press_ctrl_c()
        time.sleep(FOREVER)
        return True

    model = algorithm("MlpPolicy", make_env(3), **workers)
    with pytest.raises(KeyboardInterrupt):
        model.learn(10**9, callback=interrupt)
    assert_goes_on(model, tmp_path)


@with_workers
def test_ctrl_c_while_evaluating(algorithm, workers, tmp_path):
    class PressCtrlC(RandomWalkEnv):
        def step(self, action):
            press_ctrl_c()
            time.sleep(FOREVER)
            return super().step(action)

    callback = EvalCallback(
        make_env(1, PressCtrlC), eval_freq=20, best_model_save_path=str(tmp_path / "best"), verbose=0
    )
    model = algorithm("MlpPolicy", make_env(3), **workers)
    with pytest.raises(KeyboardInterrupt):
        model.learn(10**9, callback=callback)
    assert model.num_timesteps == 60
    assert list((tmp_path / "best").iterdir()) == []
    assert_goes_on(model, tmp_path)


@with_workers
def test_learning_on_another_thread_than_the_main_one(algorithm, workers):
    """Optuna runs trials in threads."""
    seen = []

    def train():
        def look(locals_, globals_):
            seen.append(threading.current_thread())
            return True

        algorithm("MlpPolicy", make_env(3), **workers).learn(90, callback=look)

    threads = [threading.Thread(target=train) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
    assert sorted(seen, key=id) == sorted(threads * 30, key=id)


def test_many_failures_leave_nothing_behind(algorithm):
    threads_before = set(threading.enumerate())
    for at_step in range(1, 15):
        with pytest.raises(ZeroDivisionError):
            algorithm("MlpPolicy", with_one(RaisingEnv, at_step), n_workers=3).learn(10_000)
    assert set(threading.enumerate()) <= threads_before


@with_workers
def test_stop_iteration_is_no_end_of_the_training(algorithm, workers, tmp_path):
    class RunsOut(RandomWalkEnv):
        def step(self, action):
            if self.n_steps == 2:
                next(iter([]))
            return super().step(action)

    model = algorithm("MlpPolicy", make_env(3, RunsOut), **workers)
    with pytest.raises(RuntimeError, match="StopIteration was raised in env lane") as caught:
        model.learn(10_000)
    assert isinstance(caught.value.__cause__, StopIteration)


def test_a_thread_that_does_not_start(algorithm, monkeypatch):
    def start(thread):
        if thread.name == "actor-learner-2":
            raise RuntimeError("can't start new thread")
        start_thread(thread)

    start_thread = threading.Thread.start
    model = algorithm("MlpPolicy", make_env(4), n_workers=4)
    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        model.learn(100)
    monkeypatch.undo()
    model.learn(100)


def test_ctrl_c_while_a_thread_starts(algorithm, monkeypatch):
    def start(thread):
        start_thread(thread)
        if thread.name == "actor-learner-1":
            raise KeyboardInterrupt

    start_thread = threading.Thread.start
    model = algorithm("MlpPolicy", make_env(3), n_workers=3)
    for _ in range(5):
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", start)
            with pytest.raises(KeyboardInterrupt):
                model.learn(100)
        assert actor_learners() == []
    model.learn(100)


def test_a_second_ctrl_c_leaves_no_worker_behind(algorithm):
    """It is pressed while the first one waits for the workers' steps to end, and so is a third."""
    release = threading.Event()
    env = DummyVecEnv([lambda: BlockingEnv(release, "step") for _ in range(2)])

    def impatiently_interrupt():
        wait_until(lambda: all(e.hangs.is_set() for e in env.envs))
        for n_stops in range(3):
            # Inside of so many calls of stop()
            wait_until(lambda n=n_stops: is_waiting(main_thread) and functions_of(main_thread).count("stop") == n)
            press_ctrl_c()
        wait_until(lambda: functions_of(main_thread).count("stop") == 3)
        release.set()

    main_thread = threading.main_thread()
    model = algorithm("MlpPolicy", env, n_workers=2)
    with meanwhile(impatiently_interrupt), pytest.raises(KeyboardInterrupt):
        model.learn(1000)
    assert actor_learners() == []
    assert model._pool is None


def test_ctrl_c_in_predict_does_not_freeze_the_training(algorithm):
    """It is pressed while predict() waits for the end of a step."""
    release = threading.Event()
    env = DummyVecEnv([lambda: BlockingEnv(release, "step") for _ in range(2)])

    def interrupt():
        wait_until(lambda: is_waiting(main_thread) and "close" in functions_of(main_thread))
        press_ctrl_c()

    main_thread = threading.main_thread()
    model = algorithm("MlpPolicy", env, n_workers=2)
    learning = threading.Thread(target=model.learn, args=(12,))
    learning.start()
    wait_until(lambda: all(e.hangs.is_set() for e in env.envs))
    with meanwhile(interrupt), pytest.raises(KeyboardInterrupt):
        model.predict(np.zeros(4, np.float32))
    release.set()
    learning.join(DEADLINE)
    assert not learning.is_alive()
    assert model.num_timesteps == 12


@with_workers
def test_terminal_observations_that_are_not_finite(algorithm, workers):
    class Broken(RandomWalkEnv):
        def step(self, action):
            obs, reward, _, truncated, info = super().step(action)
            return obs * (np.nan if truncated else 1), reward, False, truncated, info

    with pytest.raises(ValueError, match="The terminal observation of env lane 1 is not finite"):
        algorithm("MlpPolicy", with_one(Broken), **workers).learn(1000)


@with_workers
def test_a_learning_rate_that_is_not_finite(algorithm, workers):
    def schedule(progress):
        return 1e-3 if progress > 0.5 else float("nan")

    model = algorithm("MlpPolicy", make_env(3), learning_rate=schedule, **workers)
    with pytest.raises(ValueError, match=r"learning_rate must be a finite number .*, got nan"):
        model.learn(1000)


def test_overlapping_trainings_restore_torchs_threads(algorithm):
    """The one that ends first restores its own thread's number."""
    n_threads = th.get_num_threads()
    goes_on = threading.Event()
    has_begun = threading.Event()
    seen = []

    def train():
        def wait(locals_, globals_):
            has_begun.set()
            return goes_on.wait(DEADLINE)

        before = th.get_num_threads()
        algorithm("MlpPolicy", make_env(2), n_workers=2).learn(20, callback=wait)
        seen.append((before, th.get_num_threads()))

    other = threading.Thread(target=train)

    def start_the_other(locals_, globals_):
        if not other.is_alive() and not has_begun.is_set():
            other.start()
            assert has_begun.wait(DEADLINE)
        return True

    algorithm("MlpPolicy", make_env(2), n_workers=2).learn(20, callback=start_the_other)
    assert th.get_num_threads() == n_threads
    goes_on.set()
    other.join()
    assert seen[0][1] == n_threads


def test_many_lanes_opened_and_closed():
    process = psutil.Process()
    threads, memory = set(threading.enumerate()), []
    for _ in range(3):
        env = make_env(128)
        AsyncOneStepQ("MlpPolicy", env, n_workers=128).learn(128)
        env.close()
        wait_until(lambda: set(threading.enumerate()) <= threads)
        memory.append(process.memory_info().rss)
    # One network has half a megabyte
    assert memory[-1] - memory[1] < 50e6


def learn_in_a_child(connection):
    connection.send(AsyncOneStepQ("MlpPolicy", make_env(4), n_workers=2).learn(40).num_timesteps)


def test_learning_in_a_spawned_child():
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=learn_in_a_child, args=(sender,))
    child.start()
    assert receiver.poll(DEADLINE) and receiver.recv() == 40
    child.join(DEADLINE)
    assert child.exitcode == 0


@with_workers
def test_an_observation_that_changes_its_size(algorithm, workers, tmp_path):
    class Growing(RandomWalkEnv):
        has_grown = False

        def step(self, action):
            obs, reward, terminated, *rest = super().step(action)
            # The terminal observation of a terminated episode is not used
            if self.n_steps >= 3 and not terminated and not self.has_grown:
                self.has_grown = True
                obs = np.append(obs, 0.0)
            return obs, reward, terminated, *rest

    model = algorithm("MlpPolicy", with_one(Growing), **workers)
    with pytest.raises(ValueError, match="could not broadcast input array from shape") as caught:
        model.learn(10**6)
    assert caught.value.__notes__ == ["Raised in env lane 1."]
    assert_goes_on(model, tmp_path)


def test_an_env_that_raises_when_it_is_closed(tmp_path):
    class NeverClosed(RandomWalkEnv):
        def close(self):
            raise ZeroDivisionError("can't be closed")

    model = AsyncOneStepQ("MlpPolicy", make_env(3, NeverClosed), n_workers=3).learn(60)
    with pytest.raises(ZeroDivisionError, match="can't be closed"):
        model.get_env().close()
    assert_goes_on(model, tmp_path)
