"""What a callback, another thread or a forked process does with a model that learns."""

import inspect
import io
import json
import os
import threading
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import configure
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor

from sb3_async1step import A3C, AsyncNStepQ, AsyncOneStepQ, HistogramCallback, SharedRMSprop
from sb3_async1step.common.live_algorithm import LiveAlgorithm
from sb3_async1step.nodes.reported_steps import NotCarried
from sb3_async1step.workers import gate
from sb3_async1step.workers.gate import Gate
from tests.envs import RandomWalkEnv, make_env
from tests.helpers import DEADLINE, is_waiting, meanwhile, wait_until

SMALL = {"net_arch": [4]}
with_workers = pytest.mark.parametrize("n_workers", [1, 2])


class Do(BaseCallback):
    """
    :param function: called with the callback at each step from ``first_step`` on
    """

    def __init__(self, function: Any, first_step: int = 0) -> None:
        super().__init__()
        self.function = function
        self.first_step = first_step
        self.results: list[Any] = []

    def _on_step(self) -> bool:
        if self.num_timesteps >= self.first_step:
            self.results.append(self.function(self))
        return True


def once(function: Any) -> Any:
    """
    :param function: to be called the first time only
    """
    calls: list[Any] = []
    return lambda callback: calls or calls.append(function(callback))


def make_model(algorithm: Any, n_workers: int, n_envs: int = 2, **kwargs: Any) -> Any:
    env = make_vec_env("CartPole-v1", n_envs=n_envs, seed=0)
    return algorithm("MlpPolicy", env, n_workers=n_workers, seed=0, policy_kwargs=SMALL, **kwargs)


# ---------------------------------------------------------------------- settings


VALUES = {
    "gamma": 0.5,
    "update_interval": 3,
    "max_grad_norm": 0.25,
    "target_update_interval": 7,
    "tau": 0.5,
    "loss": "huber",
    "q_lambda": 0.5,
    "batch_size": 3,
    "gae_lambda": 0.5,
    "ent_coef": 0.5,
    "vf_coef": 0.25,
    "normalize_advantage": True,
    "sde_sample_freq": 3,
    "exploration_initial_eps": 0.75,
    "exploration_fraction": 0.75,
    "exploration_final_eps": 0.25,
    "exploration_final_probs": (1.0,),
}


@with_workers
def test_workers_follow_each_setting(algorithm, n_workers):
    model = make_model(algorithm, n_workers)
    assert algorithm._followed <= VALUES.keys()
    names = [name for name in VALUES if name in algorithm._followed]

    def change(callback: Any) -> None:
        for name in names:
            setattr(model, name, VALUES[name])

    def read(callback: Any) -> None:
        for worker in model._pool.workers:
            for name in names:
                if not name.startswith("exploration"):
                    assert getattr(worker.settings, name) == VALUES[name]
            if "exploration_final_eps" in names:
                # At the half, with 0.75 of the training to go from 0.75 to 0.25
                epsilon = worker.settings.exploration(0.5)
                np.testing.assert_allclose(epsilon, 0.75 - 0.5 * 0.5 / 0.75)

    # The workers were made with other values
    model.learn(8, callback=Do(once(lambda callback: (change(callback), read(callback)))))
    assert {name: getattr(model, name) for name in names} == {name: VALUES[name] for name in names}


def test_an_epsilon_that_changes_while_the_schedules_are_followed(value_based, monkeypatch):
    """By another thread, which waits at the gate as the one that learns asks for the schedule."""
    model = make_model(value_based, 1)

    def close() -> Any:
        model._get_exploration_schedule(2)
        return closed()

    def change(callback: Any) -> None:
        model.exploration_final_eps, model.exploration_fraction = 0.25, 1.0
        with monkeypatch.context() as patch:
            patch.setattr(model._gate, "closed", close)
            model.exploration_final_eps = 0.75
        np.testing.assert_allclose(model._pool.workers[0].settings.exploration(0.0), 0.75)

    closed = model._gate.closed
    model.learn(2, callback=Do(change))
    assert model.exploration_rate == pytest.approx(0.75)


def test_each_parameter_is_followed_or_fixed(algorithm):
    # learn() follows the first one by itself; workers know nothing of the others
    others = {"learning_rate", "eval_eps", "stats_window_size", "tensorboard_log", "verbose", "_init_setup_model"}
    parameters = inspect.signature(algorithm).parameters.keys() - others
    assert parameters & VALUES.keys() == algorithm._followed
    assert parameters - VALUES.keys() <= algorithm._fixed_while_learning


@with_workers
def test_learning_rate_is_followed(algorithm, n_workers):
    model = make_model(algorithm, n_workers, learning_rate=1e-3)
    callback = Do(once(lambda _: setattr(model, "learning_rate", 0.5)))
    model.learn(20, callback=callback)
    assert model.policy.optimizer.param_groups[0]["lr"] == 0.5


@with_workers
def test_update_interval_is_followed(n_workers):
    model = make_model(AsyncOneStepQ, n_workers, n_envs=2 * n_workers, backend="serial", update_interval=1)
    model.learn(40 * n_workers, callback=Do(lambda _: setattr(model, "update_interval", 4)))
    # The first vector step was over before the callback
    assert model._n_updates == n_workers * (1 + 19 // 4)


@with_workers
def test_impossible_values_are_refused(algorithm, n_workers):
    model = make_model(algorithm, n_workers)

    def change(callback: Any) -> None:
        with pytest.raises(ValueError, match="max_grad_norm"):
            model.max_grad_norm = -1.0

    norm = model.max_grad_norm
    model.learn(8, callback=Do(once(change)))
    assert model.max_grad_norm == norm
    model.max_grad_norm = -1.0
    with pytest.raises(ValueError, match="max_grad_norm"):
        model.learn(8)


@with_workers
def test_what_workers_are_made_with_is_fixed(algorithm, n_workers):
    model = make_model(algorithm, n_workers)

    def change(callback: Any) -> None:
        for name in sorted(algorithm._fixed_while_learning):
            with pytest.raises(AttributeError, match=f"{name} can't be changed while learn"):
                setattr(model, name, None)
        with pytest.raises(RuntimeError, match="set another one"):
            model.set_env(model.get_env())
        with pytest.raises(RuntimeError, match="before or after"):
            model.set_random_seed(1)

    model.learn(8, callback=Do(once(change)))
    model.n_workers = 1
    model.learn(8)


# ---------------------------------------------------------------------- networks


@with_workers
def test_frozen_weights_stay(algorithm, n_workers):
    # With another optimizer, the momentum would go on; and threads may be in an old segment for as long as they like
    model = make_with_optimizer(algorithm, n_workers, SharedRMSprop, backend="serial")
    weight = next(model.policy.parameters())
    values = []

    def freeze(callback: Any) -> None:
        weight.requires_grad_(len(values) >= 40)
        values.append(weight.detach().clone())

    model.learn(200, callback=Do(freeze, first_step=20))
    # Segments that have begun end with the gradients that they began with
    first = model.update_interval + 1
    assert all(th.equal(value, values[first]) for value in values[first:41])
    assert not th.equal(values[-1], values[40])
    weight.requires_grad_(False)
    before = weight.detach().clone()
    model.learn(40, reset_num_timesteps=False)
    assert th.equal(weight, before)


@with_workers
def test_gradients_are_those_of_the_last_update(algorithm, n_workers):
    model = make_model(algorithm, n_workers, max_grad_norm=0.125)
    network = model.policy if algorithm is A3C else model.q_net

    def norm(callback: Any) -> float:
        with model._gate.closed():
            return float(th.cat([p.grad.flatten() for p in network.parameters()]).norm())

    callback = Do(norm, first_step=40)
    model.learn(60, callback=callback)
    assert callback.results
    assert all(0 < value < 0.126 for value in callback.results)


@with_workers
def test_grad_norm_and_q_mean_are_logged(algorithm, n_workers, tmp_path):
    model = make_model(algorithm, n_workers)
    model.set_logger(configure(str(tmp_path), ["json"]))
    model.learn(400, log_interval=1)
    keys = {key for line in (tmp_path / "progress.json").read_text().splitlines() for key in json.loads(line)}
    assert "train/grad_norm" in keys
    assert ("train/q_mean" in keys) == (algorithm is not A3C)


def test_replaced_modules_are_warned_of():
    model = make_model(AsyncOneStepQ, 2)

    def replace(callback: Any) -> None:
        model.policy.q_net.q_net = th.nn.Sequential(th.nn.Linear(4, 2))

    with pytest.warns(UserWarning, match="replaced modules or parameters of the policy"):
        model.learn(8, callback=Do(once(replace)))


# ---------------------------------------------------------------------- parameters, hooks and the optimizer


def learning_parameters(model: Any) -> list[th.nn.Parameter]:
    return list(getattr(model, "q_net", model.policy).parameters())


def wait_for_steps(model: Any) -> None:
    """In a callback: no step begins any more, and this waits for those that have begun."""
    model.get_parameters()


def in_callback_or_before(function: Callable[[Any], Any], in_callback: bool, model: Any) -> BaseCallback | None:
    if in_callback:
        return Do(once(lambda callback: function(callback.model)), first_step=8)
    function(model)
    return None


with_optimizers = pytest.mark.parametrize("optimizer_class", [SharedRMSprop, th.optim.Adam])
when = pytest.mark.parametrize("in_callback", [False, True])


def make_with_optimizer(algorithm: Any, n_workers: int, optimizer_class: Any, **kwargs: Any) -> Any:
    policy_kwargs = {**SMALL, "optimizer_class": optimizer_class}
    env = make_vec_env("CartPole-v1", n_envs=2, seed=0)
    return algorithm("MlpPolicy", env, n_workers=n_workers, seed=0, policy_kwargs=policy_kwargs, **kwargs)


@with_workers
# Without a gradient, Adam goes on by its momentum
@pytest.mark.parametrize(
    ("optimizer_class", "in_callback"), [(SharedRMSprop, False), (SharedRMSprop, True), (th.optim.Adam, False)]
)
def test_gradients_follow_hooks_of_parameters(algorithm, n_workers, optimizer_class, in_callback):
    """A mask, for example."""
    # A thread may be in a segment from before the mask for as long as it waits for a core
    backend = "serial" if in_callback else "threads"
    model = make_with_optimizer(algorithm, n_workers, optimizer_class, backend=backend)
    first, *others = learning_parameters(model)
    handles, values = [], []

    def mask(model: Any) -> None:
        handles.append(first.register_hook(th.zeros_like))
        # From its next segment on, a worker follows
        values.append(None)

    def look(callback: Any) -> None:
        if handles:
            values.append([p.detach().clone() for p in (first, *others)])

    callbacks = [Do(look, first_step=60), in_callback_or_before(mask, in_callback, model)]
    model.learn(200, callback=[callback for callback in callbacks if callback is not None])
    masked, last = values[1], values[-1]
    assert th.equal(masked[0], last[0])
    assert not any(th.equal(*pair) for pair in zip(masked[1:], last[1:], strict=True) if pair[0].numel() > 4)
    handles[0].remove()
    model.learn(100, reset_num_timesteps=False)
    assert not th.equal(first, last[0])


@when
@with_optimizers
@with_workers
def test_hooks_are_called(algorithm, n_workers, optimizer_class, in_callback):
    model = make_with_optimizer(algorithm, n_workers, optimizer_class)
    calls: dict[str, int] = dict.fromkeys(("forward", "gradient", "step", "patched"), 0)

    def count(name: str) -> None:
        calls[name] += 1

    def add_hooks(model: Any) -> None:
        wait_for_steps(model)
        modules = getattr(model, "q_net", model.policy).modules()
        [module for module in modules if isinstance(module, th.nn.Linear)][-1].register_forward_hook(
            lambda *args: count("forward")
        )
        learning_parameters(model)[0].register_post_accumulate_grad_hook(lambda parameter: count("gradient"))
        optimizer = model.policy.optimizer
        optimizer.register_step_post_hook(lambda *args: count("step"))
        step = optimizer.step
        optimizer.step = lambda *args: (count("patched"), step(*args))[1]

    model.learn(100, callback=in_callback_or_before(add_hooks, in_callback, model))
    assert all(n > 0 for n in calls.values()), calls
    assert calls["step"] == calls["patched"] <= model._n_updates
    if not in_callback:
        assert calls["step"] == model._n_updates


@with_optimizers
@with_workers
@pytest.mark.parametrize("change", ["replace", "clear", "add"])
def test_the_optimizer_may_change_in_a_callback(algorithm, n_workers, optimizer_class, change):
    model = make_with_optimizer(algorithm, n_workers, optimizer_class)
    extra = th.nn.Parameter(th.zeros(2))

    def act(callback: Any) -> None:
        wait_for_steps(model)
        optimizer = model.policy.optimizer
        if change == "replace":
            model.policy.optimizer = th.optim.SGD(model.policy.parameters(), lr=0.01, momentum=0.9)
        elif change == "clear":
            optimizer.state.clear()
        else:
            optimizer.add_param_group({"params": [extra]})

    model.learn(100, callback=Do(once(act), first_step=50))
    optimizer = model.policy.optimizer
    assert type(optimizer) is (th.optim.SGD if change == "replace" else optimizer_class)
    names = {th.optim.SGD: "momentum_buffer", th.optim.Adam: "exp_avg", SharedRMSprop: "square_avg"}
    assert all(names[type(optimizer)] in optimizer.state[parameter] for parameter in learning_parameters(model))
    assert model.learn(20, reset_num_timesteps=False).num_timesteps == 120


class ScaledSteps(th.optim.Optimizer):
    """An optimizer whose constructor needs arguments, and which counts its steps."""

    def __init__(self, params: Any, lr: float, scale: float) -> None:
        super().__init__(params, {"lr": lr})
        self.scale = scale
        self.n_steps = 0

    def step(self, closure: Any = None) -> None:
        self.n_steps += 1
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.data.add_(parameter.grad, alpha=-group["lr"] * self.scale)


@with_workers
@pytest.mark.parametrize("as_partial", [False, True])
def test_an_optimizer_of_ones_own(algorithm, n_workers, as_partial, tmp_path):
    kwargs = {"optimizer_class": partial(ScaledSteps, scale=2.0)} if as_partial else {
        "optimizer_class": ScaledSteps, "optimizer_kwargs": {"scale": 2.0}
    }  # fmt: skip
    env = make_vec_env("CartPole-v1", n_envs=2, seed=0)
    model = algorithm("MlpPolicy", env, n_workers=n_workers, policy_kwargs={**SMALL, **kwargs}).learn(100)
    assert model.policy.optimizer.n_steps == model._n_updates > 0
    model.save(tmp_path / "model")
    loaded = algorithm.load(tmp_path / "model", env=env)
    assert loaded.learn(20, reset_num_timesteps=False).num_timesteps == 120


@with_workers
@pytest.mark.parametrize("by", ["data", "vector_to_parameters"])
def test_parameters_may_get_other_memory(algorithm, n_workers, by):
    model = make_model(algorithm, n_workers)
    changed: list[Any] = []

    def change(callback: Any) -> None:
        parameters = learning_parameters(model)
        if by == "data":
            for parameter in parameters:
                parameter.data = parameter.data + 0.1
        else:
            th.nn.utils.vector_to_parameters(th.nn.utils.parameters_to_vector(parameters) + 0.1, parameters)
        changed.extend(parameter.detach().clone() for parameter in parameters)

    model.learn(200, callback=Do(once(change), first_step=8))
    # The last layer's bias learns from every transition
    assert not th.equal(changed[-1], learning_parameters(model)[-1])


def test_new_parameters_are_warned_of():
    model = make_model(AsyncOneStepQ, 2)

    def replace(callback: Any) -> None:
        layer = model.q_net.q_net[0]
        layer.weight = th.nn.Parameter(layer.weight.detach() + 0.1)

    with pytest.warns(UserWarning, match="replaced modules or parameters of the policy"):
        model.learn(8, callback=Do(once(replace)))


class CountingExtractor(BaseFeaturesExtractor):
    def __init__(self, observation_space: spaces.Box) -> None:
        super().__init__(observation_space, 4)
        self.register_buffer("n_in_buffer", th.zeros(()))
        self.n_observations = 0

    def forward(self, observations: th.Tensor) -> th.Tensor:
        self.n_in_buffer += len(observations)
        self.n_observations += len(observations)
        return observations


def test_state_in_plain_attributes_is_warned_of():
    env = make_vec_env("CartPole-v1", n_envs=2)
    model = AsyncOneStepQ("MlpPolicy", env, policy_kwargs={"features_extractor_class": CountingExtractor})
    with pytest.warns(UserWarning, match=r"features_extractor\.n_observations during.*register_buffer"):
        model.learn(8)
    assert model.q_net.features_extractor.n_in_buffer > 0


class StatisticsExtractor(BaseFeaturesExtractor):
    """Keeps statistics of a given kind, and changes them by a given function in training mode."""

    def __init__(
        self, observation_space: spaces.Box, statistics: Any, change: Callable[[Any, np.ndarray], Any]
    ) -> None:
        super().__init__(observation_space, 4)
        self.statistics = statistics
        self.change = change
        # Not changed, so not warned of
        self.constants = {"scale": np.ones(4), "names": ["x", "v"], "self": self, "function": len}
        self.not_known = [np.nan, np.float32(np.nan), np.array([np.nan, 1.0]), np.array([None]), th.tensor([np.nan, 1])]
        self.half = [th.ones(4, dtype=th.bfloat16), th.tensor(np.nan, dtype=th.bfloat16)]
        self.unchanged = RunningMeanStd(shape=(4,))
        self.spaces = [observation_space, spaces.Discrete(2)]

    def forward(self, observations: th.Tensor) -> th.Tensor:
        for space in self.spaces:
            # The first time, it makes a generator
            space.sample()
        if self.training:
            changed = self.change(self.statistics, observations.detach().numpy())
            self.statistics = self.statistics if changed is None else changed
        return observations


@pytest.mark.parametrize("algorithm", [AsyncOneStepQ, AsyncNStepQ])
@pytest.mark.parametrize(
    ("statistics", "change"),
    [
        (RunningMeanStd(shape=(4,)), RunningMeanStd.update),
        ([0.0], lambda values, observations: values.append(1.0)),
        ([th.zeros(4)], lambda values, observations: values.__setitem__(0, values[0] + 1.0)),
        (deque([0], maxlen=5), lambda values, observations: values.append(1)),
        ({"n": {"in": 0}}, lambda values, observations: values["n"].update({"in": 1})),
        ({0}, lambda values, observations: values.add(1)),
        (np.int64(0), lambda value, observations: value + np.int64(1)),
        (None, lambda value, observations: observations.mean()),
        ("", lambda value, observations: "seen"),
        (False, lambda value, observations: True),
        (np.nan, lambda value, observations: 1.0),
        (np.array([1.0, 1.0]), lambda values, observations: values * np.nan),
        (th.ones(2, dtype=th.bfloat16), lambda values, observations: values + 1),
        (th.ones(2), lambda values, observations: values * np.nan),
        (th.ones(2), lambda values, observations: th.ones(3)),
        (th.ones(2), lambda values, observations: observations),
    ],
    ids=[
        *("object", "list", "list of tensors", "deque", "dict", "set", "numpy's number", "None", "str", "bool"),
        *("NaN", "array of NaNs", "bfloat16", "tensor of NaNs", "longer tensor", "array for tensor"),
    ],
)
def test_statistics_of_any_kind_are_warned_of(algorithm, statistics, change):
    kwargs = {"statistics": deepcopy(statistics), "change": change}
    policy_kwargs = {"features_extractor_class": StatisticsExtractor, "features_extractor_kwargs": kwargs}
    model = algorithm("MlpPolicy", make_vec_env("CartPole-v1", n_envs=2), policy_kwargs=policy_kwargs)
    with pytest.warns(UserWarning, match=r"The network has changed \S*features_extractor\.statistics during"):
        model.learn(20)


def test_unchanged_statistics_are_not_warned_of():
    kwargs = {"statistics": None, "change": lambda value, observations: None}
    policy_kwargs = {"features_extractor_class": StatisticsExtractor, "features_extractor_kwargs": kwargs}
    model = AsyncOneStepQ("MlpPolicy", make_vec_env("CartPole-v1", n_envs=2), policy_kwargs=policy_kwargs)
    add_hook = once(lambda callback: model.q_net.register_forward_hook(lambda *args: None))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.learn(20, callback=Do(add_hook))


class ClosureExtractor(BaseFeaturesExtractor):
    """Its forward pass goes through a function that refers to the module from outside."""

    def __init__(self, observation_space: spaces.Box) -> None:
        super().__init__(observation_space, 4)
        self.layer = th.nn.Linear(4, 4)
        self.steps = [lambda observations: self.layer(observations), th.relu]

    def forward(self, observations: th.Tensor) -> th.Tensor:
        for step in self.steps:
            observations = step(observations)
        return observations


@with_workers
def test_layers_that_copies_cannot_train_are_refused(algorithm, n_workers):
    """They would stay as they are, without a word."""
    policy_kwargs = {"features_extractor_class": ClosureExtractor}
    model = algorithm(
        "MlpPolicy", make_vec_env("CartPole-v1", n_envs=2), n_workers=n_workers, policy_kwargs=policy_kwargs
    )
    before = deepcopy(model.policy.state_dict())
    with pytest.raises(TypeError, match=r"uses the original's \S*features_extractor\.layer\.weight"):
        model.learn(100)
    assert all(th.equal(value, before[name]) for name, value in model.policy.state_dict().items())


class LateExtractor(CountingExtractor):
    """Registers another buffer in its first forward pass in training mode."""

    def forward(self, observations: th.Tensor) -> th.Tensor:
        if self.training and not hasattr(self, "late"):
            self.register_buffer("late", observations.mean(dim=0))
        self.n_in_buffer += len(observations)
        return observations


@pytest.mark.parametrize("algorithm", [AsyncOneStepQ, AsyncNStepQ])
def test_buffers_registered_during_training_are_warned_of(algorithm):
    env = make_vec_env("CartPole-v1", n_envs=2)
    model = algorithm("MlpPolicy", env, policy_kwargs={"features_extractor_class": LateExtractor})
    with pytest.warns(UserWarning, match=r"changed features_extractor\.late during.*register_buffer"):
        model.learn(20)
    assert model.q_net.features_extractor.n_in_buffer > 0


# ---------------------------------------------------------------------- what callbacks read


@with_workers
def test_observations_and_reset_infos_are_current(algorithm, n_workers):
    model = make_model(algorithm, n_workers, backend="serial")
    for env in model.get_env().envs:
        env.unwrapped.reset = with_info(env.unwrapped.reset)
    seen = []

    def look(callback: Any) -> None:
        np.testing.assert_array_equal(model._last_obs, callback.locals["new_obs"])
        for lane in np.flatnonzero(callback.locals["dones"]):
            seen.append(callback.training_env.reset_infos[lane]["n_resets"])

    model.learn(400, callback=Do(look))
    n_resets = [env.unwrapped.reset.n_resets for env in model.get_env().envs]
    # The first reset was before the training
    assert len(seen) == sum(n_resets) - 2
    assert max(seen) == max(n_resets)


def with_info(reset: Any) -> Any:
    def call(**kwargs: Any) -> tuple[Any, dict]:
        call.n_resets += 1
        return reset(**kwargs)[0], {"n_resets": call.n_resets}

    call.n_resets = 0
    return call


def test_histograms(algorithm, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model = make_model(algorithm, 1, tensorboard_log=str(tmp_path))
    model.learn(600, callback=HistogramCallback(freq=50), log_interval=1)
    accumulator = EventAccumulator(str(next(tmp_path.iterdir())), size_guidance={"histograms": 0})
    accumulator.Reload()
    names = set(accumulator.Tags()["histograms"])
    # A3C writes a log in each of these intervals, the others at the ends of episodes
    most = 600 // 50
    assert all(
        len(accumulator.Histograms(name)) in ([most] if algorithm is A3C else range(2, most + 1)) for name in names
    )
    weights = {name for name, _ in model.policy.named_parameters()}
    assert {name.removeprefix("histograms/weights/") for name in names if "/weights/" in name} == weights
    learning = {name for name in weights if "target" not in name}
    assert {name.removeprefix("histograms/gradients/") for name in names if "/gradients/" in name} == learning
    assert ("histograms/values" if algorithm is A3C else "histograms/q_values") in names


def test_histograms_of_a_model_whose_workers_push(algorithm):
    """Such as have begun their step before the callback."""
    model = make_model(algorithm, 1)
    name, parameter = next(iter(model.policy.named_parameters()))
    is_inside, main_thread, recorded = threading.Event(), threading.main_thread(), {}

    def push() -> None:
        with model._gate.passed():
            is_inside.set()
            wait_until(lambda: is_waiting(main_thread) or recorded)
            parameter.data.fill_(42.0)

    worker = threading.Thread(target=push)
    begin = Do(lambda callback: (worker.start(), is_inside.wait(DEADLINE)))
    look = Do(lambda callback: recorded.update(model.logger.name_to_value))
    model.learn(2, callback=[begin, HistogramCallback(freq=1), look])
    worker.join(DEADLINE)
    assert (recorded[f"histograms/weights/{name}"] == 42.0).all()


def test_histograms_as_the_callback_of_an_evaluation(algorithm):
    """SB3 gives no locals to the callback on a new best model."""

    class Look(HistogramCallback):
        def __init__(self, freq):
            super().__init__(freq)
            self.seen = []

        def _on_step(self):
            self.logger.name_to_value.clear()
            goes_on = super()._on_step()
            self.seen.append({key.split("/")[1] for key in self.logger.name_to_value if key.startswith("histograms/")})
            return goes_on

    on_best, after = Look(freq=1), Look(freq=20)
    evaluation = EvalCallback(make_vec_env("CartPole-v1"), on_best, after, eval_freq=7, n_eval_episodes=1, verbose=0)
    make_model(algorithm, 1).learn(42, evaluation)
    kinds = {"weights", "values" if algorithm is A3C else "q_values"}
    assert kinds <= on_best.seen[0]
    # After 14, 28 and 42 steps: multiples of 20 were crossed in between, if not in these very steps
    assert not after.seen[0] and all(kinds <= seen for seen in after.seen[1:])


def test_histograms_without_the_observations(algorithm):
    """They stay on the nodes of a RayVecEnv."""
    model, histograms, seen = make_model(algorithm, 1), HistogramCallback(freq=1), []
    leave_out = Do(lambda callback: histograms.locals.update(new_obs=NotCarried("new_obs")))
    look = Do(lambda callback: seen.extend(model.logger.name_to_value))
    model.learn(2, callback=[leave_out, histograms, look])
    kinds = {key.split("/")[1] for key in seen if key.startswith("histograms/")}
    # There are gradients once there was an update
    assert kinds - {"gradients"} == {"weights"}


# ---------------------------------------------------------------------- the training env


@with_workers
def test_nobody_else_steps_the_training_env(algorithm, n_workers):
    model = make_model(algorithm, n_workers)

    def step(callback: Any) -> None:
        for use in (callback.training_env.reset, lambda: callback.training_env.step([0, 0])):
            with pytest.raises(RuntimeError, match="nobody else may step or reset it"):
                use()

    model.learn(8, callback=Do(step))
    with pytest.raises(RuntimeError, match="EvalCallback"):
        model.learn(8, callback=EvalCallback(model.get_env(), eval_freq=1, n_eval_episodes=1))
    model.get_env().reset()
    model.learn(8)


# ---------------------------------------------------------------------- other threads and processes


def test_one_of_two_threads_learns(algorithm):
    for _ in range(5):
        model = make_model(algorithm, 2)
        barrier = threading.Barrier(2)
        outcomes: list[str] = []
        threads = [threading.Thread(target=learn_at, args=(barrier, model, outcomes)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(DEADLINE)
        assert [outcome[:12] for outcome in outcomes] == ["This model's", "learned"]


def learn_at(barrier: threading.Barrier, model: Any, outcomes: list[str]) -> None:
    """Learn until the other thread has been refused."""
    barrier.wait()
    try:
        model.learn(10**9, callback=Until(outcomes))
        outcomes.append("learned")
    except RuntimeError as error:
        outcomes.append(str(error))


def test_a_training_that_fails_while_another_thread_saves(algorithm, monkeypatch, tmp_path):
    """It keeps where the workers are, and the training throws that away: the next one has to reset the env."""
    model, main_thread, saves = make_model(algorithm, 1), threading.main_thread(), threading.Event()

    def remember_late(self: Any) -> None:
        saves.set()
        wait_until(lambda: is_waiting(main_thread) or model._pool is None)
        remember(self)

    def fail(callback: Any) -> None:
        thread.start()
        assert saves.wait(DEADLINE)
        raise ZeroDivisionError

    remember = LiveAlgorithm._remember_workers
    monkeypatch.setattr(LiveAlgorithm, "_remember_workers", remember_late)
    thread = threading.Thread(target=model.save, args=(tmp_path / "model",))
    with pytest.raises(ZeroDivisionError):
        model.learn(10, callback=Do(fail))
    thread.join(DEADLINE)
    assert algorithm.load(tmp_path / "model").num_timesteps == 2
    assert model._last_obs is None and model._worker_states is None


@pytest.mark.parametrize("name", ["gamma", "learning_rate"])
def test_a_training_that_ends_while_another_thread_changes_the_model(algorithm, monkeypatch, name):
    """There are no workers any more when it has looked whether there are some."""
    model = make_model(algorithm, 1)

    def end(gate: Any) -> bool:
        model.__dict__["_pool"] = None
        return True

    def change(callback: Any) -> None:
        pool = model._pool
        with monkeypatch.context() as patch:
            patch.setattr(Gate, "is_learning", end)
            setattr(model, name, 0.25)
        model._pool = pool

    model.learn(2, callback=Do(change))
    assert getattr(model, name) == 0.25


class Until(BaseCallback):
    """
    :param outcomes: learn until there is one
    """

    def __init__(self, outcomes: list[str]) -> None:
        super().__init__()
        self.outcomes = outcomes

    def _on_step(self) -> bool:
        return not self.outcomes


@pytest.mark.parametrize("n_threads", [1, 4])
@with_workers
def test_training_goes_on_beside_threads_that_look_without_a_break(n_workers, n_threads):
    """And they look while it goes on: both sides get their turns."""
    model = make_model(AsyncOneStepQ, n_workers)
    n_looks = [0] * n_threads
    has_ended = threading.Event()

    def look(i: int) -> None:
        while not has_ended.is_set():
            if i == 0:
                model.save(io.BytesIO())
            model.predict(np.zeros(4, np.float32))
            n_looks[i] += 1

    threads = [threading.Thread(target=look, args=(i,)) for i in range(n_threads)]
    for thread in threads:
        thread.start()
    try:
        wait_until(lambda: min(n_looks) > 0)
        before = list(n_looks)
        # Ends when everybody has looked ten times more
        enough = Do(lambda callback: None)
        enough._on_step = lambda: min(np.subtract(n_looks, before)) < 10  # type: ignore[method-assign]
        model.learn(10**9, callback=enough)
        n_steps = model.num_timesteps
        model.learn(200)
    finally:
        has_ended.set()
        for thread in threads:
            thread.join(DEADLINE)
    assert n_steps > 0
    assert model.num_timesteps == 200


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.parametrize("in_callback", [True, False], ids=["in a callback", "in another thread"])
@with_workers
def test_forked_process_uses_the_model(algorithm, n_workers, in_callback):
    # PyTorch computes no gradients in a process that was forked after it has computed some on a GPU
    model = make_model(algorithm, n_workers, device="cpu")
    env = make_vec_env("CartPole-v1")

    def use() -> None:
        model.predict(np.zeros(4, np.float32))
        model.save(io.BytesIO())
        model.get_parameters()
        assert model.get_env().get_attr("spec")[0].id == "CartPole-v1"
        evaluate_policy(model, env, n_eval_episodes=1)
        model.get_env().reset()
        model.learn(4)

    statuses = []

    def fork(callback: Any = None) -> None:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                use()
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        statuses.append(wait_for_child(child))

    if in_callback:
        model.learn(12, callback=Do(once(fork)))
        assert model.num_timesteps == 12
    else:

        def fork_meanwhile() -> None:
            wait_until(lambda: model._pool is not None and model.num_timesteps > 0)
            fork()

        with meanwhile(fork_meanwhile):
            model.learn(10**9, callback=Until(statuses))
    assert statuses == [0]


def wait_for_child(child: int) -> int:
    """
    :param child: a child process
    :return: its exit code; -1 if it had to be killed
    """
    deadline = time.monotonic() + DEADLINE
    while time.monotonic() < deadline:
        if (ended := os.waitpid(child, os.WNOHANG))[0]:
            return os.waitstatus_to_exitcode(ended[1])
        time.sleep(0.01)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return -1


@with_workers
def test_envs_that_a_callback_replaces(n_workers):
    """The workers step what stands in ``DummyVecEnv.envs``, as SB3's algorithms do."""

    class Counting(gym.Wrapper):
        # Each lane has its own count, since workers step at the same time
        n_steps = 0

        def step(self, action: Any) -> Any:
            self.n_steps += 1
            return super().step(action)

    model = make_model(AsyncOneStepQ, n_workers)
    envs = model.get_env().envs
    before = envs[:] = [Counting(env) for env in envs]
    after, until_now = [], []

    def replace_lanes(callback: Any) -> None:
        wait_for_steps(callback.model)
        until_now.extend(env.n_steps for env in before)
        after.extend(Counting(env.env) for env in before)
        envs[:] = after

    model.learn(200, callback=Do(once(replace_lanes)))
    assert [env.n_steps for env in before] == until_now and sum(until_now) < 200
    assert sum(env.n_steps for env in (*before, *after)) == 200


def replace_network(model):
    """As users do between two trainings, with an optimizer of the new parameters."""
    if isinstance(model, A3C):
        model.policy.value_net = th.nn.Sequential(th.nn.Linear(64, 8), th.nn.Linear(8, 1))
        model.policy.optimizer = SharedRMSprop(model.policy.parameters())
        return
    for network in (model.q_net, model.q_net_target):
        network.q_net = th.nn.Linear(4, 2)
    model.policy.optimizer = th.optim.Adam(model.q_net.parameters())


@pytest.mark.parametrize("total", [200, 212])
def test_another_network_between_two_trainings(algorithm, total):
    """Also within a segment, whose gradients were those of the network before."""
    model = algorithm("MlpPolicy", make_vec_env("CartPole-v1", 4), n_workers=1, update_interval=5).learn(total)
    replace_network(model)
    before = [parameter.clone() for parameter in model.policy.parameters()]
    model.learn(100, reset_num_timesteps=False)
    assert model.num_timesteps == total + 100
    assert not all(map(th.equal, before, model.policy.parameters()))


def test_parameters_that_are_set_between_two_trainings(algorithm, monkeypatch):
    """Nothing is computed with those before, although the last training ended within a segment."""
    model = algorithm("MlpPolicy", make_vec_env("CartPole-v1", 4), n_workers=1, update_interval=5, seed=0).learn(212)
    assert model._worker_states[0].steps_since_update > 0
    parameters = deepcopy(model.get_parameters())
    for name, values in parameters["policy"].items():
        if name in ("q_net.q_net.4.bias", "q_net_target.q_net.4.bias", "value_net.bias"):
            values.fill_(50.0)
    model.set_parameters(parameters)
    seen = []
    compute_loss = model.actor_learner_class.compute_loss

    def look(actor_learner, rollout):
        seen.append(max(parameter.max().item() for parameter in actor_learner.local.learning_network.parameters()))
        return compute_loss(actor_learner, rollout)

    monkeypatch.setattr(model.actor_learner_class, "compute_loss", look)
    model.learn(60, reset_num_timesteps=False)
    assert len(seen) >= 2 and min(seen) > 45


def test_threads_take_turns_with_the_whole_model(algorithm):
    """A file that is saved does not hold half of what another thread sets."""
    model = make_model(algorithm, 1)
    order = []

    def close():
        with model._gate.closed():
            order.append("second")

    thread = threading.Thread(target=close)
    with model._gate.closed():
        thread.start()
        wait_until(lambda: is_waiting(thread))
        model.save(io.BytesIO())
        order.append("first")
    thread.join(DEADLINE)
    assert order == ["first", "second"]


def test_eval_eps_is_checked_where_it_is_used(value_based):
    model = make_model(value_based, 1)
    model.eval_eps = 7
    assert model.predict(np.zeros(4, np.float32), deterministic=True)[0] in (0, 1)
    with pytest.raises(ValueError, match="eval_eps must be in"):
        model.predict(np.zeros(4, np.float32))


# ---------------------------------------------------------------------- envs that ask models


class Game(RandomWalkEnv):
    """
    :param choose: called with each observation, for the opponent's action
    """

    def __init__(self, choose):
        super().__init__()
        self.choose = choose

    def step(self, action):
        observation, *rest = super().step(action)
        self.choose(observation)
        return observation, *rest


def test_two_models_whose_envs_play_against_each_other(algorithm):
    models = {}

    def make(opponent):
        env = make_env(2, partial(Game, lambda obs: models[opponent].predict(obs, deterministic=True)))
        return algorithm("MlpPolicy", env, n_workers=1, policy_kwargs=SMALL)

    models.update(black=make("white"), white=make("black"))
    with warnings.catch_warnings():
        # predict() warns if it has waited
        warnings.simplefilter("error")
        with meanwhile(lambda: models["black"].learn(400)):
            models["white"].learn(400)
    assert [model.num_timesteps for model in models.values()] == [400, 400]


@with_workers
def test_an_env_that_waits_for_a_thread_that_asks_the_model(algorithm, n_workers, monkeypatch):
    monkeypatch.setattr(gate, "LOOK_TIMEOUT", 0.01)
    with ThreadPoolExecutor(1) as opponent:

        def choose(observation):
            return opponent.submit(model.predict, observation, deterministic=True).result()

        model = algorithm("MlpPolicy", make_env(2, partial(Game, choose)), n_workers=n_workers, policy_kwargs=SMALL)
        with pytest.warns(UserWarning, match=r"predict\(\) stopped waiting .* model.policy.predict\(\)"):
            assert model.learn(20).num_timesteps == 20


@pytest.mark.parametrize("method", ["_on_training_start", "_on_step", "_on_training_end"])
def test_another_env_in_a_callback(algorithm, method):
    class SetEnv(BaseCallback):
        def _on_step(self):
            return True

    callback, model = SetEnv(), make_model(algorithm, 1)
    setattr(callback, method, lambda: model.set_env(make_vec_env("CartPole-v1", 2)))
    with pytest.raises(RuntimeError, match="set another one when it has ended"):
        model.learn(20, callback)
    assert model.learn(20).num_timesteps == 20


def test_a_training_in_a_callback_leaves_the_number_of_threads():
    numbers = []

    def train_another(callback):
        numbers.append(th.get_num_threads())
        if len(numbers) == 2:
            make_model(AsyncOneStepQ, 1).learn(4)

    before = th.get_num_threads()
    th.set_num_threads(3)
    try:
        make_model(AsyncOneStepQ, 1).learn(10, Do(train_another))
        assert th.get_num_threads() == 3
    finally:
        th.set_num_threads(before)
    assert numbers == [1] * 5


@pytest.mark.parametrize("is_learning", [True, False])
def test_who_waits_for_a_step_that_takes_long(is_learning, monkeypatch):
    """The thread of ``learn()``: a callback saves the very model that it evaluated. Others may be waited for."""
    monkeypatch.setattr(gate, "LOOK_TIMEOUT", 0.0)
    the_gate, looker = Gate(), threading.current_thread()
    is_inside, has_looked = threading.Event(), threading.Event()

    def step() -> None:
        with the_gate.passed():
            is_inside.set()
            wait_until(lambda: is_waiting(looker) if is_learning else has_looked.is_set())

    if is_learning:
        the_gate.begin_learning(gate.Call(inspect.currentframe()))
    with meanwhile(step):
        is_inside.wait(DEADLINE)
        with the_gate.closed_to_look() as nobody_steps:
            has_looked.set()
    assert nobody_steps == is_learning


def test_a_look_waits_for_a_thread_that_replaces_the_model(algorithm, monkeypatch):
    """Without a warning: that thread is in no step that could wait for it."""
    monkeypatch.setattr(gate, "LOOK_TIMEOUT", 0.0)
    model, is_closed = make_model(algorithm, 1), threading.Event()
    looker: list[threading.Thread] = []

    def replace() -> None:
        with model._gate.closed():
            is_closed.set()
            wait_until(lambda: looker and is_waiting(looker[0]))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with meanwhile(replace):
            is_closed.wait(DEADLINE)
            looker.append(threading.current_thread())
            model.predict(np.zeros(4, dtype=np.float32))
