"""Which networks can act and learn with the same forward pass."""

from collections.abc import Iterable

from stable_baselines3.common.torch_layers import CombinedExtractor, FlattenExtractor, NatureCNN
from torch import nn

from sb3_async1step.common.torch_layers import ImageLayerNorm, LayerNormNatureCNN, MinAtarCNN, NipsCNN
from sb3_async1step.sb3_internals import HOOKS_OF_MODULES

#: Modules without a state, whose forward pass is the same in training and in evaluation mode
PURE_MODULES = frozenset(
    (
        *(nn.Sequential, nn.ModuleDict, nn.Identity, nn.Flatten),
        *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.LayerNorm, ImageLayerNorm),
        *(nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid),
        *(FlattenExtractor, CombinedExtractor, NatureCNN, NipsCNN, LayerNormNatureCNN, MinAtarCNN),
    )
)


def are_pure(modules: Iterable[nn.Module]) -> bool:
    """
    :param modules: modules of a network
    :return: whether their forward pass is known to be the same in training and in evaluation mode, and to leave nothing
        behind in them. Unlike BatchNorm, Dropout, modules of a class of the user's own, and those with hooks
    """
    # Subclasses don't count: they may do anything
    return all(
        type(module) in PURE_MODULES and not any(getattr(module, name) for name in HOOKS_OF_MODULES)
        for module in modules
    )
