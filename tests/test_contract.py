"""What an SB3 user does with DQN: spaces, wrappers, networks, loggers, and the getters and setters of BaseAlgorithm."""

import json
import threading
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import DQN
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import FakeImageEnv
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, NatureCNN
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    VecCheckNan,
    VecExtractDictObs,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
    VecTransposeImage,
)

from sb3_async1step import MinAtarCNN, NipsCNN
from sb3_async1step.common.torch_layers import ImageLayerNorm
from sb3_async1step.value_based.algorithm import ValueBasedAlgorithm
from sb3_async1step.workers import pool
from sb3_async1step.workers.actor_learner import _average
from tests.envs import RandomWalkEnv, make_env
from tests.helpers import DEADLINE, are_equal, trained_parameters, wait_until, weights_of


class SampleEnv(gym.Env):
    """Samples its observations; the reward counts steps."""

    action_space = spaces.Discrete(3)

    def __init__(self, observation_space, max_steps=7):
        self.observation_space = observation_space
        self.max_steps = max_steps

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.n_steps = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        self.n_steps += 1
        info = {"is_success": self.n_steps % 2 == 1}
        return self.observation_space.sample(), float(self.n_steps), False, self.n_steps == self.max_steps, info


def box(*shape):
    return spaces.Box(-1, 1, shape, dtype=np.float32)


def image(*shape, high=255):
    return spaces.Box(0, high, shape, dtype=np.uint8)


OBSERVATION_SPACES = {
    "vector": ("MlpPolicy", box(4), {}),
    "float64": ("MlpPolicy", spaces.Box(-1, 1, (2, 3), dtype=np.float64), {}),
    "channels last": ("CnnPolicy", image(36, 40, 3), {}),
    "channels first": ("CnnPolicy", image(3, 36, 40), {}),
    "image between 0 and 1": ("CnnPolicy", box(1, 36, 36), {"normalize_images": False}),
    "image to an mlp": ("MlpPolicy", image(8, 8, 1), {}),
    "discrete": ("MlpPolicy", spaces.Discrete(5), {}),
    "multi-discrete": ("MlpPolicy", spaces.MultiDiscrete([3, 4]), {}),
    "multi-binary": ("MlpPolicy", spaces.MultiBinary(6), {}),
    "dict": ("MultiInputPolicy", spaces.Dict({"pixels": image(36, 36, 1), "speed": box(2)}), {}),
    "goal": (
        "MultiInputPolicy",
        spaces.Dict({"observation": box(4), "achieved_goal": box(2), "desired_goal": box(2)}),
        {},
    ),
}


@pytest.mark.parametrize("name", OBSERVATION_SPACES)
def test_observation_spaces(algorithm, name, tmp_path):
    policy, space, policy_kwargs = OBSERVATION_SPACES[name]
    env = DummyVecEnv([lambda: SampleEnv(space)] * 4)
    small = {"net_arch": [8], **policy_kwargs}
    model = algorithm(policy, env, n_workers=2, policy_kwargs=small, update_interval=2, seed=0)
    before = weights_of(model)
    model.learn(80)
    assert not are_equal(weights_of(model), before)
    single, batch = space.sample(), model.get_env().reset()
    action, _ = model.predict(single, deterministic=True)
    actions, _ = model.predict(batch, deterministic=True)
    assert action.shape == () and actions.shape == (4,)
    model.save(tmp_path / "model")
    loaded = algorithm.load(tmp_path / "model", env=DummyVecEnv([lambda: SampleEnv(space)] * 2), n_workers=1)
    np.testing.assert_array_equal(loaded.predict(batch, deterministic=True)[0], actions)
    loaded.learn(20, reset_num_timesteps=False)


@pytest.mark.parametrize(
    ("policy", "space", "message"),
    [
        ("MlpPolicy", spaces.Dict({"speed": box(2)}), "You must use `MultiInputPolicy`"),
        ("CnnPolicy", box(4), "(NipsCNN needs images|NatureCNN only with images)"),
        ("LstmPolicy", box(4), "Policy LstmPolicy unknown"),
    ],
)
def test_policies_that_do_not_fit(algorithm, policy, space, message):
    with pytest.raises((ValueError, AssertionError), match=message):
        algorithm(policy, SampleEnv(space))


def test_replay_buffer_arguments_are_refused(algorithm):
    with pytest.raises(TypeError, match="buffer_size"):
        algorithm("MlpPolicy", make_env(1), buffer_size=1000)


# ---------------------------------------------------------------------- wrappers


def with_statistics(env):
    return VecNormalize(env, clip_obs=5.0, gamma=0.9)


WRAPPED = {
    "monitor, normalize, stack": (box(4), [VecMonitor, with_statistics, lambda env: VecFrameStack(env, 2)]),
    "stack, normalize, check": (box(4), [lambda env: VecFrameStack(env, 2), with_statistics, VecCheckNan]),
    "normalize, monitor": (box(4), [with_statistics, VecMonitor]),
    "stack, transpose, monitor": (image(36, 36, 1), [lambda env: VecFrameStack(env, 3), VecTransposeImage, VecMonitor]),
    "transpose, stack": (image(36, 36, 1), [VecTransposeImage, lambda env: VecFrameStack(env, 2)]),
    "extract, normalize": (
        spaces.Dict({"speed": box(2), "other": box(3)}),
        [lambda env: VecExtractDictObs(env, "speed"), with_statistics],
    ),
    "dict: normalize some keys": (
        spaces.Dict({"speed": box(2), "place": spaces.Discrete(3)}),
        [lambda env: VecNormalize(env, norm_obs_keys=["speed"])],
    ),
}


# A single worker drives the env as it is
@pytest.mark.parametrize(("name", "n_workers"), [*((name, 3) for name in WRAPPED), ("monitor, normalize, stack", 1)])
def test_wrappers_in_any_order(algorithm, name, n_workers):
    space, wrappers = WRAPPED[name]
    has_vec_monitor = VecMonitor in wrappers
    env = DummyVecEnv([lambda: SampleEnv(space) if has_vec_monitor else Monitor(SampleEnv(space))] * 6)
    for wrapper in wrappers:
        env = wrapper(env)
    policy = {spaces.Dict: "MultiInputPolicy"}.get(type(env.observation_space), "MlpPolicy")
    if env.observation_space.dtype == np.uint8:
        policy = "CnnPolicy"
    model = algorithm(policy, env, n_workers=n_workers, policy_kwargs={"net_arch": [8]}).learn(300)
    assert model.get_env() is env
    # 1 + 2 + ... + 7, however rewards are normalized, unless the monitor looks at normalized ones
    returns = {float(episode["r"]) for episode in model.ep_info_buffer}
    assert (returns == {28.0}) == (name != "normalize, monitor")
    normalizer = model.get_vec_normalize_env()
    if normalizer is not None:
        rms = normalizer.obs_rms["speed"] if isinstance(normalizer.obs_rms, dict) else normalizer.obs_rms
        # Every observation that the lanes saw, the first ones included
        assert rms.count == pytest.approx(6 + 300, abs=0.01)
    env.step(np.zeros(6, dtype=int))


def statistics_of(env):
    return env.obs_rms.mean.tolist(), env.obs_rms.var.tolist(), env.ret_rms.mean.tolist(), env.ret_rms.var.tolist()


@pytest.mark.parametrize("n_workers", [1, 3])
def test_saved_statistics_equal_those_trained_with(algorithm, n_workers, tmp_path):
    env = VecNormalize(make_env(3))
    model = algorithm("MlpPolicy", env, n_workers=n_workers).learn(300)
    seen = []

    def save(locals_, globals_):
        normalizer = model.get_vec_normalize_env()
        normalizer.save(tmp_path / "statistics.pkl")
        seen.append(statistics_of(normalizer))
        return len(seen) < 30

    model.learn(300, callback=save)
    loaded = VecNormalize.load(tmp_path / "statistics.pkl", make_env(1))
    assert statistics_of(loaded) == seen[-1]


# ---------------------------------------------------------------------- networks


def online_network(model):
    """The network that is trained."""
    return model.policy.q_net if isinstance(model, ValueBasedAlgorithm) else model.policy


class Extractor(BaseFeaturesExtractor):
    """Has all that behaves differently while training."""

    def __init__(self, observation_space, layers=("batch", "layer", "dropout")):
        super().__init__(observation_space, features_dim=16)
        kinds = {"batch": th.nn.BatchNorm1d(16), "layer": th.nn.LayerNorm(16), "dropout": th.nn.Dropout(0.5)}
        self.layers = th.nn.Sequential(
            th.nn.Linear(observation_space.shape[0], 16), *(kinds[name] for name in layers), th.nn.ReLU()
        )

    def forward(self, observations):
        return self.layers(observations)


@pytest.mark.parametrize(
    ("layers", "n_workers"),
    [(("batch",), 1), (("layer",), 2), (("dropout",), 2), (("batch", "layer", "dropout"), 2)],
)
def test_networks_with_training_modes(algorithm, layers, n_workers, tmp_path):
    env = make_env(4)
    policy_kwargs = {
        "features_extractor_class": Extractor, "features_extractor_kwargs": {"layers": layers}, "net_arch": [8],
    }  # fmt: skip
    model = algorithm("MlpPolicy", env, n_workers=n_workers, policy_kwargs=policy_kwargs)
    model.learn(400)
    if "batch" in layers:
        online = online_network(model).features_extractor.layers[1]
        # All workers share them. For each update there is one batch, and another where a target network changes
        assert model._n_updates // 2 < online.num_batches_tracked <= model._n_updates + 2 * 4
        assert not th.equal(online.running_mean, th.zeros(16))
    # Predictions are made in evaluation mode
    observations = env.reset()
    assert all(model.predict(observations, deterministic=True)[0] == model.predict(observations, deterministic=True)[0])
    model.save(tmp_path / "model")
    loaded = algorithm.load(tmp_path / "model")
    for name, value in model.policy.state_dict().items():
        assert th.equal(loaded.policy.state_dict()[name], value), name


def test_the_target_network_gets_the_statistics_of_batch_norm(value_based):
    """As with DQN."""
    policy_kwargs = {"features_extractor_class": Extractor, "net_arch": [8]}
    model = value_based("MlpPolicy", make_env(4), policy_kwargs=policy_kwargs, target_update_interval=100).learn(400)
    assert not th.equal(model.q_net_target.features_extractor.layers[1].running_mean, th.zeros(16))


def test_acting_is_done_in_evaluation_mode_and_learning_in_training_mode(algorithm):
    modes = {"acting": set(), "learning": set()}

    class Spying(Extractor):
        def forward(self, observations):
            modes["learning" if th.is_grad_enabled() else "acting"].add(self.training)
            return super().forward(observations)

    policy_kwargs = {"features_extractor_class": Spying}
    model = algorithm("MlpPolicy", make_env(4), n_workers=2, update_interval=5, policy_kwargs=policy_kwargs)
    model.learn(100)
    assert modes == {"acting": {False}, "learning": {True}}


def test_layer_norm(value_based, tmp_path):
    """Behind each hidden layer of net_arch, in both networks; saved and loaded."""
    policy_kwargs = {"net_arch": [8, 4], "layer_norm": True}
    model = value_based("MlpPolicy", make_env(4), policy_kwargs=policy_kwargs).learn(100)
    for network in (model.q_net, model.q_net_target):
        kinds = [type(layer).__name__ for layer in network.q_net]
        assert kinds == ["Linear", "LayerNorm", "ReLU"] * 2 + ["Linear"]
        assert [layer.normalized_shape for layer in network.q_net if hasattr(layer, "normalized_shape")] == [(8,), (4,)]
    optimized = {p for group in model.policy.optimizer.param_groups for p in group["params"]}
    assert optimized == set(model.q_net.parameters())
    assert not any(p.requires_grad and p.grad is not None for p in model.q_net_target.parameters())
    model.save(tmp_path / "model")
    model.policy.save(tmp_path / "policy.pt")
    observations = model.env.reset()
    for loaded in (value_based.load(tmp_path / "model"), type(model.policy).load(tmp_path / "policy.pt")):
        assert (loaded.predict(observations, deterministic=True)[0]) == pytest.approx(
            model.predict(observations, deterministic=True)[0]
        )


def test_layer_norm_needs_hidden_layers(value_based):
    env = make_vec_env(lambda: FakeImageEnv(screen_height=40, screen_width=40), n_envs=2)
    with pytest.raises(ValueError, match=r"give it some, as in policy_kwargs=dict\(net_arch=\[256\], layer_norm=True"):
        value_based("CnnPolicy", env, policy_kwargs={"layer_norm": True, "features_extractor_class": NatureCNN})


@pytest.mark.parametrize("dtype", [th.uint8, th.float32])
def test_images_are_scaled_as_by_sb3(value_based, dtype):
    env = make_vec_env(lambda: FakeImageEnv(screen_height=40, screen_width=40), n_envs=2)
    q_net = value_based("CnnPolicy", env).q_net
    observations = th.randint(0, 256, (2, 1, 40, 40)).to(dtype)
    before = observations.clone()
    with th.no_grad():
        features = q_net.extract_features(observations, q_net.features_extractor)
        assert th.equal(features, q_net.features_extractor(before.float() / 255.0))
    assert th.equal(observations, before)


def test_nips_cnn(value_based):
    """The paper's network, and with a ``LayerNorm`` before each ReLU."""
    env = make_vec_env(lambda: FakeImageEnv(screen_height=84, screen_width=84, n_channels=4), n_envs=2)
    layers = {}
    for layer_norm in (False, True):
        policy_kwargs = {
            "features_extractor_class": NipsCNN,
            "features_extractor_kwargs": {"layer_norm": layer_norm},
        }
        modules = value_based("CnnPolicy", env, policy_kwargs=policy_kwargs).q_net.modules()
        layers[layer_norm] = [type(module) for module in modules if not list(module.children())]
    convolution, linear, norm, image_norm = th.nn.Conv2d, th.nn.Linear, th.nn.LayerNorm, ImageLayerNorm
    relu, flatten = th.nn.ReLU, th.nn.Flatten
    assert layers[False] == [convolution, relu, convolution, relu, flatten, linear, relu, linear]
    assert layers[True] == [
        image_norm, convolution, image_norm, relu, convolution, image_norm, relu, flatten, linear, norm, relu, linear,
    ]  # fmt: skip


def test_minatar_cnn(value_based):
    """The network of Young and Tian (2019), and nothing behind it."""
    env = SampleEnv(spaces.Box(0, 1, (10, 10, 4), dtype=bool))
    policy_kwargs = {"features_extractor_class": MinAtarCNN, "layer_norm": False}
    q_net = value_based("CnnPolicy", env, policy_kwargs=policy_kwargs).q_net
    assert [tuple(parameter.shape) for parameter in q_net.parameters()] == [
        (16, 4, 3, 3), (16,), (128, 1024), (128,), (3, 128), (3,),
    ]  # fmt: skip


def test_mixed_precision(value_based, tmp_path, monkeypatch):
    """Features in bfloat16; what is learned and what is returned in float32."""
    env = make_vec_env(lambda: FakeImageEnv(screen_height=40, screen_width=40), n_envs=2)
    policy_kwargs = {"features_extractor_kwargs": {"features_dim": 16}, "mixed_precision": True}
    model = value_based("CnnPolicy", env, n_workers=2, policy_kwargs=policy_kwargs, seed=0)
    observations = model.policy.obs_to_tensor(model.env.reset())[0]
    dtypes = []
    for network in (model.q_net, model.q_net_target):
        network.features_extractor.register_forward_hook(lambda module, inputs, out: dtypes.append(out.dtype))
    with th.no_grad():
        mixed, target = model.q_net(observations), model.q_net_target(observations)
        model.q_net.mixed_precision = False
        exact = model.q_net(observations)
        model.q_net.mixed_precision = True
        with monkeypatch.context() as exporting:
            # What torch.onnx.export() says meanwhile: onnxruntime rejects bfloat16
            exporting.setattr(th.onnx, "is_in_onnx_export", lambda: True)
            assert th.equal(model.q_net(observations), exact)
    assert dtypes == [th.bfloat16, th.bfloat16, th.float32, th.float32]
    assert mixed.dtype == target.dtype == exact.dtype == th.float32
    assert not th.equal(mixed, exact) and th.allclose(mixed, exact, atol=0.02)
    before = [parameter.clone() for parameter in model.q_net.parameters()]
    model.learn(60)
    assert {parameter.dtype for parameter in model.q_net.parameters()} == {th.float32}
    assert not any(th.equal(a, b) for a, b in zip(before, model.q_net.parameters(), strict=True))
    model.save(tmp_path / "model")
    assert value_based.load(tmp_path / "model").q_net.mixed_precision


@pytest.mark.parametrize(
    "policy_kwargs",
    [
        {"net_arch": []},
        {"net_arch": [4, 4], "activation_fn": th.nn.Tanh},
        {
            "net_arch": [8],
            "optimizer_class": th.optim.Adam,
            "optimizer_kwargs": {"eps": 1e-5, "weight_decay": 1e-4},
        },
        {"net_arch": [8], "optimizer_class": th.optim.SGD, "optimizer_kwargs": {"momentum": 0.9}},
    ],
)
def test_policy_kwargs_of_dqn(value_based, policy_kwargs):
    model = value_based("MlpPolicy", make_env(4), n_workers=2, policy_kwargs=policy_kwargs).learn(200)
    dqn = DQN("MlpPolicy", make_env(1), policy_kwargs=policy_kwargs, buffer_size=10)
    assert {n: p.shape for n, p in model.policy.state_dict().items()} == (
        {n: p.shape for n, p in dqn.policy.state_dict().items()}
    )


# ---------------------------------------------------------------------- logging


@pytest.mark.parametrize("n_workers", [1, 2])
def test_loggers_and_keys(value_based, n_workers, tmp_path, capsys):
    env = DummyVecEnv([lambda: Monitor(SampleEnv(box(4)))] * 2)
    model = value_based("MlpPolicy", env, n_workers=n_workers)
    model.set_logger(configure(str(tmp_path), ["stdout", "csv", "json", "tensorboard"]))
    model.learn(200, log_interval=4)
    rows = [json.loads(line) for line in (tmp_path / "progress.json").read_text().splitlines()]

    dqn = DQN("MlpPolicy", Monitor(SampleEnv(box(4))), learning_starts=5)
    dqn.set_logger(configure(str(tmp_path / "dqn"), ["json"]))
    dqn.learn(100)
    keys_of_dqn = set(json.loads((tmp_path / "dqn" / "progress.json").read_text().splitlines()[-1]))
    ours = {f"async/{key}" for key in ("gradient_staleness", "n_workers", "updates_per_second", "worker_idle_fraction")}
    assert set(rows[-1]) == keys_of_dqn | ours | {"train/grad_norm", "train/q_mean"}
    assert "rollout/success_rate" in keys_of_dqn

    # Episodes of 7 steps, a log for every 4; with two workers, one lane may be ahead of the other
    assert [row["time/episodes"] for row in rows] == [4, 8, 12, 16, 20, 24, 28][: len(rows)]
    assert len(rows) >= 6
    assert rows[-1]["rollout/ep_len_mean"] == 7
    assert rows[-1]["rollout/ep_rew_mean"] == 28
    assert rows[-1]["rollout/success_rate"] == 1.0
    assert 4 * 7 * len(rows) <= rows[-1]["time/total_timesteps"] <= 4 * 7 * len(rows) + 2 * 7
    assert 0 <= rows[-1]["async/worker_idle_fraction"] <= 1
    assert "gradient_staleness" in capsys.readouterr().out
    assert len((tmp_path / "progress.csv").read_text().splitlines()) == 1 + len(rows)
    assert list(tmp_path.glob("events.out.tfevents*"))


def test_tensorboard_folder_and_no_logs(algorithm, tmp_path):
    model = algorithm("MlpPolicy", make_env(2), tensorboard_log=str(tmp_path))
    model.learn(100, tb_log_name="mine")
    model.learn(100, tb_log_name="mine")
    model.learn(100, log_interval=None)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{algorithm.__name__}_1", "mine_1", "mine_2"]


def test_window_of_the_statistics(algorithm):
    model = algorithm("MlpPolicy", DummyVecEnv([lambda: Monitor(SampleEnv(box(4)))] * 2), stats_window_size=5)
    model.learn(200)
    assert len(model.ep_info_buffer) == 5


def test_dump_logs_in_a_callback(algorithm, tmp_path):
    model = algorithm("MlpPolicy", make_env(2), n_workers=2)
    model.set_logger(configure(str(tmp_path), ["json"]))

    def dump(locals_, globals_):
        model.logger.record("mine", model.num_timesteps)
        model.dump_logs()
        return True

    model.learn(20, callback=dump, log_interval=None)
    rows = [json.loads(line) for line in (tmp_path / "progress.json").read_text().splitlines()]
    assert [row["mine"] for row in rows] == list(range(2, 21, 2))


# ---------------------------------------------------------------------- getters and setters


def test_learning_rate_schedule(algorithm):
    seen = []

    def keep(locals_, globals_):
        seen.append(model.policy.optimizer.param_groups[0]["lr"])
        return True

    model = algorithm("MlpPolicy", make_env(2), learning_rate=lambda progress: 0.1 * progress)
    model.learn(20, callback=keep)
    # The rate of a call is that of the steps before it, as in SB3
    np.testing.assert_allclose(seen, [0.1 * (1 - n / 20) for n in range(0, 20, 2)])


def test_set_env(algorithm):
    model = algorithm("MlpPolicy", make_env(4), n_workers=2).learn(40)
    other = make_env(4)
    model.set_env(other)
    model.learn(40, reset_num_timesteps=False)
    assert model.get_env() is other
    assert model.num_timesteps == 80
    # Threads need not share the steps equally
    assert sum(len(env.unwrapped.tape) - env.unwrapped.tape.count("reset") for env in other.envs) == 40
    with pytest.raises(ValueError, match="spaces do not match"):
        model.set_env(DummyVecEnv([lambda: gym.make("CartPole-v1")] * 4))


def test_set_env_with_another_number_of_lanes(algorithm):
    model = algorithm("MlpPolicy", make_env(4), n_workers=2).learn(40)
    with pytest.raises(ValueError, match=r"has 2 lane\(s\) and the model's last one had 4: it has to be reset"):
        model.set_env(make_env(2), force_reset=False)
    assert model.n_envs == model.get_env().num_envs == 4
    with pytest.raises(ValueError, match="spaces do not match"):
        model.set_env(DummyVecEnv([lambda: gym.make("CartPole-v1")] * 2))
    assert model.n_envs == 4
    other = make_env(2)
    model.set_env(other)
    assert model.learn(20, reset_num_timesteps=False).num_timesteps == 60
    assert sum(len(env.unwrapped.tape) - env.unwrapped.tape.count("reset") for env in other.envs) == 20


def test_parameters_go_round(algorithm, tmp_path):
    one = algorithm("MlpPolicy", make_env(2), seed=1).learn(100)
    two = algorithm("MlpPolicy", make_env(2), seed=2)
    two.set_parameters(one.get_parameters())
    assert are_equal(weights_of(two), weights_of(one))
    one.save(tmp_path / "one")
    three = algorithm("MlpPolicy", make_env(2), seed=3)
    three.set_parameters(tmp_path / "one")
    assert are_equal(weights_of(three), weights_of(one))
    three.learn(100)


def test_random_seed(algorithm):
    def train():
        model = algorithm("MlpPolicy", make_env(2), backend="serial", seed=1)
        model.set_random_seed(7)
        model.learn(100)
        return weights_of(model)

    assert are_equal(train(), train())


def test_fake_image_env_as_sb3_tests_it(algorithm):
    env = DummyVecEnv([lambda: FakeImageEnv(screen_height=40, screen_width=40, n_channels=1, discrete=True)] * 2)
    model = algorithm("CnnPolicy", env, n_workers=2, policy_kwargs={"features_extractor_kwargs": {"features_dim": 32}})
    model.learn(40)


class Normalizer(BaseFeaturesExtractor):
    """Replaces its buffer instead of changing it in place."""

    def __init__(self, observation_space):
        super().__init__(observation_space, features_dim=4)
        self.register_buffer("mean", th.zeros(4))

    def forward(self, observations):
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * observations.mean(dim=0)
        return observations - self.mean


@pytest.mark.parametrize("n_workers", [1, 2])
def test_buffers_that_are_replaced(algorithm, n_workers):
    model = algorithm(
        "MlpPolicy", make_env(4), n_workers=n_workers, policy_kwargs={"features_extractor_class": Normalizer}
    )
    model.learn(200)
    assert not th.equal(online_network(model).features_extractor.mean, th.zeros(4))


def test_batch_norm_with_a_single_lane(algorithm):
    policy_kwargs = {"features_extractor_class": Extractor}
    model = algorithm("MlpPolicy", make_env(1), policy_kwargs=policy_kwargs, update_interval=5).learn(200)
    assert online_network(model).features_extractor.layers[1].num_batches_tracked > 0


@pytest.mark.parametrize("n_workers", [1, 2])
def test_settings_of_the_optimizer_that_a_callback_changes(algorithm, n_workers):
    optimizer = {"optimizer_class": th.optim.Adam}

    def decay(locals_, globals_):
        model.policy.optimizer.param_groups[0]["weight_decay"] = 1e3
        return True

    model = algorithm("MlpPolicy", make_env(4), n_workers=n_workers, policy_kwargs=optimizer, learning_rate=1e-2)
    norm = sum(float(p.detach().norm()) for p in trained_parameters(model))
    model.learn(1000, callback=decay)
    assert sum(float(p.detach().norm()) for p in trained_parameters(model)) < 0.2 * norm


def test_an_optimizer_in_the_policys_place(algorithm):
    model = algorithm("MlpPolicy", make_env(4), n_workers=2)
    model.policy.optimizer = th.optim.SGD(trained_parameters(model), lr=1e-3, momentum=0.9)
    first = trained_parameters(model)[0]
    before = first.clone()
    model.learn(200)
    assert not th.equal(before, first)
    assert model.policy.optimizer.state[first]["momentum_buffer"].abs().sum() > 0


def test_idle_time_is_a_share(algorithm, tmp_path, monkeypatch):
    """By a clock that goes on when the callback says so: while one of two workers waits, and while both do."""
    now = [0.0]
    monkeypatch.setattr(pool, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    is_busy, release = threading.Event(), threading.Event()

    class BusyEnv(RandomWalkEnv):
        def step(self, action):
            is_busy.set()
            assert release.wait(DEADLINE)
            return super().step(action)

    class OtherEnv(RandomWalkEnv):
        def step(self, action):
            assert is_busy.wait(DEADLINE)
            return super().step(action)

    def let_time_pass(seconds, n_waiting):
        wait_until(lambda: len(model._pool._waiting_since) == n_waiting)
        now[0] += seconds
        model.dump_logs()

    def look(locals_, globals_):
        # Two steps of the other env
        let_time_pass(5.0, n_waiting=1)
        release.set()
        let_time_pass(3.0, n_waiting=2)
        return False

    model = algorithm("MlpPolicy", DummyVecEnv([BusyEnv, OtherEnv]), n_workers=2)
    model.set_logger(configure(str(tmp_path), ["json"]))
    model.learn(1000, callback=look, log_interval=None)
    rows = [json.loads(line) for line in (tmp_path / "progress.json").read_text().splitlines()]
    assert [row["async/worker_idle_fraction"] for row in rows] == [0.5, 1.0]


def test_no_updates_are_kept_without_logs(algorithm):
    model = algorithm("MlpPolicy", make_env(2), n_workers=2)
    model.learn(500, log_interval=None)
    assert model._update_log.n_updates == model._n_updates
    # Sums alone, one for each key
    assert {type(total) for total, _ in model._update_log._sums.values()} == {float}


def test_logs_are_means_over_the_updates_since_the_last_one(algorithm, tmp_path):
    """The norms of the gradients are those before clipping."""
    model = algorithm("MlpPolicy", make_env(4), n_workers=2, backend="serial", max_grad_norm=1e-6)
    model.set_logger(configure(str(tmp_path), ["json"]))
    updates, expected = [], []

    def dump(locals_, globals_):
        updates.extend(locals_["transitions"].updates)
        if model.num_timesteps % 80 == 0:
            keys = {key for update in updates for key in update.metrics}
            means = {key: np.mean([u.metrics[key] for u in updates if key in u.metrics]) for key in keys}
            n_before = expected[-1]["train/n_updates"] if expected else 0
            expected.append({**means, "train/n_updates": n_before + len(updates), "async/n_workers": 2})
            updates.clear()
            model.dump_logs()
        return True

    model.learn(240, callback=dump, log_interval=None)
    rows = [json.loads(line) for line in (tmp_path / "progress.json").read_text().splitlines()]
    assert [{key: row[key] for key in each} for row, each in zip(rows, expected, strict=True)] == [
        pytest.approx(each, rel=1e-4) for each in expected
    ]
    assert all(row["train/grad_norm"] > 1e-5 for row in rows)


def test_the_exploration_rate_is_the_mean_of_the_lanes(value_based):
    epsilons = {"exploration_final_eps": (0.1, 0.5), "exploration_final_probs": (0.75, 0.25)}
    model = value_based("MlpPolicy", make_env(4), **epsilons)
    assert model.learn(40).exploration_rate == pytest.approx(0.2)


def test_metrics_of_a_rollout_in_parts():
    assert _average([({"a": 1.0}, 1.0), ({"a": 4.0, "b": 2.0}, 3.0)]) == {"a": 3.25, "b": 2.0}


@pytest.mark.parametrize("force_reset", [True, False])
def test_an_env_that_goes_on_need_not_be_reset(algorithm, force_reset):
    model, other = algorithm("MlpPolicy", make_env(2), n_workers=1).learn(4), make_env(2)
    other.reset()
    model.set_env(other, force_reset=force_reset)
    model.learn(4, reset_num_timesteps=False)
    assert [lane.unwrapped.tape[1] == "reset" for lane in other.envs] == [force_reset] * 2
