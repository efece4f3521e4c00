"""
What we rely on in other packages beyond their public interfaces: private names, module globals, texts of exceptions.

``tests/test_sb3_internals.py`` fails if a release has changed one of them, and says which.
"""

import inspect
import runpy
import shutil
import subprocess
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from stable_baselines3.common import monitor
from stable_baselines3.common.atari_wrappers import MaxAndSkipEnv
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    EvalCallback,
    EventCallback,
    ProgressBarCallback,
)
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import CloudpickleWrapper, DummyVecEnv, VecEnv, VecEnvWrapper, VecNormalize
from stable_baselines3.common.vec_env.subproc_vec_env import _worker

# ---------------------------------------------------------------------- stable_baselines3

#: Attributes of a ``VecEnv`` with an element for each lane
VEC_ENV_ATTRIBUTES_PER_LANE = ("reset_infos", "_seeds", "_options")
#: What a process of ``SubprocVecEnv`` answers by ``NotImplemented``, unlike any other request
REQUEST_ANSWERED_BY_NOT_IMPLEMENTED: tuple[str, tuple] = ("env_method", ("__subclasshook__", (None,), {}))
#: Another request, which ``VecEnv``'s constructor makes, too
REQUEST_OF_AN_ATTRIBUTE = ("get_attr", "render_mode")


def find_lane_of_exception(exception: BaseException) -> int | None:
    """
    :param exception: an exception of a ``VecEnv.step()``
    :return: the lane that it came from, None if it is not known
    """
    for frame, _ in traceback.walk_tb(exception.__traceback__):
        # DummyVecEnv steps its environments in a loop, whose variable tells which of them raised the exception
        if frame.f_code is DummyVecEnv.step_wait.__code__:
            return frame.f_locals.get("env_idx")
    return None


def answer_requests(remote: Connection, parent_remote: Connection, env_fn: CloudpickleWrapper) -> None:
    """
    Make an env, and answer the requests of a ``SubprocVecEnv`` until it is closed, as a process of its own does.

    :param remote: this process's end of the pipe
    :param parent_remote: the other end, which is closed here
    :param env_fn: function that makes the env
    :raises Exception: the first exception of the env; the end of the pipe is still open then
    """
    _worker(remote, parent_remote, env_fn)


def replace_results_writer(writer_class: type[monitor.ResultsWriter]) -> None:
    """
    :param writer_class: class of the files that ``Monitor`` writes from now on, in this process
    """
    monitor.ResultsWriter = writer_class  # type: ignore[misc]


def close_progress_bars(callback: BaseCallback) -> None:
    """
    Close the progress bars that SB3 leaves open when the training fails.

    :param callback: the callback of the training
    """
    for each in list_callbacks(callback):
        if isinstance(each, ProgressBarCallback) and hasattr(each, "pbar"):
            each.on_training_end()


def list_callbacks(callback: BaseCallback) -> list[BaseCallback]:
    """
    :param callback: the callback of a training
    :return: it, and those that it calls
    """
    children: list[BaseCallback] = []
    if isinstance(callback, CallbackList):
        children = callback.callbacks
    elif isinstance(callback, EventCallback) and callback.callback is not None:
        children = [callback.callback]
    return [callback, *(each for child in children for each in list_callbacks(child))]


def evaluate_now(callback: EvalCallback) -> None:
    """
    Do what SB3's callback does at a step at which an evaluation is due. Of its model, it uses ``predict()``,
    ``save()``, ``get_vec_normalize_env()`` and ``logger``.

    :param callback: the callback; its number of calls says that an evaluation is due
    """
    EvalCallback._on_step(callback)


def dump_logs_by_episodes(algorithm: BaseAlgorithm) -> None:
    """
    Write SB3's log data of an off-policy algorithm, from what every algorithm has.

    :param algorithm: any algorithm
    """
    OffPolicyAlgorithm.dump_logs(algorithm)  # type: ignore[arg-type]


def dump_logs_by_iterations(algorithm: BaseAlgorithm, iteration: int) -> None:
    """
    Write SB3's log data of an on-policy algorithm, from what every algorithm has.

    :param algorithm: any algorithm
    :param iteration: number of rollouts
    """
    OnPolicyAlgorithm.dump_logs(algorithm, iteration)  # type: ignore[arg-type]


def read_wrapper(wrapper: VecEnvWrapper) -> dict[str, Any]:
    """
    :param wrapper: a wrapper of a VecEnv
    :return: its attributes that can be pickled: neither the VecEnv that it wraps nor what it keeps of its class
    """
    return {name: value for name, value in vars(wrapper).items() if name not in ("venv", "class_attributes")}


def rebuild_wrapper(wrapper_class: type[VecEnvWrapper], attributes: dict[str, Any], env: VecEnv) -> VecEnvWrapper:
    """
    :param wrapper_class: class of a wrapper
    :param attributes: what :func:`read_wrapper` returned
    :param env: the VecEnv to wrap, which has not been reset
    :return: the wrapper
    """
    wrapper = wrapper_class.__new__(wrapper_class)
    class_attributes = dict(inspect.getmembers(wrapper_class))
    vars(wrapper).update(attributes, venv=env, num_envs=env.num_envs, class_attributes=class_attributes)
    if isinstance(wrapper, VecNormalize):
        wrapper.returns = np.zeros(env.num_envs)
    return wrapper


def read_frame_skip(wrapper: MaxAndSkipEnv) -> int:
    """
    :param wrapper: SB3's wrapper
    :return: number of frames for which it repeats an action
    """
    return wrapper._skip


# ---------------------------------------------------------------------- torch

#: Attributes of a module with the hooks that its forward pass calls, by their ids
HOOKS_OF_MODULES = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
)
#: Attributes of a tensor with the hooks that its backward pass calls
HOOKS_OF_TENSORS = ("_backward_hooks", "_post_accumulate_grad_hooks")
#: Attributes of an optimizer with the hooks that its steps call
HOOKS_OF_OPTIMIZERS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")

# ---------------------------------------------------------------------- ale_py


def read_options(env: Any) -> dict[str, Any]:
    """
    :param env: an ``AtariEnv`` of ale_py
    :return: the arguments of its constructor
    """
    return env._ezpickle_kwargs


# ---------------------------------------------------------------------- ray
# An optional extra: the function imports it


def start_ray_on_loopback(**arguments: Any) -> None:
    """
    Start Ray on this machine so that nobody on the network can reach it. Asked for 127.0.0.1, ``ray.init`` takes the
    machine's address instead, and listens on all of them.

    :param arguments: further arguments of ``ray.init``
    """
    services = import_module("ray._private.services")
    with patch.object(services, "resolve_ip_for_localhost", lambda host: host):
        import_module("ray").init(address="local", _node_ip_address="127.0.0.1", **arguments)


# ---------------------------------------------------------------------- rl_zoo3
# An optional extra: the functions import it

#: Parts of the messages of the errors that the Zoo raises if the command line is wrong
ZOO_USER_ERRORS = ("not found in gym registry", "No model found", "folder was not found", "Hyperparameters not found")


def replace_experiment_manager(manager_class: type) -> None:
    """
    :param manager_class: class of the experiment manager that the Zoo's ``train`` makes from now on
    """
    module: Any = import_module("rl_zoo3.train")
    module.ExperimentManager = manager_class


def replace_vec_env_class(manager_class: Any, vec_env_class: type[VecEnv]) -> None:
    """
    :param manager_class: class of an experiment manager
    :param vec_env_class: class of the VecEnvs that it makes from now on, whatever ``--vec-env`` says
    """
    manager_class.default_vec_env_cls = vec_env_class


def preprocess_schedules(hyperparams: dict[str, Any]) -> dict[str, Any]:
    """
    :param hyperparams: hyperparameters as in the YAML files, changed in place
    :return: the same, with schedules for texts such as ``"lin_0.001"``
    """
    return import_module("rl_zoo3.exp_manager").ExperimentManager._preprocess_schedules(hyperparams)


def evaluate_hyperparam(value: Any) -> Any:
    """
    :param value: of a hyperparameter in a YAML file: perhaps Python code, which knows what the Zoo's module knows
    :return: what it says
    """
    return eval(value, vars(import_module("rl_zoo3.exp_manager"))) if isinstance(value, str) else value


@contextmanager
def normalized_as_checkpoints(find_statistics: Callable[[Path], Path | None]) -> Iterator[None]:
    """
    Inside the ``with`` block, the Zoo plays a checkpoint with its own statistics of ``VecNormalize``, instead of those
    of the end of the training, which an interrupted one does not have.

    :param find_statistics: returns the file of a checkpoint's statistics, None if there is none
    """
    utils, enjoy = import_module("rl_zoo3.utils"), import_module("rl_zoo3.enjoy")
    get_model_path, create_test_env = utils.get_model_path, utils.create_test_env
    statistics: Path | None = None

    def get(*args: Any, **kwargs: Any) -> tuple[str, str, str]:
        nonlocal statistics
        found = get_model_path(*args, **kwargs)
        statistics = find_statistics(Path(found[1]))
        return found

    def create(*args: Any, stats_path: str | None = None, **kwargs: Any) -> VecEnv:
        if statistics is None:
            return create_test_env(*args, stats_path=stats_path, **kwargs)
        with tempfile.TemporaryDirectory() as folder:
            shutil.copy(statistics, Path(folder, "vecnormalize.pkl"))
            return create_test_env(*args, stats_path=folder, **kwargs)

    replacements: dict[str, Any] = {"get_model_path": get, "create_test_env": create}
    with patch.multiple(utils, **replacements), patch.multiple(enjoy, **replacements):
        yield


def run_zoo_script(name: str, program: Sequence[str]) -> None:
    """
    Run a module of the Zoo that is a script. It starts others (``enjoy``, ``record_video``) by ``subprocess.call``; on
    processes of their own, these would not know our algorithms.

    :param name: name of the module in ``rl_zoo3``
    :param program: beginning of the command that starts one of the Zoo's scripts instead, followed by its name
    """
    original = subprocess.call
    done: list[list[str]] = []

    def call(command: list[str], *args: Any, **kwargs: Any) -> int:
        # The Zoo passes the name of an environment's files; Gymnasium needs its id
        command = [getattr(word, "gym_id", word) for word in command]
        # record_training takes the statistics beside a checkpoint for another checkpoint
        if command in done:
            return 0
        done.append(command)
        return original(replace_python(command, program), *args, **kwargs)

    with patch.object(subprocess, "call", call):
        runpy.run_module(f"rl_zoo3.{name}", run_name="__main__")


def replace_python(command: list[str], program: Sequence[str]) -> list[str]:
    """
    :param command: ``python``, a script of the Zoo's (its file, or ``-m`` and its module) and options; or any other
    :param program: see :func:`run_zoo_script`
    :return: the command that starts this script by ``program``; any other command unchanged
    """
    if command[0] != "python":
        return command
    script, *options = command[2:] if command[1] == "-m" else command[1:]
    return [*program, script.removesuffix(".py").removeprefix("rl_zoo3."), *options]


def repair_push_to_hub() -> None:
    """Provide the function that ``rl_zoo3.push_to_hub`` imports, and which huggingface_sb3 3.2 has renamed."""
    module: Any = import_module("huggingface_sb3.push_to_hub")
    if not hasattr(module, "generate_metadata"):
        module.generate_metadata = lambda *args: module._generate_metadata(*args).to_dict()


def repair_load_from_hub() -> None:
    """Raise the error that ``rl_zoo3.load_from_hub`` expects of a missing file: huggingface_hub 1 raises another."""
    module: Any = import_module("huggingface_sb3")
    missing = import_module("huggingface_hub.errors").EntryNotFoundError
    expected = import_module("requests.exceptions").HTTPError
    original = module.load_from_hub

    def load_from_hub(*args: Any, **kwargs: Any) -> str:
        try:
            return original(*args, **kwargs)
        except missing as error:
            raise expected(str(error)) from error

    module.load_from_hub = load_from_hub


def repair_pictures_of_minatar() -> None:
    """
    Let MinAtar's games render images of bytes, large enough to be seen: theirs have one pixel for each field, and
    colours from 0 to 1, which are black in a video.
    """
    env_class: Any = import_module("minatar.gym").BaseEnv
    original = env_class.render

    def render(env: Any) -> Any:
        image = original(env)
        # Unless this was repaired before
        if env.render_mode != "rgb_array" or image.dtype == np.uint8:
            return image
        return np.kron(np.round(255 * image), np.ones((16, 16, 1))).astype(np.uint8)

    env_class.render = render


def repair_benchmark() -> None:
    """Let ``rl_zoo3.benchmark`` look for the files of environments whose ids have a slash under the files' names."""
    module: Any = import_module("rl_zoo3.utils")
    name_class = import_module("huggingface_sb3").EnvironmentName
    original = module.get_trained_models

    def get_trained_models(log_folder: str) -> dict[str, tuple[str, str]]:
        models = original(log_folder).items()
        # Unless this was repaired before
        return {model: (algo, name_class(getattr(env_id, "gym_id", env_id))) for model, (algo, env_id) in models}

    module.get_trained_models = get_trained_models
