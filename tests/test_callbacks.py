"""SB3's callbacks, unchanged: what they count, what they see, what they save."""

import io
import sys
import threading

import numpy as np
import pytest
from stable_baselines3 import A2C, DQN
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    CheckpointCallback,
    ConvertCallback,
    EvalCallback,
    EveryNTimesteps,
    ProgressBarCallback,
    StopTrainingOnMaxEpisodes,
    StopTrainingOnNoModelImprovement,
    StopTrainingOnRewardThreshold,
)
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecNormalize

from sb3_async1step import AsyncOneStepQ
from sb3_async1step.workers.thread_pool import ThreadWorkerPool
from tests.envs import RandomWalkEnv, make_env
from tests.helpers import are_equal, weights_of

BACKENDS = ["threads", "serial"]


class Recorder(BaseCallback):
    """The tape of all calls."""

    def __init__(self):
        super().__init__()
        self.tape = []

    def _on_training_start(self):
        self.tape.append("training_start")

    def _on_rollout_start(self):
        self.tape.append("rollout_start")

    def _on_step(self):
        self.tape.append(self.num_timesteps)
        return True

    def _on_rollout_end(self):
        self.tape.append("rollout_end")

    def _on_training_end(self):
        self.tape.append("training_end")


@pytest.mark.parametrize("backend", BACKENDS)
def test_order_of_calls(algorithm, backend):
    """That of SB3's A2C."""
    recorder = Recorder()
    model = algorithm("MlpPolicy", make_env(4), n_workers=2, update_interval=3, backend=backend)
    model.learn(20, callback=recorder)
    assert recorder.tape == [
        "training_start", "rollout_start", 4, 8, 12, "rollout_end", "rollout_start", 16, 20, "rollout_end",
        "training_end",
    ]  # fmt: skip


@pytest.mark.parametrize(("n_steps", "stop_at"), [(24, None), (24, 8), (24, 12), (12, None), (0, None)])
def test_calls_are_a2cs(algorithm, n_steps, stop_at):
    """Also if the last rollout is complete, if a callback stops the training, and if there is nothing to learn."""

    def record(algorithm, **kwargs):
        recorder = Recorder()
        stop = ConvertCallback(lambda locals_, globals_: locals_["self"].num_timesteps != stop_at)
        algorithm("MlpPolicy", make_env(4), **kwargs).learn(n_steps, callback=[recorder, stop])
        return recorder.tape

    assert record(algorithm, n_workers=1, update_interval=3) == record(A2C, n_steps=3)


def test_locals_and_arguments_are_sb3s(algorithm):
    seen = []
    env = make_env(4)
    model = algorithm("MlpPolicy", env, n_workers=2)
    model.learn(8, callback=lambda locals_, globals_: seen.append(locals_) or True)
    assert all(locals_["env"] is env and locals_["clipped_actions"] is locals_["actions"] for locals_ in seen)

    class AtStart(BaseCallback):
        def _on_training_start(self):
            seen.append(self.locals["tb_log_name"])

        def _on_step(self):
            return True

    model.learn(8, callback=AtStart())
    assert seen[-1] == algorithm.__name__


def test_training_start_is_early_enough_for_settings(algorithm):
    """Workers are made afterwards, and numbers that the constructor refuses are refused."""

    class Set(BaseCallback):
        def __init__(self, **settings):
            super().__init__()
            self.settings = settings

        def _on_training_start(self):
            for name, value in self.settings.items():
                setattr(self.model, name, value)

        def _on_rollout_start(self):
            pool, _ = self.model.get_workers()
            self.workers = pool.workers

        def _on_step(self):
            return True

    callback = Set(n_workers=4, gamma=0.5, update_interval=7)
    model = algorithm("MlpPolicy", make_env(4), n_workers=1).learn(8, callback=callback)
    seen = [(worker.n_lanes, worker.settings.gamma, worker.settings.update_interval) for worker in callback.workers]
    assert seen == [(1, 0.5, 7)] * 4
    with pytest.raises(ValueError, match="gamma must be in"):
        model.learn(8, callback=Set(gamma=7.0))
    model.gamma, model.n_workers = 0.5, "many"
    with pytest.raises(ValueError, match="n_workers"):
        model.learn(8)


def test_epsilons_set_at_training_start():
    class Set(BaseCallback):
        epsilons = ()

        def _on_training_start(self):
            self.model.exploration_initial_eps = self.model.exploration_final_eps = 0.3
            self.model.exploration_final_probs = [1.0]

        def _on_step(self):
            pool, _ = self.model.get_workers()
            self.epsilons = pool.workers[0].settings.exploration(1.0)
            return True

    callback = Set()
    model = AsyncOneStepQ("MlpPolicy", make_env(4), n_workers=1).learn(40, callback=callback)
    assert np.array_equal(callback.epsilons, [0.3] * 4) and model.exploration_rate == pytest.approx(0.3)


def test_the_training_env_is_free_when_the_training_ends(algorithm):
    class Evaluate(BaseCallback):
        mean = None

        def _on_training_end(self):
            self.mean, _ = evaluate_policy(self.model, self.training_env, n_eval_episodes=4, warn=False)

        def _on_step(self):
            return True

    callback = Evaluate()
    algorithm("MlpPolicy", make_env(4), n_workers=2).learn(40, callback=callback)
    assert callback.mean is not None


@pytest.mark.parametrize("n_envs", [1, 4])
def test_num_timesteps_are_dqns(n_envs):
    """Callbacks that act every n calls act at the same timesteps as with DQN."""

    def act(algorithm, **kwargs):
        inner = Recorder()
        seen = []
        callback = [EveryNTimesteps(50, inner), ConvertCallback(lambda locals_, globals_: seen.append(1) or True)]
        model = algorithm("MlpPolicy", make_env(n_envs), **kwargs).learn(301, callback=callback)
        return [entry for entry in inner.tape if isinstance(entry, int)], len(seen), model.num_timesteps

    assert act(AsyncOneStepQ) == act(DQN, learning_starts=1000, train_freq=1)


def test_locals_are_the_transitions_of_this_call(algorithm):
    """What a callback sees adds up to what the envs did."""

    class Sum(BaseCallback):
        rewards, n_dones, episodes = 0.0, 0, 0

        def _on_step(self):
            self.rewards += float(self.locals["rewards"].sum())
            self.n_dones += int(self.locals["dones"].sum())
            self.episodes += sum("episode" in info for info in self.locals["infos"])
            assert self.locals["self"] is self.model
            assert self.locals["new_obs"].shape == (4, 4)
            return True

    class SummingEnv(RandomWalkEnv):
        total = 0.0

        def step(self, action):
            result = super().step(action)
            self.total += np.float32(result[1])
            return result

    env, callback = make_env(4, SummingEnv), Sum()
    model = algorithm("MlpPolicy", env, n_workers=4).learn(1000, callback=callback)
    assert callback.rewards == pytest.approx(sum(env.get_attr("total")), rel=1e-5)
    n_ended = sum(e.unwrapped.tape.count("reset") - 1 for e in env.envs)
    assert callback.n_dones == callback.episodes == model._episode_num == n_ended


def test_eval_callback_saves_the_model_that_it_evaluated(algorithm, tmp_path, monkeypatch):
    """Also when the workers would go on learning between the evaluation and the save."""
    evaluated = {}

    def predict(model, *args, **kwargs):
        evaluated[callback.num_timesteps] = weights_of(model)
        return predict_of_algorithm(model, *args, **kwargs)

    predict_of_algorithm = algorithm.predict
    monkeypatch.setattr(algorithm, "predict", predict)
    callback = EvalCallback(
        make_env(1), eval_freq=100, n_eval_episodes=3, best_model_save_path=str(tmp_path), log_path=str(tmp_path),
        verbose=0,
    )  # fmt: skip
    model = algorithm("MlpPolicy", make_env(4), n_workers=4, learning_rate=0.01, seed=0)
    model.learn(1600, callback=callback)
    results = np.load(tmp_path / "evaluations.npz")
    assert results["timesteps"].tolist() == list(evaluated) == list(range(400, 1601, 400))
    means = results["results"].mean(axis=1)
    assert callback.best_mean_reward == means.max()
    best = algorithm.load(tmp_path / "best_model")
    seen = evaluated[results["timesteps"][means.argmax()]]
    assert are_equal(weights_of(best), seen)
    assert not are_equal(weights_of(model), evaluated[400])


def test_weights_stand_still_while_a_callback_predicts(algorithm):
    class Look(BaseCallback):
        def _on_step(self):
            self.model.predict(np.zeros(4, np.float32), deterministic=True)
            before = weights_of(self.model)
            for _ in range(3):
                self.model.predict(np.zeros((500, 4), np.float32), deterministic=True)
            assert are_equal(before, weights_of(self.model))
            return True

    algorithm("MlpPolicy", make_env(4), n_workers=4, update_interval=1).learn(400, callback=Look())


def test_checkpoints(algorithm, tmp_path):
    model = algorithm("MlpPolicy", make_env(2), n_workers=2)
    model.learn(300, callback=CheckpointCallback(50, str(tmp_path), "model"))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "model_100_steps.zip", "model_200_steps.zip", "model_300_steps.zip",
    ]  # fmt: skip
    loaded = algorithm.load(tmp_path / "model_200_steps", env=make_env(2))
    assert loaded.num_timesteps == 200
    assert loaded.learn(100, reset_num_timesteps=False).num_timesteps == 300


def test_checkpoint_of_vec_normalize(tmp_path):
    env = VecNormalize(make_env(4))
    AsyncOneStepQ("MlpPolicy", env, n_workers=2).learn(
        400, callback=CheckpointCallback(50, str(tmp_path), save_vecnormalize=True)
    )
    loaded = VecNormalize.load(str(tmp_path / "rl_model_vecnormalize_400_steps.pkl"), make_env(4))
    # The first observations of each lane count, too
    assert loaded.obs_rms.count == pytest.approx(env.obs_rms.count) == pytest.approx(404, abs=1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_stop_on_reward_threshold(algorithm, backend):
    stop = StopTrainingOnRewardThreshold(reward_threshold=-1000.0)
    callback = EvalCallback(make_env(1), callback_on_new_best=stop, eval_freq=25, n_eval_episodes=1, verbose=0)
    model = algorithm("MlpPolicy", make_env(4), n_workers=2, backend=backend).learn(10_000, callback=callback)
    assert model.num_timesteps == 100


def test_stop_on_no_model_improvement():
    stop = StopTrainingOnNoModelImprovement(max_no_improvement_evals=1, min_evals=1)
    callback = EvalCallback(make_env(1), callback_after_eval=stop, eval_freq=10, n_eval_episodes=1, verbose=0)
    model = AsyncOneStepQ("MlpPolicy", make_env(4), n_workers=2, learning_rate=0.0)
    assert model.learn(100_000, callback=callback).num_timesteps < 100_000


@pytest.mark.parametrize("backend", BACKENDS)
def test_stop_on_max_episodes(algorithm, backend):
    callback = StopTrainingOnMaxEpisodes(max_episodes=5)
    model = algorithm("MlpPolicy", make_env(2), n_workers=2, backend=backend).learn(10_000, callback=callback)
    # per env, as with any SB3 algorithm
    assert callback.n_episodes >= 10
    assert callback.n_episodes - 2 < 10
    assert model.num_timesteps < 500


def test_a_plain_function_stops_the_training(algorithm):
    def stop_at_80(locals_, globals_):
        return locals_["self"].num_timesteps < 80

    assert algorithm("MlpPolicy", make_env(4), n_workers=4).learn(10_000, callback=stop_at_80).num_timesteps == 80


def test_progress_bar_shows_all_steps(algorithm, monkeypatch):
    bars = []
    monkeypatch.setattr(sys, "stdout", io.StringIO())

    class Keep(ProgressBarCallback):
        def _on_training_end(self):
            bars.append((self.pbar.n, self.pbar.total))
            super()._on_training_end()

    algorithm("MlpPolicy", make_env(4), n_workers=2).learn(400, callback=CallbackList([Keep()]))
    assert bars == [(400, 400)]


def test_nested_learning_in_a_callback(algorithm):
    """A callback may train and evaluate another model meanwhile."""

    class TrainAnother(BaseCallback):
        def _on_step(self):
            if self.n_calls == 10:
                other = algorithm("MlpPolicy", make_env(2), n_workers=2).learn(100)
                self.result = evaluate_policy(other, make_env(1), n_eval_episodes=2)
            return True

    callback = TrainAnother()
    assert algorithm("MlpPolicy", make_env(4), n_workers=2).learn(200, callback=callback).num_timesteps == 200
    assert np.isfinite(callback.result).all()


def test_a_learning_rate_that_falls_to_zero_falls_no_further(algorithm):
    """The last vector step exceeds the number of steps."""
    model = algorithm("MlpPolicy", make_env(4), learning_rate=lambda progress: 0.1 * progress, n_workers=1, seed=0)
    rates = []
    model.learn(
        10, callback=lambda locals_, globals_: rates.append(model.policy.optimizer.param_groups[0]["lr"]) or True
    )
    assert model.num_timesteps == 12
    assert rates == pytest.approx([0.1, 0.06, 0.02])
    assert model.policy.optimizer.param_groups[0]["lr"] == 0.0


def test_workers_are_two_batches_ahead_at_most(algorithm, monkeypatch):
    """The calling thread takes a batch when the workers wait for it."""

    def look_late(pool):
        is_late = not pool._may_step() and len(pool._waiting_since) == 2
        return has_news(pool) and (is_late or threading.current_thread() is not threading.main_thread())

    has_news = ThreadWorkerPool._has_news
    monkeypatch.setattr(ThreadWorkerPool, "_has_news", look_late)
    env = make_env(4)
    model = algorithm("MlpPolicy", env, n_workers=2)
    model.learn(10**6, callback=lambda *_: model.num_timesteps < 20)
    n_steps = sum(len(lane.unwrapped.tape) - lane.unwrapped.tape.count("reset") for lane in env.envs)
    assert model.num_timesteps == 20 < n_steps <= 20 + 2 * 4
