"""DQN's policies, with layer normalization and mixed precision."""

import inspect
from collections.abc import Callable
from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.torch_layers import (
    BaseFeaturesExtractor,
    CombinedExtractor,
    FlattenExtractor,
    NatureCNN,
    create_mlp,
)
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from stable_baselines3.dqn.policies import CnnPolicy as DQNCnnPolicy
from stable_baselines3.dqn.policies import DQNPolicy
from stable_baselines3.dqn.policies import MultiInputPolicy as DQNMultiInputPolicy
from stable_baselines3.dqn.policies import QNetwork as DQNQNetwork
from torch import nn

from sb3_async1step.common.mixed_precision import MixedPrecision
from sb3_async1step.common.torch_layers import MinAtarCNN, NipsCNN
from sb3_async1step.common.warn import warn_the_caller

#: CNNs of this package, whose constructors take ``layer_norm``
CNNS_WITH_LAYER_NORM = (NipsCNN, MinAtarCNN)
CNNS_WITH_HIDDEN_LAYER = (*CNNS_WITH_LAYER_NORM, NatureCNN)


def takes(function: Callable[..., Any], name: str) -> bool:
    """
    :param function: a function, or a class
    :param name: name of an argument
    :return: whether it takes this argument
    """
    parameters = inspect.signature(function).parameters
    return name in parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values())


def unwrap_extractor(extractor: Any) -> tuple[type[BaseFeaturesExtractor], dict[str, Any]]:
    """
    :param extractor: a class of features extractors, or a function that makes one: a ``functools.partial``, say
    :return: its class, as far as it is known, and the arguments that a ``functools.partial`` fixes
    """
    function = getattr(extractor, "func", extractor)
    extractor_class = function if isinstance(function, type) else BaseFeaturesExtractor
    return extractor_class, getattr(extractor, "keywords", {})


def choose_layer_norm(
    extractor: type[BaseFeaturesExtractor], net_arch: list[int], layer_norm: bool | None, kwargs: dict[str, Any]
) -> bool:
    """
    Decide whether hidden layers are normalized.

    :param extractor: class of the features extractor
    :param net_arch: hidden layers behind the features extractor
    :param layer_norm: what the user has asked for, None for the default
    :param kwargs: arguments of the features extractor, which get ``layer_norm`` if it takes that
    :return: whether there is a ``LayerNorm`` before the activation of each hidden layer
    :raises ValueError: if there is no hidden layer that ``layer_norm`` could normalize
    """
    # Classes that were derived from ours may have constructors of their own
    is_taken = issubclass(extractor, CNNS_WITH_LAYER_NORM) and takes(extractor, "layer_norm")
    if layer_norm is None:
        layer_norm = kwargs.get("layer_norm", is_taken)
    if is_taken:
        kwargs.setdefault("layer_norm", layer_norm)
    elif layer_norm and len(net_arch) == 0:
        raise ValueError(
            f"layer_norm=True normalizes hidden layers, but {extractor.__name__}'s are its own and "
            "net_arch is empty: give it some, as in policy_kwargs=dict(net_arch=[256], layer_norm=True)."
        )
    return layer_norm


def warn_of_own_predict(policy: DQNPolicy) -> None:
    """
    :param policy: a policy, whose class or Q-network may choose actions in a way of its own, as for a mask of actions
    """
    for module, known in ((policy, (DQNPolicy, MlpPolicy)), (policy.q_net, (DQNQNetwork,))):
        if all(type(module)._predict is not base._predict for base in known):
            warn_the_caller(
                f"Workers do not call {type(module).__name__}._predict() while they learn; only predict() does. They "
                "take the action with the highest Q-value, or a random one of all actions. A low value from the "
                "Q-network's forward() keeps an action from being the greedy one; exploration may still choose it."
            )


class QNetwork(DQNQNetwork, MixedPrecision):
    """
    DQN's Q-network.

    :param args: see SB3's ``QNetwork``
    :param layer_norm: whether a ``LayerNorm`` stands before the activation of each hidden layer of ``net_arch``
    :param mixed_precision: whether the features extractor computes in bfloat16
    :param kwargs: see SB3's ``QNetwork``
    """

    def __init__(self, *args: Any, layer_norm: bool, mixed_precision: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.layer_norm = layer_norm
        self.mixed_precision = mixed_precision
        if layer_norm:
            assert isinstance(self.action_space, spaces.Discrete)
            self.q_net = nn.Sequential(
                *create_mlp(
                    self.features_dim,
                    int(self.action_space.n),
                    self.net_arch,
                    self.activation_fn,
                    post_linear_modules=[nn.LayerNorm],
                )
            )

    def _get_constructor_parameters(self) -> dict[str, Any]:
        ours = {"layer_norm": self.layer_norm, "mixed_precision": self.mixed_precision}
        return {**super()._get_constructor_parameters(), **ours}


class MlpPolicy(DQNPolicy):
    """
    DQN's policy with Q-network and target network, and Adam as its optimizer.

    :param observation_space: observation space
    :param action_space: action space
    :param lr_schedule: learning rate schedule
    :param net_arch: hidden layers behind the features extractor: two of 256 units by default, none behind a CNN that
        ends in a hidden layer of its own
    :param features_extractor_class: class of the features extractor
    :param features_extractor_kwargs: further parameters of the features extractor
    :param normalize_images: whether images are divided by 255
    :param optimizer_class: any torch optimizer; only updates of :class:`~sb3_async1step.SharedRMSprop` need no lock
    :param optimizer_kwargs: further parameters of the optimizer, by default ``dict(fused=True)`` for Adam
    :param layer_norm: whether there is a ``LayerNorm`` before the activation of each hidden layer: those of
        ``net_arch``, and those of :class:`~sb3_async1step.NipsCNN`, :class:`~sb3_async1step.LayerNormNatureCNN` and
        :class:`~sb3_async1step.MinAtarCNN`. It keeps values that are learned without replay from diverging (Gallici et
        al. 2025, "Simplifying Deep Temporal Difference Learning"). By default only networks with one of these CNNs have
        it: with it, small networks are worse at learning small differences between large values
    :param mixed_precision: whether the features extractor computes in bfloat16 (``torch.autocast``), which is faster
        where the processor can; weights, gradients, the layers of ``net_arch`` and the Q-values stay in float32
    :param kwargs: further parameters of SB3's ``DQNPolicy``
    :raises ValueError: if there is no hidden layer that ``layer_norm`` could normalize
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Discrete,
        lr_schedule: Schedule,
        net_arch: list[int] | None = None,
        features_extractor_class: type[BaseFeaturesExtractor] = FlattenExtractor,
        features_extractor_kwargs: dict[str, Any] | None = None,
        normalize_images: bool = True,
        optimizer_class: type[th.optim.Optimizer] = th.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
        layer_norm: bool | None = None,
        mixed_precision: bool = False,
        **kwargs: Any,
    ) -> None:
        extractor, fixed_kwargs = unwrap_extractor(features_extractor_class)
        features_extractor_kwargs = {**fixed_kwargs, **(features_extractor_kwargs or {})}
        if net_arch is None:
            net_arch = [] if issubclass(extractor, CNNS_WITH_HIDDEN_LAYER) else [256, 256]
        layer_norm = choose_layer_norm(extractor, net_arch, layer_norm, features_extractor_kwargs)
        if issubclass(extractor, NipsCNN) and takes(extractor, "normalized_image") and not normalize_images:
            # As SB3 does for its own CNNs
            features_extractor_kwargs.setdefault("normalized_image", True)
        if optimizer_kwargs is None and optimizer_class is th.optim.Adam:
            # One pass over each parameter instead of a dozen: 1.0 instead of 3.6 ms for the Nature CNN on a CPU
            optimizer_kwargs = {"fused": True}
        # DQNPolicy's constructor makes the networks
        self.layer_norm = layer_norm
        self.mixed_precision = mixed_precision
        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            net_arch=net_arch,
            features_extractor_class=features_extractor_class,
            features_extractor_kwargs=features_extractor_kwargs,
            normalize_images=normalize_images,
            optimizer_class=optimizer_class,
            optimizer_kwargs=optimizer_kwargs,
            **kwargs,
        )

    def make_q_net(self) -> QNetwork:
        """
        :return: a new Q-network
        """
        net_args = self._update_features_extractor(self.net_args, features_extractor=None)
        q_network = QNetwork(**net_args, layer_norm=self.layer_norm, mixed_precision=self.mixed_precision)
        return q_network.to(self.device)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        ours = {"layer_norm": self.layer_norm, "mixed_precision": self.mixed_precision}
        return {**super()._get_constructor_parameters(), **ours}

    def _predict(self, obs: PyTorchObs, deterministic: bool = True) -> th.Tensor:
        # The network numbers actions from 0, the action space may start elsewhere
        assert isinstance(self.action_space, spaces.Discrete)
        return super()._predict(obs, deterministic) + int(self.action_space.start)


class CnnPolicy(MlpPolicy, DQNCnnPolicy):
    """
    :class:`MlpPolicy` for images.

    :param observation_space: observation space
    :param action_space: action space
    :param lr_schedule: learning rate schedule
    :param features_extractor_class: the paper's :class:`~sb3_async1step.NipsCNN` by default
    :param kwargs: further parameters of :class:`MlpPolicy`
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Discrete,
        lr_schedule: Schedule,
        features_extractor_class: type[BaseFeaturesExtractor] = NipsCNN,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            features_extractor_class=features_extractor_class,
            **kwargs,
        )


class MultiInputPolicy(MlpPolicy, DQNMultiInputPolicy):
    """
    :class:`MlpPolicy` for dict observations.

    :param observation_space: observation space
    :param action_space: action space
    :param lr_schedule: learning rate schedule
    :param features_extractor_class: SB3's ``CombinedExtractor`` by default
    :param kwargs: further parameters of :class:`MlpPolicy`
    """

    def __init__(
        self,
        observation_space: spaces.Dict,
        action_space: spaces.Discrete,
        lr_schedule: Schedule,
        features_extractor_class: type[BaseFeaturesExtractor] = CombinedExtractor,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            features_extractor_class=features_extractor_class,
            **kwargs,
        )
