"""Layers of the networks, and what is known of modules."""

from functools import partial

import gymnasium as gym
import pytest
import torch as th
from stable_baselines3.common.envs import FakeImageEnv
from stable_baselines3.common.torch_layers import NatureCNN
from torch import nn

from sb3_async1step import LayerNormNatureCNN, MinAtarCNN, NipsCNN
from sb3_async1step.async_one_step_q.forward_passes import are_pure
from sb3_async1step.common.torch_layers import ImageLayerNorm


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("memory_format", [th.channels_last, th.contiguous_format])
def test_image_layer_norm(affine, memory_format):
    """The same function and gradients as PyTorch's, and the images stay as they are in memory."""
    ours, theirs = (
        ImageLayerNorm((3, 5, 7), elementwise_affine=affine),
        nn.LayerNorm((3, 5, 7), elementwise_affine=affine),
    )
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)
    ours.load_state_dict(theirs.state_dict())
    values = th.randn(4, 3, 5, 7).contiguous(memory_format=memory_format)
    inputs = [values.clone(memory_format=th.preserve_format).requires_grad_() for _ in range(2)]
    outputs = [layer(images) for layer, images in zip((ours, theirs), inputs, strict=True)]
    th.testing.assert_close(*outputs)
    assert outputs[0].is_contiguous(memory_format=memory_format)
    for output in outputs:
        (output * th.arange(output.numel()).reshape(output.shape)).mean().backward()
    th.testing.assert_close(inputs[0].grad, inputs[1].grad)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        th.testing.assert_close(mine.grad, other.grad)


def add_hook(module):
    module.register_forward_hook(lambda *args: None)
    return module


@pytest.mark.parametrize(
    ("module", "pure"),
    [
        (nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.ReLU()), True),
        (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), False),
        (nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)), False),
        (nn.utils.spectral_norm(nn.Linear(4, 4)), False),
        (nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)), False),
        (add_hook(nn.Linear(4, 4)), False),
        (nn.Sequential(nn.RReLU()), False),
    ],
)
def test_what_is_known_of_modules(module, pure):
    assert are_pure(module.modules()) == pure


@pytest.mark.parametrize("extractor", [NipsCNN, LayerNormNatureCNN, NatureCNN, MinAtarCNN])
def test_the_cnns_are_pure(extractor):
    shape = (10, 10, 4) if extractor is MinAtarCNN else (4, 84, 84)
    cnn = extractor(gym.spaces.Box(0, 255, shape, dtype="uint8"))
    assert are_pure(cnn.modules())
    observations = th.rand(2, *shape)
    assert th.equal(cnn.train()(observations), cnn.eval()(observations))


IMAGES = gym.spaces.Box(0, 255, (4, 84, 84), dtype="uint8")


def test_without_normalization_it_is_the_nature_cnn():
    ours, theirs = LayerNormNatureCNN(IMAGES, layer_norm=False), NatureCNN(IMAGES)
    ours.load_state_dict(theirs.state_dict())
    images = th.rand(3, 4, 84, 84)
    th.testing.assert_close(ours(images), theirs(images))


@pytest.mark.parametrize(("extractor", "n_convolutions"), [(NipsCNN, 2), (LayerNormNatureCNN, 3)])
def test_normalization_before_each_relu_and_of_the_input(extractor, n_convolutions):
    cnn = extractor(IMAGES, layer_norm=True).train()
    convolutions = [module for module in cnn.modules() if isinstance(module, nn.Conv2d)]
    assert len(convolutions) == n_convolutions
    images = th.rand(3, 4, 84, 84)
    expected = nn.functional.layer_norm(images, images.shape[1:])
    for convolution in convolutions:
        expected = convolution(expected)
        expected = nn.functional.relu(nn.functional.layer_norm(expected, expected.shape[1:]))
    hidden = cnn.linear[0](expected.flatten(1))
    th.testing.assert_close(cnn(images), nn.functional.relu(nn.functional.layer_norm(hidden, hidden.shape[1:])))


class OwnConstructor(NipsCNN):
    def __init__(self, observation_space):
        super().__init__(observation_space)


@pytest.mark.parametrize(
    ("extractor", "kwargs", "has_norms"),
    [
        (NipsCNN, {}, True),
        (partial(NipsCNN, layer_norm=False), {}, False),
        (partial(NipsCNN, layer_norm=False), {"features_extractor_kwargs": {"layer_norm": True}}, True),
        (partial(NipsCNN, layer_norm=True), {"layer_norm": False}, True),
        (LayerNormNatureCNN, {}, True),
        (LayerNormNatureCNN, {"layer_norm": False}, False),
        (OwnConstructor, {}, False),
        (OwnConstructor, {"normalize_images": False}, False),
    ],
)
def test_what_a_policy_adds_to_the_arguments_of_a_cnn(value_based, extractor, kwargs, has_norms):
    """Nothing that was said already, and nothing that it does not take."""
    env = FakeImageEnv(screen_height=84, screen_width=84, n_channels=4, channel_first=True)
    model = value_based("CnnPolicy", env, policy_kwargs={"features_extractor_class": extractor, **kwargs})
    modules = model.q_net.features_extractor.modules()
    assert any(isinstance(module, (nn.LayerNorm, ImageLayerNorm)) for module in modules) == has_norms
