"""Files are whole or not there, and a loaded model goes on where the saved one was."""

import copy
import errno
import io
import threading
import zipfile

import numpy as np
import pytest
import torch as th
from stable_baselines3 import A2C, DQN
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_async1step import A3C, AsyncNStepQ, AsyncOneStepQ, AsyncOneStepSarsa
from sb3_async1step.common import live_algorithm, model_file
from sb3_async1step.value_based.algorithm import ValueBasedAlgorithm
from tests.envs import BoxWalkEnv, RandomWalkEnv, make_env
from tests.helpers import (
    CountingOptimizer,
    are_equal,
    count_additions,
    meanwhile,
    trained_parameters,
    wait_until,
    weights_of,
)


def state_of(model):
    """Everything that decides about the rest of a training."""
    return {
        "policy": model.policy.state_dict(),
        "optimizer": model.policy.optimizer.state_dict(),
        "counters": (model.num_timesteps, model._n_updates, model._episode_num),
        "exploration_rate": getattr(model, "exploration_rate", None),
        "generators": [generator.bit_generator.state for generator in model._random_generators],
        "last_obs": model._last_obs,
        "workers": model._worker_states,
        "returns": list(model.ep_info_buffer),
    }


def assert_equal(one, other):
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_equal(a, b)
    elif isinstance(one, (th.Tensor, np.ndarray)):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
    elif hasattr(one, "__dataclass_fields__"):
        assert_equal(vars(one), vars(other))
    else:
        assert one == other


class SaveAt(BaseCallback):
    """Saves model and envs at some call, and stops there if it is told to."""

    def __init__(self, at_call, envs, stops=False):
        super().__init__()
        self.at_call, self.envs, self.stops = at_call, envs, stops
        self.file = io.BytesIO()

    def _on_step(self):
        if self.n_calls == self.at_call:
            self.model.save(self.file)
            self.saved_envs = copy.deepcopy(self.envs)
            return not self.stops
        return True


IN_A_CALLBACK, AFTER_A_STOP, AFTER_LEARN = "in a callback", "after a callback stopped the training", "after learn()"


# None of the calls ends a rollout of 5 steps
@pytest.mark.parametrize(
    ("n_lanes", "n_workers", "at_call", "how"),
    [
        (1, 1, 37, IN_A_CALLBACK),
        (1, 1, 51, AFTER_LEARN),
        (3, 1, 37, AFTER_A_STOP),
        (3, 3, 1, IN_A_CALLBACK),
        (3, 3, 37, AFTER_LEARN),
        (4, 2, 51, IN_A_CALLBACK),
        (4, 2, 1, AFTER_A_STOP),
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(algorithm, n_lanes, n_workers, at_call, how):
    own = (
        {"target_update_interval": 7, "exploration_fraction": 0.9} if issubclass(algorithm, ValueBasedAlgorithm) else {}
    )
    assert_resumes_exactly(algorithm, RandomWalkEnv, n_lanes, n_workers, at_call, how, own)


@pytest.mark.parametrize(
    ("n_lanes", "n_workers", "at_call", "how"),
    [(1, 1, 37, AFTER_LEARN), (3, 1, 51, AFTER_A_STOP), (4, 2, 37, IN_A_CALLBACK), (4, 2, 51, AFTER_LEARN)],
)
@pytest.mark.parametrize(
    "own", [{}, {"use_sde": True}, {"use_sde": True, "sde_sample_freq": 2}], ids=["gaussian", "sde", "sde every 2"]
)
def test_a_resumed_run_with_continuous_actions_equals_an_uninterrupted_one(own, n_lanes, n_workers, at_call, how):
    """The noise that is drawn once in a segment is saved in the middle of it."""
    assert_resumes_exactly(A3C, BoxWalkEnv, n_lanes, n_workers, at_call, how, own)


def assert_resumes_exactly(algorithm, env_class, n_lanes, n_workers, at_call, how, own):
    parameters = {
        "backend": "serial", "n_workers": n_workers, "seed": 3, "update_interval": 5,
        "learning_rate": lambda progress: 0.01 * progress, "policy_kwargs": {"net_arch": [16]}, **own,
    }  # fmt: skip

    def make_envs():
        env = make_env(n_lanes, env_class)
        env.seed(1)
        return env

    total = 100 * n_lanes
    whole = algorithm("MlpPolicy", make_envs(), **parameters).learn(total)

    env = make_envs()
    model = algorithm("MlpPolicy", env, **parameters)
    if how == "after learn()":
        # The schedules are those of the whole training
        stop = SaveAt(at_call, env.envs, stops=True)
        model.learn(total, callback=stop)
        file, envs = io.BytesIO(), copy.deepcopy(env.envs)
        model.save(file)
    else:
        save = SaveAt(at_call, env.envs, stops="stopped" in how)
        model.learn(total, callback=save)
        file, envs = save.file, save.saved_envs
    file.seek(0)
    restored = DummyVecEnv([lambda env=env: env for env in envs])
    resumed = algorithm.load(file, env=restored, force_reset=False)
    assert resumed.num_timesteps == at_call * n_lanes
    resumed.learn(total - at_call * n_lanes, reset_num_timesteps=False)
    expected, actual = state_of(whole), state_of(resumed)
    # Wall-clock times of the episodes
    for state in (expected, actual):
        state["returns"] = [(info["r"], info["l"]) for info in state["returns"]]
    assert_equal(expected, actual)


def test_two_calls_of_learn_equal_one(algorithm):
    value_based = issubclass(algorithm, ValueBasedAlgorithm)
    constant_exploration = {"exploration_initial_eps": 0.1, "exploration_final_eps": 0.1} if value_based else {}

    def train(*totals):
        env = make_env(3)
        # Schedules depend on the steps of each call
        model = algorithm(
            "MlpPolicy", env, backend="serial", n_workers=3, seed=1, learning_rate=1e-3, update_interval=5,
            policy_kwargs={"net_arch": [16]}, **constant_exploration,
        )  # fmt: skip
        for total in totals:
            model.learn(total, reset_num_timesteps=total == totals[0])
        state = state_of(model)
        state["returns"] = [(info["r"], info["l"]) for info in state["returns"]]
        return state

    assert_equal(train(300), train(102, 198))


def test_a_reset_forgets_what_the_workers_had_begun(algorithm):
    env = make_env(2)
    model = algorithm("MlpPolicy", env, n_workers=1, update_interval=100, learning_rate=0.1).learn(20)
    assert model._worker_states[0].steps_since_update == 10
    model.learn(20)
    assert model._worker_states[0].steps_since_update == 10
    model.set_env(make_env(2))
    model.learn(20, reset_num_timesteps=False)
    assert model._worker_states[0].steps_since_update == 10


@pytest.mark.parametrize(("n_lanes", "n_workers"), [(1, 1), (8, 2), (4, 4), (5, 1)])
def test_load_on_another_layout(algorithm, n_lanes, n_workers, tmp_path):
    algorithm("MlpPolicy", make_env(4), n_workers=2, seed=0).learn(403).save(tmp_path / "model")
    model = algorithm.load(tmp_path / "model", env=make_env(n_lanes), n_workers=n_workers)
    assert model.num_timesteps == 404
    model.learn(100, reset_num_timesteps=False)
    assert 504 <= model.num_timesteps < 504 + n_lanes


def test_what_a_file_holds(algorithm, tmp_path):
    model = algorithm("MlpPolicy", make_env(2), n_workers=2, seed=0).learn(111)
    model.save(tmp_path / "model.zip")
    assert_equal(state_of(algorithm.load(tmp_path / "model")), state_of(model))


def test_custom_objects_as_the_zoo_passes_them(algorithm, tmp_path):
    algorithm("MlpPolicy", make_env(2)).save(tmp_path / "model")
    custom_objects = {"learning_rate": 0.0, "lr_schedule": lambda _: 0.0, "clip_range": lambda _: 0.0}
    model = algorithm.load(tmp_path / "model", custom_objects=custom_objects, seed=4, buffer_size=1)
    assert (model.learning_rate, model.seed) == (0.0, 4)


def test_suffix_and_folders_are_sb3s(tmp_path):
    model = AsyncOneStepQ("MlpPolicy", make_env(1))
    for name in ("a/b/model", "model.zip", "model.v1"):
        model.save(tmp_path / name)
        AsyncOneStepQ.load(tmp_path / name)
    model.save(str(tmp_path / "text"))
    found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert found == ["a/b/model.zip", "model.v1", "model.zip", "text.zip"]


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "link.zip").symlink_to(tmp_path / "real.zip")
    AsyncOneStepQ("MlpPolicy", make_env(1)).save(tmp_path / "link")
    assert (tmp_path / "link.zip").is_symlink()
    AsyncOneStepQ.load(tmp_path / "real.zip")


@pytest.mark.parametrize("where", ["write", "fsync", "replace"])
def test_a_failed_save_leaves_the_old_file(algorithm, where, tmp_path, monkeypatch):
    model = algorithm("MlpPolicy", make_env(1), seed=0)
    model.save(tmp_path / "model")
    before = (tmp_path / "model.zip").read_bytes()
    model.learn(50)

    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    if where == "write":
        monkeypatch.setattr(zipfile.ZipFile, "writestr", fail)
    else:
        monkeypatch.setattr(model_file.os, where, fail)
    with pytest.raises(OSError, match="No space left"):
        model.save(tmp_path / "model")
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["model.zip"]
    assert (tmp_path / "model.zip").read_bytes() == before
    model.learn(50, reset_num_timesteps=False)
    model.save(tmp_path / "model")
    assert algorithm.load(tmp_path / "model").num_timesteps == 100


@pytest.mark.parametrize(("backend", "n_workers"), [("threads", 4), ("serial", 2)])
def test_saving_from_another_thread(algorithm, backend, n_workers, tmp_path):
    """Each file holds one moment: online network, statistics and counters of the same number of updates."""
    model = algorithm(
        "MlpPolicy", make_env(4), backend=backend, n_workers=n_workers, lock_updates=True, update_interval=1,
        policy_kwargs={"optimizer_class": CountingOptimizer, "net_arch": [4]},
    )  # fmt: skip
    start = [p.detach().clone() for p in trained_parameters(model)]
    files = [tmp_path / str(i) for i in range(10)]
    ended = threading.Event()

    def save_now_and_then():
        try:
            for path in files:
                n_updates = model._n_updates
                wait_until(lambda n=n_updates: model._n_updates > n + 20)
                model.save(path)
        finally:
            ended.set()

    model.learn(40, log_interval=None)
    with meanwhile(save_now_and_then):
        model.learn(
            10**9, callback=lambda locals_, globals_: not ended.is_set(), log_interval=1, reset_num_timesteps=False
        )
    counts = []
    for path in files:
        steps = count_additions(algorithm.load(path), start)
        assert len(steps) == 1
        counts.append(steps.pop())
        assert counts[-1] == int(counts[-1])
    assert counts == sorted(set(counts))


@pytest.mark.parametrize("n_workers", [1, 2])
def test_training_waits_for_a_save_that_began_before(algorithm, n_workers, tmp_path, monkeypatch):
    """No update falls into a save, though no worker ran when it began."""
    model = algorithm("MlpPolicy", make_env(2), n_workers=n_workers)
    before = weights_of(model)
    saving, learned, saved = threading.Event(), threading.Event(), []

    def slow_pack(*args):
        saving.set()
        wait_until(lambda: learned.is_set() or all_workers_wait())
        saved.append(are_equal(weights_of(model), before))
        return memoryview(b"")

    def all_workers_wait():
        return model._pool is not None and len(model._pool._waiting_since) == n_workers

    monkeypatch.setattr(live_algorithm, "pack_model", slow_pack)
    with meanwhile(lambda: model.save(tmp_path / "model")):
        wait_until(saving.is_set)
        model.learn(100)
        learned.set()
    assert saved == [True]
    assert not are_equal(weights_of(model), before)


@pytest.mark.parametrize("other", [DQN, A2C])
def test_files_of_other_algorithms(algorithm, other, tmp_path):
    env = make_env(1)
    other("MlpPolicy", env).save(tmp_path / "model")
    with pytest.raises(ValueError, match=rf"model was not saved by {algorithm.__name__}: load it with the class"):
        algorithm.load(tmp_path / "model")


def test_files_of_our_other_algorithms(value_based, tmp_path):
    """The error says how to start from the weights of SB3's algorithm with the same policies."""
    value_based("MlpPolicy", make_env(1)).save(tmp_path / "values")
    A3C("MlpPolicy", make_env(1)).save(tmp_path / "actor")
    with pytest.raises(ValueError, match=r"not saved by A3C.*weights of A2C.*load_state_dict\(a2c\."):
        A3C.load(tmp_path / "values")
    with pytest.raises(
        ValueError, match=rf"not saved by {value_based.__name__}.*weights of DQN.*load_state_dict\(dqn\."
    ):
        value_based.load(tmp_path / "actor")


def test_weights_of_a_dqn():
    """As the error message advises."""
    dqn = DQN("MlpPolicy", make_env(1), seed=0)
    policy_kwargs = {"net_arch": [64, 64], "layer_norm": False}
    model = AsyncOneStepQ("MlpPolicy", make_env(1), policy_kwargs=policy_kwargs, seed=1)
    model.policy.load_state_dict(dqn.policy.state_dict())
    obs = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    np.testing.assert_array_equal(model.predict(obs, deterministic=True)[0], dqn.predict(obs, deterministic=True)[0])


def make_reset_env(n_lanes):
    env = make_env(n_lanes)
    env.reset()
    return env


def test_value_based_methods_can_load_each_others_files(value_based, tmp_path):
    """Whatever state the workers of the other one left."""
    for other in (AsyncOneStepQ, AsyncOneStepSarsa, AsyncNStepQ):
        other("MlpPolicy", make_env(2), n_workers=1, update_interval=5).learn(106).save(tmp_path / "model")
        for force_reset in (True, False):
            model = value_based.load(tmp_path / "model", env=make_reset_env(2), force_reset=force_reset)
            assert model.learn(100, reset_num_timesteps=False).num_timesteps == 206


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.99])
def test_damaged_files(algorithm, keep, tmp_path):
    path = tmp_path / "model.zip"
    algorithm("MlpPolicy", make_env(1)).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(ValueError, match=r"model.zip is damaged, or no saved model"):
        algorithm.load(path)


def test_file_objects(algorithm):
    model, file = algorithm("MlpPolicy", make_env(1), seed=0).learn(50), io.BytesIO()
    model.save(file)
    file.seek(0)
    assert_equal(state_of(algorithm.load(file)), state_of(model))


def test_an_envs_state_is_not_in_the_file(tmp_path):
    """No threads, locks or envs are pickled; the workers' states are small."""
    env = DummyVecEnv([RandomWalkEnv] * 4)
    AsyncOneStepQ("MlpPolicy", env, n_workers=4, policy_kwargs={"net_arch": [8]}).learn(402).save(tmp_path / "model")
    with zipfile.ZipFile(tmp_path / "model.zip") as archive:
        names = archive.namelist()
        data = archive.read("data").decode()
    assert "policy.pth" in names
    assert "policy.optimizer.pth" in names
    for word in ("_thread", "RandomWalkEnv", "ActorLearner object", "WorkerPool"):
        assert word not in data
    assert len(data) < 50_000


def test_another_seed_than_the_files(algorithm):
    """Seeds of a study that begins with one file; the file's own seed goes on where its training stopped."""

    def act(model):
        actions = []
        model.learn(40, callback=lambda locals_, globals_: actions.append(locals_["actions"]) or True)
        return np.array(actions)

    file = io.BytesIO()
    algorithm("MlpPolicy", make_env(4), n_workers=2, backend="serial", seed=3, update_interval=100).learn(8).save(file)

    def load(**kwargs):
        file.seek(0)
        return algorithm.load(file, env=make_env(4), **kwargs)

    goes_on = act(load())
    assert np.array_equal(act(load(seed=3)), goes_on)
    one, two = act(load(seed=1)), act(load(seed=2))
    assert not np.array_equal(one, two) and not np.array_equal(one, goes_on)
    assert np.array_equal(act(load(seed=1)), one)
    model = load()
    model.seed = 1
    assert np.array_equal(act(model), one)


def test_attributes_that_are_left_out_or_added(algorithm):
    model = algorithm("MlpPolicy", make_env(2), n_workers=1, seed=0)
    # SB3 leaves out the second one by default
    model.note = model.replay_buffer = "a note"

    def read(**kwargs):
        file = io.BytesIO()
        model.save(file, **kwargs)
        attributes = vars(algorithm.load(file))
        return {name for name in ("note", "replay_buffer") if attributes.get(name) == "a note"}

    assert read() == {"note"}
    assert read(exclude=["note"], include=["replay_buffer"]) == {"replay_buffer"}


@pytest.mark.parametrize("resets", [True, False])
@pytest.mark.parametrize("n_steps", [0, 200])
def test_the_window_of_logged_returns_may_change(algorithm, n_steps, resets, tmp_path):
    env = DummyVecEnv([lambda: Monitor(RandomWalkEnv())] * 2)
    before = algorithm("MlpPolicy", env).learn(n_steps)
    before.save(tmp_path / "model")
    for kwargs, window in (({}, 100), ({"stats_window_size": 3}, 3)):
        model = algorithm.load(tmp_path / "model", env=env, **kwargs)
        # The last episodes are kept
        assert list(model.ep_info_buffer) == list(before.ep_info_buffer)[-window:]
        assert (len(model.ep_info_buffer) > 0) == (n_steps > 0)
        model.learn(200, reset_num_timesteps=resets)
        assert model.ep_info_buffer.maxlen == model.ep_success_buffer.maxlen == window
        assert (len(model.ep_info_buffer) == 3) == (window == 3)
    with pytest.raises(ValueError, match="stats_window_size must be a whole number of at least 1, got 0"):
        algorithm.load(tmp_path / "model", stats_window_size=0)


def test_other_lanes_have_to_be_reset(algorithm, tmp_path):
    env = make_env(3)
    algorithm("MlpPolicy", env).learn(30).save(tmp_path / "model")
    with pytest.raises(ValueError, match=r"The env has 5 lane\(s\) and the model's last one had 3: .* force_reset"):
        algorithm.load(tmp_path / "model", env=make_env(5), force_reset=False)
    model = algorithm.load(tmp_path / "model", env=env, force_reset=False)
    assert model.learn(30, reset_num_timesteps=False).num_timesteps == 60
