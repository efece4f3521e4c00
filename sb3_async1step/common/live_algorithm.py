"""An SB3 algorithm whose model may be used from any thread while it learns."""

import copy
import io
import pathlib
import warnings
from collections.abc import Iterable
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.type_aliases import TensorDict
from stable_baselines3.common.vec_env import VecNormalize

from sb3_async1step.common.model_file import (
    check_saved_model,
    explain_errors,
    read_attributes,
    renamed_modules,
    write_atomically,
)
from sb3_async1step.workers.gate import Gate
from sb3_async1step.workers.shared_parameters import check_optimizer_state

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

        The file is written completely or not at all: if anything fails, an existing file is left as it was. Only where
        it can't be replaced (a mount point, a folder without write permission) it is written in place, with a warning.

        :param path: file to write, ".zip" is added to a name without suffix
        :param exclude: names of attributes not to save
        :param include: names of attributes to save that would not be saved by default
        """
        file: Any = io.BytesIO() if isinstance(path, (str, pathlib.Path)) else path
        with self._gate.closed():
            self._before_saving()
            # Files of different algorithms hold the same attributes
            self._saved_by = type(self).__name__
            super().save(file, exclude, include)
        # Workers need not wait for the disk
        if isinstance(path, (str, pathlib.Path)):
            path = pathlib.Path(path)
            if path.suffix == "":
                # SB3's
                path = path.with_name(f"{path.name}.zip")
            write_atomically(path, file.getvalue())

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
        :raises ValueError: if the file is damaged, or was saved by an algorithm with other policies
        """
        expected = ("n_workers", *cls._own_attributes)
        attributes = check_saved_model(path, cls.__name__, expected, cls._sb3_counterpart)
        saved_by = attributes.get("_saved_by", cls.__name__)
        if saved_by != cls.__name__:
            warnings.warn(
                f"{path} was saved by {saved_by}, and {cls.__name__} goes on with it: the weights and settings are "
                "those of the file, but it learns other targets from now on.",
                stacklevel=2,
            )
        with renamed_modules(), explain_errors(path):
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
        :raises ValueError: if the file is damaged, names are missing, or the optimizer's state is another one's
        """
        if isinstance(load_path_or_dict, dict):
            self._set_parameters(load_path_or_dict, exact_match, device)
            return
        read_attributes(load_path_or_dict)
        with explain_errors(load_path_or_dict):
            _, params, _ = load_from_zip_file(load_path_or_dict, device=device, load_data=False)
            self._set_parameters(params, exact_match, device)

    def _set_parameters(self, params: TensorDict, exact_match: bool, device: th.device | str) -> None:
        if "policy.optimizer" in params:
            # Torch would go on with the tensors of the given state, which may be those of another model
            state = copy.deepcopy(params["policy.optimizer"])
            check_optimizer_state(self.policy, state)
            params = {**params, "policy.optimizer": state}
        with self._gate.closed():
            super().set_parameters(params, exact_match, device)
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
