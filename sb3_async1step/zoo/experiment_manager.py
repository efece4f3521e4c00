"""The Zoo's experiment manager for our algorithms: their hyperparameters, and trainings that continue."""

from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar

from rl_zoo3.exp_manager import ExperimentManager
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from sb3_async1step.nodes.ray_vec_env import RayVecEnv
from sb3_async1step.registry import ALGORITHMS


def find_folder(name: str) -> Path:
    """
    :param name: name of a folder of data
    :return: where it is: a wheel holds it inside of the package, the repository beside it
    """
    package = Path(str(files("sb3_async1step")))
    folder = package / name
    return folder if folder.is_dir() else package.parent / name


def hyperparams_path(algo: str) -> str:
    """
    :param algo: name of one of our algorithms in the Zoo
    :return: path of its YAML file of hyperparameters
    """
    return str(find_folder("hyperparams") / f"{algo}.yml")


def trained_agents_path() -> str:
    """
    :return: path of the folder of agents that were trained for this package
    """
    return str(find_folder("trained_agents"))


class ContinuedTraining:
    """
    A model whose ``learn()`` goes on counting its steps, for the Zoo, which would count from zero.

    :param model: the model
    """

    def __init__(self, model: BaseAlgorithm) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def learn(self, total_timesteps: int, **kwargs: Any) -> BaseAlgorithm:
        """
        :param total_timesteps: number of environment steps, beside those before
        :param kwargs: further arguments of the model's ``learn()``
        :return: the model
        """
        return self._model.learn(total_timesteps, reset_num_timesteps=False, **kwargs)


class AsyncExperimentManager(ExperimentManager):
    """
    The Zoo's experiment manager, which also finds the hyperparameters of our algorithms.

    :param args: the parsed command line
    :param algo: the algorithm's name in the Zoo
    :param positional: further positional arguments of the Zoo's experiment manager
    :param kwargs: keyword arguments of the Zoo's experiment manager; without a ``config`` (``--conf-file``), our
        algorithms get their file of tuned hyperparameters
    """

    #: Keyword arguments of the VecEnv's class, beside the Zoo's
    default_vec_env_kwargs: ClassVar[dict[str, Any]] = {}

    def __init__(self, args: Any, algo: str, *positional: Any, **kwargs: Any) -> None:
        if kwargs.get("config") is None and algo in ALGORITHMS:
            kwargs["config"] = hyperparams_path(algo)
        super().__init__(args, algo, *positional, **kwargs)
        self.vec_env_kwargs = {**self.vec_env_kwargs, **self.default_vec_env_kwargs}

    def create_envs(self, n_envs: int, eval_env: bool = False, no_log: bool = False) -> VecEnv:
        """
        Make a VecEnv with its wrappers. That of an evaluation is on this machine: of Ray's, a step takes milliseconds.

        :param n_envs: number of lanes
        :param eval_env: whether it is for evaluations
        :param no_log: whether not to write a monitor file
        :return: the VecEnv
        """
        original = self.vec_env_class, self.vec_env_kwargs
        if eval_env and self.vec_env_class is RayVecEnv:
            self.vec_env_class, self.vec_env_kwargs = DummyVecEnv, {}
        try:
            return super().create_envs(n_envs, eval_env, no_log)
        finally:
            self.vec_env_class, self.vec_env_kwargs = original

    def learn(self, model: BaseAlgorithm) -> None:
        """
        Train a model. If it was loaded with ``-i``, it continues where it stopped. Otherwise it would explore again as
        much as at the start, which ruins the policy.

        :param model: the model to train
        """
        if self.continue_training and self.algo in ALGORITHMS:
            super().learn(ContinuedTraining(model))  # type: ignore[arg-type]
        else:
            super().learn(model)
