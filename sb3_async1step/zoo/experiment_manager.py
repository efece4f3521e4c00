"""The Zoo's experiment manager for our algorithms: their hyperparameters, and trainings that continue."""

import copy
import io
import re
import warnings
from contextlib import redirect_stdout
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar

from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.hyperparams_opt import HYPERPARAMS_SAMPLER
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import CheckpointCallback
from stable_baselines3.common.utils import configure_logger
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize

from sb3_async1step.nodes.ray_vec_env import RayVecEnv
from sb3_async1step.registry import ALGORITHMS
from sb3_async1step.sb3_internals import evaluate_hyperparam
from sb3_async1step.zoo.hyperparams_search import keep_policy_kwargs, make_sampler

#: Each would need the CPUs of the whole cluster
ONE_TRIAL_AT_A_TIME = "With --vec-env ray, trials run one after another: leave --n-jobs out."

NO_STATISTICS = (
    "There are no statistics of VecNormalize beside {agent}, so the training goes on with new ones. Checkpoints "
    "(--save-freq) come with theirs."
)


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


def find_statistics(checkpoint: Path) -> Path | None:
    """
    :param checkpoint: file of a checkpoint
    :return: file with the statistics of ``VecNormalize`` at that time, if there is one
    """
    # The names that SB3's CheckpointCallback gives them
    name = re.fullmatch(r"(.*)_(\d+_steps)\.zip", checkpoint.name)
    if name is None:
        return None
    path = checkpoint.with_name(f"{name[1]}_vecnormalize_{name[2]}.pkl")
    return path if path.exists() else None


def is_new(env: VecNormalize) -> bool:
    """
    :param env: a normalized VecEnv
    :return: whether its statistics have seen no step
    """
    return env.ret_rms.count < 1.0


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
        model = self._model
        if model.tensorboard_log is not None:
            # Without a new folder, SB3 would write into the latest one, whichever training made it
            model.set_logger(configure_logger(model.verbose, model.tensorboard_log, type(model).__name__))
        return model.learn(total_timesteps, reset_num_timesteps=False, **kwargs)


class AsyncExperimentManager(ExperimentManager):
    """
    The Zoo's experiment manager, which also finds the hyperparameters of our algorithms.

    :param args: the parsed command line
    :param algo: the algorithm's name in the Zoo
    :param positional: further positional arguments of the Zoo's experiment manager
    :param kwargs: keyword arguments of the Zoo's experiment manager; without a ``config`` (``--conf-file``), our
        algorithms get their file of tuned hyperparameters
    """

    #: ``--vec-env``, if it is one that the Zoo does not know
    own_vec_env: ClassVar[str | None] = None
    #: Keyword arguments of the VecEnv's class, beside the Zoo's
    default_vec_env_kwargs: ClassVar[dict[str, Any]] = {}
    # ``normalize`` for config.yml, if the agent that ``-i`` names is normalized and the env's entry is not
    _normalization_of_agent: str | None = None

    def __init__(self, args: Any, algo: str, *positional: Any, **kwargs: Any) -> None:
        if kwargs.get("config") is None and algo in ALGORITHMS:
            kwargs["config"] = hyperparams_path(algo)
        super().__init__(args, algo, *positional, **kwargs)
        # For args.yml
        args.vec_env = self.own_vec_env or args.vec_env
        args.vec_env_kwargs = self.default_vec_env_kwargs
        self.vec_env_kwargs = {**self.vec_env_kwargs, **self.default_vec_env_kwargs}

    def create_envs(self, n_envs: int, eval_env: bool = False, no_log: bool = False) -> VecEnv:
        """
        Make a VecEnv with its wrappers. That of an evaluation is on this machine: of Ray's, a step takes milliseconds.

        :param n_envs: number of lanes
        :param eval_env: whether it is for evaluations
        :param no_log: whether not to write a monitor file
        :return: the VecEnv
        """
        # Trials write no monitor files; before them, the Zoo looks at a single lane
        is_for_looking = self.optimize_hyperparameters and not no_log
        if self.vec_env_class is not RayVecEnv or not (eval_env or is_for_looking):
            return super().create_envs(n_envs, eval_env, no_log)
        # Trials on other threads may make theirs meanwhile
        manager = copy.copy(self)
        manager.vec_env_class, manager.vec_env_kwargs = DummyVecEnv, {}
        return manager.create_envs(n_envs, eval_env, no_log)

    def create_callbacks(self) -> None:
        """Make the Zoo's callbacks. Checkpoints come with the statistics of ``VecNormalize``, to go on from them."""
        super().create_callbacks()
        for callback in self.callbacks:
            if isinstance(callback, CheckpointCallback):
                callback.save_vecnormalize = True

    def _maybe_normalize(self, env: VecEnv, eval_env: bool) -> VecEnv:
        statistics = find_statistics(Path(self.trained_agent)) if self.continue_training else None
        if statistics is None:
            env = super()._maybe_normalize(env, eval_env)
            if self.continue_training and isinstance(env, VecNormalize) and is_new(env) and not eval_env:
                warnings.warn(NO_STATISTICS.format(agent=self.trained_agent), stacklevel=2)
        else:
            print("Loading saved VecNormalize stats")
            env = VecNormalize.load(str(statistics), env)
            if eval_env:
                env.training = env.norm_reward = False
        if isinstance(env, VecNormalize) and not (self.normalize or eval_env):
            # The agent to go on with is normalized, although its env's entry is not: its statistics are to be saved
            self.normalize = True
            self._normalization_of_agent = f"dict(norm_obs={env.norm_obs}, norm_reward={env.norm_reward})"
        return env

    def _save_config(self, saved_hyperparams: dict[str, Any]) -> None:
        if self._normalization_of_agent is not None:
            saved_hyperparams = {**saved_hyperparams, "normalize": self._normalization_of_agent}
        super()._save_config(saved_hyperparams)

    def hyperparameters_optimization(self) -> None:
        """Search. What is not searched for is that of the environment's entry, also among the ``policy_kwargs``."""
        # -1 is one for each core
        if self.n_jobs != 1 and self.vec_env_class is RayVecEnv:
            raise ValueError(ONE_TRIAL_AT_A_TIME)
        if self.algo in ALGORITHMS:
            policy_kwargs = self._hyperparams.get("policy_kwargs", {})
            HYPERPARAMS_SAMPLER[self.algo] = make_sampler(  # type: ignore[assignment]
                ALGORITHMS[self.algo], policy_kwargs
            )
        super().hyperparameters_optimization()

    def load_trial(
        self, storage: str, study_name: str, trial_id: int | None = None, convert: bool = True
    ) -> dict[str, Any]:
        """
        :param storage: see the Zoo's ``--storage``
        :param study_name: name of a study
        :param trial_id: number of a trial, by default the best one
        :param convert: whether to convert what was sampled to hyperparameters
        :return: the hyperparameters with which that trial was made, but for those of the environment's entry
        """
        hyperparams = super().load_trial(storage, study_name, trial_id, convert)
        if convert and self.algo in ALGORITHMS:
            return keep_policy_kwargs(hyperparams, self._read_policy_kwargs())
        return hyperparams

    def _read_policy_kwargs(self) -> dict[str, Any]:
        """Those of the environment's entry."""
        manager = copy.copy(self)
        manager.study_name = None
        with redirect_stdout(io.StringIO()):
            hyperparams, _ = manager.read_hyperparameters()
        return evaluate_hyperparam(hyperparams.get("policy_kwargs", {}))

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
