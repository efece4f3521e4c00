"""What A3C has and the value-based methods have not: all action spaces, SB3's actor-critic policies, A2C's logs."""

import copy
import json
import pickle
import threading

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import A2C
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import FakeImageEnv
from stable_baselines3.common.logger import configure
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import distributions

from sb3_async1step import A3C, NipsCNN, SharedRMSprop
from sb3_async1step.a3c import MlpPolicy
from sb3_async1step.a3c.random_draws import DRAWING_FUNCTIONS, DrawFrom
from tests.envs import BoxWalkEnv, RandomWalkEnv, make_env
from tests.helpers import DEADLINE, are_equal, weights_of, with_worker
from tests.test_vec_env_split import DictEnv


class CheckingEnv(RandomWalkEnv):
    """Whatever its action space, it takes no action from outside, and prefers large ones."""

    def __init__(self, action_space):
        super().__init__()
        self.action_space = action_space
        self.seen = []

    def step(self, action):
        assert self.action_space.contains(action), action
        self.seen.append(np.array(action))
        _, reward, *rest = super().step(0)
        return self.state.astype(np.float32), reward + float(np.sum(action)), *rest


SQUASHED = {"use_sde": True, "policy_kwargs": {"squash_output": True}}
UNEVEN_BOX = spaces.Box(np.array([-0.2, 1.0], np.float32), np.array([0.1, 3.0], np.float32))
ACTIONS = {
    "box": (UNEVEN_BOX, {}),
    "box of no dimension": (spaces.Box(-0.5, 0.5, (), np.float32), {}),
    "box of two dimensions": (spaces.Box(-0.5, 0.5, (2, 3), np.float32), {}),
    "sde": (UNEVEN_BOX, {"use_sde": True, "sde_sample_freq": 2}),
    "squashed": (UNEVEN_BOX, SQUASHED),
    "squashed, of two dimensions": (spaces.Box(-0.5, 2.0, (2, 3), np.float32), SQUASHED),
    "discrete": (spaces.Discrete(3, start=5), {}),
    "multi-discrete": (spaces.MultiDiscrete([3, 2]), {}),
    "multi-discrete from elsewhere": (spaces.MultiDiscrete([3, 2], start=[-1, 4]), {}),
    "multi-binary": (spaces.MultiBinary(3), {}),
}


@pytest.mark.parametrize("n_workers", [1, 2])
@pytest.mark.parametrize("name", ACTIONS)
def test_action_spaces(name, n_workers, tmp_path):
    space, parameters = ACTIONS[name]
    model = A3C("MlpPolicy", DummyVecEnv([lambda: CheckingEnv(space)] * 4), n_workers=n_workers, seed=0, **parameters)
    before = weights_of(model)

    def look(locals_, globals_):
        assert all(space.contains(action) for action in locals_["actions"])
        return True

    model.learn(200, callback=look)
    assert not are_equal(weights_of(model), before)
    observations = model.get_env().reset()
    for deterministic in (True, False):
        actions = model.predict(np.repeat(observations, 10, axis=0), deterministic=deterministic)[0]
        assert len(actions) == 40 and all(space.contains(action) for action in actions)
        assert space.contains(model.predict(observations[0], deterministic=deterministic)[0])
    model.save(tmp_path / "model")
    loaded = A3C.load(tmp_path / "model", env=DummyVecEnv([lambda: CheckingEnv(space)] * 4))
    expected = model.predict(observations, deterministic=True)[0]
    np.testing.assert_array_equal(loaded.predict(observations, deterministic=True)[0], expected)
    assert loaded.learn(40, reset_num_timesteps=False).num_timesteps == 240


@pytest.mark.parametrize("space", [spaces.Discrete(3, start=5), spaces.MultiDiscrete([3, 2], start=[-1, 4])])
def test_learning_and_predicting_number_actions_alike(space):
    """A trained policy predicts the action that its env rewarded, and not its neighbour."""
    env = DummyVecEnv([lambda: CheckingEnv(space)] * 8)
    model = A3C("MlpPolicy", env, learning_rate=0.01, gamma=0.0, ent_coef=0.0, seed=0).learn(4000)
    best = space.start + (space.n if isinstance(space, spaces.Discrete) else space.nvec) - 1
    np.testing.assert_array_equal(model.predict(env.reset()[0], deterministic=True)[0], best)


def record_rollouts(seen):
    def compute_loss(parents, worker, rollout):
        seen.append(rollout.actions.copy())
        return parents(rollout)

    return with_worker(A3C, compute_loss=compute_loss)


@pytest.mark.parametrize("squashed", [False, True])
def test_the_gradient_is_that_of_the_sampled_actions(squashed):
    """As with A2C: the env gets a clipped or rescaled copy of the actions."""
    sampled, space = [], spaces.Box(-0.1, 0.3, (1,), np.float32)
    env = DummyVecEnv([lambda: CheckingEnv(space)] * 2)
    model = record_rollouts(sampled)("MlpPolicy", env, n_workers=1, seed=0, **(SQUASHED if squashed else {}))
    model.learn(200)
    actions = np.concatenate(sampled)
    executed = np.stack([lane.unwrapped.seen for lane in env.envs], axis=1)
    expected = -0.1 + 0.2 * (actions + 1) if squashed else np.clip(actions, -0.1, 0.3)
    np.testing.assert_allclose(executed, expected, atol=1e-6)
    if squashed:
        assert np.abs(actions).max() < 1
    else:
        assert actions.min() < -0.1 and actions.max() > 0.3


class StillEnv(CheckingEnv):
    """Nothing ever changes."""

    def step(self, action):
        super().step(action)
        return np.ones(4, np.float32), 0.0, False, False, {}

    def reset(self, **kwargs):
        return np.ones(4, np.float32), super().reset(**kwargs)[1]


@pytest.mark.parametrize(
    ("freq", "draws"), [(-1, [0, 0, 0, 0, 0]), (2, [0, 0, 1, 1, 2]), (1, [0, 1, 2, 3, 4]), (5, [0, 0, 0, 0, 0])]
)
def test_state_dependent_noise_is_drawn_for_each_segment_and_every_few_steps(freq, draws):
    """In the same state, the same noise gives the same action; each lane has its own."""
    sampled = []
    env = DummyVecEnv([lambda: StillEnv(spaces.Box(-1, 1, (1,), np.float32))] * 2)
    model = record_rollouts(sampled)(
        "MlpPolicy", env, n_workers=1, seed=0, learning_rate=0.0, use_sde=True, sde_sample_freq=freq
    )
    model.learn(40)
    assert len(sampled) == 4
    first_of_each = set()
    for actions in sampled:
        for lane in range(2):
            noise = actions[:, lane, 0].round(4).tolist()
            assert [noise.index(value) for value in noise] == [draws.index(draw) for draw in draws]
            first_of_each.add(noise[0])
    assert len(first_of_each) == 8


def test_noise_is_drawn_from_the_workers_own_generator():
    """Sampling leaves PyTorch's generator as it was."""
    for env_class, parameters in ((RandomWalkEnv, {}), (BoxWalkEnv, {"use_sde": True})):
        model = A3C("MlpPolicy", make_env(2, env_class), n_workers=2, seed=0, **parameters)
        before = th.get_rng_state()
        model.learn(100)
        assert th.equal(th.get_rng_state(), before)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"gae_lambda": 1.1}, r"gae_lambda must be in \[0, 1\], got 1.1"),
        ({"gae_lambda": None}, r"gae_lambda must be in \[0, 1\], got None"),
        ({"ent_coef": -0.01}, "ent_coef must be a finite number of at least 0, got -0.01"),
        ({"ent_coef": "auto"}, "ent_coef must be a finite number of at least 0, got 'auto'"),
        ({"vf_coef": float("inf")}, "vf_coef must be a finite number of at least 0, got inf"),
        ({"vf_coef": float("nan")}, "vf_coef must be a finite number of at least 0, got nan"),
        ({"rms_prop_eps": -1e-5}, "rms_prop_eps must be a positive, finite number, got -1e-05"),
        ({"rms_prop_eps": 0.0}, "rms_prop_eps must be a positive, finite number, got 0.0"),
        ({"sde_sample_freq": 0}, "sde_sample_freq must be -1, or 1 or more, got 0"),
        ({"sde_sample_freq": -2}, "sde_sample_freq must be -1, or 1 or more, got -2"),
        ({"sde_sample_freq": 1.5}, "sde_sample_freq must be -1, or 1 or more, got 1.5"),
        ({"normalize_advantage": 1}, "normalize_advantage must be True or False, got 1"),
        ({"use_sde": "yes"}, "use_sde must be True or False, got 'yes'"),
    ],
)
def test_parameters_out_of_range(parameters, message):
    with pytest.raises(ValueError, match=message):
        A3C("MlpPolicy", make_env(2, BoxWalkEnv), **parameters)


def test_state_dependent_noise_needs_continuous_actions():
    with pytest.raises(ValueError, match="gSDE"):
        A3C("MlpPolicy", make_env(2), use_sde=True)


def test_action_spaces_that_no_policy_has():
    class DictActions(RandomWalkEnv):
        action_space = spaces.Dict({"jump": spaces.Discrete(2)})

    with pytest.raises(AssertionError, match=r"only supports .*MultiBinary.* as action spaces but .* was provided"):
        A3C("MlpPolicy", make_env(2, DictActions))


# ---------------------------------------------------------------------- policies


class OwnPolicy(ActorCriticPolicy):
    """With a temperature that is learned."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.temperature = th.nn.Parameter(th.ones(()))
        self.optimizer.add_param_group({"params": [self.temperature]})

    def _get_action_dist_from_latent(self, latent_pi):
        return self.action_dist.proba_distribution(self.action_net(latent_pi) / self.temperature)


class Rigid(ActorCriticPolicy):
    """Acts by its ``forward()``, as A2C's policies do."""

    def forward(self, obs, deterministic=False):
        actions, values, log_prob = super().forward(obs, deterministic)
        return th.zeros_like(actions), values, log_prob


@pytest.mark.parametrize("n_workers", [1, 2])
def test_workers_act_by_the_users_forward(n_workers):
    class Record(BaseCallback):
        actions = ()

        def _on_step(self):
            self.actions = (*self.actions, *self.locals["actions"])
            return True

    seen = []
    for policy in (Rigid, "MlpPolicy"):
        callback = Record()
        A3C(policy, make_env(4), n_workers=n_workers, seed=0).learn(100, callback=callback)
        seen.append(set(callback.actions))
    assert seen[0] == {0} and len(seen[1]) > 1


def test_a_compiled_policy():
    model = A3C("MlpPolicy", make_env(4), n_workers=2, seed=0)
    before = weights_of(model)
    model.policy = th.compile(model.policy, backend="eager")
    model.learn(100)
    assert not are_equal(before, weights_of(model))
    assert model.predict(np.zeros((3, 4), np.float32))[0].shape == (3,)


@pytest.mark.parametrize("n_workers", [1, 2])
def test_a_policy_of_the_users(n_workers, tmp_path):
    model = A3C(OwnPolicy, make_env(4), n_workers=n_workers, learning_rate=0.01, seed=0).learn(200)
    assert model.policy.temperature.item() != 1.0
    model.save(tmp_path / "model")
    assert are_equal(weights_of(A3C.load(tmp_path / "model")), weights_of(model))


@pytest.mark.parametrize("space", [spaces.Discrete(3, start=5), spaces.MultiDiscrete([3, 2], start=[0, 1])])
def test_policies_that_number_actions_from_zero(space):
    """Their ``predict()`` would say other actions than those that were trained."""
    env = DummyVecEnv([lambda: CheckingEnv(space)])
    with pytest.raises(ValueError, match=r"OwnPolicy predicts actions that start at 0: derive it from .*\.MlpPolicy"):
        A3C(OwnPolicy, env)

    class Derived(MlpPolicy):
        pass

    assert space.contains(A3C(Derived, env).predict(np.zeros(4, np.float32))[0])


@pytest.mark.parametrize(
    ("policy_kwargs", "env_class"),
    [
        ({"net_arch": []}, RandomWalkEnv),
        ({"net_arch": {"pi": [8], "vf": [16, 4]}, "activation_fn": th.nn.ReLU}, RandomWalkEnv),
        ({"net_arch": [8], "share_features_extractor": False, "log_std_init": -1.0}, BoxWalkEnv),
        ({"net_arch": [8], "optimizer_class": th.optim.Adam, "optimizer_kwargs": {"weight_decay": 0.1}}, BoxWalkEnv),
    ],
)
def test_policy_kwargs_of_a2c(policy_kwargs, env_class):
    model = A3C("MlpPolicy", make_env(4, env_class), n_workers=2, policy_kwargs=policy_kwargs).learn(100)
    a2c = A2C("MlpPolicy", make_env(1, env_class), policy_kwargs=policy_kwargs, device="cpu")
    model.policy.load_state_dict(a2c.policy.state_dict())
    observations = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    np.testing.assert_array_equal(
        model.predict(observations, deterministic=True)[0], a2c.predict(observations, deterministic=True)[0]
    )


@pytest.mark.parametrize("share_features_extractor", [False, True])
def test_dict_observations(share_features_extractor):
    policy_kwargs = {"net_arch": [8], "share_features_extractor": share_features_extractor}
    env = DummyVecEnv([DictEnv] * 4)
    model = A3C("MultiInputPolicy", env, n_workers=2, seed=0, policy_kwargs=policy_kwargs)
    before = weights_of(model)
    model.learn(100)
    # The critic's extractor, too
    assert not any(th.equal(value, before[name]) for name, value in weights_of(model).items())
    assert model.predict(env.reset(), deterministic=True)[0].shape == (4,)


@pytest.mark.parametrize("share_features_extractor", [True, False])
def test_mixed_precision(share_features_extractor, tmp_path):
    """Features in bfloat16; what is learned and what is returned in float32."""
    env = make_vec_env(lambda: FakeImageEnv(screen_height=40, screen_width=40), n_envs=2)
    policy_kwargs = {"mixed_precision": True, "share_features_extractor": share_features_extractor, "net_arch": []}
    policy_kwargs |= {"features_extractor_class": NipsCNN, "features_extractor_kwargs": {"features_dim": 16}}
    model = A3C("CnnPolicy", env, n_workers=2, policy_kwargs=policy_kwargs, seed=0)
    policy = model.policy
    observations = policy.obs_to_tensor(model.env.reset())[0]
    dtypes = []
    hooks = [
        extractor.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
        for extractor in {policy.pi_features_extractor, policy.vf_features_extractor}
    ]
    with th.no_grad():
        mixed = policy.predict_values(observations), policy.get_distribution(observations).distribution.logits
        policy.mixed_precision = False
        exact = policy.predict_values(observations), policy.get_distribution(observations).distribution.logits
        policy.mixed_precision = True
    assert dtypes == [th.bfloat16] * 2 + [th.float32] * 2
    for a, b in zip(mixed, exact, strict=True):
        assert a.dtype == b.dtype == th.float32
        assert not th.equal(a, b) and th.allclose(a, b, atol=0.02)
    for hook in hooks:
        hook.remove()
    before = [parameter.clone() for parameter in policy.parameters()]
    model.learn(60)
    assert {parameter.dtype for parameter in policy.parameters()} == {th.float32}
    assert not any(th.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))
    model.save(tmp_path / "model")
    assert A3C.load(tmp_path / "model").policy.mixed_precision


def test_the_optimizer():
    assert isinstance(A3C("MlpPolicy", make_env(2)).policy.optimizer, SharedRMSprop)
    with_eps = A3C("MlpPolicy", make_env(2), rms_prop_eps=0.01).policy.optimizer
    assert {group["eps"] for group in with_eps.param_groups} == {0.01}
    named = A3C("MlpPolicy", make_env(2), rms_prop_eps=0.01, policy_kwargs={"optimizer_class": SharedRMSprop})
    assert {group["eps"] for group in named.policy.optimizer.param_groups} == {0.01}
    adam = {"optimizer_class": th.optim.Adam, "optimizer_kwargs": {"eps": 1e-3}}
    other = A3C("MlpPolicy", make_env(2), rms_prop_eps=0.01, policy_kwargs=adam).policy.optimizer
    assert isinstance(other, th.optim.Adam) and other.param_groups[0]["eps"] == 1e-3


def test_the_papers_hyperparameters():
    env = make_vec_env(lambda: FakeImageEnv(screen_height=84, screen_width=84, n_channels=4), n_envs=2)
    network = {"features_extractor_class": NipsCNN, "net_arch": []}
    model = A3C("CnnPolicy", env, **A3C.paper_hyperparams(), policy_kwargs=network)
    kinds = [type(layer).__name__ for layer in model.policy.modules() if not list(layer.children())]
    assert [kind for kind in kinds if kind in ("Conv2d", "Linear")] == ["Conv2d"] * 2 + ["Linear"] * 3
    assert isinstance(model.policy.optimizer, SharedRMSprop)
    assert model.policy.optimizer.param_groups[0]["eps"] == 0.1
    assert [model.lr_schedule(progress) for progress in (1.0, 0.5, 0.0)] == [7e-4, 3.5e-4, 0.0]
    values = (model.update_interval, model.gae_lambda, model.ent_coef, model.vf_coef, model.max_grad_norm)
    assert values == (5, 1.0, 0.01, 0.5, 40.0)
    assert model.learn(20).num_timesteps == 20


@pytest.mark.filterwarnings("ignore:.*single env lane")
def test_a_single_advantage_is_not_normalized():
    """Neither of one step at a time, nor at the end of an episode."""
    weights = []
    for normalize in (False, True):
        model = A3C("MlpPolicy", make_env(1), update_interval=1, normalize_advantage=normalize, seed=0)
        weights.append(weights_of(model.learn(50)))
    assert are_equal(*weights)
    A3C("MlpPolicy", make_env(1, max_steps=6), update_interval=5, normalize_advantage=True, seed=0).learn(50)


# ---------------------------------------------------------------------- logging


def read_rows(folder):
    return [json.loads(line) for line in (folder / "progress.json").read_text().splitlines()]


@pytest.mark.parametrize("n_workers", [1, 2])
@pytest.mark.parametrize("env_class", [RandomWalkEnv, BoxWalkEnv])
def test_log_keys_are_a2cs(env_class, n_workers, tmp_path):
    """A log for every ``log_interval`` iterations of ``update_interval`` vector steps."""
    rows = {}
    for algorithm, parameters in ((A2C, {"n_steps": 5}), (A3C, {"update_interval": 5, "n_workers": n_workers})):
        model = algorithm("MlpPolicy", make_env(4, env_class), device="cpu", **parameters)
        model.set_logger(configure(str(tmp_path / algorithm.__name__), ["json"]))
        model.learn(4 * 5 * 6, log_interval=2)
        rows[algorithm] = read_rows(tmp_path / algorithm.__name__)
    ours = {f"async/{key}" for key in ("gradient_staleness", "n_workers", "updates_per_second", "worker_idle_fraction")}
    ours.add("train/grad_norm")
    assert set(rows[A3C][-1]) == set(rows[A2C][-1]) | ours
    assert ("train/std" in rows[A3C][-1]) == (env_class is BoxWalkEnv)
    # Of the first updates
    assert rows[A3C][0].get("train/std", 1.0) == pytest.approx(1.0, abs=0.05)
    for key in ("time/iterations", "time/total_timesteps"):
        assert [row[key] for row in rows[A3C]] == [row[key] for row in rows[A2C]]
    assert all(row["train/value_loss"] > 0 for row in rows[A3C])
    if env_class is RandomWalkEnv:
        # Nearly that of a policy that chooses each of three actions as often
        assert rows[A3C][0]["train/entropy_loss"] == pytest.approx(-np.log(3), abs=0.05)


def test_an_explained_variance_that_is_undefined_does_not_hide_the_others(tmp_path):
    """Returns of a single time step have no variance: some updates have nothing to explain."""
    model = A3C("MlpPolicy", make_env(1, max_steps=2, p_terminate=0.3), seed=0)
    model.set_logger(configure(str(tmp_path), ["json"]))
    with pytest.warns(UserWarning, match="single env lane"):
        model.learn(100, log_interval=10)
    assert all(np.isfinite(row["train/explained_variance"]) for row in read_rows(tmp_path))


ONES = th.ones(3)
DRAWS = {
    "_sample_dirichlet": lambda: distributions.Dirichlet(ONES).sample(),
    "_standard_gamma": lambda: distributions.Gamma(ONES, ONES).sample(),
    "bernoulli": lambda: distributions.Bernoulli(0.5 * ONES).sample(),
    "bernoulli_": lambda: ONES.clone().bernoulli_(0.5),
    "binomial": lambda: distributions.Binomial(9, 0.5 * ONES).sample(),
    "cauchy_": lambda: distributions.Cauchy(ONES, ONES).sample(),
    "exponential_": lambda: distributions.Exponential(ONES).sample(),
    "geometric_": lambda: ONES.clone().geometric_(0.5),
    "log_normal_": lambda: ONES.clone().log_normal_(),
    "multinomial": lambda: distributions.Categorical(ONES).sample((9,)),
    "normal": lambda: distributions.Normal(ONES, ONES).sample(),
    "normal_": lambda: distributions.Normal(ONES, ONES).rsample(),
    "poisson": lambda: distributions.Poisson(9 * ONES).sample(),
    "rand": lambda: distributions.Uniform(0 * ONES, ONES).sample(),
    "rand_like": lambda: th.rand_like(ONES),
    "randint": lambda: th.randint(9, (9,)),
    "randint_like": lambda: th.randint_like(ONES, 9),
    "randn": lambda: th.randn(3),
    "randn_like": lambda: th.randn_like(ONES),
    "random_": lambda: ONES.clone().random_(),
    "randperm": lambda: th.randperm(9),
    "uniform_": lambda: ONES.clone().uniform_(),
}


@pytest.mark.parametrize("name", sorted(DRAWING_FUNCTIONS))
def test_draws_from_a_generator_of_its_own(name):
    """The numbers of the global one, seeded alike; that one stays as it is, and others still draw from it."""
    draw = DRAWS[name]
    th.manual_seed(7)
    expected = [draw(), draw()]
    th.manual_seed(1)
    before, of_the_other = th.get_rng_state(), []
    with DrawFrom(th.Generator().manual_seed(7)):
        first = draw()
        other = threading.Thread(target=lambda: of_the_other.append(draw()))
        other.start()
        other.join()
        second = draw()
    assert th.equal(first, expected[0]) and th.equal(second, expected[1])
    after = th.get_rng_state()
    th.manual_seed(1)
    assert th.equal(th.get_rng_state(), before)
    assert th.equal(of_the_other[0], draw()) and th.equal(th.get_rng_state(), after)


def test_a_generator_that_is_given_is_kept():
    expected = th.rand(3, generator=th.Generator().manual_seed(5))
    with DrawFrom(th.Generator().manual_seed(7)):
        assert th.equal(th.rand(3, generator=th.Generator().manual_seed(5)), expected)


@pytest.mark.parametrize("name", ACTIONS)
def test_the_global_generator_is_left_alone(name):
    """Neither does the training draw from it, nor does it disturb the training that somebody else does."""

    class Draws(BaseCallback):
        def _on_step(self):
            th.manual_seed(self.n_calls)
            return True

    def train(callback):
        space, parameters = ACTIONS[name]
        env = DummyVecEnv([lambda: CheckingEnv(space)] * 4)
        model = A3C("MlpPolicy", env, n_workers=2, backend="serial", seed=0, **parameters)
        before = th.get_rng_state()
        model.learn(40, callback)
        return before, weights_of(model)

    before, weights = train(None)
    assert th.equal(th.get_rng_state(), before)
    assert are_equal(train(Draws())[1], weights)


@pytest.mark.parametrize("n_workers", [1, 2])
def test_predict_explores_with_the_noise_of_today(n_workers):
    """As with A2C: not with that of the first standard deviations."""

    def calm(locals_, globals_):
        locals_["self"].policy.log_std.data.fill_(-5.0)
        return True

    env = DummyVecEnv([BoxWalkEnv] * 4)
    model = A3C("MlpPolicy", env, n_workers=n_workers, use_sde=True, seed=0).learn(200, callback=calm)
    assert model.policy.action_dist.exploration_mat.abs().max() < 0.1
    observation = np.full(env.observation_space.shape, 0.5, np.float32)
    actions = [model.predict(observation, deterministic=choice)[0] for choice in (False, True)]
    np.testing.assert_allclose(*actions, atol=0.5)


@pytest.mark.parametrize("use_sde", [False, True])
def test_copies_of_a_policy_with_graphs(use_sde):
    """SB3's distributions keep what they were last called with, in graphs, which can't be copied."""
    model = A3C("MlpPolicy", make_env(2, BoxWalkEnv), use_sde=use_sde, seed=0)
    observations = np.zeros((2, 4), np.float32)
    copies = [copy.deepcopy(model)]

    def look(locals_, globals_):
        model.policy.evaluate_actions(th.zeros(2, 4), th.zeros(2, 2))
        copies.append(copy.deepcopy(model))
        return True

    model.learn(4, callback=look)
    copies.append(copy.deepcopy(model))
    for twin in (*copies, pickle.loads(pickle.dumps(model))):
        assert twin.predict(observations, deterministic=True)[0].shape == (2, 2)
        assert twin.predict(observations)[0].shape == (2, 2)
        twin.learn(4)
    assert are_equal(weights_of(copy.deepcopy(model)), weights_of(model))
    if use_sde:
        assert th.equal(
            copy.deepcopy(model).policy.action_dist.exploration_mat, model.policy.action_dist.exploration_mat
        )


def test_envs_that_play_against_the_model():
    """Two workers ask it for actions at the same time. SB3's policies keep the parameters of one distribution."""
    observations = np.random.default_rng(0).normal(size=(2, 100, 4)).astype(np.float32)
    both, is_playing = threading.Barrier(2), threading.local()

    class Meeting(MlpPolicy):
        def get_distribution(self, obs):
            distribution = super().get_distribution(obs)
            if getattr(is_playing, "yes", False):
                both.wait(DEADLINE)
            return distribution

    class Duel(RandomWalkEnv):
        def step(self, action):
            number = self.unwrapped.number
            is_playing.yes = True
            answers[number], _ = model.predict(observations[number], deterministic=True)
            is_playing.yes = False
            return super().step(action)

    env = make_env(2, Duel)
    for number, lane in enumerate(env.envs):
        lane.unwrapped.number = number
    model = A3C(Meeting, env, n_workers=2, seed=0)
    expected = [model.predict(row, deterministic=True)[0] for row in observations]
    assert not np.array_equal(*expected)
    answers = [None, None]
    # No update within the first segment
    model.learn(2)
    assert all(np.array_equal(*pair) for pair in zip(answers, expected, strict=True))


def test_rms_prop_eps_that_changes_between_two_trainings(tmp_path):
    def eps_of(model):
        return {group["eps"] for group in model.policy.optimizer.param_groups}

    model = A3C("MlpPolicy", make_env(2), rms_prop_eps=0.01).learn(20)
    model.save(tmp_path / "model")
    model.rms_prop_eps = 0.1
    assert eps_of(model.learn(20)) == {0.1}
    loaded = A3C.load(tmp_path / "model", env=make_env(2), rms_prop_eps=0.5)
    assert eps_of(loaded.learn(20)) == {0.5}
    # Nothing else changes it
    for group in loaded.policy.optimizer.param_groups:
        group["eps"] = 0.75
    assert eps_of(loaded.learn(20)) == {0.75}
    # What the user says of the optimizer comes first
    named = A3C("MlpPolicy", make_env(2), rms_prop_eps=0.1, policy_kwargs={"optimizer_kwargs": {"eps": 0.25}})
    assert eps_of(named.learn(20)) == {0.25}


def test_rms_prop_eps_of_parameters_that_are_set(tmp_path):
    """The state of the optimizer has it."""

    def make(rms_prop_eps, **optimizer_kwargs):
        policy_kwargs = {"optimizer_kwargs": optimizer_kwargs}
        return A3C("MlpPolicy", make_env(2), rms_prop_eps=rms_prop_eps, policy_kwargs=policy_kwargs)

    def eps_of(model):
        (group,) = model.policy.optimizer.param_groups
        return model.rms_prop_eps, group["eps"]

    other = make(0.01)
    other.save(tmp_path / "model")
    for parameters in (other.get_parameters(), str(tmp_path / "model")):
        model = make(0.5)
        assert eps_of(model) == (0.5, 0.5)
        model.set_parameters(parameters)
        assert eps_of(model) == eps_of(model.learn(20)) == (0.01, 0.01)
    # While it learns, too
    model = make(0.5)
    model.learn(20, callback=lambda locals_, globals_: model.set_parameters(other.get_parameters()) or True)
    assert eps_of(model) == (0.01, 0.01)
    # Parameters without an optimizer leave it as it is, and so does what the user says of the optimizer
    model = make(0.5)
    model.set_parameters({"policy": other.get_parameters()["policy"]}, exact_match=False)
    assert eps_of(model) == (0.5, 0.5)
    named = make(0.5, eps=0.25)
    named.set_parameters(named.get_parameters())
    assert eps_of(named) == (0.5, 0.25)
