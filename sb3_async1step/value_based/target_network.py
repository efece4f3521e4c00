"""The target network that all workers share."""

import threading
from collections.abc import Iterable

import torch as th
from stable_baselines3.common.utils import get_parameters_by_name
from stable_baselines3.dqn.policies import DQNPolicy

from sb3_async1step.workers.shared_parameters import SharedParameters


def count_syncs(interval: int, before: int | float, after: int | float) -> int:
    """
    :param interval: environment steps between two updates of the target network
    :param before: environment steps (the paper's T) before
    :param after: environment steps after
    :return: number of updates that are due: one for each multiple of the interval that was crossed
    """
    return int(after // interval - before // interval)


@th.no_grad()
def move_towards(targets: Iterable[th.Tensor], sources: Iterable[th.Tensor], tau: float) -> None:
    """
    Unlike SB3's ``polyak_update``, this never scales the target in place: other workers would read ``(1 - tau)`` times
    the target meanwhile, that is, zeros for a copy.

    :param targets: tensors of the target network
    :param sources: tensors of the online network
    :param tau: soft update coefficient, 1 for a copy
    """
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source if tau == 1.0 else th.add(target * (1 - tau), source, alpha=tau))


class SharedQNetworks(SharedParameters):
    """
    The shared online network (theta) and target network (theta^-).

    :param policy: the policy whose networks and optimizer are shared
    :param lock_updates: see :class:`~sb3_async1step.workers.shared_parameters.SharedParameters`
    """

    def __init__(self, policy: DQNPolicy, lock_updates: bool) -> None:
        super().__init__(policy.q_net, policy, lock_updates)
        self.target_network = policy.q_net_target
        self.target_parameters = list(self.target_network.parameters())
        self._sync_lock = threading.Lock()

    def sync_target(self, n_times: int, tau: float) -> None:
        """
        Move the target network towards the online network: theta^- <- theta.

        :param n_times: number of soft updates, which are made at once: ``n`` updates with ``tau`` equal one with
            ``1 - (1 - tau)^n``
        :param tau: soft update coefficient, 1 for a copy
        """
        tau = 1.0 - (1.0 - tau) ** n_times
        with self._sync_lock:
            move_towards(self.target_network.parameters(), self.network.parameters(), tau)
            # The running statistics of BatchNorm are copied, as in SB3's DQN
            online_statistics = get_parameters_by_name(self.network, ["running_"])
            move_towards(get_parameters_by_name(self.target_network, ["running_"]), online_statistics, 1.0)
