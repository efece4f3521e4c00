"""The policy's optimizer on the server, for the gradients that nodes push."""

import io
from typing import Any

import numpy as np
import torch as th

from sb3_async1step.nodes.messages import Learned
from sb3_async1step.nodes.parameters import read_values, store_values


class ServerOptimizer:
    """
    Applies gradients to the parameters as the policy's optimizer does, with its own statistics.

    :param model_class: class of the model
    :param file: a file of the model
    :param state: state of the optimizer, None for that in the file
    """

    def __init__(self, model_class: Any, file: bytes, state: dict[str, Any] | None) -> None:
        model = model_class.load(io.BytesIO(file), device="cpu")
        self._optimizer: th.optim.Optimizer = model.policy.optimizer
        self._parameters = model.list_learned_parameters()
        self._gradients = [th.zeros_like(parameter) for parameter in self._parameters]
        if state is not None:
            self._optimizer.load_state_dict(state)

    def step(self, values: np.ndarray, learned: Learned) -> np.ndarray:
        """
        :param values: the parameters
        :param learned: a gradient
        :return: the parameters after a step
        """
        store_values(self._parameters, values)
        store_values(self._gradients, learned.change)
        for parameter, gradient, has in zip(self._parameters, self._gradients, learned.has_gradient, strict=True):
            parameter.grad = gradient if has else None
        for group in self._optimizer.param_groups:
            group["lr"] = learned.learning_rate
        self._optimizer.step()
        return read_values(self._parameters)

    def get_state(self) -> dict[str, Any]:
        """
        :return: the optimizer's state
        """
        return self._optimizer.state_dict()
