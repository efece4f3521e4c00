"""The RL Zoo's command line with our algorithms, see :mod:`sb3_async1step.zoo.cli`."""

from sb3_async1step.zoo.cli import main, register, register_minatar
from sb3_async1step.zoo.experiment_manager import AsyncExperimentManager, hyperparams_path, trained_agents_path

__all__ = ["AsyncExperimentManager", "hyperparams_path", "main", "register", "register_minatar", "trained_agents_path"]
