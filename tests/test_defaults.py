"""What one line of code gives: lanes, workers, networks and hyperparameters that the user does not name."""

import inspect
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import FakeImageEnv, IdentityEnv
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_async1step import AsyncNStepQ, AsyncOneStepQ, AsyncOneStepSarsa, MinAtarCNN, NipsCNN, SharedRMSprop
from sb3_async1step.common.parallelism import count_multiplications
from tests.envs import RandomWalkEnv, make_env
from tests.helpers import knows_identity
from tests.test_contract import SampleEnv, box, image


def make_images(n_envs):
    return make_vec_env(lambda: FakeImageEnv(screen_height=84, screen_width=84, n_channels=4), n_envs=n_envs)


def defaults_of(algorithm):
    return {name: parameter.default for name, parameter in inspect.signature(algorithm).parameters.items()}


def test_what_differs_between_the_value_based_algorithms():
    q, sarsa, n_step = (defaults_of(algorithm) for algorithm in (AsyncOneStepQ, AsyncOneStepSarsa, AsyncNStepQ))
    # Sarsa learns the values of the policy that explores
    epsilons = {"exploration_final_eps": (0.1, 0.01, 0.3), "exploration_final_probs": (0.4, 0.3, 0.3)}
    assert sarsa == q | epsilons
    assert n_step == q | {"update_interval": 5, "q_lambda": 1.0, "batch_size": None, "lock_updates": True}


# ---------------------------------------------------------------------- lanes


@pytest.mark.parametrize(("n_envs", "n_lanes"), [(None, 16), (3, 3), (1, 1)])
def test_an_env_id_makes_lanes(algorithm, n_envs, n_lanes, capsys):
    model = algorithm("MlpPolicy", "CartPole-v1", n_envs=n_envs, seed=0, verbose=1)
    assert model.n_envs == model.get_env().num_envs == n_lanes
    assert model.get_env().env_is_wrapped(gym.wrappers.TimeLimit) == [True] * n_lanes
    assert f"Creating {n_lanes} environments from the given name 'CartPole-v1'" in capsys.readouterr().out
    assert model.learn(1).num_timesteps == n_lanes


def test_the_seed_decides_the_lanes_of_an_env_id(algorithm):
    first, same, other = (algorithm("MlpPolicy", "CartPole-v1", seed=seed).get_env().reset() for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, same)
    assert not np.array_equal(first, other)
    # No two lanes are alike
    assert len(np.unique(first, axis=0)) == 16


def test_the_lanes_of_an_env_id_do_not_draw(algorithm):
    model = algorithm("MlpPolicy", "CartPole-v1", n_envs=2)
    assert model.get_env().get_attr("render_mode") == [None, None]
    # Nor need they know render modes
    gym.register("NoRenderMode-v0", RandomWalkEnv)
    try:
        assert algorithm("MlpPolicy", "NoRenderMode-v0", n_envs=2).learn(4).num_timesteps == 4
    finally:
        gym.registry.pop("NoRenderMode-v0")


def test_an_env_has_its_own_number_of_lanes(algorithm):
    assert algorithm("MlpPolicy", gym.make("CartPole-v1")).n_envs == 1
    assert algorithm("MlpPolicy", make_env(4)).n_envs == 4
    assert algorithm("MlpPolicy", make_env(4), n_envs=4).n_envs == 4


@pytest.mark.parametrize("make", [lambda: make_env(4), lambda: gym.make("CartPole-v1")])
def test_another_number_of_lanes_than_the_env_has_is_refused(algorithm, make):
    with pytest.raises(ValueError, match=r"n_envs=3, but the env has \d lane\(s\): .* an env's id.*make_vec"):
        algorithm("MlpPolicy", make(), n_envs=3)


@pytest.mark.parametrize("n_envs", [0, -1, 2.0, True, "16"])
def test_numbers_of_lanes_that_are_none(algorithm, n_envs):
    with pytest.raises(ValueError, match=f"n_envs must be a whole number of at least 1, or None, got {n_envs!r}"):
        algorithm("MlpPolicy", "CartPole-v1", n_envs=n_envs)


def test_envs_that_come_later_may_have_other_numbers_of_lanes(algorithm, tmp_path):
    model = algorithm("MlpPolicy", "CartPole-v1", seed=0).learn(16)
    model.set_env(make_vec_env("CartPole-v1", n_envs=3))
    assert model.n_envs == model.get_env().num_envs == 3
    assert model.learn(6).num_timesteps == 6
    model.save(tmp_path / "model")
    loaded = algorithm.load(tmp_path / "model", env=make_vec_env("CartPole-v1", n_envs=5))
    assert loaded.n_envs == loaded.get_env().num_envs == 5
    assert loaded.learn(10, reset_num_timesteps=False).num_timesteps == 16
    single = algorithm.load(tmp_path / "model", env=gym.make("CartPole-v1"))
    assert evaluate_policy(single, single.get_env(), n_eval_episodes=1)[0] > 0


def test_a_single_lane_is_said_to_learn_badly(algorithm):
    message = f"{algorithm.__name__} learns from a single env lane.*Give it the env's id.*makes 16 lanes.*make_vec_env"
    with pytest.warns(UserWarning, match=message) as record:
        algorithm("MlpPolicy", gym.make("CartPole-v1")).learn(10)
    # Where the user called learn()
    assert [warning.filename for warning in record] == [__file__]
    model = algorithm("MlpPolicy", make_env(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.learn(10)
    model.set_env(make_env(1))
    with pytest.warns(UserWarning, match=message):
        model.learn(10)


# ---------------------------------------------------------------------- workers and threads


class Threads(BaseCallback):
    """Notes the number of workers, and of torch's threads that each of them computes with."""

    def _on_step(self):
        self.n_workers = len(self.model._pool.workers)
        self.n_intra_op = th.get_num_threads()
        return False


@pytest.mark.parametrize(
    ("make_model", "n_workers", "n_intra_op"),
    [
        (lambda algorithm: algorithm("MlpPolicy", make_env(16)), 1, 1),
        (lambda algorithm: algorithm("MlpPolicy", make_env(16), n_workers=2), 2, 1),
        # 67 000 multiplications or more each
        (lambda algorithm: algorithm("MlpPolicy", make_env(130), policy_kwargs={"net_arch": [256, 256]}), 1, 8),
        (lambda algorithm: algorithm("CnnPolicy", make_images(4)), 4, 2),
        (lambda algorithm: algorithm("CnnPolicy", make_images(1)), 1, 8),
        (lambda algorithm: algorithm("CnnPolicy", make_images(2), n_workers=1), 1, 8),
    ],
    ids=["small", "small, two workers", "small, many lanes", "CNN", "CNN, one lane", "CNN, one worker"],
)
def test_small_networks_have_one_worker_and_one_thread(
    algorithm, monkeypatch, capsys, make_model, n_workers, n_intra_op
):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    model = make_model(algorithm)
    model.verbose = 1
    before = th.get_num_threads()
    th.set_num_threads(8)
    try:
        callback = Threads()
        model.learn(100, callback=callback)
        assert (callback.n_workers, callback.n_intra_op) == (n_workers, n_intra_op)
        assert th.get_num_threads() == 8
    finally:
        th.set_num_threads(before)
    assert (
        f"Learning with {n_workers} worker(s) for {model.n_envs} env lane(s), which step together; "
        f"{n_intra_op} intra-op thread(s) of PyTorch for each worker\n"
    ) in capsys.readouterr().out


def test_multiplications_are_counted():
    linear = th.nn.Sequential(th.nn.Linear(4, 8), th.nn.LayerNorm(8), th.nn.ReLU(), th.nn.Linear(8, 3))
    assert count_multiplications(linear, lambda: linear(th.zeros(1, 4))) == 4 * 8 + 8 * 3
    images = spaces.Box(0, 255, (4, 84, 84), np.uint8)
    convolutions = 20 * 20 * 16 * 8 * 8 * 4 + 9 * 9 * 32 * 4 * 4 * 16
    network = NipsCNN(images)
    assert count_multiplications(network, lambda: network(th.zeros(1, 4, 84, 84))) == convolutions + 9 * 9 * 32 * 256
    # Nothing stays on the network
    assert not any(module._forward_hooks for module in linear.modules())


# ---------------------------------------------------------------------- networks and hyperparameters


def kinds_of(module):
    return [type(layer).__name__ for layer in module.modules() if not list(layer.children())]


def test_default_networks(value_based):
    mlp = value_based("MlpPolicy", make_env(2)).q_net
    assert kinds_of(mlp.q_net) == ["Linear", "ReLU"] * 2 + ["Linear"]
    assert [layer.out_features for layer in mlp.q_net if hasattr(layer, "out_features")] == [256, 256, 3]
    cnn = value_based("CnnPolicy", make_images(2)).q_net
    assert isinstance(cnn.features_extractor, NipsCNN)
    assert kinds_of(cnn) == [
        "ImageLayerNorm", "Conv2d", "ImageLayerNorm", "ReLU", "Conv2d", "ImageLayerNorm", "ReLU", "Flatten",
        "Linear", "LayerNorm", "ReLU", "Linear",
    ]  # fmt: skip
    bare = value_based("CnnPolicy", make_images(2), policy_kwargs={"layer_norm": False}).q_net
    assert kinds_of(bare) == ["Conv2d", "ReLU", "Conv2d", "ReLU", "Flatten", "Linear", "ReLU", "Linear"]


def test_layer_norm_of_minatars_network(value_based):
    class Binary(RandomWalkEnv):
        observation_space = spaces.Box(0, 1, (10, 10, 4), dtype=bool)

        def reset(self, **kwargs):
            return self.observation_space.sample(), super().reset(**kwargs)[1]

        def step(self, action):
            return self.observation_space.sample(), *super().step(action)[1:]

    policy_kwargs = {"features_extractor_class": MinAtarCNN}
    model = value_based("CnnPolicy", make_env(2, Binary), policy_kwargs=policy_kwargs)
    assert kinds_of(model.q_net) == [
        "Conv2d", "LayerNorm", "ReLU", "Flatten", "Linear", "LayerNorm", "ReLU", "Linear"
    ]  # fmt: skip
    assert model.learn(100).num_timesteps == 100


def test_the_papers_hyperparameters_are_a_dict_of_ones_own(algorithm):
    hyperparams = algorithm.paper_hyperparams()
    hyperparams["gamma"] = hyperparams.setdefault("policy_kwargs", {})["net_arch"] = None
    again = algorithm.paper_hyperparams()
    assert "gamma" not in again and "net_arch" not in again.get("policy_kwargs", {})


def test_the_papers_hyperparameters(value_based):
    hyperparams = value_based.paper_hyperparams()
    model = value_based("CnnPolicy", make_images(2), **hyperparams)
    assert isinstance(model.policy.optimizer, SharedRMSprop)
    assert kinds_of(model.q_net) == ["Conv2d", "ReLU", "Conv2d", "ReLU", "Flatten", "Linear", "ReLU", "Linear"]
    values = (model.update_interval, model.target_update_interval, model.loss, model.max_grad_norm)
    assert values == (5, 10_000, "mse", 40.0)
    assert not model.lock_updates
    assert (model.exploration_final_eps, model.exploration_final_probs) == ((0.1, 0.01, 0.5), (0.4, 0.3, 0.3))
    assert [model.lr_schedule(progress) for progress in (1.0, 0.5, 0.0)] == [7e-4, 3.5e-4, 0.0]


@pytest.mark.parametrize(
    ("policy", "space", "expected"),
    [
        ("MlpPolicy", box(3), 1e-3),
        ("CnnPolicy", image(36, 36, 1), 1e-4),
        ("MultiInputPolicy", spaces.Dict({"speed": box(3)}), 1e-3),
        ("MultiInputPolicy", spaces.Dict({"speed": box(3), "pixels": image(36, 36, 1)}), 1e-4),
    ],
)
def test_images_are_learned_at_a_lower_rate(value_based, policy, space, expected, tmp_path):
    env = make_vec_env(lambda: SampleEnv(space, 5), n_envs=2)
    model = value_based(policy, env, policy_kwargs={"net_arch": [8]})
    assert [model.lr_schedule(progress) for progress in (1.0, 0.5, 0.0)] == [expected, expected / 2, 0.0]
    assert model.policy.optimizer.param_groups[0]["lr"] == expected
    model.learn(6).save(tmp_path / "model")
    for loaded in (value_based.load(tmp_path / "model", env=env), value_based.load(tmp_path / "model")):
        assert loaded.lr_schedule(1.0) == expected
    given = value_based(policy, env, learning_rate=0.25, policy_kwargs={"net_arch": [8]})
    assert given.lr_schedule(0.5) == 0.25


def test_the_learning_rate_is_annealed_to_zero(value_based):
    model = value_based("MlpPolicy", make_env(4), seed=0)
    assert model.policy.optimizer.param_groups[0]["lr"] == model.lr_schedule(1.0) > 0
    model.learn(100)
    assert model.policy.optimizer.param_groups[0]["lr"] == model.lr_schedule(0.0) == 0.0


# ---------------------------------------------------------------------- learning


@pytest.mark.filterwarnings("ignore:.*single env lane")
def test_identity(algorithm):
    """As SB3's tests ask of DQN, A2C and PPO, from a single lane."""
    env = DummyVecEnv([lambda: IdentityEnv(dim=4)])
    model = algorithm("MlpPolicy", env, learning_rate=0.002, gamma=0.4, seed=0).learn(1200)
    assert knows_identity(model)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("env_id", "n_steps", "score"), [("CartPole-v1", 200_000, 475), ("Acrobot-v1", 300_000, -100)])
def test_one_line_learns(algorithm, env_id, n_steps, score):
    """On two of three seeds; the published table has more."""
    scores = []
    for seed in range(3):
        model = algorithm("MlpPolicy", env_id, seed=seed).learn(n_steps)
        scores.append(evaluate_policy(model, make_vec_env(env_id, 10, seed=1000), n_eval_episodes=40)[0])
    assert sorted(scores)[1] >= score, scores


def test_the_device_is_the_cpu_unless_another_one_is_named(algorithm, monkeypatch):
    monkeypatch.setattr(th.cuda, "is_available", lambda: True)
    assert algorithm("MlpPolicy", make_env(2)).device == th.device("cpu")


def test_adam_is_fused_by_default(value_based):
    optimizer = value_based("MlpPolicy", make_env(2)).policy.optimizer
    assert isinstance(optimizer, th.optim.Adam) and optimizer.defaults["fused"] is True
