"""EvalCallback's results, each at the step of its snapshot, while the training goes on."""

import json
import re
import shlex
import sys
import threading
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch as th
from stable_baselines3 import DQN, PPO, SAC
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    EvalCallback,
    EveryNTimesteps,
    StopTrainingOnNoModelImprovement,
    StopTrainingOnRewardThreshold,
)
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize

from sb3_async1step import A3C, AsyncOneStepQ, BackgroundEvalCallback
from sb3_async1step.callbacks import background_eval
from sb3_async1step.common.snapshot import Snapshot
from sb3_async1step.registry import ALGORITHMS
from tests.command_line import call_zoo, run_code_afresh
from tests.envs import BlockingEnv, BoxWalkEnv, RaisingEnv, RandomWalkEnv, Speechless, make_env
from tests.helpers import DEADLINE, FOREVER, are_equal, functions_of, meanwhile, press_ctrl_c, wait_until, weights_of

#: By their names, all algorithms that the tests evaluate, and arguments with which they learn in few steps
ARGUMENTS = {
    **{entry.model_class: {"n_workers": 1} for entry in ALGORITHMS.values()},
    DQN: {"buffer_size": 100, "learning_starts": 4, "train_freq": 1},
    PPO: {"n_steps": 8, "batch_size": 8, "n_epochs": 1},
}
with_algorithms = pytest.mark.parametrize("any_algorithm", ARGUMENTS, ids=lambda algorithm: algorithm.__name__)
with_ours_and_sb3s = pytest.mark.parametrize("any_algorithm", [AsyncOneStepQ, DQN], ids=["AsyncOneStepQ", "DQN"])


def make_model(algorithm, env=None, **kwargs):
    env = make_env(2) if env is None else env
    policy_kwargs = {"net_arch": [8]}
    return algorithm(
        "MlpPolicy", env, seed=0, learning_rate=0.02, policy_kwargs=policy_kwargs, **ARGUMENTS[algorithm], **kwargs
    )


def evaluations():
    """The threads that evaluate."""
    return [thread for thread in threading.enumerate() if thread.name == "evaluation"]


@pytest.fixture(autouse=True)
def no_evaluation_left() -> Iterator[None]:
    yield
    wait_until(lambda: not evaluations())


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine may need long for the current step of an evaluation."""
    monkeypatch.setattr(background_eval, "EVALUATION_END_TIMEOUT", DEADLINE)


class ScoreEnv(RandomWalkEnv):
    """Nothing in it is random: the same policy has the same score. Every second episode is a success."""

    n_resets = 0

    def reset(self, **kwargs):
        super().reset(**kwargs)
        self.n_resets += 1
        self.state = np.full(4, 0.1 * (self.n_resets % 2))
        return self.state.astype(np.float32), {}

    def step(self, action):
        self.n_steps += 1
        push = np.zeros(4)
        push[action] = 0.5 * (1 + action)
        self.state = np.tanh(np.roll(self.state, 1) + push)
        done = self.n_steps == 7
        return self.state.astype(np.float32), float(self.state[0]), done, False, {"is_success": self.n_resets % 2 == 0}


class EndlessEnv(RandomWalkEnv):
    """Its episodes never end."""

    def __init__(self):
        super().__init__(max_steps=10**9, p_terminate=0.0)


def let_episodes_end(env):
    for lane in env.envs:
        lane.unwrapped.max_steps = 5


class Do(BaseCallback):
    """
    :param function: called at each step with the number of calls; ends the training by returning False
    """

    def __init__(self, function: Callable[[int], object]) -> None:
        super().__init__()
        self.function = function

    def _on_step(self):
        return self.function(self.n_calls) is not False


def wait_for_evaluation(n_calls=0):
    wait_until(lambda: not evaluations())


class Tape(KVWriter):
    """Keeps what is written to the log."""

    def __init__(self):
        self.written = []

    def write(self, key_values, key_excluded, step=0):
        self.written.append((step, dict(key_values), dict(key_excluded)))

    def close(self):
        pass


def read(path):
    with np.load(path) as results:
        return {name: results[name].tolist() for name in results.files}


def read_model(path):
    """What is in the file of a model, but for tensors of the workers: their pickles hold addresses."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    attributes = json.loads(members.pop("data"))
    attributes.pop("_worker_states", None)
    return members, attributes


# ---------------------------------------------------------------------- what EvalCallback does


@with_algorithms
def test_files_and_logs_are_those_of_eval_callback(any_algorithm, tmp_path):
    def train(callback_class):
        folder = tmp_path / callback_class.__name__
        callback = callback_class(
            make_env(2, ScoreEnv), eval_freq=5, log_path=str(folder), best_model_save_path=str(folder / "best"),
            n_eval_episodes=4, verbose=0,
        )  # fmt: skip
        model = make_model(any_algorithm)
        tape = Tape()
        model.set_logger(Logger(None, [tape]))
        model.learn(48, callback=[callback, Do(wait_for_evaluation)], log_interval=None)
        logged = [
            ({key: value for key, value in values.items() if key[:5] == "eval/" or "steps" in key}, step)
            for step, values, _ in tape.written
        ]
        bests = callback.best_mean_reward, callback.last_mean_reward
        return model, read(folder / "evaluations.npz"), logged, bests, any_algorithm.load(folder / "best/best_model")

    model, results, logged, bests, best_model = train(BackgroundEvalCallback)
    expected = train(EvalCallback)
    assert results == expected[1]
    assert results["timesteps"] == [10, 20, 30, 40]
    assert len({tuple(rewards) for rewards in results["results"]}) > 1
    assert logged == expected[2]
    assert len(logged) == 4
    assert bests == expected[3]
    assert best_model.num_timesteps == expected[4].num_timesteps
    assert are_equal(weights_of(best_model), weights_of(expected[4]))
    # Nor has the training noticed
    assert are_equal(weights_of(model), weights_of(expected[0]))


@with_algorithms
def test_the_best_model_is_what_save_wrote_at_that_step(any_algorithm, tmp_path):
    def save(n_calls):
        if n_calls == 8:
            model.save(tmp_path / "then")

    model = make_model(any_algorithm)
    callback = BackgroundEvalCallback(
        make_env(1, ScoreEnv), eval_freq=8, n_eval_episodes=1, best_model_save_path=str(tmp_path), verbose=0
    )
    model.learn(30, callback=[callback, Do(save)])
    assert read_model(tmp_path / "best_model.zip") == read_model(tmp_path / "then.zip")
    best = any_algorithm.load(tmp_path / "best_model", env=make_env(2))
    assert best.num_timesteps == 16
    assert best.learn(16, reset_num_timesteps=False).num_timesteps == 32


def test_verbose_prints_what_eval_callback_does(capsys):
    printed = []
    for callback_class in (EvalCallback, BackgroundEvalCallback):
        callback = callback_class(make_env(1, ScoreEnv), eval_freq=5, verbose=1)
        make_model(AsyncOneStepQ).learn(30, callback=[callback, Do(wait_for_evaluation)], log_interval=None)
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] and "Success rate" in printed[0]


@with_ours_and_sb3s
def test_each_result_is_logged_at_its_step_and_the_trainings_records_stay(any_algorithm):
    def record(n_calls):
        model.logger.record("mine/n_calls", n_calls)
        model.logger.record_mean("mine/mean", n_calls)
        wait_for_evaluation()

    model, tape = make_model(any_algorithm), Tape()
    model.set_logger(Logger(None, [tape]))
    callback = BackgroundEvalCallback(make_env(1, ScoreEnv), eval_freq=5, n_eval_episodes=2, verbose=0)
    model.learn(20, callback=[callback, Do(record)], log_interval=None)
    assert [step for step, _, _ in tape.written] == [10, 20]
    for step, values, excluded in tape.written:
        assert set(values) == {"eval/mean_reward", "eval/mean_ep_length", "eval/success_rate", "time/total_timesteps"}
        assert (values["eval/mean_ep_length"], values["eval/success_rate"]) == (7.0, 0.5)
        assert (values["time/total_timesteps"], excluded["time/total_timesteps"]) == (step, ("tensorboard",))
    assert model.logger.name_to_value["mine/n_calls"] == 10
    assert model.logger.name_to_value["mine/mean"] == 5.5
    assert model.logger.name_to_count["mine/mean"] == 10


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model = make_model(AsyncOneStepQ, tensorboard_log=str(tmp_path))
    callback = BackgroundEvalCallback(make_env(1, ScoreEnv), eval_freq=100, verbose=0)
    # Other logs have been written when the results arrive
    model.learn(800, callback=[callback, Do(lambda n_calls: n_calls % 50 or wait_for_evaluation())], log_interval=1)
    accumulator = EventAccumulator(str(next(tmp_path.iterdir())))
    accumulator.Reload()
    scalars = accumulator.Scalars("eval/mean_reward")
    assert [scalar.step for scalar in scalars] == [200, 400, 600, 800]
    assert scalars[-1].value == pytest.approx(callback.last_mean_reward)


@with_ours_and_sb3s
def test_stop_on_reward_threshold(any_algorithm):
    stop = StopTrainingOnRewardThreshold(reward_threshold=-1000.0)
    callback = BackgroundEvalCallback(
        make_env(1, ScoreEnv), callback_on_new_best=stop, eval_freq=5, n_eval_episodes=1, verbose=0
    )
    model = make_model(any_algorithm).learn(10**6, callback=[callback, Do(wait_for_evaluation)])
    # One step after the evaluation has ended; none has begun in that step
    assert (model.num_timesteps, callback.n_calls) == (12, 6)
    assert np.isfinite(callback.best_mean_reward)


@with_ours_and_sb3s
def test_stop_on_no_model_improvement(any_algorithm):
    stop = StopTrainingOnNoModelImprovement(max_no_improvement_evals=2)
    callback = BackgroundEvalCallback(make_env(1, ScoreEnv), callback_after_eval=stop, eval_freq=5, verbose=0)
    model = make_model(any_algorithm)
    model.learning_rate = model.lr_schedule = lambda progress: 0.0
    model.learn(10**6, callback=[callback, Do(wait_for_evaluation)])
    # The first is the best so far, the next three are not better
    assert callback.n_calls == 4 * 5 + 1


def test_callbacks_are_called_on_the_calling_thread():
    calls = []

    class Note(BaseCallback):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def _on_step(self):
            calls.append((self.name, self.n_calls, self.num_timesteps, self.parent.last_mean_reward))
            assert threading.current_thread() is threading.main_thread()
            assert self.model is model and self.parent.model is model
            return True

    env = make_env(1, ScoreEnv)
    callback = BackgroundEvalCallback(env, Note("best"), Note("after"), n_eval_episodes=1, eval_freq=5, verbose=0)
    model = make_model(AsyncOneStepQ)
    model.learn(22, callback=[callback, Do(wait_for_evaluation)])
    first, *_, last = calls
    assert first[:3] == ("best", 1, 12)
    assert [call[:3] for call in calls if call[0] == "after"] == [("after", 1, 12), ("after", 2, 22)]
    assert last[3] == callback.last_mean_reward


# ---------------------------------------------------------------------- beside the training


@with_algorithms
def test_the_training_goes_on_meanwhile(any_algorithm, tmp_path, capsys):
    """Evaluations that are due meanwhile are skipped; the snapshot plays, not the model."""
    release = threading.Event()
    eval_env = make_env(1, BlockingEnv, release=release, where="step")

    def follow(n_calls):
        if n_calls == 2:
            wait_until(eval_env.envs[0].unwrapped.hangs.is_set)
        if n_calls == 9:
            assert evaluations()
            release.set()
        if n_calls >= 9:
            wait_for_evaluation()

    model = make_model(any_algorithm)
    callback = BackgroundEvalCallback(eval_env, eval_freq=2, n_eval_episodes=1, log_path=str(tmp_path), verbose=2)
    model.learn(32, callback=[callback, Do(follow)], log_interval=None)
    assert read(tmp_path / "evaluations.npz")["timesteps"] == [4, 20, 24, 28, 32]
    skipped = [line for line in capsys.readouterr().out.splitlines() if "skipped" in line]
    assert skipped == [
        f"Eval num_timesteps={n} is skipped, since another one is running" for n in (8, 12, 16)
    ]  # fmt: skip


@with_algorithms
def test_a_snapshot_plays_as_the_model_did(any_algorithm):
    model = make_model(any_algorithm).learn(16)
    snapshot = Snapshot(model, with_file=False)
    observations = np.random.default_rng(0).normal(size=(500, 4)).astype(np.float32)

    def predict(player, deterministic):
        np.random.seed(0)
        th.manual_seed(0)
        return player.predict(observations, deterministic=deterministic)[0].tolist()

    before = [predict(model, deterministic) for deterministic in (True, False)]
    assert [predict(snapshot, deterministic) for deterministic in (True, False)] == before
    model.learn(400)
    assert [predict(model, deterministic) for deterministic in (True, False)] != before
    np.testing.assert_equal([predict(snapshot, deterministic) for deterministic in (True, False)], before)


@pytest.mark.parametrize("n_workers", [1, 2])
def test_a_snapshot_is_of_one_moment(algorithm, n_workers):
    """Workers on threads finish their steps before it is made; then all of it stands still."""
    sizes = []

    def look(n_calls):
        snapshot = Snapshot(model, with_file=False)
        assert are_equal(weights_of(snapshot._player), weights_of(model))
        assert snapshot.num_timesteps == model.num_timesteps
        sizes.append(n_calls)

    # As the callback does before
    settle = Do(lambda n_calls: model.get_vec_normalize_env())
    model = algorithm("MlpPolicy", make_env(4), n_workers=n_workers, update_interval=1, learning_rate=0.05)
    model.learn(400, callback=[settle, Do(look)])
    assert len(sizes) == 100


def test_the_players_networks_are_its_own():
    """Also those that the model has as attributes, and BatchNorm's statistics; and no optimizer is copied."""
    model = make_model(DQN)
    player = Snapshot(model, with_file=False)._player
    assert player.q_net is player.policy.q_net and player.q_net is not model.q_net
    assert player.policy.optimizer is None and model.policy.optimizer is not None
    model.policy.q_net.register_buffer("statistics", th.zeros(3))
    player = Snapshot(model, with_file=False)._player
    model.policy.q_net.statistics += 1
    assert player.q_net.statistics.tolist() == [0.0] * 3


@pytest.mark.parametrize("algorithm_class", [SAC, PPO, A3C])
def test_state_dependent_noise(algorithm_class):
    """The policy keeps tensors that can't be copied deeply, and its distribution is not shared."""
    arguments = {SAC: {"learning_starts": 4}, PPO: {"n_steps": 8, "batch_size": 8}, A3C: {"n_workers": 1}}
    env = make_env(2, BoxWalkEnv)
    model = algorithm_class("MlpPolicy", env, use_sde=True, seed=0, **arguments[algorithm_class]).learn(20)
    player = Snapshot(model, with_file=False)._player
    one, other = (getattr(policy, "actor", policy).action_dist for policy in (model.policy, player.policy))
    assert type(one) is type(other) and one is not other
    callback = BackgroundEvalCallback(
        make_env(1, BoxWalkEnv), eval_freq=5, n_eval_episodes=1, deterministic=False, verbose=0
    )
    model.learn(20, callback=[callback, Do(wait_for_evaluation)])
    assert np.isfinite(callback.last_mean_reward)


@with_ours_and_sb3s
def test_statistics_of_vec_normalize_are_those_of_the_snapshot(any_algorithm):
    release = threading.Event()
    env = VecNormalize(make_env(2))
    lanes = make_env(1, BlockingEnv, release=release, where="step")
    eval_env = VecNormalize(lanes, training=False)
    seen = {}

    def follow(n_calls):
        if n_calls == 5:
            model.get_vec_normalize_env()
            seen.update(then=(env.obs_rms.mean.tolist(), env.obs_rms.count))
            wait_until(lanes.envs[0].unwrapped.hangs.is_set)
        if n_calls == 14:
            assert env.obs_rms.count > seen["then"][1]
            assert (eval_env.obs_rms.mean.tolist(), eval_env.obs_rms.count) == seen["then"]
            release.set()

    model = make_model(any_algorithm, env)
    callback = BackgroundEvalCallback(eval_env, eval_freq=5, n_eval_episodes=1, verbose=0)
    model.learn(28, callback=[callback, Do(follow)])


@pytest.mark.parametrize("vec_env", ["training", "evaluation", "both"])
def test_processes(vec_env, tmp_path):
    def make(*env_classes, in_processes):
        functions = [lambda env_class=env_class: Monitor(env_class()) for env_class in env_classes]
        return SubprocVecEnv(functions, start_method="fork") if in_processes else DummyVecEnv(functions)

    env = make(RandomWalkEnv, RandomWalkEnv, in_processes=vec_env != "evaluation")
    eval_env = make(ScoreEnv, ScoreEnv, in_processes=vec_env != "training")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Training and eval env are not of the same type")
        callback = BackgroundEvalCallback(
            eval_env, eval_freq=10, n_eval_episodes=2, best_model_save_path=str(tmp_path), verbose=0
        )
        model = AsyncOneStepQ("MlpPolicy", env, n_workers=2)
        model.learn(60, callback=[callback, Do(wait_for_evaluation)])
    assert np.isfinite(callback.last_mean_reward)
    assert AsyncOneStepQ.load(tmp_path / "best_model").num_timesteps in (20, 40, 60)
    env.close()
    eval_env.close()


@with_ours_and_sb3s
def test_the_last_evaluation_is_finished_at_the_end(any_algorithm, tmp_path):
    release = threading.Event()
    calls = []

    def release_at_the_end():
        wait_until(lambda: "_on_training_end" in functions_of(threading.main_thread()))
        assert not (tmp_path / "evaluations.npz").exists()
        release.set()

    callback = BackgroundEvalCallback(
        make_env(1, BlockingEnv, release=release, where="step"), callback_after_eval=Do(calls.append), eval_freq=4,
        n_eval_episodes=1, log_path=str(tmp_path), best_model_save_path=str(tmp_path), verbose=0,
    )  # fmt: skip
    model = make_model(any_algorithm)
    with meanwhile(release_at_the_end):
        model.learn(16, callback=callback)
    assert read(tmp_path / "evaluations.npz")["timesteps"] == [8]
    assert calls == [1]
    assert any_algorithm.load(tmp_path / "best_model").num_timesteps == 8
    assert not evaluations()


def test_a_second_training_goes_on_with_the_results(tmp_path):
    model = make_model(AsyncOneStepQ)
    callback = BackgroundEvalCallback(make_env(1, ScoreEnv), eval_freq=10, log_path=str(tmp_path), verbose=0)
    for reset_num_timesteps in (True, False):
        model.learn(20, callback=callback, reset_num_timesteps=reset_num_timesteps)
    assert read(tmp_path / "evaluations.npz")["timesteps"] == [20, 40]


def test_no_evaluation_is_ever_due(tmp_path):
    callback = BackgroundEvalCallback(make_env(1, RaisingEnv, at_step=1), eval_freq=-1, verbose=0)
    make_model(AsyncOneStepQ).learn(20, callback=callback)


def test_in_the_zoo(tmp_path, monkeypatch):
    """What the page prints: the key ``callback`` of the hyperparameters names a function."""
    page = (Path(__file__).parent.parent / "docs" / "guide" / "zoo.md").read_text()
    (module,) = re.findall(r"```py\n(.*?)```", page, re.DOTALL)
    (command,) = re.findall(r"```shell\npython -m sb3_async1step.zoo (.*?)```", page, re.DOTALL)
    (tmp_path / "evaluation.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "evaluation", raising=False)
    words = ["sb3-async1step", *shlex.split(command.replace("1000", "20")), "n_envs:8", "-n", "1000"]
    code, output = call_zoo(words, tmp_path)
    assert code == 0, output
    timesteps = read(tmp_path / "logs" / "evaluations.npz")["timesteps"]
    assert timesteps[0] == 160 and set(timesteps) <= set(range(160, 1001, 160))
    assert (tmp_path / "logs" / "best_model.zip").exists()


# ---------------------------------------------------------------------- failures


@with_ours_and_sb3s
def test_an_exception_of_the_eval_env_is_raised_by_learn(any_algorithm):
    model = make_model(any_algorithm)
    callback = BackgroundEvalCallback(make_env(1, RaisingEnv, at_step=3), eval_freq=4, n_eval_episodes=5, verbose=0)
    with pytest.raises(ZeroDivisionError, match="the env is broken") as caught:
        model.learn(10**6, callback=[callback, Do(wait_for_evaluation)])
    assert model.num_timesteps == 10
    functions = [frame.name for frame in traceback.extract_tb(caught.tb)]
    assert functions[-1] == "step" and "learn" in functions and "evaluate_policy" in functions
    assert caught.value.__notes__ == ["Raised by the evaluation of the model as it was after 8 steps."]
    # Both go on
    model.learn(40, callback=callback, reset_num_timesteps=False)
    assert np.isfinite(callback.last_mean_reward)


@pytest.mark.parametrize("exception", [ZeroDivisionError, Speechless])
def test_an_exception_of_the_last_evaluation(exception):
    class Raising(RandomWalkEnv):
        def step(self, action):
            raise exception

    callback = BackgroundEvalCallback(make_env(1, Raising), eval_freq=10, verbose=0)
    with pytest.raises(exception):
        make_model(AsyncOneStepQ).learn(20, callback=callback)


def test_an_eval_env_that_is_bound_to_its_thread():
    class BoundEnv(RandomWalkEnv):
        thread = threading.current_thread()

        def step(self, action):
            if threading.current_thread() is not self.thread:
                raise RuntimeError("created in another thread")
            return super().step(action)

    callback = BackgroundEvalCallback(make_env(1, BoundEnv), eval_freq=10, verbose=0)
    with pytest.raises(RuntimeError, match="another thread") as caught:
        make_model(AsyncOneStepQ).learn(20, callback=callback)
    assert caught.value.__notes__[1:] == [
        "It was raised on the thread of an evaluation. If the env is bound to the thread that made it, use "
        "EvalCallback, or SubprocVecEnv, which gives each env a process."
    ]


@pytest.mark.parametrize("make_callback", [lambda c: [c], lambda c: CallbackList([CallbackList([c])]),
                                           lambda c: EveryNTimesteps(2, c)])  # fmt: skip
def test_nothing_is_left_when_a_training_of_ours_has_failed(algorithm, make_callback):
    """Evaluations end before ``learn()`` raises, so that the evaluation env is free."""
    eval_env = make_env(2, EndlessEnv)
    callback = BackgroundEvalCallback(eval_env, eval_freq=4, verbose=0)
    model = make_model(algorithm, make_env(2, RaisingEnv, at_step=50))
    with pytest.raises(ZeroDivisionError):
        model.learn(10**6, callback=make_callback(callback))
    assert not evaluations()
    assert callback.evaluations_timesteps == []
    let_episodes_end(eval_env)
    model.set_env(make_env(2))
    model.learn(20, callback=callback)
    assert np.isfinite(callback.last_mean_reward)


def test_the_next_training_abandons_what_a_failed_one_of_sb3s_has_left(tmp_path):
    eval_env = make_env(2, EndlessEnv)
    callback = BackgroundEvalCallback(eval_env, eval_freq=4, log_path=str(tmp_path), verbose=0)
    model = make_model(DQN, make_env(2, RaisingEnv, at_step=50))
    with pytest.raises(ZeroDivisionError):
        model.learn(10**6, callback=callback)
    assert len(evaluations()) == 1
    model.set_env(make_env(2))
    model.learn(8, callback=[callback, Do(lambda n_calls: let_episodes_end(eval_env))])
    # 49 calls in the first training, 3 in the second
    assert read(tmp_path / "evaluations.npz")["timesteps"] == [6]


def test_on_training_end_after_a_failure(tmp_path):
    """The Zoo calls it for the first callback, whatever has happened."""
    for any_algorithm in (AsyncOneStepQ, DQN):
        callback = BackgroundEvalCallback(
            make_env(1, ScoreEnv), eval_freq=2, log_path=str(tmp_path / any_algorithm.__name__), verbose=0
        )
        with pytest.raises(ZeroDivisionError):
            make_model(any_algorithm, make_env(2, RaisingEnv, at_step=50)).learn(10**6, callback=callback)
        callback.on_training_end()
        callback.on_training_end()
        assert not evaluations()


def test_an_evaluation_ends_when_the_thread_of_the_training_has():
    callback = BackgroundEvalCallback(make_env(2, EndlessEnv), eval_freq=4, verbose=0)
    model = make_model(DQN, make_env(2, RaisingEnv, at_step=50))

    def train():
        with pytest.raises(ZeroDivisionError):
            model.learn(10**6, callback=callback)

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    wait_for_evaluation()
    assert callback.evaluations_timesteps == []


def test_the_program_ends_when_a_training_has_failed(tmp_path):
    """Though Python waits for all threads, and the episodes would go on forever."""
    code = """
from stable_baselines3 import DQN
from sb3_async1step import BackgroundEvalCallback
from tests.envs import RaisingEnv, make_env
from tests.test_background_eval import EndlessEnv

callback = BackgroundEvalCallback(make_env(1, EndlessEnv), eval_freq=4, verbose=0)
DQN("MlpPolicy", make_env(2, RaisingEnv, at_step=50)).learn(10**6, callback=callback)
"""
    folder = str(Path(__file__).parent.parent)
    exit_code, output = run_code_afresh(f"import sys; sys.path.insert(0, {folder!r})\n{code}", tmp_path)
    assert exit_code == 1
    assert output.endswith("ZeroDivisionError: the env is broken\n")


def test_stop(tmp_path):
    """To wait for the step of an evaluation that nobody needs any more."""
    release = threading.Event()
    eval_env = make_env(1, BlockingEnv, release=release, where="step")
    # Without files, EvalCallback does not remember the steps of its evaluations
    callback = BackgroundEvalCallback(eval_env, eval_freq=4, log_path=str(tmp_path), verbose=0)
    callback.stop()
    with pytest.raises(ZeroDivisionError):
        make_model(DQN, make_env(2, RaisingEnv, at_step=50)).learn(10**6, callback=callback)
    wait_until(eval_env.envs[0].unwrapped.hangs.is_set)
    callback.stop(timeout=0.01)
    assert evaluations()
    release.set()
    callback.stop()
    assert not evaluations()
    assert callback.evaluations_timesteps == []


def test_a_hanging_evaluation_does_not_keep_an_exception(monkeypatch, tmp_path):
    monkeypatch.setattr(background_eval, "EVALUATION_END_TIMEOUT", 0.05)
    release = threading.Event()
    eval_env = make_env(1, BlockingEnv, release=release, where="step")

    def fail(n_calls):
        if n_calls == 10:
            wait_until(eval_env.envs[0].unwrapped.hangs.is_set)
            raise ZeroDivisionError

    callback = BackgroundEvalCallback(eval_env, eval_freq=4, n_eval_episodes=2, log_path=str(tmp_path), verbose=0)
    model = make_model(AsyncOneStepQ)
    with pytest.raises(ZeroDivisionError):
        model.learn(10**6, callback=[callback, Do(fail)])
    assert evaluations()
    # The next training waits for the env
    with meanwhile(lambda: (wait_until(lambda: "stop" in functions_of(threading.main_thread())), release.set())):
        model.learn(20, callback=callback)
    # Ten calls in the first training, ten in the second; the abandoned evaluation of step 8 is not among them
    assert callback.evaluations_timesteps[0] == 4 and set(callback.evaluations_timesteps) <= {4, 12, 20}


@with_ours_and_sb3s
def test_ctrl_c_at_the_end(any_algorithm):
    """While ``learn()`` waits for the last evaluation."""
    eval_env = make_env(1, EndlessEnv)
    callback = BackgroundEvalCallback(eval_env, eval_freq=4, verbose=0)
    model = make_model(any_algorithm)

    def interrupt():
        wait_until(lambda: functions_of(threading.main_thread())[:2] == ["wait", "_on_training_end"])
        press_ctrl_c()

    with meanwhile(interrupt), pytest.raises(KeyboardInterrupt):
        model.learn(16, callback=callback)
    assert not evaluations()
    let_episodes_end(eval_env)
    model.learn(16, callback=callback)
    assert np.isfinite(callback.last_mean_reward)


def test_ctrl_c_while_the_training_goes_on(algorithm):
    def interrupt(n_calls):
        if n_calls == 6:
            press_ctrl_c()
            time.sleep(FOREVER)

    callback = BackgroundEvalCallback(make_env(1, EndlessEnv), eval_freq=4, verbose=0)
    with pytest.raises(KeyboardInterrupt):
        make_model(algorithm).learn(16, callback=[callback, Do(interrupt)])
    assert not evaluations()


def test_results_of_an_evaluation_that_nobody_published_agree_with_the_files(tmp_path):
    """The training fails in the same step in which an evaluation has ended."""

    def fail(n_calls):
        if n_calls == 5:
            wait_for_evaluation()
            raise ZeroDivisionError

    callback = BackgroundEvalCallback(
        make_env(1, ScoreEnv), eval_freq=5, log_path=str(tmp_path), best_model_save_path=str(tmp_path), verbose=0
    )
    with pytest.raises(ZeroDivisionError):
        make_model(AsyncOneStepQ).learn(100, callback=[callback, Do(fail)])
    results = read(tmp_path / "evaluations.npz")
    assert results["timesteps"] == callback.evaluations_timesteps == [10]
    assert callback.best_mean_reward == callback.last_mean_reward == np.mean(results["results"])
    assert AsyncOneStepQ.load(tmp_path / "best_model").num_timesteps == 10


def test_wrappers_that_do_not_match():
    callback = BackgroundEvalCallback(make_env(1), eval_freq=5, verbose=0)
    with pytest.raises(AssertionError, match="expected the eval env to be a VecEnvWrapper"):
        make_model(AsyncOneStepQ, VecNormalize(make_env(2))).learn(20, callback=callback)


@with_ours_and_sb3s
@pytest.mark.parametrize("share", ["VecEnv", "wrapped", "lane"])
def test_the_training_env_is_refused(any_algorithm, share):
    env = make_env(2)
    eval_env = {"VecEnv": env, "wrapped": VecNormalize(env), "lane": env.envs[1].env}[share]
    with pytest.raises(ValueError, match="The evaluation env is the training env"):
        make_model(any_algorithm, env).learn(20, callback=BackgroundEvalCallback(eval_env))


@pytest.mark.parametrize("other", [EvalCallback, BackgroundEvalCallback])
@pytest.mark.parametrize("reverse", [False, True])
def test_two_callbacks_with_one_env(algorithm, other, reverse):
    """The first training fails before it has made a step, the second one, in which each has its own, does not."""
    model, eval_env = make_model(algorithm, make_env(2)), make_env(2)
    callbacks = [
        BackgroundEvalCallback(eval_env, eval_freq=10),
        other(VecNormalize(eval_env, norm_reward=False), eval_freq=10),
    ]
    with pytest.raises(ValueError, match=r"the same evaluation env.* give each an env of its own"):
        model.learn(40, callback=callbacks[::-1] if reverse else callbacks)
    assert model.num_timesteps == 0
    callbacks[1] = other(make_env(2), eval_freq=10)
    model.learn(40, callback=callbacks)
    assert model.num_timesteps == 40
