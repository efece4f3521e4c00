"""Messages between nodes, server and driver. Observations and actions are never sent."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sb3_async1step.nodes.moments import Moments
from sb3_async1step.workers.transitions import UpdateStats


@dataclass
class Report:
    """
    What the driver's callbacks and logger need of a node's steps.

    :param dones: whether an episode ended, for each step, shape ``(n,)``
    :param infos: the infos of those that did
    :param updates: statistics of the updates
    """

    dones: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=bool))
    infos: list[dict[str, Any]] = field(default_factory=list)
    updates: list[UpdateStats] = field(default_factory=list)


@dataclass
class Learned:
    """
    What a node has learned since it pulled the parameters last.

    :param change: by how much it has changed the parameters, or the mean gradient of its updates
    :param learning_rate: of the gradient, None for a change of the parameters
    :param has_gradient: of a gradient, which parameters have one: optimizers leave others alone, such as frozen ones,
        whereas weight decay or momentum would change one whose gradient is zero
    """

    change: np.ndarray
    learning_rate: float | None = None
    has_gradient: list[bool] = field(default_factory=list)


@dataclass
class Push:
    """
    What a node sends to the server.

    :param node: number of the node
    :param epoch: how often that node was restarted
    :param number: number of this push in its epoch
    :param version: version of the parameters that the node had pulled
    :param learned: what the node has learned since, None if it has not pulled any yet or made no update
    :param buffers: what the network keeps besides (the statistics of BatchNorm)
    :param moments: what the running statistics have gained since
    :param report: the steps since
    """

    node: int
    epoch: int
    number: int
    version: int
    learned: Learned | None
    buffers: list[np.ndarray]
    moments: dict[str, Moments]
    report: Report


@dataclass
class Pull:
    """
    What the server answers.

    :param version: version of the parameters
    :param values: the parameters, None if the node shall ask again
    :param buffers: the network's buffers
    :param moments: the running statistics
    :param num_timesteps: environment steps of all nodes (the paper's T)
    :param n_granted: vector steps that the node shall take next; 0 to ask again in a moment
    :param n_nodes: number of nodes that take steps at present
    :param is_over: whether the training is over
    """

    version: int
    values: np.ndarray | None
    buffers: list[np.ndarray]
    moments: dict[str, Moments]
    num_timesteps: int
    n_granted: int
    n_nodes: int
    is_over: bool


@dataclass
class ServerState:
    """
    All that a server needs to go on from.

    :param values: the parameters
    :param buffers: the network's buffers
    :param moments: running statistics
    :param n_lanes: number of lanes of each node
    :param num_timesteps: environment steps that were pushed (the paper's T)
    :param total_timesteps: T at which the training is over
    :param last_timestep: ``total_timesteps``, rounded up to a vector step of all lanes. If the nodes have unequal
        numbers of lanes, the steps of the last one may exceed it
    :param version: number of pushes that were applied
    :param momentum: running mean of the deltas
    :param optimizer: the state of the optimizer that applies gradients
    :param epochs: of each node, how often it was restarted
    :param last_numbers: of each node, the number of its last push in that epoch
    :param granted: of each node that takes steps, how many it may take until its next push
    :param n_side_by_side: of each of these, number of nodes that took steps when it was granted its own
    """

    values: np.ndarray
    buffers: list[np.ndarray]
    moments: dict[str, Moments]
    n_lanes: list[int]
    num_timesteps: int
    total_timesteps: int
    last_timestep: int
    version: int = 0
    momentum: np.ndarray | None = None
    optimizer: dict[str, Any] | None = None
    epochs: dict[int, int] = field(default_factory=dict)
    last_numbers: dict[int, int] = field(default_factory=dict)
    granted: dict[int, int] = field(default_factory=dict)
    n_side_by_side: dict[int, int] = field(default_factory=dict)


@dataclass
class News:
    """
    What the driver learns from the server.

    :param reports: those of the pushes since the last time
    :param num_timesteps: environment steps, with those of the reports
    :param version: version of the parameters
    :param moments: running statistics
    :param staleness: of the pushes since the last time
    :param pull_seconds: what exchanges took the nodes
    :param n_bytes: of parameters that were pushed and pulled since the last time
    :param n_dropped: number of pushes since the last time that were too stale
    :param epochs: of each node, how often it was restarted
    :param last_numbers: of each node, the number of its last push in that epoch
    :param is_complete: whether all steps have been taken
    :param state: a checkpoint, if the driver asked for one
    """

    reports: list[Report]
    num_timesteps: int
    version: int
    moments: dict[str, Moments]
    staleness: list[int]
    pull_seconds: list[float]
    n_bytes: int
    n_dropped: int
    epochs: dict[int, int]
    last_numbers: dict[int, int]
    is_complete: bool
    state: ServerState | None = None
