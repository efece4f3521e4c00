"""How nodes learn together."""

import math
import numbers
from dataclasses import dataclass, replace
from typing import Any

from sb3_async1step.nodes.exchange import EXCHANGES

# Most steps of a node between two exchanges of deltas, unless somebody asks for more
SYNC_INTERVAL = 500


def check_number(
    name: str,
    value: Any,
    at_least: float = -math.inf,
    above: float = -math.inf,
    below: float = math.inf,
    whole: bool = False,
) -> None:
    """
    :param name: name of a parameter
    :param value: its value
    :param at_least: the smallest that is allowed
    :param above: what it has to be greater than
    :param below: what it has to be less than
    :param whole: whether it must be a whole number
    :raises ValueError: if it is out of range, or no such number
    """
    kind = numbers.Integral if whole else numbers.Real
    if isinstance(value, kind) and not isinstance(value, bool):
        number = float(value)
        if at_least <= number and above < number < below:
            return
    limits = [("of at least", at_least), ("greater than", above), ("less than", below)]
    allowed = " and ".join(f"{words} {limit}" for words, limit in limits if math.isfinite(limit))
    raise ValueError(f"{name} must be a {'whole ' if whole else ''}number {allowed}, got {value!r}.")


@dataclass(frozen=True)
class ExchangeSettings:
    """
    How the nodes of a :class:`~sb3_async1step.RayVecEnv` exchange parameters; see there.

    :param exchange: one of ``EXCHANGES``
    :param sync_interval: steps of a node between two exchanges; see :meth:`with_sync_interval` for None
    :param outer_learning_rate: factor of a node's delta, None for 1 divided by the number of nodes that learn
    :param outer_momentum: momentum of the deltas
    :param max_staleness: pushes of others between a node's pull and its push, beyond which the push is dropped
    :param checkpoint_interval: seconds between two checkpoints of the server
    :param max_restarts: restarts of nodes that do not end the training
    :param node_timeout: seconds without an exchange after which a node is restarted, None for no limit
    :raises ValueError: if a parameter is out of range
    """

    exchange: str = "deltas"
    sync_interval: int | None = None
    outer_learning_rate: float | None = None
    outer_momentum: float = 0.0
    max_staleness: int | None = None
    checkpoint_interval: float = 10.0
    max_restarts: int = 10
    node_timeout: float | None = 300.0

    def __post_init__(self) -> None:
        if self.exchange not in EXCHANGES:
            raise ValueError(f"exchange must be one of {', '.join(map(repr, EXCHANGES))}, got {self.exchange!r}.")
        if self.sync_interval is not None:
            check_number("sync_interval", self.sync_interval, at_least=1, whole=True)
        if self.exchange != "deltas" and (self.outer_learning_rate is not None or self.outer_momentum != 0):
            raise ValueError(
                "outer_learning_rate and outer_momentum are those of deltas. With exchange='gradients', the policy's "
                "optimizer and the model's learning_rate apply them: leave both out."
            )
        if self.outer_learning_rate is not None:
            check_number("outer_learning_rate", self.outer_learning_rate, above=0)
        check_number("outer_momentum", self.outer_momentum, at_least=0, below=1)
        check_number("checkpoint_interval", self.checkpoint_interval, above=0)
        check_number("max_restarts", self.max_restarts, at_least=0, whole=True)
        if self.max_staleness is not None:
            check_number("max_staleness", self.max_staleness, at_least=0, whole=True)
        if self.node_timeout is not None:
            check_number("node_timeout", self.node_timeout, above=0)

    def with_sync_interval(self, n_steps_per_update: int, n_nodes: int, longest: float) -> "ExchangeSettings":
        """
        :param n_steps_per_update: steps of a node between two updates of all its workers
        :param n_nodes: number of nodes
        :param longest: most steps of all nodes that should lie between two exchanges
        :return: the same, with a ``sync_interval``: by default an update for gradients, and for deltas
            ``SYNC_INTERVAL`` or the node's share of ``longest``, but no less than an update
        """
        if self.sync_interval is not None:
            return self
        n_steps = n_steps_per_update
        if self.exchange == "deltas":
            n_steps = max(n_steps, int(min(SYNC_INTERVAL, longest / n_nodes)))
        return replace(self, sync_interval=n_steps)
