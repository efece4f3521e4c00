"""What the workers share, the online network and the statistics of one optimizer, and their two ways to it."""

import copy
import threading
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar

import numpy as np
import torch as th
from stable_baselines3.common.policies import BaseModel, BasePolicy
from torch import nn

AnyNetwork = TypeVar("AnyNetwork", bound=BaseModel)

HOOKS_OF_MODULES = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
)
# Attributes of modules: PyTorch's own, the distribution, which keeps what it was last called with, and what no copy has
NO_STATISTICS = (*vars(nn.Module()), "call_super_init", "action_dist", "optimizer")


class SharedParameters:
    """
    The online network (the paper's theta) and its optimizer, as the workers see them.

    A worker does not use the module of the online network itself, but a :class:`LocalParameters`: by :meth:`pull` it
    reads the parameters, by :meth:`push` it applies a gradient.

    :param network: the online network
    :param policy: the policy that it belongs to, and whose optimizer is shared
    :param lock_updates: whether updates wait for each other; those of an optimizer that does not say that it
        ``is_lock_free`` always do
    """

    def __init__(self, network: BaseModel, policy: BasePolicy, lock_updates: bool) -> None:
        self.network = network
        self.policy = policy
        self._lock_updates = lock_updates
        # Of the modules that the network has now: workers can't follow if somebody replaces them
        self.modules = list(network.modules())
        self.parameters = list(network.parameters())
        self.buffers = dict(network.named_buffers())
        self.n_updates = 0
        #: From 1 (start) to 0 (end of the training), for the workers' schedules
        self.progress_remaining = 1.0
        #: By how much T grows when these workers take a step: by more than 1 if other nodes learn as well
        self.pace: int | float = 1
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
        if view is None or self._lock_updates or is_observed(optimizer):
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
        for group, shared_group in zip(view.param_groups, optimizer.param_groups, strict=True):
            # The learning rate of the schedule, and whatever else a callback has changed
            group.update({name: value for name, value in shared_group.items() if name != "params"})
            for viewed, parameter in zip(group["params"], shared_group["params"], strict=True):
                # The same dict: what the optimizer of one worker keeps in it, all workers see
                view.state[viewed] = optimizer.state[parameter]
        # The first update creates the statistics, which two workers must not do at the same time
        with nullcontext() if has_state else self._update_lock:
            view.step()

    def _show(self, gradients: list[th.Tensor | None]) -> None:
        """Let the optimizer and callbacks see the gradient of each parameter."""
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
        """Share those buffers (of BatchNorm) that a forward pass replaced instead of changing them in place."""
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
        :return: a copy of the gradient accumulated since the last push, None for a parameter without one
        """
        return [None if p.grad is None else p.grad.clone() for p in self.parameters]

    def set_gradients(self, gradients: list[th.Tensor | None]) -> None:
        """
        :param gradients: what :meth:`get_gradients` returned
        """
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = None if gradient is None else gradient.clone()

    def get_values(self) -> list[th.Tensor] | None:
        """
        :return: a copy of theta', None if there is none
        """
        return [p.detach().clone() for p in self.parameters] if self.thread_specific else None

    def set_values(self, values: list[th.Tensor] | None) -> None:
        """
        :param values: what :meth:`get_values` returned
        """
        if self.thread_specific and values is not None:
            for parameter, value in zip(self.parameters, values, strict=True):
                parameter.data.copy_(value)


def find_leaves(loss: th.Tensor) -> set[th.Tensor]:
    """
    :param loss: what was computed with gradients
    :return: the tensors that its gradient is for
    """
    leaves, seen, nodes = set(), set(), [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.add(node.variable)
        nodes += [following for following, _ in node.next_functions]
    return leaves


def have_changed(before: Any, after: Any, seen: frozenset[int] = frozenset()) -> bool:
    """
    :param before: statistics that a module kept before the training: a number, an array, a container or an object of
        these
    :param after: the same of a worker's copy of the module, now
    :param seen: ids of the objects that these are part of, which may refer to themselves
    :return: whether a forward pass has changed them. Functions, modules and the like are no statistics
    """
    # Computed from parameters in each forward pass, as the weight of weight_norm is
    if getattr(after, "grad_fn", None) is not None or id(after) in seen:
        return False
    if isinstance(after, (np.ndarray, np.generic, th.Tensor)):
        before, after = (value.detach().cpu() if isinstance(value, th.Tensor) else value for value in (before, after))
        return not np.array_equal(before, after)
    if after is None or isinstance(after, (int, float, str, bytes, set)):
        return type(before) is not type(after) or before != after
    if isinstance(after, (nn.Module, type)) or callable(after):
        return False
    mine, other = list_parts(after), list_parts(before)
    return mine.keys() != other.keys() or any(
        have_changed(other[key], value, seen | {id(after)}) for key, value in mine.items()
    )


def list_parts(statistics: Any) -> dict[Any, Any]:
    """
    :param statistics: a container or an object
    :return: what it consists of, by keys, indices or the names of attributes
    """
    if isinstance(statistics, Mapping):
        return dict(statistics)
    if isinstance(statistics, (Sequence, deque)):
        return dict(enumerate(statistics))
    return getattr(statistics, "__dict__", {})


def copy_network(network: AnyNetwork) -> AnyNetwork:
    """
    :param network: a network, or a policy with an optimizer
    :return: a copy with values of its own, but with the same buffers (statistics of BatchNorm), and no optimizer
    :raises TypeError: see :func:`copy_modules`
    """
    duplicate = copy_modules(network)
    for my_buffer, shared_buffer in zip(duplicate.buffers(), network.buffers(), strict=True):
        my_buffer.data = shared_buffer.data
    return duplicate


def copy_modules(network: AnyNetwork) -> AnyNetwork:
    """
    :param network: a network, or a policy with optimizers
    :return: a copy that shares no parameters and no buffers with it, without gradients and optimizers
    :raises TypeError: if a module keeps something that can't be copied in a list, or deeper; names the module
    """
    memo: dict[int, Any] = {}
    for module in network.modules():
        # The same hooks, also those that a callback registers later
        memo.update((id(hooks), hooks) for hooks in (getattr(module, name) for name in HOOKS_OF_MODULES))
        if hasattr(module, "optimizer"):
            memo[id(module.optimizer)] = None
        if hasattr(module, "action_dist"):
            # It keeps what it was last called with, tensors that can't be copied deeply
            memo[id(module.action_dist)] = copy.copy(module.action_dist)
    try:
        duplicate = copy.deepcopy(network, memo.copy())
    except Exception:
        duplicate = copy.deepcopy(network, memo | find_uncopyable(network, memo))
    for mine in duplicate.parameters():
        mine.grad = None
    return duplicate


def find_uncopyable(network: nn.Module, memo: dict[int, Any]) -> dict[int, Any]:
    """
    Find out what to put in the place of attributes that can't be copied deeply.

    :param network: a network
    :param memo: what to put in the place of others, by their ids
    :return: the same for the attributes found: for a tensor that was computed from parameters (the weight of
        ``weight_norm``, say) a detached copy, for anything else (locks, open files) the object itself, to be shared
    :raises TypeError: if such an attribute is a container, whose modules must not be shared
    """
    found: dict[int, Any] = {}
    for name, module in network.named_modules():
        for attribute, value in vars(module).items():
            # These are copied with their modules. What they hold is looked for there
            if attribute in ("_modules", "_parameters", "_buffers"):
                continue
            try:
                copy.deepcopy(value, memo | found)
            except Exception as exception:
                if isinstance(value, (dict, list, set, tuple, nn.Module)):
                    raise TypeError(
                        f"Other threads need copies of the network, but '{attribute}' of its module '{name}' "
                        f"({type(module).__name__}) can't be copied: {exception}. Keep what can't be copied in an "
                        f"attribute of its own, which the copies share, or define {type(module).__name__}.__deepcopy__."
                    ) from exception
                found[id(value)] = value.detach().clone() if isinstance(value, th.Tensor) else value
    return found


def view_network(network: AnyNetwork) -> AnyNetwork:
    """
    :param network: a network, or a policy
    :return: a view of it: another module whose parameters share its memory, with gradients of their own
    """
    view = copy_network(network)
    share_memory(view.parameters(), network.parameters())
    return view


def share_memory(views: Iterable[nn.Parameter], parameters: Iterable[nn.Parameter]) -> None:
    """
    :param views: parameters that from then on have the memory of...
    :param parameters: these; a callback may have given them other memory, by assigning to ``data``
    """
    for view, parameter in zip(views, parameters, strict=True):
        if view.data_ptr() != parameter.data_ptr():
            view.data = parameter.data


def is_observed(optimizer: th.optim.Optimizer) -> bool:
    """
    :param optimizer: the policy's
    :return: whether somebody follows its steps: by hooks, or by a function in the place of its method, as schedulers do
    """
    hooks = (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks)
    return any(hooks) or "step" in vars(optimizer)


def share_hooks(mine: nn.Parameter, shared: nn.Parameter) -> None:
    """
    :param mine: a worker's parameter, which gets the hooks by which others follow or change the gradient of...
    :param shared: the parameter
    """
    for name in ("_backward_hooks", "_post_accumulate_grad_hooks"):
        hooks = getattr(shared, name)
        if getattr(mine, name) is not hooks:
            setattr(mine, name, hooks)


def view_optimizer(policy: BasePolicy, network: BaseModel, view: BaseModel) -> th.optim.Optimizer | None:
    """
    :param policy: the policy that has the shared optimizer
    :param network: the network whose parameters that optimizer changes
    :param view: a view of the network
    :return: an optimizer for the parameters of the view; None if the shared one's updates need a lock, and so no view
    """
    # Adam divides the mean of the gradients by the root of their mean square. Without a lock, another worker may have
    # added to the mean already, but not yet to the mean square: where that is still zero, the step is immense
    if not getattr(policy.optimizer, "is_lock_free", False):
        return None
    return rebuild_optimizer(policy, dict(zip(network.parameters(), view.parameters(), strict=True)))


def rebuild_optimizer(policy: BasePolicy, replacements: Mapping[Any, th.Tensor]) -> th.optim.Optimizer:
    """
    :param policy: a policy
    :param replacements: by parameters that its optimizer changes, those to change instead
    :return: an optimizer with the same settings, and without statistics
    :raises TypeError: if its class needs arguments that are not known
    """
    original = policy.optimizer
    groups = [{**group, "params": [replacements.get(p, p) for p in group["params"]]} for group in original.param_groups]
    # The groups hold all settings, but a class may need arguments. If the user has replaced the optimizer, the policy's
    # may not fit
    is_the_policys = not isinstance(policy.optimizer_class, type) or type(original) is policy.optimizer_class
    make: Any = policy.optimizer_class if is_the_policys else type(original)
    return make(groups, lr=groups[0]["lr"], **(policy.optimizer_kwargs if is_the_policys else {}))


def check_optimizer_state(policy: BasePolicy, state: Any) -> None:
    """
    Try whether a policy's optimizer could take a step from a given state. Torch loads any state with the right number
    of parameters, and fails at the next step.

    :param policy: the policy, which is left as it is
    :param state: what some optimizer's ``state_dict()`` returned
    :raises ValueError: if it is the state of another kind of optimizer, or for other parameters
    """
    copies: dict[th.Tensor, th.Tensor] = {
        p: th.zeros_like(p, requires_grad=True) for group in policy.optimizer.param_groups for p in group["params"]
    }
    try:
        trial = rebuild_optimizer(policy, copies)
    except TypeError:
        # A class of the user's own that needs further arguments
        return
    try:
        trial.load_state_dict(copy.deepcopy(state))
        for group in trial.param_groups:
            # Fused kernels don't compare shapes: they would write beyond the end of a tensor that is too small
            if "fused" in group:
                group["fused"] = False
        for parameter in copies.values():
            parameter.grad = th.zeros_like(parameter)
        trial.step()
    except Exception as error:
        raise ValueError(
            f"The state of policy.optimizer does not fit this policy's {type(trial).__name__} "
            f"({type(error).__name__}: {error}): load it into a model with the optimizer that it was saved with, or "
            "leave it out (exact_match=False)."
        ) from error
