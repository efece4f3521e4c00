"""A model as it is at one moment, to be played and saved by another thread while the model learns on."""

import copy
import io
import pathlib
from typing import Any, TypeVar

from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.logger import Logger
from torch import nn

from sb3_async1step.common.model_file import write_atomically
from sb3_async1step.workers.network_copies import copy_modules

AnyAlgorithm = TypeVar("AnyAlgorithm", bound=BaseAlgorithm)


class Snapshot:
    """
    What :class:`EvalCallback <stable_baselines3.common.callbacks.EvalCallback>` uses of a model, as it is now. Make it
    while the model stands still.

    :param model: a model of any algorithm
    :param with_file: whether it can be saved
    """

    def __init__(self, model: BaseAlgorithm, with_file: bool) -> None:
        self.num_timesteps = model.num_timesteps
        self.logger = RecordingLogger(None, [])
        self._player = copy_to_play(model)
        # The file is made now: optimizer, random generators and counters go on
        self._file = io.BytesIO()
        if with_file:
            model.save(self._file)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """
        :param args: positional arguments of the model's ``predict()``
        :param kwargs: keyword arguments of the model's ``predict()``
        :return: actions, and the state of a recurrent policy
        """
        return self._player.predict(*args, **kwargs)

    def save(self, path: str) -> None:
        """
        Write what the model's ``save()`` would have written when the snapshot was made.

        :param path: the file without its suffix
        """
        write_atomically(pathlib.Path(f"{path}.zip"), self._file.getbuffer())

    def get_vec_normalize_env(self) -> None:
        """
        :return: None: whoever makes the snapshot gives the evaluation env the statistics of that moment
        """


class RecordingLogger(Logger):
    """A logger that keeps its records, for another one to dump."""

    def dump(self, step: int = 0) -> None:
        """
        :param step: not used
        """


def copy_to_play(model: AnyAlgorithm) -> AnyAlgorithm:
    """
    :param model: a model of any algorithm
    :return: a copy that predicts as the model does now, with a policy of its own. It can do nothing else: it has no
        optimizer, and shares the env
    """
    player = copy.copy(model)
    policy = copy_modules(model.policy)
    twins: dict[Any, nn.Module] = dict(zip(model.policy.modules(), policy.modules(), strict=True))
    # Networks of the policy are attributes of the model, too
    for name, value in vars(model).items():
        if isinstance(value, nn.Module) and value in twins:
            setattr(player, name, twins[value])
    return player
