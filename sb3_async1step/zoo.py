"""
The RL Zoo's command line with our algorithms registered::

    sb3-async1step train --algo async_one_step_q --env CartPole-v1 -P
    sb3-async1step enjoy --algo async_one_step_q --env CartPole-v1 -f logs

The commands are the Zoo's own, with all of their options.
"""

import argparse
import functools
import runpy
import subprocess
import sys
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import patch

import optuna
import rl_zoo3.enjoy
import rl_zoo3.train
import torch as th
from rl_zoo3 import ALGOS
from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER, convert_offpolicy_params
from stable_baselines3.common.base_class import BaseAlgorithm

from sb3_async1step import AsyncOneStepQ, AsyncOneStepSarsa
from sb3_async1step.common.optimizers import SharedRMSprop

ALGORITHMS: dict[str, type[AsyncOneStepQ] | type[AsyncOneStepSarsa]] = {
    "async_one_step_q": AsyncOneStepQ,
    "async_one_step_sarsa": AsyncOneStepSarsa,
}
OPTIMIZERS = {"shared_rmsprop": SharedRMSprop, "adam": th.optim.Adam}

# Modules of rl_zoo3 that run as scripts
SCRIPTS = ("benchmark", "record_video", "record_training", "push_to_hub", "load_from_hub")
# Functions of rl_zoo3.plots
PLOTS = ("plot_train", "plot_from_file", "all_plots")
COMMANDS = ("train", "enjoy", *SCRIPTS, *PLOTS)

# Messages of exceptions that the user's command line causes, and that are printed without a traceback
USER_ERRORS = (
    "not found in gym registry",
    "No model found",
    "Hyperparameters not found",
    "AleVecEnv can't replace this env",
)


class AsyncExperimentManager(ExperimentManager):
    """
    The Zoo's experiment manager, which also finds the hyperparameters of our algorithms.

    :param args: the parsed command line
    :param algo: the algorithm's name in the Zoo
    :param positional: further positional arguments of the Zoo's experiment manager
    :param kwargs: keyword arguments of the Zoo's experiment manager; without a ``config`` (``--conf-file``), our
        algorithms get their file of tuned hyperparameters
    """

    def __init__(self, args: Any, algo: str, *positional: Any, **kwargs: Any) -> None:
        if kwargs.get("config") is None and algo in ALGORITHMS:
            kwargs["config"] = hyperparams_path(algo)
        super().__init__(args, algo, *positional, **kwargs)

    def learn(self, model: BaseAlgorithm) -> None:
        """
        Train a model. If it was loaded with ``-i``, it continues where it stopped. The Zoo would count its steps from
        zero, and the model would explore again as much as at the start, which ruins the policy.

        :param model: the model to train
        """
        if not (self.continue_training and self.algo in ALGORITHMS):
            super().learn(model)
            return
        algorithm = type(model)
        # Patch the class: an attribute of the model would be saved with its checkpoints
        going_on = functools.partialmethod(algorithm.learn, reset_num_timesteps=False)
        with patch.object(algorithm, "learn", going_on):
            super().learn(model)


def sample_hyperparams(
    trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]
) -> dict[str, Any]:
    """
    Sample hyperparameters of our algorithms for ``train -optimize``.

    :param trial: the Optuna trial
    :param n_actions: number of actions (not used)
    :param n_envs: number of environments (not used)
    :param additional_args: further arguments of the Zoo (not used)
    :return: arguments of the algorithm's constructor
    """
    sampled = {
        "one_minus_gamma": trial.suggest_float("one_minus_gamma", 0.0001, 0.03, log=True),
        "learning_rate": trial.suggest_float("learning_rate", 1e-5, 0.01, log=True),
        "update_interval": trial.suggest_int("update_interval", 1, 16, log=True),
        "target_update_interval": trial.suggest_int("target_update_interval", 100, 20_000, log=True),
        "exploration_fraction": trial.suggest_float("exploration_fraction", 0.02, 0.8),
        "exploration_final_eps": trial.suggest_float("exploration_final_eps", 0.01, 0.2),
        "max_grad_norm": trial.suggest_float("max_grad_norm", 0.3, 40.0, log=True),
        "loss": trial.suggest_categorical("loss", ["mse", "huber"]),
        "optimizer": trial.suggest_categorical("optimizer", list(OPTIMIZERS)),
        "net_arch": trial.suggest_categorical("net_arch", ["small", "medium", "big"]),
        "layer_norm": trial.suggest_categorical("layer_norm", [False, True]),
    }
    return ExperimentManager._preprocess_schedules(convert_hyperparams(sampled))


def convert_hyperparams(sampled_params: dict[str, Any]) -> dict[str, Any]:
    """
    Convert the values of a trial.

    :param sampled_params: the values
    :return: hyperparameters as in the YAML files; the learning rate is annealed to zero, as in the paper (section 8)
    """
    hyperparams = convert_offpolicy_params(sampled_params)
    hyperparams["learning_rate"] = f"lin_{sampled_params['learning_rate']}"
    hyperparams["policy_kwargs"]["layer_norm"] = hyperparams.pop("layer_norm")
    hyperparams["policy_kwargs"]["optimizer_class"] = OPTIMIZERS[hyperparams.pop("optimizer")]
    return hyperparams


def hyperparams_path(algo: str) -> str:
    """
    :param algo: name of one of our algorithms in the Zoo
    :return: path of its YAML file of hyperparameters
    """
    package = Path(str(files("sb3_async1step")))
    # A wheel holds the folder inside of the package, the repository beside it
    folder = package / "hyperparams"
    return str((folder if folder.is_dir() else package.parent / "hyperparams") / f"{algo}.yml")


def register() -> None:
    """Register our algorithms with the Zoo."""
    ALGOS.update(ALGORITHMS)
    HYPERPARAMS_SAMPLER.update(dict.fromkeys(ALGORITHMS, sample_hyperparams))
    HYPERPARAMS_CONVERTER.update(dict.fromkeys(ALGORITHMS, convert_hyperparams))
    rl_zoo3.train.ExperimentManager = AsyncExperimentManager  # type: ignore[misc]


def take_ale_option(arguments: list[str]) -> list[str]:
    """
    Use ``AleVecEnv`` if the command line of ``train`` has ``--vec-env ale``, which the Zoo's parser does not know.

    :param arguments: arguments of the command line
    :return: the arguments for the Zoo's parser
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--vec-env")
    option, others = parser.parse_known_args(arguments)
    if option.vec_env != "ale":
        return arguments
    # Imported here, since it needs ale_py
    AsyncExperimentManager.default_vec_env_cls = import_module("sb3_async1step.vec_envs.ale_vec_env").AleVecEnv
    return others


def call_with_our_algorithms(command: list[str], *args: Any, **kwargs: Any) -> int:
    """
    Replace ``subprocess.call`` in the Zoo's scripts: the processes that they start for ``enjoy`` or ``record_video``
    would not know our algorithms.

    :param command: Python, a script (or ``-m`` and a module) and its options; any other command is called unchanged
    :param args: positional arguments of ``subprocess.call``
    :param kwargs: keyword arguments of ``subprocess.call``
    :return: exit code
    """
    if command[0] == "python":
        _, script, *options = [word for word in command if word != "-m"]
        name = script.removesuffix(".py").removeprefix("rl_zoo3.")
        command = [sys.executable, "-m", "sb3_async1step.zoo", name, *options]
    with subprocess.Popen(command, *args, **kwargs) as process:
        return process.wait()


def repair_push_to_hub() -> None:
    """Provide the function that ``rl_zoo3.push_to_hub`` imports, and which huggingface_sb3 3.2 has renamed."""
    module: Any = import_module("huggingface_sb3.push_to_hub")
    if not hasattr(module, "generate_metadata"):
        module.generate_metadata = lambda *args: module._generate_metadata(*args).to_dict()


def run(command: str) -> None:
    """
    Run a command of the Zoo, with the options in ``sys.argv``.

    :param command: one of ``COMMANDS``
    """
    if command == "train":
        sys.argv[1:] = take_ale_option(sys.argv[1:])
        rl_zoo3.train.train()
    elif command == "enjoy":
        rl_zoo3.enjoy.enjoy()
    elif command in PLOTS:
        # Imported here, since that takes long
        getattr(import_module("rl_zoo3.plots"), command)()
    else:
        if command == "push_to_hub":
            repair_push_to_hub()
        with patch("subprocess.call", call_with_our_algorithms):
            runpy.run_module(f"rl_zoo3.{command}", run_name="__main__")


def fail(problem: str) -> NoReturn:
    """
    Print an error, and exit with status 2.

    :param problem: what is wrong with the command line
    """
    print(f"sb3-async1step: error: {problem}", file=sys.stderr)
    sys.exit(2)


def register_minatar() -> None:
    """Register MinAtar's games with Gymnasium, but only if the command line names one: importing them takes seconds."""
    if not any("MinAtar/" in word for word in sys.argv):
        return
    try:
        import_module("minatar.gym").register_envs()
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
    sys.argv = [f"{sys.argv[0]} {command}", *sys.argv[2:]]
    try:
        run(command)
    except ValueError as error:
        if not any(message in str(error) for message in USER_ERRORS):
            raise
        fail(str(error))


if __name__ == "__main__":
    main()
