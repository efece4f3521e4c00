"""Copies and views of networks: each worker computes with one of its own."""

import copy
import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BaseModel
from torch import nn

from sb3_async1step.sb3_internals import HOOKS_OF_MODULES, HOOKS_OF_TENSORS

AnyNetwork = TypeVar("AnyNetwork", bound=BaseModel)


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
    # TorchScript clones the tensors of its modules. With gradients, these would be computed from the original's
    with th.no_grad():
        try:
            duplicate = copy.deepcopy(network, memo.copy())
        except Exception:
            duplicate = copy.deepcopy(network, memo | find_uncopyable(network, memo))
    for mine, original in zip(duplicate.parameters(), network.parameters(), strict=True):
        mine.requires_grad_(original.requires_grad)
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
    Let parameters use the memory of others, to which a callback may have given other memory, by assigning to ``data``.

    :param views: parameters to redirect
    :param parameters: those whose memory they get
    """
    for view, parameter in zip(views, parameters, strict=True):
        if view.data_ptr() != parameter.data_ptr():
            view.data = parameter.data


def share_hooks(mine: nn.Parameter, shared: nn.Parameter) -> None:
    """
    Give a parameter the hooks of another one, by which callbacks follow or change its gradient.

    :param mine: a worker's parameter
    :param shared: the shared parameter
    """
    for name in HOOKS_OF_TENSORS:
        hooks = getattr(shared, name)
        if getattr(mine, name) is not hooks:
            setattr(mine, name, hooks)


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
    :return: whether a forward pass has changed them. Functions, modules, spaces (which make a generator when they are
        first sampled from) and the like are no statistics
    """
    # Computed from parameters in each forward pass, as the weight of weight_norm is
    if getattr(after, "grad_fn", None) is not None or id(after) in seen:
        return False
    if isinstance(after, th.Tensor):
        return not isinstance(before, th.Tensor) or not are_equal_tensors(before.detach().cpu(), after.detach().cpu())
    if isinstance(after, (np.ndarray, np.generic)):
        return not are_equal_arrays(before, after)
    if after is None or isinstance(after, (int, float, str, bytes, set)):
        are_nan = all(isinstance(value, float) and math.isnan(value) for value in (before, after))
        return type(before) is not type(after) or (before != after and not are_nan)
    if isinstance(after, (nn.Module, spaces.Space, type)) or callable(after):
        return False
    mine, other = list_parts(after), list_parts(before)
    return mine.keys() != other.keys() or any(
        have_changed(other[key], value, seen | {id(after)}) for key, value in mine.items()
    )


def are_equal_tensors(one: th.Tensor, two: th.Tensor) -> bool:
    """
    :param one: a tensor
    :param two: another one on the same device
    :return: whether they have the same values, NaN included. NumPy does not know all of their types
    """
    return one.shape == two.shape and bool(((one == two) | (one.isnan() & two.isnan())).all())


def are_equal_arrays(one: Any, two: Any) -> bool:
    """
    :param one: an array, or anything
    :param two: an array
    :return: whether they have the same values, NaN included
    """
    have_nan = all(isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in "fc" for value in (one, two))
    return np.array_equal(one, two, equal_nan=have_nan)


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
