"""Features extractors for images."""

from collections.abc import Sequence
from typing import ClassVar

import torch as th
from gymnasium import spaces
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn
from torch.nn import functional as F


class ImageLayerNorm(nn.LayerNorm):
    """``LayerNorm`` of images whose channels come last in memory. PyTorch's would copy them into another order."""

    def forward(self, images: th.Tensor) -> th.Tensor:
        """
        :param images: shape ``(n, n_channels, height, width)``
        :return: the normalized images, in the same shape and order
        """
        if not images.is_contiguous(memory_format=th.channels_last):
            return super().forward(images)
        n_channels, height, width = self.normalized_shape
        weight, bias = (None if p is None else p.permute(1, 2, 0).contiguous() for p in (self.weight, self.bias))
        normalized = F.layer_norm(images.permute(0, 2, 3, 1), (height, width, n_channels), weight, bias, self.eps)
        return normalized.permute(0, 3, 1, 2)


def create_cnn(
    image_shape: Sequence[int], convolutions: Sequence[nn.Conv2d], layer_norm: type[nn.LayerNorm] | None
) -> nn.Sequential:
    """
    Stack convolutions, each with a ReLU, and flatten the result.

    :param image_shape: shape of an image, ``(n_channels, height, width)``
    :param convolutions: the convolutions
    :param layer_norm: class of what stands before each ReLU, None for nothing
    :return: a module that turns images of shape ``(n, n_channels, height, width)`` into an array of shape ``(n, -1)``
    """
    cnn = nn.Sequential()
    image = th.zeros(1, *image_shape)
    for convolution in convolutions:
        image = convolution(image)
        cnn.append(convolution)
        if layer_norm is not None:
            cnn.append(layer_norm(image.shape[1:]))
        cnn.append(nn.ReLU())
    return cnn.append(nn.Flatten())


def create_hidden_layer(n_inputs: int, n_units: int, layer_norm: bool) -> nn.Sequential:
    """
    :param n_inputs: number of inputs
    :param n_units: number of hidden units
    :param layer_norm: whether a ``LayerNorm`` stands before the ReLU
    :return: a fully connected layer with a ReLU
    """
    layer = nn.Sequential(nn.Linear(n_inputs, n_units))
    if layer_norm:
        layer.append(nn.LayerNorm(n_units))
    return layer.append(nn.ReLU())


def count_outputs(module: nn.Module, input_shape: Sequence[int]) -> int:
    """
    :param module: a module
    :param input_shape: shape of one of its inputs
    :return: number of features that the module computes from it
    """
    with th.no_grad():
        return int(module(th.zeros(1, *input_shape)).shape[1])


class NipsCNN(BaseFeaturesExtractor):
    """
    The CNN of Mnih et al. (2013), which the paper uses on Atari (section 5.1): 16 filters of 8x8 with stride 4, 32
    filters of 4x4 with stride 2, and 256 hidden units. It is smaller than SB3's ``NatureCNN``.

    :param observation_space: images, channels first, shape ``(n_channels, height, width)``
    :param features_dim: number of hidden units
    :param normalized_image: whether the images are normalized already, as for SB3's ``NatureCNN``
    :param layer_norm: whether there is a ``LayerNorm`` before each ReLU, as in PQN's network (Gallici et al. 2025), and
        one without parameters at the input. Without it, a background that is not black moves all weights of a filter
        together, until its ReLU is dead
    :raises ValueError: if the observations are not images

    :cvar convolutions: number of filters, kernel size and stride of each convolution
    """

    convolutions: ClassVar[Sequence[tuple[int, int, int]]] = ((16, 8, 4), (32, 4, 2))

    def __init__(
        self,
        observation_space: spaces.Box,
        features_dim: int = 256,
        normalized_image: bool = False,
        layer_norm: bool = False,
    ) -> None:
        super().__init__(observation_space, features_dim)
        if not is_image_space(observation_space, check_channels=False, normalized_image=normalized_image):
            raise ValueError(
                f"{type(self).__name__} needs images (uint8, or normalized_image=True), got {observation_space}"
            )
        n_channels = (observation_space.shape[0], *(n_filters for n_filters, _, _ in self.convolutions))
        convolutions = [
            nn.Conv2d(n_inputs, n_filters, kernel_size, stride)
            for n_inputs, (n_filters, kernel_size, stride) in zip(n_channels, self.convolutions, strict=False)
        ]
        self.cnn = create_cnn(observation_space.shape, convolutions, ImageLayerNorm if layer_norm else None)
        if layer_norm:
            self.cnn.insert(0, ImageLayerNorm(observation_space.shape, elementwise_affine=False))
        self.linear = create_hidden_layer(count_outputs(self.cnn, observation_space.shape), features_dim, layer_norm)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        """
        :param observations: images, shape ``(n, n_channels, height, width)``
        :return: features, shape ``(n, features_dim)``
        """
        return self.linear(self.cnn(observations))


class LayerNormNatureCNN(NipsCNN):
    """
    PQN's network (Gallici et al. 2025), SB3's ``NatureCNN`` with a ``LayerNorm`` before each ReLU. Unlike there, the
    input is normalized as well, as in :class:`NipsCNN`.

    :param observation_space: images, channels first, shape ``(n_channels, height, width)``
    :param features_dim: number of hidden units
    :param normalized_image: whether the images are normalized already, as for SB3's ``NatureCNN``
    :param layer_norm: whether there are these normalizations
    """

    convolutions = ((32, 8, 4), (64, 4, 2), (64, 3, 1))

    def __init__(
        self,
        observation_space: spaces.Box,
        features_dim: int = 512,
        normalized_image: bool = False,
        layer_norm: bool = True,
    ) -> None:
        super().__init__(observation_space, features_dim, normalized_image, layer_norm)


class MinAtarCNN(BaseFeaturesExtractor):
    """
    The network that Young and Tian (2019) use on MinAtar: 16 filters of 3x3, and 128 hidden units.

    :param observation_space: MinAtar's binary images, channels last, shape ``(height, width, n_channels)``
    :param features_dim: number of hidden units
    :param layer_norm: whether a ``LayerNorm`` stands before each ReLU
    """

    def __init__(self, observation_space: spaces.Box, features_dim: int = 128, layer_norm: bool = False) -> None:
        super().__init__(observation_space, features_dim)
        height, width, n_channels = observation_space.shape
        image_shape = (n_channels, height, width)
        # Copies of such small images cost less than what ImageLayerNorm adds
        convolutions = [nn.Conv2d(n_channels, 16, kernel_size=3)]
        self.cnn = create_cnn(image_shape, convolutions, nn.LayerNorm if layer_norm else None)
        self.linear = create_hidden_layer(count_outputs(self.cnn, image_shape), features_dim, layer_norm)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        """
        :param observations: images, shape ``(n, height, width, n_channels)``
        :return: features, shape ``(n, features_dim)``
        """
        return self.linear(self.cnn(observations.permute(0, 3, 1, 2)))
