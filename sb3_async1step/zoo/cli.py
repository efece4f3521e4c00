"""
The RL Zoo's command line with our algorithms registered::

    sb3-async1step train --algo async_one_step_q --env CartPole-v1 -P
    sb3-async1step enjoy --algo async_one_step_q --env CartPole-v1 -f logs

The commands are the Zoo's own, with all of their options.
"""

import argparse
import inspect
import re
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import NoReturn

import rl_zoo3.enjoy
import rl_zoo3.train
from rl_zoo3 import ALGOS
from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER
from rl_zoo3.utils import StoreDict

from sb3_async1step.nodes.ray_module import import_ray
from sb3_async1step.registry import ALGORITHMS
from sb3_async1step.sb3_internals import (
    ZOO_USER_ERRORS,
    evaluate_hyperparam,
    normalized_as_checkpoints,
    repair_benchmark,
    repair_load_from_hub,
    repair_pictures_of_minatar,
    repair_push_to_hub,
    replace_experiment_manager,
    replace_vec_env_class,
    run_zoo_script,
)
from sb3_async1step.zoo.experiment_manager import (
    ONE_TRIAL_AT_A_TIME,
    AsyncExperimentManager,
    find_statistics,
    trained_agents_path,
)
from sb3_async1step.zoo.hyperparams_search import make_sampler

# Modules of rl_zoo3 that run as scripts
SCRIPTS = ("benchmark", "record_video", "record_training", "push_to_hub", "load_from_hub")
REPAIRS = {
    "benchmark": repair_benchmark,
    "push_to_hub": repair_push_to_hub,
    "load_from_hub": repair_load_from_hub,
}
# Functions of rl_zoo3.plots
PLOTS = ("plot_train", "plot_from_file", "all_plots")
COMMANDS = ("train", "enjoy", *SCRIPTS, *PLOTS)

#: VecEnvs of this package for ``train --vec-env``: their modules and names. They are imported when they are asked for,
#: since one needs ale_py
VEC_ENVS = {
    "ale": ("sb3_async1step.vec_envs.ale_vec_env", "AleVecEnv"),
    "healing": ("sb3_async1step.vec_envs.healing_vec_env", "HealingVecEnv"),
    "ray": ("sb3_async1step.nodes.ray_vec_env", "RayVecEnv"),
}

#: Those of the Zoo's own parser
ZOO_VEC_ENVS = {
    "dummy": ("stable_baselines3.common.vec_env", "DummyVecEnv"),
    "subproc": ("stable_baselines3.common.vec_env", "SubprocVecEnv"),
}

# Messages of exceptions that the user's command line causes, and that are printed without a traceback
USER_ERRORS = (*ZOO_USER_ERRORS, "AleVecEnv can't replace this env", ONE_TRIAL_AT_A_TIME)


def register() -> None:
    """Register our algorithms with the Zoo."""
    for name, algorithm in ALGORITHMS.items():
        ALGOS[name] = algorithm.model_class
        HYPERPARAMS_SAMPLER[name] = make_sampler(algorithm)  # type: ignore[assignment]
        HYPERPARAMS_CONVERTER[name] = algorithm.convert_hyperparams  # type: ignore[assignment]
    replace_experiment_manager(AsyncExperimentManager)


def take_vec_env_options(arguments: list[str]) -> list[str]:
    """
    Follow what the Zoo's parser does not know: ``--vec-env`` with one of ``VEC_ENVS``, and ``--vec-env-kwargs``.

    :param arguments: arguments of the command line of ``train``
    :return: the arguments for the Zoo's parser
    """
    parser = argparse.ArgumentParser(prog=sys.argv[0], add_help=False)
    group = parser.add_argument_group("options of this package")
    group.add_argument("--vec-env", choices=[*ZOO_VEC_ENVS, *VEC_ENVS], default="dummy", help="class of the VecEnv")
    group.add_argument(
        "--vec-env-kwargs", nargs="+", action=StoreDict, default={}, help="its arguments, e.g. start_method:\"'fork'\""
    )
    options, others = parser.parse_known_args(arguments)
    if {"-h", "--help"} & {*arguments}:
        print(parser.format_help().partition("\n\n")[2], "the Zoo's own:", sep="\n")
    module, name = (VEC_ENVS | ZOO_VEC_ENVS)[options.vec_env]
    if options.vec_env == "ray":
        check_ray()
    vec_env_class = getattr(import_module(module), name)
    try:
        inspect.signature(vec_env_class).bind([], **options.vec_env_kwargs)
    except TypeError as error:
        fail(f"--vec-env-kwargs: {name} {error}")
    AsyncExperimentManager.default_vec_env_kwargs = options.vec_env_kwargs
    if options.vec_env in ZOO_VEC_ENVS:
        return [*others, "--vec-env", options.vec_env]
    AsyncExperimentManager.own_vec_env = options.vec_env
    replace_vec_env_class(AsyncExperimentManager, vec_env_class)
    return others


def find_agents(arguments: list[str]) -> list[str]:
    """
    Look for our algorithms' agents among those of this package, unless a folder is given.

    :param arguments: arguments of the command line of ``enjoy`` or ``record_video``
    :return: the arguments for the Zoo's parser
    """
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("-f", "--folder")
    parser.add_argument("--algo")
    options, _ = parser.parse_known_args(arguments)
    if options.folder is None and options.algo in ALGORITHMS:
        return [*arguments, "--folder", trained_agents_path()]
    return arguments


def choose_video_folder(arguments: list[str]) -> list[str]:
    """
    Record the agents of this package to the folder ``videos``: the Zoo would write beside them, into the package.

    :param arguments: arguments of the command line of ``record_video``, after :func:`find_agents`
    :return: the arguments for the Zoo's parser, where a folder that the user has given takes precedence
    """
    return ["--output-folder", "videos", *arguments] if trained_agents_path() in arguments else arguments


@contextmanager
def terminated_as_by_ctrl_c() -> Iterator[None]:
    """Inside the ``with`` block, SIGTERM (which preempted jobs get) does what Ctrl-C does: the Zoo saves the model."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run(command: str) -> None:
    """
    Run a command of the Zoo, with the options in ``sys.argv``.

    :param command: one of ``COMMANDS``
    """
    if command == "train":
        sys.argv[1:] = take_vec_env_options(sys.argv[1:])
        with terminated_as_by_ctrl_c():
            rl_zoo3.train.train()
    elif command == "enjoy":
        sys.argv[1:] = find_agents(sys.argv[1:])
        with normalized_as_checkpoints(find_statistics):
            rl_zoo3.enjoy.enjoy()
    elif command in PLOTS:
        # These look for folders, whose names have no slash
        sys.argv[1:] = [re.sub(r"^(--env=)?MinAtar/(\w+-v\d+)$", r"\1MinAtar-\2", word) for word in sys.argv[1:]]
        # Imported here, since that takes long
        getattr(import_module("rl_zoo3.plots"), command)()
    else:
        if command in REPAIRS:
            REPAIRS[command]()
        if command == "record_video":
            sys.argv[1:] = choose_video_folder(find_agents(sys.argv[1:]))
        with normalized_as_checkpoints(find_statistics):
            run_zoo_script(command, program=[sys.executable, "-m", "sb3_async1step.zoo"])


def fail(problem: str) -> NoReturn:
    """
    Print an error, and exit with status 2.

    :param problem: what is wrong with the command line
    """
    print(f"sb3-async1step: error: {problem}", file=sys.stderr)
    sys.exit(2)


def check_ray() -> None:
    """Say how to install Ray before the Zoo makes an env."""
    try:
        import_ray()
    except ImportError as error:
        fail(str(error))


def is_of_an_option(error: Exception) -> bool:
    """
    :param error: a ``NameError`` or ``SyntaxError``
    :return: whether it comes from the value of an option (``--hyperparams``, ``--env-kwargs`` and the like), which the
        Zoo evaluates as Python, and not from other code, whose traceback the user needs
    """
    frames = traceback.extract_tb(error.__traceback__)
    # What can't be compiled has no frame
    is_of_a_string = "<string>" in (frames[-1].filename, getattr(error, "filename", None))
    caller = next(frame for frame in reversed(frames) if frame.filename != "<string>")
    is_of_the_zoo = Path(caller.filename).parent == Path(rl_zoo3.__file__).parent and "eval(" in (caller.line or "")
    return is_of_a_string and (is_of_the_zoo or caller.name == evaluate_hyperparam.__name__)


def register_minatar() -> None:
    """Register MinAtar's games with Gymnasium, but only if the command line names one: importing them takes seconds."""
    if not any("MinAtar/" in word for word in sys.argv):
        return
    try:
        import_module("minatar.gym").register_envs()
        repair_pictures_of_minatar()
    except ModuleNotFoundError as error:
        fail(f"MinAtar's games need a package that is not installed ({error.name}): pip install minatar")


def main() -> None:
    """Entry point of ``sb3-async1step``."""
    register()
    register_minatar()
    names = ", ".join(COMMANDS)
    usage = "usage: sb3-async1step COMMAND [options]   (sb3-async1step COMMAND --help lists the options)"
    command = sys.argv[1] if len(sys.argv) > 1 else None
    if command in ("-h", "--help"):
        print(f"{usage}\n\ncommands: {names}\n\nalgorithms: {', '.join(ALGOS)}")
        return
    if command is None:
        fail(f"a command is missing, choose from: {names}\n{usage}")
    if command not in COMMANDS:
        fail(f"unknown command '{command}', choose from: {names}\n{usage}")
    # The Zoo parses sys.argv
    sys.argv = [f"sb3-async1step {command}", *sys.argv[2:]]
    try:
        run(command)
    except (ValueError, AssertionError) as error:
        if not any(message in str(error) for message in USER_ERRORS):
            raise
        fail(str(error))
    except (NameError, SyntaxError) as error:
        if not is_of_an_option(error):
            raise
        fail(f"{error}. Values are Python, where a text needs quotes of its own: -params learning_rate:\"'lin_1e-3'\"")
