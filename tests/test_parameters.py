"""Bad input gets an error that says what was wrong, what is allowed and what to do."""

import math
import warnings
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.vec_env import DummyVecEnv
from stable_baselines3.dqn.policies import DQNPolicy, QNetwork

from sb3_async1step import AsyncNStepQ, AsyncOneStepQ, HistogramCallback
from sb3_async1step.value_based.policies import MlpPolicy
from tests.envs import RandomWalkEnv, make_env
from tests.test_a3c import CheckingEnv
from tests.test_vec_env_split import UnknownWrapper


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"lock_updates": "auto"}, r"lock_updates must be True or False, got 'auto'"),
        ({"n_workers": 0}, r'n_workers must be "auto" or from 1 to the number of env lanes, got 0'),
        ({"n_workers": -1}, r'n_workers must be "auto" or from 1 to the number of env lanes, got -1'),
        ({"n_workers": 5}, r'n_workers must be "auto" or from 1 to the number of env lanes \(4\), got 5'),
        ({"n_workers": "all"}, r"n_workers must be \"auto\" or .*, got 'all'"),
        ({"n_workers": True}, r"n_workers must be .*, got True"),
        ({"n_workers": 2.0}, r"n_workers must be .*, got 2.0"),
        ({"update_interval": True}, "update_interval must be a whole number of at least 1, got True"),
        ({"gamma": "0.99"}, r"gamma must be in \[0, 1\], got '0.99'"),
        ({"max_grad_norm": None}, "max_grad_norm must be a positive number, got None"),
        ({"backend": ["threads"]}, r"backend must be one of .* got \['threads'\]"),
        ({"n_workers": 1.5}, r"n_workers must be \"auto\" or .*, got 1.5"),
        ({"update_interval": 0}, "update_interval must be a whole number of at least 1, got 0"),
        ({"update_interval": -5}, "update_interval must be a whole number of at least 1, got -5"),
        ({"update_interval": 2.5}, "update_interval must be a whole number of at least 1, got 2.5"),
        ({"gamma": 1.01}, r"gamma must be in \[0, 1\], got 1.01"),
        ({"max_grad_norm": 0}, "max_grad_norm must be a positive number, got 0"),
        ({"n_envs": True}, "n_envs must be a whole number of at least 1, or None, got True"),
        ({"learning_rate": True}, "learning_rate must be a finite number of at least 0, got True"),
        ({"learning_rate": "0.1"}, "learning_rate must be a finite number of at least 0, got '0.1'"),
        ({"learning_rate": -0.1}, "learning_rate must be a finite number of at least 0, got -0.1"),
        ({"learning_rate": np.nan}, "learning_rate must be a finite number of at least 0, got nan"),
        ({"learning_rate": np.inf}, "learning_rate must be a finite number of at least 0, got inf"),
        ({"stats_window_size": 0}, "stats_window_size must be a whole number of at least 1, got 0"),
        ({"stats_window_size": True}, "stats_window_size must be a whole number of at least 1, got True"),
        ({"stats_window_size": None}, "stats_window_size must be a whole number of at least 1, got None"),
        ({"seed": True}, "seed must be a whole number of at least 0, or None, got True"),
        ({"seed": -1}, "seed must be a whole number of at least 0, or None, got -1"),
        ({"seed": 1.5}, "seed must be a whole number of at least 0, or None, got 1.5"),
        ({"backend": "processes"}, r"backend must be one of \['serial', 'threads'\], got 'processes'"),
    ],
)
def test_parameters_out_of_range(algorithm, parameters, message):
    with pytest.raises(ValueError, match=message):
        algorithm("MlpPolicy", make_env(4), **parameters)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"eval_eps": None}, r"eval_eps must be in \[0, 1\], got None"),
        ({"exploration_fraction": "0.1"}, r"exploration_fraction must be in \(0, 1\], got '0.1'"),
        ({"exploration_final_eps": None}, "exploration_final_eps must be one or more values"),
        ({"exploration_final_probs": 0.5}, "exploration_final_probs must be 3 proportions .* got 0.5"),
        ({"loss": ["mse"]}, r"loss must be one of .* got \['mse'\]"),
        ({"target_update_interval": 0}, "target_update_interval must be a whole number of at least 1, got 0"),
        ({"target_update_interval": -1}, "target_update_interval must be a whole number of at least 1, got -1"),
        ({"exploration_final_eps": 1.1}, r"exploration_final_eps must be one or more values in \[0, 1\], got 1.1"),
        ({"exploration_final_eps": -0.1}, r"exploration_final_eps must be one or more values in \[0, 1\], got -0.1"),
        ({"exploration_final_eps": (0.1, 2, 0.5)}, r"exploration_final_eps must be .* got \(0.1, 2, 0.5\)"),
        ({"exploration_final_eps": ()}, "exploration_final_eps must be one or more values"),
        ({"exploration_final_eps": "0.1"}, r"exploration_final_eps must be .* got '0.1'"),
        ({"exploration_final_eps": {0.1: 1.0}}, r"exploration_final_eps must be .* got \{0.1: 1.0\}"),
        ({"exploration_final_eps": {0.1}}, r"exploration_final_eps must be .* got \{0.1\}"),
        ({"exploration_final_eps": iter([0.1])}, r"exploration_final_eps must be .* got <list_iterator"),
        ({"exploration_final_eps": np.eye(3)}, r"exploration_final_eps must be .* got \[\[1.0, 0.0, 0.0\]"),
        ({"exploration_final_probs": {0.4, 0.3}}, "exploration_final_probs must be 3 proportions"),
        ({"exploration_final_eps": (0.1, 0.5)}, "exploration_final_probs must be 2 proportions that sum up to 1"),
        ({"exploration_final_probs": (0.4, 0.3, 0.2)}, "exploration_final_probs must be 3 proportions .*sum up to 1"),
        ({"exploration_final_probs": (1.4, -0.2, -0.2)}, "exploration_final_probs must be 3 proportions"),
        ({"exploration_final_probs": None}, "exploration_final_probs must be 3 proportions .* got None"),
        ({"exploration_fraction": 0.0}, r"exploration_fraction must be in \(0, 1\], got 0.0"),
        ({"exploration_fraction": 1.5}, r"exploration_fraction must be in \(0, 1\], got 1.5"),
        ({"exploration_initial_eps": 1.5}, r"exploration_initial_eps must be in \[0, 1\], got 1.5"),
        ({"eval_eps": -1.0}, r"eval_eps must be in \[0, 1\], got -1.0"),
        ({"tau": float("nan")}, r"tau must be in \[0, 1\], got nan"),
        ({"loss": "mae"}, r"loss must be one of \['huber', 'mse'\], got 'mae'"),
    ],
)
def test_parameters_of_the_value_based_methods_out_of_range(value_based, parameters, message):
    with pytest.raises(ValueError, match=message):
        value_based("MlpPolicy", make_env(4), **parameters)


@pytest.mark.parametrize(
    "kind", [np.array, tuple, list, pd.Series, th.tensor, lambda values: [*map(np.float32, values)]]
)
def test_epsilons_in_any_container(value_based, kind, tmp_path):
    def make(kind):
        eps = {"exploration_final_eps": kind([0.5, 0.125]), "exploration_final_probs": kind([0.25, 0.75])}
        return value_based("MlpPolicy", make_env(4), n_workers=2, seed=0, **eps)

    def epsilons(model):
        return model._get_exploration_schedule(4)(0.0).tolist()

    model = make(kind).learn(40)
    assert epsilons(model) == epsilons(make(list)) == [0.125, 0.5, 0.125, 0.125]
    model.save(tmp_path / "model")
    loaded = value_based.load(tmp_path / "model", env=make_env(4))
    assert epsilons(loaded) == epsilons(model)
    assert loaded.learn(40, reset_num_timesteps=False).num_timesteps == 80
    # Arguments of load() do not pass through the constructor
    other = value_based.load(tmp_path / "model", env=make_env(4), exploration_final_eps=kind([0.25, 0.25]))
    assert epsilons(other) == [0.25] * 4
    # Nor do values that are set later
    model.exploration_final_eps = kind([0.0625, 0.0625])
    model.learn(40)
    assert epsilons(model) == [0.0625] * 4


@pytest.mark.parametrize("value", [np.array(0.25), np.float32(0.25), th.tensor(0.25), np.float64(0.25)], ids=repr)
def test_one_epsilon_in_any_type(value):
    model = AsyncOneStepQ("MlpPolicy", make_env(4), exploration_final_eps=value).learn(40)
    assert model._exploration(0.0).tolist() == [0.25] * 4


@pytest.mark.parametrize("batch_size", [0, -1, 2.5, True, "32"])
def test_a_batch_size_out_of_range(batch_size):
    message = f"batch_size must be a whole number of at least 1, or None, got {batch_size!r}"
    with pytest.raises(ValueError, match=message):
        AsyncNStepQ("MlpPolicy", make_env(4), batch_size=batch_size)


@pytest.mark.parametrize("q_lambda", [-0.1, 1.1, float("nan"), None, "1"])
def test_a_q_lambda_out_of_range(q_lambda):
    with pytest.raises(ValueError, match=rf"q_lambda must be in \[0, 1\], got {q_lambda!r}"):
        AsyncNStepQ("MlpPolicy", make_env(4), q_lambda=q_lambda)


@pytest.mark.parametrize(
    "action_space",
    [
        spaces.Box(-1, 1, (2,)),
        spaces.MultiDiscrete([2, 3]),
        spaces.MultiBinary(3),
    ],
)
def test_action_spaces_that_are_not_discrete(value_based, action_space):
    class OtherActions(RandomWalkEnv):
        pass

    OtherActions.action_space = action_space
    with pytest.raises(AssertionError, match=r"only supports .*Discrete.* as action spaces but .* was provided"):
        value_based("MlpPolicy", make_env(1, OtherActions))


def test_an_unsplittable_wrapper_with_explicit_workers(algorithm):
    message = (
        r"UnknownWrapper can't be split among n_workers=2: use n_workers=1, "
        r"or register the class with sb3_async1step.split_vec_env.register"
    )
    with pytest.raises(TypeError, match=message):
        algorithm("MlpPolicy", UnknownWrapper(make_env(4)), n_workers=2)
    assert algorithm("MlpPolicy", UnknownWrapper(make_env(4)), n_workers=1).learn(40).num_timesteps == 40


def test_the_env_may_come_later(algorithm, tmp_path):
    """What depends on the env is checked when it is there."""
    algorithm("MlpPolicy", make_env(4), n_workers=4).save(tmp_path / "model")
    model = algorithm.load(tmp_path / "model")
    with pytest.raises(AssertionError, match="set the environment before"):
        model.learn(10)
    model.set_env(make_env(4))
    assert model.learn(40).num_timesteps == 40


def test_fewer_lanes_than_workers_after_loading(algorithm, tmp_path):
    algorithm("MlpPolicy", make_env(4), n_workers=4).save(tmp_path / "model")
    model = algorithm.load(tmp_path / "model", env=make_env(2))
    with pytest.warns(UserWarning, match="n_workers=4, but there are only 2 env lanes"):
        assert model.learn(40).num_timesteps == 40
    # Nothing is shared where nobody learns
    algorithm.load(tmp_path / "model", env=UnknownWrapper(make_env(1))).predict(model.env.reset())


def test_unknown_policies(algorithm):
    with pytest.raises(ValueError, match="Policy MlpLstmPolicy unknown"):
        algorithm("MlpLstmPolicy", make_env(1))


@pytest.mark.parametrize("value", [2.5, "2", True, None])
def test_a_number_of_workers_set_as_an_attribute(algorithm, value):
    model = algorithm("MlpPolicy", make_env(4))
    model.n_workers = value
    with pytest.raises(ValueError, match='n_workers must be "auto" or from 1 to the number of env lanes, got'):
        model.learn(8)


def test_steps_that_are_not_a_number(algorithm):
    with pytest.raises(ValueError, match="total_timesteps must be a number, got nan"):
        algorithm("MlpPolicy", make_env(4)).learn(float("nan"))


@pytest.mark.parametrize("total", [math.inf, -math.inf])
def test_infinitely_many_steps(algorithm, total):
    """As with SB3's algorithms, until a callback ends them."""
    model = algorithm("MlpPolicy", make_env(4), n_workers=1)
    if total < 0:
        with pytest.raises(ValueError, match="total_timesteps must be a number, got -inf"):
            model.learn(total)
        return
    model.learn(total, callback=lambda locals_, globals_: model.num_timesteps < 40)
    assert model.num_timesteps == 40


def test_policies_of_sb3_number_actions_from_zero(value_based):
    """Their ``predict()`` would say other actions than those that were trained."""
    env = DummyVecEnv([lambda: CheckingEnv(spaces.Discrete(3, start=5))])
    with pytest.raises(
        ValueError, match=r"actions start at 5, but DQNPolicy .* start at 0: derive it from .*MlpPolicy"
    ):
        value_based(DQNPolicy, env)
    assert env.action_space.contains(value_based("MlpPolicy", env).predict(np.zeros(4, np.float32))[0])


def test_a_negative_learning_rate_in_a_callback(algorithm):
    def change(locals_, globals_):
        locals_["self"].learning_rate = -1.0
        return True

    with pytest.raises(ValueError, match=r"learning_rate must be .* not negative, got -1"):
        algorithm("MlpPolicy", make_env(4)).learn(100, callback=change)


@pytest.mark.parametrize("extractor", [partial(FlattenExtractor), lambda space: FlattenExtractor(space)])
def test_a_features_extractor_made_by_a_function(algorithm, extractor):
    policy_kwargs = {"features_extractor_class": extractor}
    assert algorithm("MlpPolicy", make_env(4), policy_kwargs=policy_kwargs).learn(40).num_timesteps == 40


def test_a_layer_of_no_units(algorithm):
    assert algorithm("MlpPolicy", make_env(4), policy_kwargs={"net_arch": [0]}).learn(40).num_timesteps == 40


def test_numpys_numbers_of_optimizers_can_be_loaded(algorithm, tmp_path):
    policy_kwargs = {"optimizer_class": th.optim.Adam, "optimizer_kwargs": {"eps": np.float64(1e-5)}}
    model = algorithm("MlpPolicy", make_env(4), policy_kwargs=policy_kwargs).learn(40)
    model.save(tmp_path / "model")
    assert algorithm.load(tmp_path / "model").policy.optimizer.param_groups[0]["eps"] == 1e-5


@pytest.mark.parametrize("freq", [0, -1, 1.5])
def test_how_often_histograms_are_written(freq):
    with pytest.raises(ValueError, match="freq must be a whole number of at least 1"):
        HistogramCallback(freq)


class OfItsOwn(QNetwork):
    def _predict(self, observation, deterministic=True):
        return super()._predict(observation, deterministic)


@pytest.mark.parametrize("where", ["policy", "network"])
def test_a_policy_that_chooses_actions_in_a_way_of_its_own(value_based, where):
    class Own(MlpPolicy):
        if where == "policy":

            def _predict(self, obs, deterministic=True):
                return super()._predict(obs, deterministic)

        else:

            def make_q_net(self):
                network = super().make_q_net()
                network.__class__ = OfItsOwn
                return network

    name = {"policy": "Own", "network": "OfItsOwn"}[where]
    with pytest.warns(UserWarning, match=rf"do not call {name}._predict\(\)"):
        value_based(Own, make_env(2))


@pytest.mark.parametrize("policy", ["MlpPolicy", MlpPolicy, DQNPolicy])
def test_policies_that_choose_the_highest_value_are_not_warned_of(value_based, policy):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        value_based(policy, make_env(2))
