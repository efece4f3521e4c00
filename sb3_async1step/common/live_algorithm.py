"""An SB3 algorithm whose model may be used from any thread while it learns."""

import io
import pathlib
from collections.abc import Iterable
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.type_aliases import TensorDict
from stable_baselines3.common.vec_env import VecNormalize

from sb3_async1step.common.model_file import check_saved_model, renamed_modules, write_atomically
from sb3_async1step.workers.gate import Gate

SelfLiveAlgorithm = TypeVar("SelfLiveAlgorithm", bound="LiveAlgorithm")


class LiveAlgorithm(BaseAlgorithm):
    """
    Whoever predicts, saves, reads or replaces the parameters waits until no worker is in the middle of a step, and no
    worker begins one meanwhile.

    :param args: see :class:`BaseAlgorithm <stable_baselines3.common.base_class.BaseAlgorithm>`
    :param kwargs: see there
    """

    # What tells the files that it can load from those of our other algorithms
    _own_attributes: ClassVar[tuple[str, ...]]
    # SB3's algorithm with the same policies
    _sb3_counterpart: ClassVar[str]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._gate = Gate()

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """
        Choose actions. While the model learns, this waits until no update is in flight.

        :param observation: one observation, or a batch
        :param state: not used
        :param episode_start: not used
        :param deterministic: whether to choose the best action, or to sample
        :return: the actions, and the state
        """
        with self._gate.closed():
            return super().predict(observation, state, episode_start, deterministic)

    def save(
        self,
        path: str | pathlib.Path | io.BufferedIOBase,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
    ) -> None:
        """
        Save the model, from any thread. While it learns, this waits until no update is in flight.

        The file is written completely or not at all: if anything fails, an existing file is left as it was.

        :param path: file to write, ".zip" is added to a name without suffix
        :param exclude: names of attributes not to save
        :param include: names of attributes to save that would not be saved by default
        """
        with self._gate.closed():
            self._before_saving()
            if isinstance(path, (str, pathlib.Path)):
                # SB3's suffix
                with write_atomically(pathlib.Path(path), default_suffix=".zip") as file:
                    super().save(file, exclude, include)
            else:
                super().save(path, exclude, include)

    @classmethod
    def load(
        cls: type[SelfLiveAlgorithm], path: str | pathlib.Path | io.BufferedIOBase, *args: Any, **kwargs: Any
    ) -> SelfLiveAlgorithm:
        """
        Load a model. It may continue with another number of lanes or workers.

        :param path: path of a saved model, or an open file
        :param args: positional arguments of
            :meth:`BaseAlgorithm.load <stable_baselines3.common.base_class.BaseAlgorithm.load>`
        :param kwargs: keyword arguments of the same method
        :return: the model
        :raises ValueError: if the file is damaged, or was saved by another algorithm
        """
        check_saved_model(path, cls.__name__, ("n_workers", *cls._own_attributes), cls._sb3_counterpart)
        with renamed_modules():
            return super().load(path, *args, **kwargs)

    def get_parameters(self) -> dict[str, dict]:
        """
        :return: state dicts of the policy and of its optimizer. As in SB3 they are views: copy them to keep them
        """
        with self._gate.closed():
            return super().get_parameters()

    def set_parameters(
        self, load_path_or_dict: str | TensorDict, exact_match: bool = True, device: th.device | str = "auto"
    ) -> None:
        """
        Load parameters, with which the workers continue.

        :param load_path_or_dict: path of a saved model, or a dict as returned by ``get_parameters()``
        :param exact_match: whether all parameters must be given
        :param device: device onto which a file is loaded
        """
        with self._gate.closed():
            super().set_parameters(load_path_or_dict, exact_match, device)
            self._after_setting_parameters()

    def get_vec_normalize_env(self) -> VecNormalize | None:
        """
        :return: the ``VecNormalize`` wrapper of the training env, if it has one. Inside a callback, its statistics do
            not change after this call
        """
        with self._gate.closed():
            return super().get_vec_normalize_env()

    def _before_saving(self) -> None:
        """Bring the attributes up to date that are saved."""

    def _after_setting_parameters(self) -> None:
        """Do what new parameters require."""

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_gate"]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", "policy.optimizer"], []
