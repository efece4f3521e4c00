"""What the workers share: the online network, the target network and one optimizer's statistics."""

import copy
import threading
from contextlib import nullcontext

import torch as th
from stable_baselines3.common.utils import get_parameters_by_name, polyak_update
from stable_baselines3.dqn.policies import DQNPolicy, QNetwork

from sb3_async1step.common.optimizers import SharedRMSprop


class SharedParameters:
    """
    The policy's networks and optimizer, as the workers see them.

    A worker never touches the online network's module. It gets views: modules of the same structure whose
    parameters share the online network's memory, but have their own gradients and version counters.
    So gradients of concurrent workers don't mix, a lock-free (Hogwild) write by one worker doesn't
    fail another's backward pass, and ``predict()`` may flip the policy's train mode at any time.

    :param policy: the policy whose networks and optimizer are shared
    :param tau: soft update coefficient of the target network
    :param lock_updates: whether updates wait for each other; with another optimizer than :class:`SharedRMSprop`,
        they always do
    """

    def __init__(self, policy: DQNPolicy, tau: float, lock_updates: bool) -> None:
        self.policy = policy
        self.tau = tau
        # Adam divides a mean of gradients, to which another worker may have added already, by a root of their mean
        # square, to which it has not: where that is still zero, the step is immense
        self.lock_updates = lock_updates or not isinstance(policy.optimizer, SharedRMSprop)
        self.target_network: QNetwork = policy.q_net_target
        self.n_updates = 0
        self.n_target_syncs = 0
        self._optimizer_has_state = False
        self._update_lock = threading.Lock()
        self._count_lock = threading.Lock()
        self._sync_lock = threading.Lock()

    def view_network(self, training: bool) -> QNetwork:
        """
        :param training: whether batch norm and dropout shall behave as in training
        :return: a view of the online network
        """
        online_network = self.policy.q_net
        view = copy.deepcopy(online_network)
        for mine, shared in zip(view.parameters(), online_network.parameters(), strict=True):
            mine.data, mine.grad = shared.data, None
        for my_buffer, shared_buffer in zip(view.buffers(), online_network.buffers(), strict=True):
            my_buffer.data = shared_buffer.data
        view.set_training_mode(training)
        return view

    def share_buffers(self, view: QNetwork) -> None:
        """
        Share the buffers that a forward pass replaced, instead of changing them in place.

        :param view: a view of the online network
        """
        for my_buffer, shared_buffer in zip(view.buffers(), self.policy.q_net.buffers(), strict=True):
            if my_buffer.data_ptr() != shared_buffer.data_ptr():
                shared_buffer.copy_(my_buffer)
                my_buffer.data = shared_buffer.data

    def view_optimizer(self, network: QNetwork) -> th.optim.Optimizer:
        """
        :param network: a view of the online network
        :return: an optimizer that applies this view's gradients, with the shared optimizer's statistics
        """
        shared = self.policy.optimizer
        view_of = dict(zip(self.policy.q_net.parameters(), network.parameters(), strict=True))
        groups = [{**group, "params": [view_of[p] for p in group["params"]]} for group in shared.param_groups]
        # The groups hold all settings; the policy's arguments may be wrong for an optimizer that replaced its own
        is_the_policys = type(shared) is self.policy.optimizer_class
        optimizer = type(shared)(groups, **(self.policy.optimizer_kwargs if is_the_policys else {}))
        for group in shared.param_groups:
            for parameter in group["params"]:
                # The very same dict: what one worker's optimizer keeps in it, all see
                optimizer.state[view_of[parameter]] = shared.state[parameter]
        return optimizer

    def apply_gradient(self, optimizer: th.optim.Optimizer) -> int:
        """
        Apply the gradient of a view to the online network.

        :param optimizer: the view's optimizer
        :return: how many updates all workers had applied before this one
        """
        for group, shared_group in zip(optimizer.param_groups, self.policy.optimizer.param_groups, strict=True):
            # The schedule's learning rate, and whatever else a callback changed
            group.update({name: value for name, value in shared_group.items() if name != "params"})
        # The first update creates the statistics: nobody else may create them at the same time
        exclusive = self.lock_updates or not self._optimizer_has_state
        with self._update_lock if exclusive else nullcontext():
            optimizer.step()
            self._optimizer_has_state = True
        with self._count_lock:
            self.n_updates += 1
            return self.n_updates - 1

    def sync_target(self, n_times: int) -> None:
        """
        Move the target network towards the online network.

        :param n_times: how often (in one go: ``n`` soft updates with ``tau`` are one with ``1 - (1 - tau)^n``)
        """
        tau = 1.0 - (1.0 - self.tau) ** n_times
        online_network, target_network = self.policy.q_net, self.target_network
        with self._sync_lock:
            polyak_update(online_network.parameters(), target_network.parameters(), tau)
            # Running statistics of batch norm are copied, as in SB3's DQN
            online_statistics = get_parameters_by_name(online_network, ["running_"])
            polyak_update(online_statistics, get_parameters_by_name(target_network, ["running_"]), 1.0)
            self.n_target_syncs += n_times
