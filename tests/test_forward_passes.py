"""With an update after each step, one-step Q-learning acts and learns from one forward pass of the online network."""

from typing import ClassVar

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import nn

from sb3_async1step import AsyncOneStepQ, NipsCNN
from sb3_async1step.workers.lanes import Lanes
from tests.envs import RandomWalkEnv, make_env
from tests.helpers import are_equal, weights_of
from tests.test_vec_env_split import ImageEnv


class MyFlatten(FlattenExtractor):
    """Of a class that nothing is known of."""


class MyCNN(NipsCNN):
    """Of a class that nothing is known of."""


class Counting(AsyncOneStepQ):
    """Counts the forward passes of its workers' networks."""

    def _make_workers(self, *args):
        workers = super()._make_workers(*args)
        self.n_passes = 0
        for worker in workers:
            for network in (worker.local.acting_network, worker.local.learning_network):
                network.forward = self.count(network.forward)
        return workers

    def count(self, forward):
        def counted(*args):
            self.n_passes += 1
            return forward(*args)

        return counted


def train(policy, env_class, extractor, **parameters):
    """Take 30 vector steps in 4 lanes."""
    kwargs = {"n_workers": 1, "seed": 0, "learning_rate": 1e-3, **parameters}
    policy_kwargs = {"features_extractor_class": extractor, "net_arch": [16], "layer_norm": False}
    model = Counting(policy, make_env(4, env_class), policy_kwargs=policy_kwargs, **kwargs)
    return model.learn(120)


@pytest.mark.parametrize("n_workers", [1, 2])
@pytest.mark.parametrize(
    ("policy", "extractor", "unknown"), [("MlpPolicy", FlattenExtractor, MyFlatten), ("CnnPolicy", NipsCNN, MyCNN)]
)
def test_one_pass_learns_what_two_learn(policy, extractor, unknown, n_workers):
    env_class = ImageEnv if policy == "CnnPolicy" else RandomWalkEnv
    one = train(policy, env_class, extractor, n_workers=n_workers, backend="serial")
    two = train(policy, env_class, unknown, n_workers=n_workers, backend="serial")
    assert (one.n_passes, two.n_passes) == (30 * n_workers, 60 * n_workers)
    assert are_equal(weights_of(one), weights_of(two))


def test_several_steps_for_an_update_take_a_pass_of_their_own():
    model = train("MlpPolicy", RandomWalkEnv, FlattenExtractor, update_interval=5)
    assert model.n_passes == 30 + 6


@pytest.mark.parametrize(("n_workers", "n_passes"), [(1, 60), (2, 120)])
def test_gradients_of_the_newest_parameters_take_a_pass_of_their_own(n_workers, n_passes):
    model = train(
        "MlpPolicy", RandomWalkEnv, FlattenExtractor, n_workers=n_workers, lock_updates=True, backend="serial"
    )
    assert model.n_passes == n_passes


def test_the_parameters_are_read_before_acting():
    """What another worker changes while the lanes step is staleness."""
    model = AsyncOneStepQ("MlpPolicy", make_env(4), seed=0)
    (worker,) = model._make_workers([Lanes(model.env)], [range(4)], model.env.reset())
    step = model.env.step

    def step_while_others_learn(actions):
        worker.shared.n_updates += 3
        return step(actions)

    model.env.step = step_while_others_learn
    for n in (4, 8):
        worker.begin_step(4)
        (update,) = worker.finish_step(lambda n_lanes, n=n: n).updates
        assert update.gradient_staleness == 3


class InPlace(FlattenExtractor):
    """It scales its input where it is, as it may with DQN."""

    seen: ClassVar[set[float]] = set()

    def forward(self, observations):
        observations /= 100.0
        self.seen.update(observations.unique().tolist())
        return super().forward(observations)


class Constant(RandomWalkEnv):
    observation_space = gym.spaces.Box(1, 200, (3,), np.float32)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        return np.full(3, 100, np.float32), {}

    def step(self, action):
        return np.full(3, 100, np.float32), *super().step(action)[1:]


@pytest.mark.parametrize("n_workers", [1, 2])
def test_an_extractor_that_changes_its_input(algorithm, n_workers):
    InPlace.seen.clear()
    env = DummyVecEnv([Constant] * 4)
    model = algorithm("MlpPolicy", env, n_workers=n_workers, policy_kwargs={"features_extractor_class": InPlace})
    model.learn(100)
    assert InPlace.seen == {1.0}


class Embeds(FlattenExtractor):
    """It takes what the space has, and nothing else: no zeros."""

    def __init__(self, observation_space):
        super().__init__(observation_space)
        self.embedding = nn.Embedding(200, 1)

    def forward(self, observations):
        return self.embedding(observations.long() - 1).squeeze(2)


def test_only_observations_of_the_space_are_computed(algorithm):
    policy_kwargs = {"features_extractor_class": Embeds}
    algorithm("MlpPolicy", DummyVecEnv([Constant] * 2), policy_kwargs=policy_kwargs).learn(20)
