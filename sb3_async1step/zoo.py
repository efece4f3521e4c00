"""
The RL Zoo, with our algorithms registered::

    sb3-async1step train --algo async_one_step_q --env CartPole-v1 -P
    sb3-async1step enjoy --algo async_one_step_q --env CartPole-v1 -f logs

The sub-commands are the Zoo's own, with every one of their options.
"""

import sys
from importlib.resources import files
from typing import Any

import rl_zoo3.enjoy
import rl_zoo3.train
from rl_zoo3 import ALGOS
from rl_zoo3.exp_manager import ExperimentManager

from sb3_async1step import AsyncOneStepQ, AsyncOneStepSarsa

ALGORITHMS = {"async_one_step_q": AsyncOneStepQ, "async_one_step_sarsa": AsyncOneStepSarsa}

COMMANDS = {"train": rl_zoo3.train.train, "enjoy": rl_zoo3.enjoy.enjoy}


class AsyncExperimentManager(ExperimentManager):
    """
    The Zoo's experiment manager; it finds our hyperparameters where the Zoo would look for its own.

    :param args: parsed command line
    :param algo: Zoo id of the algorithm
    :param positional: further parameters of the Zoo's
    :param kwargs: likewise; ``config`` is the user's ``--conf-file``, by default ours for our algorithms
    """

    def __init__(self, args: Any, algo: str, *positional: Any, **kwargs: Any) -> None:
        if kwargs.get("config") is None and algo in ALGORITHMS:
            kwargs["config"] = hyperparams_path(algo)
        super().__init__(args, algo, *positional, **kwargs)


def hyperparams_path(algo: str) -> str:
    """
    :param algo: Zoo id of one of our algorithms
    :return: its YAML file
    """
    return str(files("sb3_async1step.hyperparams") / f"{algo}.yml")


def register() -> None:
    """Make our algorithms known to the Zoo."""
    ALGOS.update(ALGORITHMS)
    rl_zoo3.train.ExperimentManager = AsyncExperimentManager  # type: ignore[misc]


def main() -> None:
    """Entry point of ``sb3-async1step``."""
    register()
    names = ", ".join(COMMANDS)
    usage = f"usage: sb3-async1step {{{names}}} [options]   (sb3-async1step COMMAND --help lists the options)"
    command = sys.argv[1] if len(sys.argv) > 1 else None
    if command in ("-h", "--help"):
        print(f"{usage}\n\nalgorithms: {', '.join(ALGOS)}")
        return
    if command not in COMMANDS:
        problem = "a command is missing" if command is None else f"unknown command '{command}'"
        print(f"{usage}\nsb3-async1step: error: {problem}, choose from: {names}", file=sys.stderr)
        sys.exit(2)
    # The Zoo parses sys.argv
    sys.argv = [f"{sys.argv[0]} {command}", *sys.argv[2:]]
    COMMANDS[command]()


if __name__ == "__main__":
    main()
