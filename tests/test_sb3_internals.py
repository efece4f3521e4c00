"""
What we rely on in other packages beyond their public interfaces is still there.

If one of these tests fails after an upgrade, what it names has changed, and the code that uses it has to follow.
"""

import argparse
import ast
import importlib.util
import inspect
import io
import json
import os
import re
import runpy
import subprocess
import sys
import tempfile
import textwrap
import zipfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path

import ale_py
import gymnasium as gym
import numpy as np
import pytest
import rl_zoo3.enjoy
import rl_zoo3.hyperparams_opt
import rl_zoo3.train
import rl_zoo3.utils
import torch as th
from ale_py.vector_env import AtariVectorEnv
from huggingface_sb3 import EnvironmentName
from rl_zoo3.exp_manager import ExperimentManager
from stable_baselines3 import A2C
from stable_baselines3.common import atari_wrappers, monitor
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import EvalCallback, ProgressBarCallback
from stable_baselines3.common.envs import SimpleMultiObsEnv
from stable_baselines3.common.monitor import Monitor, ResultsWriter
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import (
    CloudpickleWrapper,
    DummyVecEnv,
    SubprocVecEnv,
    VecCheckNan,
    VecEnvWrapper,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
)
from stable_baselines3.dqn.policies import DQNPolicy, QNetwork

from sb3_async1step.sb3_internals import (
    HOOKS_OF_MODULES,
    HOOKS_OF_OPTIMIZERS,
    HOOKS_OF_TENSORS,
    REQUEST_ANSWERED_BY_NOT_IMPLEMENTED,
    REQUEST_OF_AN_ATTRIBUTE,
    ZOO_USER_ERRORS,
    answer_requests,
    preprocess_schedules,
    repair_push_to_hub,
    replace_python,
    replace_results_writer,
    run_zoo_script,
)
from sb3_async1step.zoo.cli import SCRIPTS

# Each function without parameters looks for some of it, and returns the names of what has changed


def missing(instance: object, *names: str) -> set[str]:
    """The names that an object (or class) lacks; what a wrapper passes on to what it wraps does not count."""
    return set(names) - set(dir(instance))


def make_env() -> gym.Env:
    return gym.make("CartPole-v1")


# ---------------------------------------------------------------------- rl_zoo3


def make_manager(cls: type[ExperimentManager] = ExperimentManager, config: str | None = None) -> ExperimentManager:
    return cls(argparse.Namespace(), "dqn", "CartPole-v1", "no_such_folder", verbose=0, config=config)


def zoo_globals() -> set[str]:
    """``train()`` makes the manager, and the manager finds the algorithms, by these names of its module's."""
    users = {
        "ALGOS": (ExperimentManager.setup_experiment, rl_zoo3.utils.ALGOS),
        "ExperimentManager": (rl_zoo3.train.train, rl_zoo3.train.ExperimentManager),
        "HYPERPARAMS_CONVERTER": (ExperimentManager.load_trial, rl_zoo3.hyperparams_opt.HYPERPARAMS_CONVERTER),
        "HYPERPARAMS_SAMPLER": (ExperimentManager.objective, rl_zoo3.hyperparams_opt.HYPERPARAMS_SAMPLER),
    }
    return {
        name
        for name, (user, value) in users.items()
        if name not in user.__code__.co_names or user.__globals__[name] is not value
    }


def zoo_samplers() -> set[str]:
    samplers = rl_zoo3.hyperparams_opt.HYPERPARAMS_SAMPLER
    expected = ["trial", "n_actions", "n_envs", "additional_args"]
    return {algo for algo in ("dqn", "a2c") if list(inspect.signature(samplers[algo]).parameters) != expected}


def zoo_manager() -> set[str]:
    class Manager(ExperimentManager):
        default_vec_env_cls = SubprocVecEnv

    manager = make_manager(Manager)
    changed = missing(manager, "algo", "config", "continue_training", "learn", "vec_env_kwargs")
    changed |= {"default_vec_env_cls"} if manager.vec_env_class is not SubprocVecEnv else set()
    schedule = preprocess_schedules({"learning_rate": "lin_0.5"})["learning_rate"]
    return changed | ({"_preprocess_schedules"} if [schedule(1.0), schedule(0.5)] != [0.5, 0.25] else set())


def list_attributes(method: Callable, instance: str) -> set[str]:
    """The attributes of an object that a method's code names, by the code for the object."""
    (function,) = ast.parse(textwrap.dedent(inspect.getsource(method))).body
    attributes = [node for node in ast.walk(function) if isinstance(node, ast.Attribute)]
    return {node.attr for node in attributes if ast.unparse(node.value) == instance}


def zoo_learn() -> set[str]:
    """The attributes of the model that the manager's ``learn()`` uses: ``ContinuedTraining`` stands in for it."""
    used = list_attributes(ExperimentManager.learn, "model")
    # The policy is that of ARS
    return used ^ {"learn", "env", "policy"}


def list_calls(script: str) -> set[tuple[str, ...]]:
    """The beginnings of the commands that a script calls by ``subprocess.call([...])``: the words up to a variable."""
    spec = importlib.util.find_spec(f"rl_zoo3.{script}")
    assert spec is not None and spec.origin is not None
    calls = [node for node in ast.walk(ast.parse(Path(spec.origin).read_text())) if isinstance(node, ast.Call)]
    lists = [call.args[0] for call in calls if ast.unparse(call.func) == "subprocess.call"]
    return {tuple(word.value for word in words.elts if isinstance(word, ast.Constant)) for words in lists}


def zoo_statistics() -> set[str]:
    """Where ``enjoy`` and ``record_video`` find a model and its statistics of ``VecNormalize``."""
    changed = missing(rl_zoo3.enjoy, "get_model_path", "create_test_env")
    is_read = 'os.path.join(stats_path, "vecnormalize.pkl")' in inspect.getsource(rl_zoo3.utils.create_test_env)
    return changed | (set() if is_read else {"vecnormalize.pkl"})


def zoo_scripts() -> set[str]:
    expected = {
        "benchmark": {("python", "enjoy.py")},
        "record_training": {("python", "-m", "rl_zoo3.record_video")},
    }
    return {script for script in SCRIPTS if list_calls(script) != expected.get(script, set())}


def zoo_errors() -> set[str]:
    """Texts that none of these errors has, each of which a user can make."""

    def find_model(folder: Path) -> None:
        (folder / "dqn").mkdir()
        rl_zoo3.utils.get_model_path(0, str(folder), "dqn", EnvironmentName("CartPole-v1"))

    def find_folder(folder: Path) -> None:
        rl_zoo3.utils.get_model_path(0, str(folder), "dqn", EnvironmentName("CartPole-v1"))

    def read_hyperparams(folder: Path) -> None:
        (folder / "empty.yml").write_text("{}")
        make_manager(config=str(folder / "empty.yml")).read_hyperparameters()

    def find_env(folder: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["train", "--env", "CartPole-v9"])
            rl_zoo3.train.train()

    messages = []
    for function in (find_model, find_folder, read_hyperparams, find_env):
        with tempfile.TemporaryDirectory() as folder:
            try:
                function(Path(folder))
            except (ValueError, AssertionError) as error:
                messages.append(str(error))
    return {text for text in ZOO_USER_ERRORS if not any(text in message for message in messages)}


def hub_metadata() -> set[str]:
    repair_push_to_hub()
    metadata = importlib.import_module("huggingface_sb3.push_to_hub").generate_metadata("Q", "CartPole-v1", 1.0, 0.5)
    return {"library_name", "model-index", "tags"} - set(metadata)


# ---------------------------------------------------------------------- SB3


@cache
def make_a2c() -> A2C:
    """Shares nothing with the off-policy algorithms but the base class."""
    return A2C("MlpPolicy", "CartPole-v1", device="cpu")


def base_algorithm() -> set[str]:
    changed = missing(
        make_a2c(), "_current_progress_remaining", "_episode_num", "_excluded_save_params", "_get_torch_save_params",
        "_last_obs", "_n_updates", "_setup_lr_schedule", "_total_timesteps", "_update_current_progress_remaining",
        "_update_info_buffer", "_update_learning_rate", "_wrap_env", "lr_schedule", "n_envs",
    )  # fmt: skip
    parameters = list(inspect.signature(A2C._setup_learn).parameters)[1:]
    expected = ["total_timesteps", "callback", "reset_num_timesteps", "tb_log_name", "progress_bar"]
    return changed | (set(parameters) ^ set(expected))


def saved_model() -> set[str]:
    """Attributes are JSON in the file ``data``."""
    file = io.BytesIO()
    make_a2c().save(file)
    with zipfile.ZipFile(file) as archive:
        return {"n_envs", "num_timesteps"} - set(json.loads(archive.read("data")))


def off_policy_logs() -> set[str]:
    """``dump_logs()`` reads only what every algorithm has."""
    model = make_a2c()
    model._setup_learn(1, None)
    OffPolicyAlgorithm.dump_logs(model)
    return set()


def eval_callback() -> set[str]:
    """What it uses of the model, for which a snapshot stands in, and what it changes of its own."""
    step = vars(EvalCallback)["_on_step"]
    changed = list_attributes(step, "self.model") ^ {"get_vec_normalize_env", "save"}
    (call,) = re.findall(r"evaluate_policy\((.*?)\)", inspect.getsource(step), re.DOTALL)
    changed |= {"evaluate_policy"} if call.split(",")[0].strip() != "self.model" else set()
    assigned = set(re.findall(r"self\.(\w+) = ", inspect.getsource(step)))
    return changed | assigned ^ {"_is_success_buffer", "best_mean_reward", "last_mean_reward"}


def progress_bar() -> set[str]:
    callback = ProgressBarCallback()
    callback.init_callback(make_a2c())
    before = missing(callback, "pbar")
    callback.on_training_start({"total_timesteps": 1}, {})
    after = missing(callback, "pbar")
    callback.on_training_end()
    return after | ({"pbar"} - before)


def linear_schedule() -> set[str]:
    schedule = LinearSchedule(1.0, np.array([0.0, 0.5]), 0.5)
    values = [schedule(progress).tolist() for progress in (0.75, 0.0)]
    return set() if values == [[0.5, 0.75], [0.0, 0.5]] else {"__call__"}


def dqn_policy() -> set[str]:
    used = []

    class Network(QNetwork):
        def extract_features(self, obs, features_extractor):
            used.append("extract_features")
            return super().extract_features(obs, features_extractor)

    class Policy(DQNPolicy):
        def make_q_net(self):
            used.append("make_q_net")
            return Network(**self._update_features_extractor(self.net_args, features_extractor=None))

        def _predict(self, obs, deterministic=True):
            used.append("_predict")
            return super()._predict(obs, deterministic)

        def _get_constructor_parameters(self):
            # With which a saved policy is made again
            used.append("_get_constructor_parameters")
            parameters = super()._get_constructor_parameters()
            assert {"net_arch", "observation_space"} <= set(parameters)
            return parameters

    env = make_env()
    policy = Policy(env.observation_space, env.action_space, lambda _: 1e-3)
    policy.predict(env.reset()[0])
    policy.save(io.BytesIO())
    expected = ["make_q_net", "make_q_net", "_predict", "extract_features", "_get_constructor_parameters"]
    changed = set() if used == expected else set(used) ^ set(expected) or {"make_q_net"}
    return changed | missing(policy, "q_net", "q_net_target") | missing(policy.q_net, "q_net", "set_training_mode")


def vec_env() -> set[str]:
    env = DummyVecEnv([make_env])
    return missing(env, "_get_indices", "_options", "_reset_options", "_reset_seeds", "_seeds", "reset_infos", "envs")


def dummy_vec_env() -> set[str]:
    return {"env_idx"} - set(DummyVecEnv.step_wait.__code__.co_varnames)


def subproc_vec_env() -> set[str]:
    env = SubprocVecEnv([make_env], start_method="fork" if os.name == "posix" else "spawn")
    try:
        changed = missing(env, "closed", "processes", "remotes", "waiting", "work_remotes")
        for request, answer in ((REQUEST_OF_AN_ATTRIBUTE, None), (REQUEST_ANSWERED_BY_NOT_IMPLEMENTED, NotImplemented)):
            env.remotes[0].send(request)
            changed |= set() if env.remotes[0].recv() is answer else {request[0]}
        return changed
    finally:
        env.close()


def process_of_subproc_vec_env() -> set[str]:
    """What it answers, and that its end of the pipe stays open when the env raises an exception."""
    answers: dict[str, object] = {}

    class Env(gym.Wrapper):
        is_broken = False

        def step(self, action):
            if self.is_broken:
                raise ZeroDivisionError
            return super().step(action)

    requests = [
        ("reset", (3, {})), ("set_attr", ("is_broken", False)), ("step", 0), ("get_attr", "is_broken"),
        ("set_attr", ("is_broken", True)), ("step", 0),
    ]  # fmt: skip

    class Remote:
        def recv(self):
            self.command, argument = requests.pop(0)
            return self.command, argument

        def send(self, answer):
            answers[self.command] = answer

        def close(self):
            assert self is not remote

    remote = Remote()
    with suppress(ZeroDivisionError):
        answer_requests(remote, Remote(), CloudpickleWrapper(lambda: Env(make_env())))
        return {"an exception of the env"}
    first_observation = make_env().reset(seed=3)[0]
    observation, reward, done, info, _ = answers["step"]
    return {
        name
        for name, is_same in {
            "step": (observation.shape, reward, done) == ((4,), 1.0, False) and "TimeLimit.truncated" in info,
            "reset": (answers["reset"][0] == first_observation).all() and answers["reset"][1] == {},
            "set_attr": answers["set_attr"] is None,
            "get_attr": answers["get_attr"] is False,
        }.items()
        if not is_same
    }


def results_writer() -> set[str]:
    """``Monitor`` finds the class in its module, and writes a header unless a file goes on."""
    made = []

    class Writer(ResultsWriter):
        def __init__(self, filename="", header=None, extra_keys=(), override_existing=True):
            super().__init__(filename, header, extra_keys, override_existing)
            made.append((sorted(header), override_existing, Path(self.file_handler.name).read_text().count("\n")))

    original = monitor.ResultsWriter
    try:
        replace_results_writer(Writer)
        with tempfile.TemporaryDirectory() as folder:
            for name, overrides in (("a", True), ("b", False)):
                Monitor(make_env(), f"{folder}/{name}", override_existing=overrides).close()
    finally:
        replace_results_writer(original)
    header = ["env_id", "t_start"]
    return set() if made == [(header, True, 2), (header, False, 0)] else {"ResultsWriter"}


class BareWrapper(VecEnvWrapper):
    def reset(self):
        return self.venv.reset()

    def step_wait(self):
        return self.venv.step_wait()


def own_attributes(wrapper: VecEnvWrapper) -> set[str]:
    """What a wrapper keeps beside what every wrapper does."""
    wrapper.reset()
    wrapper.step([wrapper.action_space.sample()])
    return set(vars(wrapper)) - set(vars(BareWrapper(wrapper.venv)))


def vec_normalize() -> set[str]:
    """All of its attributes: a new one may be a setting that the workers would not see, or a state of each lane."""
    return own_attributes(VecNormalize(DummyVecEnv([make_env]))) ^ {
        "clip_obs", "clip_reward", "epsilon", "gamma", "norm_obs", "norm_obs_keys", "norm_reward", "obs_rms",
        "old_obs", "old_reward", "ret_rms", "returns", "training",
    }  # fmt: skip


def vec_monitor() -> set[str]:
    return own_attributes(VecMonitor(DummyVecEnv([make_env]))) ^ {
        "episode_count", "episode_lengths", "episode_returns", "info_keywords", "results_writer", "t_start",
    }  # fmt: skip


def vec_check_nan() -> set[str]:
    """No state of a lane that a step needs."""
    return own_attributes(VecCheckNan(DummyVecEnv([make_env]))) ^ {
        "_actions", "_observations", "_user_warned", "check_inf", "raise_exception", "warn_once",
    }  # fmt: skip


def vec_frame_stack() -> set[str]:
    """All attributes of the stacks, too: a part has a stack of its own."""
    changed = own_attributes(stack := VecFrameStack(DummyVecEnv([make_env]), 2)) ^ {"stacked_obs"}
    in_common = {"n_stack", "observation_space", "stacked_observation_space"}
    changed |= set(vars(stack.stacked_obs)) ^ in_common ^ {
        "channels_first", "repeat_axis", "stack_dimension", "stacked_obs", "stacked_shape",
    }  # fmt: skip
    of_dicts = VecFrameStack(DummyVecEnv([SimpleMultiObsEnv]), 2).stacked_obs
    return changed | set(vars(of_dicts)) ^ in_common ^ {"sub_stacked_observations"}


# ---------------------------------------------------------------------- Atari


def make_pong() -> gym.Env:
    gym.register_envs(ale_py)
    return gym.make("PongNoFrameskip-v4")


def wrappers_of_atari() -> set[str]:
    env = atari_wrappers.AtariWrapper(Monitor(make_pong()), action_repeat_probability=0.25)
    wrappers = {}
    while isinstance(env, gym.Wrapper):
        wrappers[type(env).__name__] = env
        env = env.env
    attributes = {
        "AtariWrapper": (), "ClipRewardEnv": (), "EpisodicLifeEnv": (), "FireResetEnv": (),
        "MaxAndSkipEnv": ("_skip",), "Monitor": ("results_writer",), "NoopResetEnv": ("noop_max",),
        "StickyActionEnv": ("action_repeat_probability",), "WarpFrame": ("height", "width"),
        "OrderEnforcing": (), "PassiveEnvChecker": (),
    }  # fmt: skip
    changed = set(wrappers) ^ set(attributes)
    return changed.union(*(missing(wrappers[name], *names) for name, names in attributes.items()))


def atari_env() -> set[str]:
    """The options with which it was made, and the engine's limit of frames."""
    env = make_pong().unwrapped
    changed = {"max_num_frames_per_episode"} if env.ale.getInt("max_num_frames_per_episode") <= 0 else set()
    # All of them: a new one may be something that AleVecEnv can't reproduce
    return changed | set(env._ezpickle_kwargs) ^ {
        "continuous", "continuous_action_threshold", "difficulty", "frameskip", "full_action_space", "game",
        "max_num_frames_per_episode", "mode", "obs_type", "render_mode", "repeat_action_probability", "sound_obs",
    }  # fmt: skip


def ez_pickle() -> set[str]:
    pickled = gym.utils.EzPickle(game="pong")
    return set() if pickled._ezpickle_kwargs == {"game": "pong"} else {"_ezpickle_kwargs"}


def atari_vector_env() -> set[str]:
    engine = AtariVectorEnv(
        "pong", num_envs=1, num_threads=1, max_num_frames_per_episode=1000, repeat_action_probability=0.0,
        full_action_space=False, img_height=84, img_width=84, stack_num=1, frameskip=4, maxpool=True, noop_max=0,
        episodic_life=False, life_loss_info=False, reward_clipping=False, use_fire_reset=False,
    )  # fmt: skip
    _, infos = engine.reset(seed=1)
    changed = {"lives", "episode_frame_number"} - set(infos)
    engine.send(np.array([0]))
    observations, rewards, terminated, truncated, infos = engine.recv()
    shapes = [array.shape for array in (observations, rewards, terminated, truncated)]
    changed |= set() if shapes == [(1, 1, 84, 84), (1,), (1,), (1,)] else {"recv"}
    return changed | {"lives", "episode_frame_number"} - set(infos)


# ---------------------------------------------------------------------- ray


def ray_on_loopback() -> set[str]:
    """That a cluster of ours listens on 127.0.0.1 is seen in ``test_ray.py``."""
    services = pytest.importorskip("ray._private.services", reason="Ray is not installed")
    return set() if services.resolve_ip_for_localhost("1.2.3.4") == "1.2.3.4" else {"resolve_ip_for_localhost"}


# ---------------------------------------------------------------------- torch


def hooks() -> set[str]:
    """Each hook is kept in one of the attributes that we know, and each of these has some."""
    module, tensor = th.nn.Linear(1, 1), th.zeros(1, requires_grad=True)
    optimizer = th.optim.SGD([tensor], lr=1.0)
    module.register_forward_hook(lambda *_: None, with_kwargs=True, always_call=True)
    module.register_forward_pre_hook(lambda *_: None, with_kwargs=True)
    tensor.register_hook(lambda _: None)
    tensor.register_post_accumulate_grad_hook(lambda _: None)
    optimizer.register_step_pre_hook(lambda *_: None)
    optimizer.register_step_post_hook(lambda *_: None)
    filled = {name for each in (module, optimizer) for name, value in vars(each).items() if "hook" in name and value}
    filled |= {name for name in dir(tensor) if name.endswith("_hooks") and getattr(tensor, name)}
    return filled ^ {*HOOKS_OF_MODULES, *HOOKS_OF_TENSORS, *HOOKS_OF_OPTIMIZERS}


# ---------------------------------------------------------------------- the table

#: Distribution, what we rely on, and the function that looks for it
RELIED_ON: list[tuple[str, str, Callable[[], Iterable[str]]]] = [
    ("rl_zoo3", "globals of train and exp_manager", zoo_globals),
    ("rl_zoo3", "parameters of HYPERPARAMS_SAMPLER's functions", zoo_samplers),
    ("rl_zoo3", "ExperimentManager", zoo_manager),
    ("rl_zoo3", "the model's attributes in ExperimentManager.learn", zoo_learn),
    ("rl_zoo3", "subprocess.call in scripts", zoo_scripts),
    ("rl_zoo3", "messages of errors", zoo_errors),
    ("rl_zoo3", "statistics of a model in enjoy", zoo_statistics),
    ("huggingface_sb3", "push_to_hub.generate_metadata", hub_metadata),
    ("stable_baselines3", "BaseAlgorithm", base_algorithm),
    ("stable_baselines3", "attributes in a saved model", saved_model),
    ("stable_baselines3", "OffPolicyAlgorithm.dump_logs", off_policy_logs),
    ("stable_baselines3", "EvalCallback", eval_callback),
    ("stable_baselines3", "ProgressBarCallback", progress_bar),
    ("stable_baselines3", "LinearSchedule with arrays", linear_schedule),
    ("stable_baselines3", "DQNPolicy and QNetwork", dqn_policy),
    ("stable_baselines3", "VecEnv", vec_env),
    ("stable_baselines3", "variables of DummyVecEnv.step_wait", dummy_vec_env),
    ("stable_baselines3", "SubprocVecEnv", subproc_vec_env),
    ("stable_baselines3", "subproc_vec_env._worker", process_of_subproc_vec_env),
    ("stable_baselines3", "ResultsWriter of Monitor", results_writer),
    ("stable_baselines3", "VecNormalize", vec_normalize),
    ("stable_baselines3", "VecMonitor", vec_monitor),
    ("stable_baselines3", "VecCheckNan", vec_check_nan),
    ("stable_baselines3", "VecFrameStack and StackedObservations", vec_frame_stack),
    ("stable_baselines3", "AtariWrapper", wrappers_of_atari),
    ("gymnasium", "EzPickle", ez_pickle),
    ("ray", "services.resolve_ip_for_localhost", ray_on_loopback),
    ("ale-py", "AtariEnv", atari_env),
    ("ale-py", "AtariVectorEnv", atari_vector_env),
    ("torch", "hooks of modules, tensors and optimizers", hooks),
]


def find_changes(distribution: str, what: str, check: Callable[[], Iterable[str]]) -> str:
    """A message about what has changed, or nothing."""
    try:
        changed = ", ".join(sorted(check()))
    except Exception as error:
        changed = f"{type(error).__name__}: {error}"
    return f"{distribution} {version(distribution)} has changed {what}: {changed}" if changed else ""


@pytest.mark.parametrize(("distribution", "what", "check"), RELIED_ON, ids=[what for _, what, _ in RELIED_ON])
def test_nothing_that_we_rely_on_has_changed(distribution, what, check):
    message = find_changes(distribution, what, check)
    assert not message, message


# ---------------------------------------------------------------------- and a change is found


def rename(owner: object, name: str) -> Callable[[pytest.MonkeyPatch], None]:
    def apply(monkeypatch):
        monkeypatch.setattr(owner, f"{name}_renamed", getattr(owner, name), raising=False)
        monkeypatch.delattr(owner, name)

    return apply


def rename_in_instances(cls: type, name: str) -> Callable[[pytest.MonkeyPatch], None]:
    def apply(monkeypatch):
        make = cls.__init__

        def renaming(self, *args, **kwargs):
            make(self, *args, **kwargs)
            vars(self)[f"{name}_renamed"] = vars(self).pop(name)

        monkeypatch.setattr(cls, "__init__", renaming)

    return apply


def replace_text(monkeypatch):
    def get_model_path(*args):
        raise ValueError("There is no model")

    monkeypatch.setattr(rl_zoo3.utils, "get_model_path", get_model_path)


def rename_loop_variable(monkeypatch):
    def step_wait(self):
        for lane in range(self.num_envs):
            self.envs[lane].step(self.actions[lane])

    monkeypatch.setattr(DummyVecEnv, "step_wait", step_wait)


@pytest.mark.parametrize(
    ("change", "check", "found"),
    [
        (rename(ExperimentManager, "_preprocess_schedules"), zoo_manager, "_preprocess_schedules"),
        (rename(rl_zoo3.train, "ExperimentManager"), zoo_globals, "ExperimentManager"),
        (replace_text, zoo_errors, "No model found"),
        (rename(BaseAlgorithm, "_excluded_save_params"), base_algorithm, "_excluded_save_params"),
        (rename(EvalCallback, "_on_step"), eval_callback, "_on_step"),
        (rename(DQNPolicy, "_get_constructor_parameters"), dqn_policy, "AssertionError"),
        (rename_loop_variable, dummy_vec_env, "env_idx"),
        (rename_in_instances(SubprocVecEnv, "waiting"), subproc_vec_env, "waiting"),
        (rename_in_instances(VecNormalize, "old_reward"), vec_normalize, "old_reward_renamed"),
        (rename_in_instances(atari_wrappers.MaxAndSkipEnv, "_skip"), wrappers_of_atari, "_skip"),
        (rename_in_instances(th.nn.Linear, "_forward_hooks"), hooks, "_forward_hooks"),
    ],
)
def test_a_change_is_found(change, check, found, monkeypatch):
    assert not find_changes("rl_zoo3", "it", check)
    change(monkeypatch)
    message = find_changes("rl_zoo3", "it", check)
    assert message.startswith(f"rl_zoo3 {version('rl_zoo3')} has changed it: ")
    assert found in message


@pytest.mark.parametrize(
    ("command", "replaced"),
    [
        (["python", "enjoy.py", "-n", "3"], ["zoo", "enjoy", "-n", "3"]),
        (["python", "-m", "rl_zoo3.record_video", "-m", "3"], ["zoo", "record_video", "-m", "3"]),
        (["ffmpeg", "-i", "python"], ["ffmpeg", "-i", "python"]),
    ],
)
def test_scripts_of_the_zoo_start_ours(command, replaced):
    assert replace_python(command, ["zoo"]) == replaced


def test_record_training_records_each_checkpoint_once(monkeypatch):
    """It finds a checkpoint twice, once by its statistics."""
    checkpoints, calls = (100, 100, 200), []
    monkeypatch.setattr(subprocess, "call", lambda command: calls.append(command) or 0)

    def script(*args, **kwargs):
        command = ["python", "-m", "rl_zoo3.record_video", "--load-checkpoint", ""]
        for checkpoint in checkpoints:
            # The Zoo's list is the same each time
            command[-1] = str(checkpoint)
            assert subprocess.call(command) == 0

    monkeypatch.setattr(runpy, "run_module", script)
    run_zoo_script("record_training", ["zoo"])
    assert calls == [["zoo", "record_video", "--load-checkpoint", n] for n in ("100", "200")]
