"""What the workers share: the online network, the target network and the statistics of one optimizer."""

import copy
import threading
from contextlib import nullcontext

import torch as th
from stable_baselines3.common.utils import get_parameters_by_name, polyak_update
from stable_baselines3.dqn.policies import DQNPolicy, QNetwork

from sb3_async1step.common.optimizers import SharedRMSprop


class SharedParameters:
    """
    The networks and the optimizer of the policy, as the workers see them.

    A worker does not use the module of the online network itself. It gets views: modules of the same structure whose
    parameters share the memory of the online network, but have gradients and version counters of their own. Therefore,
    gradients of concurrent workers do not mix, a write without a lock (Hogwild) by one worker does not make another's
    backward pass fail, and ``predict()`` may switch the policy to evaluation mode at any time.

    :param policy: the policy whose networks and optimizer are shared
    :param tau: soft update coefficient of the target network
    :param lock_updates: whether updates wait for each other; with any other optimizer than
        :class:`~sb3_async1step.SharedRMSprop` they always do
    """

    def __init__(self, policy: DQNPolicy, tau: float, lock_updates: bool) -> None:
        self.policy = policy
        self.tau = tau
        # Adam divides the mean of the gradients by the root of their mean square. Without a lock, another worker may
        # have added to the mean already, but not yet to the mean square: where that is still zero, the step is immense
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
        :param training: whether the view is in training mode, which BatchNorm and dropout depend on
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
        Share those buffers that a forward pass replaced instead of changing them in place.

        :param view: a view of the online network
        """
        for my_buffer, shared_buffer in zip(view.buffers(), self.policy.q_net.buffers(), strict=True):
            if my_buffer.data_ptr() != shared_buffer.data_ptr():
                shared_buffer.copy_(my_buffer)
                my_buffer.data = shared_buffer.data

    def view_optimizer(self, network: QNetwork) -> th.optim.Optimizer:
        """
        :param network: a view of the online network
        :return: an optimizer that applies the gradients of this view, with the statistics of the shared optimizer
        """
        shared = self.policy.optimizer
        view_of = dict(zip(self.policy.q_net.parameters(), network.parameters(), strict=True))
        groups = [{**group, "params": [view_of[p] for p in group["params"]]} for group in shared.param_groups]
        # The groups hold all settings. If the user has replaced the optimizer, the policy's arguments may not fit
        is_the_policys = type(shared) is self.policy.optimizer_class
        optimizer = type(shared)(groups, **(self.policy.optimizer_kwargs if is_the_policys else {}))
        for group in shared.param_groups:
            for parameter in group["params"]:
                # The same dict: what the optimizer of one worker keeps in it, all workers see
                optimizer.state[view_of[parameter]] = shared.state[parameter]
        return optimizer

    def apply_gradient(self, optimizer: th.optim.Optimizer) -> int:
        """
        Apply the gradient of a view to the online network.

        :param optimizer: the view's optimizer
        :return: how many updates all workers had applied before this one
        """
        for group, shared_group in zip(optimizer.param_groups, self.policy.optimizer.param_groups, strict=True):
            # The learning rate of the schedule, and whatever else a callback has changed
            group.update({name: value for name, value in shared_group.items() if name != "params"})
        # The first update creates the statistics, which two workers must not do at the same time
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

        :param n_times: number of soft updates, which are made at once: ``n`` updates with ``tau`` equal one with
            ``1 - (1 - tau)^n``
        """
        tau = 1.0 - (1.0 - self.tau) ** n_times
        online_network, target_network = self.policy.q_net, self.target_network
        with self._sync_lock:
            polyak_update(online_network.parameters(), target_network.parameters(), tau)
            # The running statistics of BatchNorm are copied, as in SB3's DQN
            online_statistics = get_parameters_by_name(online_network, ["running_"])
            polyak_update(online_statistics, get_parameters_by_name(target_network, ["running_"]), 1.0)
            self.n_target_syncs += n_times
