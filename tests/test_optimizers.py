from copy import deepcopy

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike

from sb3_async1step import SharedRMSprop

SHAPES = [(5, 3), (7,)]


def make_parameters() -> list[th.nn.Parameter]:
    generator = th.Generator().manual_seed(0)
    return [th.nn.Parameter(th.randn(shape, generator=generator)) for shape in SHAPES]


def take_steps(optimizer: th.optim.Optimizer, parameters: list[th.nn.Parameter], n_steps: int) -> None:
    generator = th.Generator().manual_seed(1)
    for _ in range(n_steps):
        for parameter in parameters:
            parameter.grad = th.randn(parameter.shape, generator=generator)
        optimizer.step()


def test_equals_the_papers_equations():
    """Mnih et al. 2016, equations 8 and 9."""
    parameters = make_parameters()
    theta = [p.detach().double().numpy().copy() for p in parameters]
    g = [np.zeros_like(p) for p in theta]
    alpha, eta, epsilon = 0.9, 0.01, 0.1
    take_steps(SharedRMSprop(parameters, lr=eta, alpha=alpha, eps=epsilon), parameters, 20)

    generator = th.Generator().manual_seed(1)
    for _ in range(20):
        for i in range(len(theta)):
            d_theta = th.randn(SHAPES[i], generator=generator).double().numpy()
            g[i] = alpha * g[i] + (1 - alpha) * d_theta**2
            theta[i] = theta[i] - eta * d_theta / np.sqrt(g[i] + epsilon)
    for parameter, expected in zip(parameters, theta, strict=True):
        np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=1e-5, atol=1e-6)


def test_equals_rmsprop_tf_like_up_to_the_initial_average():
    ours, theirs = make_parameters(), make_parameters()
    our_optimizer = SharedRMSprop(ours, lr=0.01, alpha=0.95, eps=0.01)
    their_optimizer = RMSpropTFLike(theirs, lr=0.01, alpha=0.95, eps=0.01)
    take_steps(our_optimizer, ours, 1)
    take_steps(their_optimizer, theirs, 1)
    assert not th.equal(ours[0], theirs[0])
    for mine, their in zip(ours, theirs, strict=True):
        mine.data.copy_(their.data)
        our_optimizer.state[mine]["square_avg"].copy_(their_optimizer.state[their]["square_avg"])
    take_steps(our_optimizer, ours, 20)
    take_steps(their_optimizer, theirs, 20)
    for mine, their in zip(ours, theirs, strict=True):
        th.testing.assert_close(mine, their, rtol=1e-6, atol=1e-7)


def test_state_dict_restores_the_average():
    parameters, restored = make_parameters(), make_parameters()
    optimizer = SharedRMSprop(parameters)
    take_steps(optimizer, parameters, 3)
    other = SharedRMSprop(restored)
    other.load_state_dict(deepcopy(optimizer.state_dict()))
    for mine, their in zip(restored, parameters, strict=True):
        mine.data.copy_(their.data)
    take_steps(optimizer, parameters, 3)
    take_steps(other, restored, 3)
    for mine, their in zip(restored, parameters, strict=True):
        assert th.equal(mine, their)


def test_skips_parameters_without_gradient():
    parameters = make_parameters()
    before = parameters[1].detach().clone()
    optimizer = SharedRMSprop(parameters)
    parameters[0].grad = th.ones(SHAPES[0])
    optimizer.step()
    assert th.equal(parameters[1], before)
    assert list(optimizer.state) == [parameters[0]]


@pytest.mark.parametrize(
    "wrong",
    [
        *({"lr": -1.0}, {"lr": float("nan")}, {"lr": None}, {"alpha": 1.1}, {"alpha": -0.1}, {"alpha": True}),
        *({"eps": -1e-3}, {"eps": 0.0}, {"eps": float("inf")}, {"eps": "0.1"}),
    ],
)
def test_wrong_hyperparameters(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=rf"{name} must be .*, got {value!r}"):
        SharedRMSprop(make_parameters(), **wrong)


def test_complex_parameters():
    """Real and imaginary parts are parameters of their own."""
    values = th.tensor([1.0 - 2.0j, 0.5j])
    whole = th.nn.Parameter(values.clone())
    parts = th.nn.Parameter(th.view_as_real(values).clone())
    optimizers = [SharedRMSprop([parameter], lr=0.1) for parameter in (whole, parts)]
    for i in range(5):
        gradient = th.tensor([0.3 - i * 1.0j, 2.0 + 0.1j])
        whole.grad, parts.grad = gradient, th.view_as_real(gradient).clone()
        for optimizer in optimizers:
            optimizer.step()
        assert th.equal(th.view_as_real(whole.detach()), parts.detach())
