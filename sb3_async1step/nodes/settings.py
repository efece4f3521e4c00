"""How nodes learn together."""

from dataclasses import dataclass, replace

from sb3_async1step.nodes.exchange import EXCHANGES
from sb3_async1step.parameter_checks import check, check_choice, check_positive, check_whole, is_number

# Most steps of a node between two exchanges of deltas, unless somebody asks for more
SYNC_INTERVAL = 500


@dataclass(frozen=True)
class ExchangeSettings:
    """
    How the nodes of a :class:`~sb3_async1step.RayVecEnv` exchange parameters; see there.

    :param exchange: one of ``EXCHANGES``
    :param sync_interval: steps of a node between two exchanges, None for those of an update; see
        :meth:`with_sync_interval`
    :param outer_learning_rate: factor of a node's delta, None for 1 divided by the number of nodes that learn
    :param outer_momentum: momentum of the deltas
    :param max_staleness: pushes of others between a node's pull and its push, beyond which the push is dropped
    :param checkpoint_interval: seconds between two checkpoints of the server
    :param max_restarts: restarts of nodes that do not end the training
    :param node_timeout: seconds without an exchange after which a node is restarted, None for no limit
    :param update_interval: vector steps between two updates of a node's workers
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
    update_interval: int = 1

    def __post_init__(self) -> None:
        check_choice("exchange", self.exchange, EXCHANGES)
        momentum = self.outer_momentum
        check("outer_momentum", momentum, is_number(momentum) and 0 <= momentum < 1, "in [0, 1)")
        check_positive(or_none=True, outer_learning_rate=self.outer_learning_rate, node_timeout=self.node_timeout)
        check_positive(checkpoint_interval=self.checkpoint_interval)
        check_whole(or_none=True, sync_interval=self.sync_interval)
        check_whole(at_least=0, or_none=True, max_staleness=self.max_staleness)
        check_whole(at_least=0, max_restarts=self.max_restarts)
        if self.exchange != "deltas" and (self.outer_learning_rate is not None or momentum != 0):
            raise ValueError(
                "outer_learning_rate and outer_momentum are for exchange='deltas'. With exchange='gradients', the "
                "policy's optimizer applies the gradients, with the model's learning_rate: leave both out."
            )

    def with_sync_interval(self, update_interval: int, n_lanes: list[int], longest: float) -> "ExchangeSettings":
        """
        :param update_interval: vector steps between two updates of a node's workers
        :param n_lanes: number of lanes of each node
        :param longest: most steps of all nodes that should lie between two exchanges
        :return: the same for these nodes. Gradients are exchanged after each update by default, and deltas have a
            ``sync_interval``: ``SYNC_INTERVAL`` or the node's share of ``longest``, but no less than an update
        """
        settings = replace(self, update_interval=update_interval)
        if self.sync_interval is not None or self.exchange == "gradients":
            return settings
        n_steps = int(min(SYNC_INTERVAL, longest / len(n_lanes)))
        return replace(settings, sync_interval=max(update_interval * max(n_lanes), n_steps))

    def count_steps(self, n_lanes: int) -> int:
        """
        :param n_lanes: number of lanes of a node
        :return: how many steps it takes between two exchanges: ``sync_interval``, rounded up to a step of all its
            lanes, or if that is None, those of an update
        """
        n_vector_steps = self.update_interval if self.sync_interval is None else -(-self.sync_interval // n_lanes)
        return n_vector_steps * n_lanes
