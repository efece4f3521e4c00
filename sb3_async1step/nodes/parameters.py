"""The parameters of a network as one array."""

from collections.abc import Sequence

import numpy as np
import torch as th

from sb3_async1step.workers.shared_parameters import SharedParameters


def read_values(parameters: Sequence[th.Tensor]) -> np.ndarray:
    """
    :param parameters: tensors
    :return: a copy of their values, one after another
    """
    widest = th.float64 if any(p.dtype == th.float64 for p in parameters) else th.float32
    return th.cat([p.detach().to("cpu", widest).reshape(-1) for p in parameters]).numpy()


def store_values(parameters: Sequence[th.Tensor], values: np.ndarray) -> None:
    """
    Write values into tensors, in place.

    :param parameters: tensors
    :param values: their new values
    """
    first = 0
    # A copy, since what Ray hands out can't be written to, which torch warns of
    source = th.from_numpy(np.array(values))
    for parameter in parameters:
        n_values = parameter.numel()
        parameter.data.copy_(source[first : first + n_values].view_as(parameter))
        first += n_values


def read_buffers(shared: SharedParameters) -> list[np.ndarray]:
    """
    :param shared: parameters with the buffers of their network
    :return: a copy of the buffers
    """
    return [buffer.detach().cpu().numpy().copy() for buffer in shared.buffers.values()]


def store_buffers(shared: SharedParameters, values: list[np.ndarray]) -> None:
    """
    Write values into the buffers of a network, in place.

    :param shared: parameters with the buffers of their network
    :param values: their new values
    """
    for buffer, value in zip(shared.buffers.values(), values, strict=True):
        buffer.data.copy_(th.from_numpy(np.array(value)))
