"""Views of the policy's optimizer, which workers use without a lock, and whether a state fits it."""

import copy
from collections.abc import Mapping
from typing import Any

import torch as th
from stable_baselines3.common.policies import BaseModel, BasePolicy

from sb3_async1step.sb3_internals import HOOKS_OF_OPTIMIZERS


def is_observed(optimizer: th.optim.Optimizer) -> bool:
    """
    :param optimizer: the policy's
    :return: whether somebody follows its steps: by hooks, or by a function in the place of its method, as schedulers do
    """
    return any(getattr(optimizer, name) for name in HOOKS_OF_OPTIMIZERS) or "step" in vars(optimizer)


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
