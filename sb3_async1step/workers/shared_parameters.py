"""What the workers share, the online network and the statistics of one optimizer, and their two ways to it."""

import threading
from contextlib import nullcontext

import torch as th
from stable_baselines3.common.policies import BaseModel, BasePolicy
from torch import nn

from sb3_async1step.workers.network_copies import (
    copy_network,
    find_leaves,
    have_changed,
    share_hooks,
    share_memory,
    view_network,
)
from sb3_async1step.workers.optimizer_views import is_observed, view_optimizer

# Attributes of modules that are no statistics: PyTorch's own, the distribution of the last call, the optimizer
NO_STATISTICS = (*vars(nn.Module()), "call_super_init", "action_dist", "optimizer")


class SharedParameters:
    """
    The online network (the paper's theta) and its optimizer, as the workers see them.

    A worker does not use the module of the online network itself, but a :class:`LocalParameters`, whose
    ``pull()`` reads the parameters, and whose ``push()`` applies a gradient.

    :param network: the online network
    :param policy: the policy that it belongs to, and whose optimizer is shared
    :param lock_updates: whether workers learn in turns: one reads the parameters, computes a gradient and applies it
        before the next one does
    """

    def __init__(self, network: BaseModel, policy: BasePolicy, lock_updates: bool) -> None:
        self.network = network
        self.policy = policy
        # Of the modules that the network has now: workers can't follow if somebody replaces them
        self.modules = list(network.modules())
        self.parameters = list(network.parameters())
        self.buffers = dict(network.named_buffers())
        self.n_updates = 0
        #: From 1 (start) to 0 (end of the training), for the workers' schedules
        self.progress_remaining = 1.0
        #: By how much T grows when these workers take a step: by more than 1 if other nodes learn as well
        self.pace: int | float = 1
        self.lock_updates = lock_updates
        #: What a worker holds while it learns
        self.turn = threading.Lock() if lock_updates else nullcontext()
        # Those of an optimizer that does not say that it is_lock_free wait for each other in any case
        self._update_lock = threading.Lock()
        self._count_lock = threading.Lock()

    def push(
        self, optimizer: th.optim.Optimizer, view: th.optim.Optimizer | None, gradients: list[th.Tensor | None]
    ) -> int:
        """
        Apply a gradient to the online network.

        :param optimizer: the policy's, in whose place a callback may put another one meanwhile
        :param view: a view of it that holds the gradient, None if its updates need a lock
        :param gradients: the gradient of each parameter
        :return: how many updates all workers had applied before this one
        """
        if view is None or is_observed(optimizer):
            with self._update_lock:
                self._show(gradients)
                optimizer.step()
                return self._count_update()
        self._step_view(optimizer, view)
        with self._count_lock:
            self._show(gradients)
            return self._count_update()

    def _count_update(self) -> int:
        self.n_updates += 1
        return self.n_updates - 1

    def _step_view(self, optimizer: th.optim.Optimizer, view: th.optim.Optimizer) -> None:
        has_state = any(optimizer.state.values())
        # A callback may add a group at this moment; its parameters have no gradient in this update
        for group, shared_group in zip(view.param_groups, optimizer.param_groups, strict=False):
            # The learning rate of the schedule, and whatever else a callback has changed
            group.update({name: value for name, value in shared_group.items() if name != "params"})
            for viewed, parameter in zip(group["params"], shared_group["params"], strict=True):
                # The same dict: what the optimizer of one worker keeps in it, all workers see
                view.state[viewed] = optimizer.state[parameter]
        # The first update creates the statistics, which two workers must not do at the same time
        with nullcontext() if has_state else self._update_lock:
            view.step()

    def _show(self, gradients: list[th.Tensor | None]) -> None:
        """Store each gradient in ``grad`` of the shared parameter, where the optimizer and callbacks find it."""
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient


class LocalParameters:
    """
    A worker's parameters, and its only ways to the shared ones.

    They are a view by default: modules of the same structure whose parameters share the memory of the online network,
    but have gradients and version counters of their own. Therefore, gradients of concurrent workers do not mix, a write
    without a lock (Hogwild) by one worker does not make another's backward pass fail, and ``predict()`` may switch the
    policy to evaluation mode at any time.

    :param shared: the shared parameters
    :param thread_specific: whether the worker has values of its own (the paper's theta'), which change only when it
        pulls the shared ones
    """

    def __init__(self, shared: SharedParameters, thread_specific: bool) -> None:
        self._shared = shared
        # What pulls read and pushes write
        self._view = view_network(shared.network)
        #: Computes gradients
        self.learning_network = copy_network(shared.network) if thread_specific else self._view
        #: Chooses actions, always in evaluation mode
        self.acting_network = view_network(self.learning_network)
        self.acting_network.set_training_mode(False)
        self.thread_specific = thread_specific
        # Walking through the modules at each update would take as long as the backward pass of a small network
        self.parameters = list(self.learning_network.parameters())
        self._viewed = list(self._view.parameters())
        self._acting = list(self.acting_network.parameters())
        self._n_updates_when_pulled = 0
        # The policy's optimizer, and the view of it
        self._optimizer = shared.policy.optimizer
        self._optimizer_view = view_optimizer(shared.policy, shared.network, self._view)

    def _follow_optimizer(self) -> None:
        """View the policy's optimizer, which a callback may have replaced or given further parameters."""
        optimizer, view = self._shared.policy.optimizer, self._optimizer_view
        has_grown = view is not None and len(view.param_groups) != len(optimizer.param_groups)
        if self._optimizer is not optimizer or has_grown:
            self._optimizer = optimizer
            self._optimizer_view = view_optimizer(self._shared.policy, self._shared.network, self._view)

    def pull(self) -> None:
        """Read the shared parameters, theta' <- theta, which of them are frozen, and their hooks."""
        share_memory(self._viewed, self._shared.parameters)
        for mine, shared in zip(self.parameters, self._shared.parameters, strict=True):
            mine.requires_grad_(shared.requires_grad)
            share_hooks(mine, shared)
            if self.thread_specific:
                mine.data.copy_(shared.data)
        share_memory(self._acting, self.parameters)
        self._n_updates_when_pulled = self._shared.n_updates

    def push(self) -> int:
        """
        Apply the accumulated gradient to the shared parameters, where callbacks may read it, and clear it.

        :return: number of updates that others applied between the last pull and this one
        """
        gradients = [parameter.grad for parameter in self.parameters]
        for view, gradient in zip(self._viewed, gradients, strict=True):
            view.grad = gradient
        self._follow_optimizer()
        n_updates_before = self._shared.push(self._optimizer, self._optimizer_view, gradients)
        for mine, view in zip(self.parameters, self._viewed, strict=True):
            mine.grad = view.grad = None
        return n_updates_before - self._n_updates_when_pulled

    def check_graph(self, loss: th.Tensor) -> None:
        """
        :param loss: a loss of the learning network
        :raises TypeError: if it was computed with parameters of the shared network instead of the worker's, so that its
            gradient would be lost; names them
        """
        leaves = find_leaves(loss)
        foreign = [name for name, parameter in self._shared.network.named_parameters() if parameter in leaves]
        if foreign:
            raise TypeError(
                f"Workers train copies of the network, but its forward pass uses the original's {', '.join(foreign)} "
                "instead of the copy's: some attribute of a module is a lambda or an inner function that refers to "
                "the module. Copies of the module keep that function as it is. Make it a method, or a module."
            )

    def share_buffers(self) -> None:
        """Write back the buffers (of BatchNorm) that a forward pass replaced instead of changing them in place."""
        if not self._shared.buffers:
            return
        buffers = dict(self.learning_network.named_buffers())
        for name, shared in self._shared.buffers.items():
            mine = buffers[name]
            if mine.data_ptr() != shared.data_ptr():
                shared.copy_(mine)
                mine.data = shared.data

    def list_unshared_state(self) -> list[str]:
        """
        :return: names of what the worker's modules have changed, but don't share: what they keep as plain attributes,
            and buffers that they have registered since the worker was made
        """
        attributes = [
            f"{name}.{key}"
            for (name, mine), shared in zip(self.learning_network.named_modules(), self._shared.modules, strict=True)
            for key, value in vars(mine).items()
            if key not in NO_STATISTICS and have_changed(vars(shared).get(key, value), value)
        ]
        buffers = [name for name, _ in self.learning_network.named_buffers() if name not in self._shared.buffers]
        return attributes + buffers

    def get_gradients(self) -> list[th.Tensor | None]:
        """
        :return: a copy of the gradient accumulated since the last push, None for a parameter without one. It is on the
            CPU: a file that holds it may be loaded on a machine without an accelerator
        """
        return [None if p.grad is None else p.grad.to("cpu", copy=True) for p in self.parameters]

    def can_take(self, gradients: list[th.Tensor | None], values: list[th.Tensor] | None) -> bool:
        """
        :param gradients: what another worker's :meth:`get_gradients` returned
        :param values: what its :meth:`get_values` returned
        :return: whether they are those of parameters of the same shapes
        """
        shapes = [parameter.shape for parameter in self.parameters]
        return all(
            len(tensors) == len(shapes)
            and all(tensor is None or tensor.shape == shape for tensor, shape in zip(tensors, shapes, strict=True))
            for tensors in (gradients, values)
            if tensors is not None
        )

    def set_gradients(self, gradients: list[th.Tensor | None]) -> None:
        """
        :param gradients: what :meth:`get_gradients` returned, perhaps on another device
        """
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = None if gradient is None else gradient.to(parameter.device, copy=True)

    def get_values(self) -> list[th.Tensor] | None:
        """
        :return: a copy of theta', on the CPU, None if there is none
        """
        return [p.detach().to("cpu", copy=True) for p in self.parameters] if self.thread_specific else None

    def set_values(self, values: list[th.Tensor] | None) -> None:
        """
        :param values: what :meth:`get_values` returned
        """
        if self.thread_specific and values is not None:
            for parameter, value in zip(self.parameters, values, strict=True):
                parameter.data.copy_(value)
