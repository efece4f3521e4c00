"""Warnings that say what to do instead."""

import inspect
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch as th
from stable_baselines3.common.policies import BasePolicy
from torch import nn

from sb3_async1step.workers.actor_learner import ActorLearner


def without_autocast(device: th.device) -> AbstractContextManager[Any]:
    """
    Disable ``torch.autocast``, with a warning. Workers can't follow it: it applies to a single thread, and it keeps
    what it has converted until its ``with`` block ends, so that the network would seem to stay as it is.

    :param device: the model's
    :return: a context manager without it
    """
    if not th.is_autocast_enabled(device.type):
        return nullcontext()
    warn_the_caller(
        "learn() ignores torch.autocast. Policies compute in bfloat16 with policy_kwargs=dict(mixed_precision=True)."
    )
    return th.autocast(device.type, enabled=False)


def list_modules_and_parameters(policy: BasePolicy) -> list[nn.Module | nn.Parameter]:
    """
    :param policy: a policy
    :return: its modules and parameters
    """
    return [*policy.modules(), *policy.parameters()]


def warn_of_what_is_not_followed(
    policy: BasePolicy, parts: list[nn.Module | nn.Parameter], workers: Sequence[ActorLearner]
) -> None:
    """
    :param policy: the policy after a training
    :param parts: the modules and parameters that it had when the workers were made
    :param workers: the workers
    """
    if list(map(id, parts)) != list(map(id, list_modules_and_parameters(policy))):
        warn_the_caller(
            "A callback has replaced modules or parameters of the policy. The workers went on with those from before, "
            "and what they learned is not in the new ones: replace them between two calls of learn(), or change "
            "parameters in place."
        )
    names = {name: None for worker in workers for name in worker.local.list_unshared_state()}
    if names:
        warn_the_caller(
            f"The network has changed {', '.join(names)} during its forward passes. The workers' copies of a module "
            "share neither plain attributes nor buffers that are registered during training, so the changes are lost: "
            "register them as buffers in the module's constructor (Module.register_buffer), and change them in place."
        )


def warn_the_caller(message: str) -> None:
    """
    Warn with the line of the user's call of ``learn()``.

    :param message: the warning
    """
    frame, stacklevel = inspect.currentframe(), 1
    while frame is not None and frame.f_globals.get("__name__", "").startswith("sb3_async1step."):
        frame, stacklevel = frame.f_back, stacklevel + 1
    warnings.warn(message, stacklevel=stacklevel)
