"""Copies of a model that is learning: without its workers, and without a way back to its envs."""

import copy
import pickle

import cloudpickle
import numpy as np
import pytest
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import HumanOutputFormat

from tests.envs import make_env
from tests.helpers import (
    CountingOptimizer,
    actor_learners,
    are_equal,
    count_additions,
    has_made_steps,
    meanwhile,
    trained_parameters,
    wait_until,
    weights_of,
)

COPIERS = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "cloudpickle": lambda model: cloudpickle.loads(cloudpickle.dumps(model)),
}


class CopyAt(BaseCallback):
    """Copies the model once."""

    def __init__(self, copier, at_call):
        super().__init__()
        self.copier, self.at_call = copier, at_call

    def _on_step(self):
        if self.n_calls == self.at_call:
            # Waits for steps that began before; none begins during a callback
            self.model.get_parameters()
            self.weights = weights_of(self.model)
            self.n_timesteps = self.model.num_timesteps
            self.copy = self.copier(self.model)
        return True


@pytest.mark.parametrize("n_workers", [1, 2])
@pytest.mark.parametrize("copier", COPIERS.values(), ids=COPIERS)
def test_a_copy_in_a_callback(algorithm, copier, n_workers, tmp_path):
    env = make_env(4)
    model = algorithm("MlpPolicy", env, n_workers=n_workers, seed=0, policy_kwargs={"net_arch": [8]}, verbose=1)
    callback = CopyAt(copier, at_call=10)
    model.learn(100, callback=callback)
    twin = callback.copy
    assert are_equal(weights_of(twin), callback.weights) and not are_equal(weights_of(model), callback.weights)
    assert twin.num_timesteps == callback.n_timesteps == 40
    assert getattr(twin, "q_net", None) is getattr(twin.policy, "q_net", None)

    # Its env is another one, whose methods are free
    tapes = [lane.unwrapped.tape for lane in env.envs]
    before = [list(tape) for tape in tapes]
    twins_env = twin.get_env()
    twins_env.env_method("reset")
    assert [lane.tape[-1] for lane in [e.unwrapped for e in twins_env.envs]] == ["reset"] * 4
    twins_env.reset()
    twins_env.step(np.zeros(4, dtype=int))
    weights = weights_of(model)
    # Its next training resets the env and goes on; without the original's logger
    twin.learn(60, reset_num_timesteps=False)
    assert twin.num_timesteps == 100 and not are_equal(weights_of(twin), callback.weights)
    assert [isinstance(output, HumanOutputFormat) for output in twin.logger.output_formats] == [True]
    assert [list(tape) for tape in tapes] == before and are_equal(weights_of(model), weights)
    model.learn(20, reset_num_timesteps=False)


def test_copies_from_another_thread(algorithm):
    """Each is of one moment, though workers update all the time."""
    policy_kwargs = {"net_arch": [8], "optimizer_class": CountingOptimizer}
    model = algorithm("MlpPolicy", make_env(2), n_workers=2, update_interval=1, policy_kwargs=policy_kwargs)
    start = [p.detach().clone() for p in trained_parameters(model)]
    done = []

    def copy_twice():
        try:
            wait_until(lambda: has_made_steps(model, 100))
            for copier in (COPIERS["deepcopy"], COPIERS["pickle"]):
                done.append(copier(model))
        finally:
            done.append(None)

    with meanwhile(copy_twice):
        model.learn(10**9, callback=lambda locals_, globals_: None not in done)
    wait_until(lambda: not actor_learners())
    for twin in done[:2]:
        (n_updates,) = count_additions(twin, start)
        assert n_updates == int(n_updates) > 0
        assert twin.learn(10).num_timesteps == 10


def test_a_copy_between_two_trainings_goes_on_where_the_original_does(algorithm):
    model = algorithm("MlpPolicy", make_env(2), n_workers=2, backend="serial", seed=0, update_interval=5).learn(106)
    twin = copy.deepcopy(model)
    for one in (model, twin):
        one.learn(50, reset_num_timesteps=False)
    assert are_equal(weights_of(model), weights_of(twin))
    np.testing.assert_array_equal(model._last_obs, twin._last_obs)


def test_a_copied_optimizer_takes_the_same_steps(algorithm):
    model = algorithm("MlpPolicy", make_env(2), n_workers=1).learn(20)
    twin = copy.deepcopy(model)
    for one in (model, twin):
        for group in one.policy.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = parameter.detach().clone()
        one.policy.optimizer.step()
    assert are_equal(weights_of(model), weights_of(twin))


def test_a_shallow_copy(algorithm):
    """It shares the policy and the env, but not the workers: its users wait for nobody."""
    copies = CopyAt(copy.copy, at_call=10)
    model = algorithm("MlpPolicy", make_env(2), n_workers=2, policy_kwargs={"net_arch": [8]})
    model.learn(100, callback=copies)
    twin = copies.copy
    assert twin.policy is model.policy and twin.get_env() is model.get_env()
    assert twin.num_timesteps == copies.n_timesteps
    assert twin._pool is None and twin._gate is not model._gate
