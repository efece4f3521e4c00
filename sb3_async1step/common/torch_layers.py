"""Features extractors for images."""

import torch as th
from gymnasium import spaces
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn


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
    """

    def __init__(
        self,
        observation_space: spaces.Box,
        features_dim: int = 256,
        normalized_image: bool = False,
        layer_norm: bool = False,
    ) -> None:
        super().__init__(observation_space, features_dim)
        if not is_image_space(observation_space, check_channels=False, normalized_image=normalized_image):
            raise ValueError(f"NipsCNN needs images (uint8, or normalized_image=True), got {observation_space}")
        images = th.as_tensor(observation_space.sample()[None]).float()
        convolutions = (
            nn.Conv2d(observation_space.shape[0], 16, kernel_size=8, stride=4),
            nn.Conv2d(16, 32, kernel_size=4, stride=2),
        )
        self.cnn = nn.Sequential()
        if layer_norm:
            self.cnn.append(nn.LayerNorm(observation_space.shape, elementwise_affine=False))
        for convolution in convolutions:
            self.cnn.append(convolution)
            if layer_norm:
                self.cnn.append(nn.LayerNorm(self.cnn(images).shape[1:]))
            self.cnn.append(nn.ReLU())
        self.cnn.append(nn.Flatten())
        self.linear = nn.Sequential(nn.Linear(self.cnn(images).shape[1], features_dim))
        if layer_norm:
            self.linear.append(nn.LayerNorm(features_dim))
        self.linear.append(nn.ReLU())

    def forward(self, observations: th.Tensor) -> th.Tensor:
        """
        :param observations: images, shape ``(n, n_channels, height, width)``
        :return: features, shape ``(n, features_dim)``
        """
        return self.linear(self.cnn(observations))


class MinAtarCNN(BaseFeaturesExtractor):
    """
    The network that Young and Tian (2019) use on MinAtar: 16 filters of 3x3, and 128 hidden units.

    :param observation_space: MinAtar's binary images, channels last, shape ``(height, width, n_channels)``
    :param features_dim: number of hidden units
    """

    def __init__(self, observation_space: spaces.Box, features_dim: int = 128) -> None:
        super().__init__(observation_space, features_dim)
        height, width, n_channels = observation_space.shape
        self.cnn = nn.Sequential(nn.Conv2d(n_channels, 16, kernel_size=3), nn.ReLU(), nn.Flatten())
        self.linear = nn.Sequential(nn.Linear(16 * (height - 2) * (width - 2), features_dim), nn.ReLU())

    def forward(self, observations: th.Tensor) -> th.Tensor:
        """
        :param observations: images, shape ``(n, height, width, n_channels)``
        :return: features, shape ``(n, features_dim)``
        """
        return self.linear(self.cnn(observations.permute(0, 3, 1, 2)))
