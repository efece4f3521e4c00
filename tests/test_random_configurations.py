"""Whatever an SB3 user combines, it trains: no error, no hang, no thread left, weights that are finite and moved."""

import threading

import torch as th
from gymnasium import spaces
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    SubprocVecEnv,
    VecCheckNan,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
)

from sb3_async1step.registry import ALGORITHMS
from sb3_async1step.value_based.algorithm import ValueBasedAlgorithm
from tests.test_contract import SampleEnv, box, image

SPACES = {
    "vector": box(3),
    "image": image(36, 36, 1),
    "discrete": spaces.Discrete(4),
    "multi-binary": spaces.MultiBinary(3),
    "dict": spaces.Dict({"pixels": image(36, 36, 1), "speed": box(2)}),
}
WRAPPERS = {
    "stack": lambda env: VecFrameStack(env, 2),
    "monitor": VecMonitor,
    "normalize": lambda env: VecNormalize(env, norm_obs=False),
    "check": VecCheckNan,
}
# Stacking needs a Box or a Dict of them
UNSTACKABLE = ("discrete", "multi-binary")


def value_based_parameters():
    return st.fixed_dictionaries(
        {
            "target_update_interval": st.sampled_from([1, 3, 16, 100, 10_000]),
            "tau": st.sampled_from([1.0, 0.5, 0.01]),
            "exploration_fraction": st.sampled_from([0.1, 1.0]),
            "exploration_final_eps": st.sampled_from([(0.1, 0.01, 0.5), 0.0, 0.2]),
            "loss": st.sampled_from(["mse", "huber"]),
        }
    )


def actor_critic_parameters():
    return st.fixed_dictionaries(
        {
            "gae_lambda": st.sampled_from([1.0, 0.9, 0.0]),
            "ent_coef": st.sampled_from([0.0, 0.01]),
            "vf_coef": st.sampled_from([0.0, 0.5]),
            "normalize_advantage": st.booleans(),
        }
    )


@st.composite
def configurations(draw):
    name = draw(st.sampled_from(sorted(SPACES)))
    n_lanes = draw(st.integers(1, 6))
    wrappers = draw(st.lists(st.sampled_from(sorted(WRAPPERS)), unique=True, max_size=3))
    algorithm = draw(st.sampled_from([entry.model_class for entry in ALGORITHMS.values()]))
    value_based = issubclass(algorithm, ValueBasedAlgorithm)
    return {
        "space": name,
        "n_lanes": n_lanes,
        # Starting processes takes seconds
        "vec_env": draw(st.sampled_from([DummyVecEnv] * 49 + [SubprocVecEnv])),
        "max_steps": draw(st.integers(1, 9)),
        "wrappers": [wrapper for wrapper in wrappers if not (wrapper == "stack" and name in UNSTACKABLE)],
        "algorithm": algorithm,
        "n_steps": draw(st.integers(1, 100)),
        "log_interval": draw(st.sampled_from([None, 1, 4])),
        "parameters": {
            "n_workers": draw(st.one_of(st.just("auto"), st.integers(1, n_lanes))),
            "backend": draw(st.sampled_from(["threads", "threads", "serial"])),
            "update_interval": draw(st.integers(1, 7)),
            "gamma": draw(st.sampled_from([0.0, 0.9, 1.0])),
            "max_grad_norm": draw(st.sampled_from([0.1, 40.0])),
            "lock_updates": draw(st.booleans()),
            "seed": draw(st.sampled_from([None, 0])),
            **draw(value_based_parameters() if value_based else actor_critic_parameters()),
        },
        "policy_kwargs": draw(st.sampled_from([{}, {"optimizer_class": th.optim.Adam}])),
    }


def make_env(configuration):
    def make_lane():
        return SampleEnv(SPACES[configuration["space"]], configuration["max_steps"])

    make = configuration["vec_env"]
    env = make([make_lane] * configuration["n_lanes"])
    for wrapper in configuration["wrappers"]:
        env = WRAPPERS[wrapper](env)
    return env


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(configurations())
def test_any_configuration_trains(configuration):
    policy = {"image": "CnnPolicy", "dict": "MultiInputPolicy"}.get(configuration["space"], "MlpPolicy")
    policy_kwargs = {"net_arch": [8], **configuration["policy_kwargs"]}
    env = make_env(configuration)
    n_steps, n_lanes = configuration["n_steps"], configuration["n_lanes"]
    model = configuration["algorithm"](policy, env, policy_kwargs=policy_kwargs, **configuration["parameters"])
    threads_before = set(threading.enumerate())

    model.learn(n_steps, log_interval=configuration["log_interval"])
    assert n_steps <= model.num_timesteps < n_steps + n_lanes
    before = model.num_timesteps
    model.learn(50, log_interval=configuration["log_interval"], reset_num_timesteps=False)
    assert before + 50 <= model.num_timesteps < before + 50 + n_lanes

    assert set(threading.enumerate()) <= threads_before
    assert model._n_updates > 0
    assert all(bool(parameter.isfinite().all()) for parameter in model.policy.parameters())
    action, _ = model.predict(env.observation_space.sample())
    assert model.action_space.contains(int(action))
    env.close()
