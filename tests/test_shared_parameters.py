import threading
from copy import deepcopy

import pytest
import torch as th

from sb3_async1step import AsyncOneStepQ
from sb3_async1step.workers.shared_parameters import SharedParameters
from tests.envs import make_env


def make_policy(**policy_kwargs):
    return AsyncOneStepQ("MlpPolicy", make_env(1), seed=0, policy_kwargs=policy_kwargs).policy


def loss_of(network, observations):
    return network(observations).square().mean()


def test_views_share_weights_but_not_gradients():
    policy = make_policy()
    shared = SharedParameters(policy, tau=1.0, lock_updates=False)
    one, two = shared.view_network(training=True), shared.view_network(training=False)
    assert one.training and not two.training
    with th.no_grad():
        next(policy.q_net.parameters()).fill_(0.25)
    assert all(th.equal(next(net.parameters()), next(policy.q_net.parameters())) for net in (one, two))
    loss_of(one, th.ones(2, 4)).backward()
    assert all(p.grad is not None for p in one.parameters())
    assert all(p.grad is None for net in (two, policy.q_net) for p in net.parameters())
    # Predicting flips the policy's mode, not the views'
    policy.set_training_mode(True)
    policy.predict(th.ones(4).numpy())
    assert one.training and not policy.q_net.training


def test_a_write_between_forward_and_backward_raises_no_error():
    shared = SharedParameters(make_policy(), tau=1.0, lock_updates=False)
    one, two = shared.view_network(training=True), shared.view_network(training=True)
    loss = loss_of(one, th.ones(2, 4))
    optimizer = shared.view_optimizer(two)
    loss_of(two, th.ones(2, 4)).backward()
    shared.apply_gradient(optimizer)
    loss.backward()


def test_gradients_of_concurrent_workers_do_not_mix():
    shared = SharedParameters(make_policy(), tau=1.0, lock_updates=False)
    batches = [th.full((8, 4), float(i + 1)) for i in range(4)]
    expected = []
    for batch in batches:
        view = shared.view_network(training=True)
        loss_of(view, batch).backward()
        expected.append([p.grad for p in view.parameters()])
    wrong = []

    def work(i):
        view = shared.view_network(training=True)
        for _ in range(300):
            view.zero_grad()
            loss_of(view, batches[i]).backward()
            wrong.extend(
                p for p, e in zip(view.parameters(), expected[i], strict=True) if not th.allclose(p.grad, e, rtol=1e-4)
            )

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize(
    ("optimizer_class", "optimizer_kwargs"),
    [
        (None, {}),
        (th.optim.Adam, {"eps": 1e-5}),
        (th.optim.AdamW, {"weight_decay": 0.1}),
        (th.optim.RMSprop, {"momentum": 0.9, "centered": True}),
        (th.optim.SGD, {}),
        (th.optim.SGD, {"momentum": 0.9}),
        (th.optim.Adagrad, {}),
    ],
)
def test_one_optimizers_statistics_serve_all_workers(optimizer_class, optimizer_kwargs):
    """Two workers' updates in turn equal one optimizer's steps with the same gradients."""
    policy_kwargs = {} if optimizer_class is None else {"optimizer_class": optimizer_class}
    policy = make_policy(optimizer_kwargs=optimizer_kwargs, **policy_kwargs)
    plain = deepcopy(policy.q_net)
    plain_optimizer = type(policy.optimizer)(plain.parameters(), lr=0.01, **optimizer_kwargs)
    for group in policy.optimizer.param_groups:
        group["lr"] = 0.01
    shared = SharedParameters(policy, tau=1.0, lock_updates=False)
    views = [shared.view_network(training=True) for _ in range(2)]
    optimizers = [shared.view_optimizer(view) for view in views]
    for i in range(6):
        batch = th.full((3, 4), i / 3.0)
        for network in (plain, views[i % 2]):
            network.zero_grad()
            loss_of(network, batch).backward()
        plain_optimizer.step()
        assert shared.apply_gradient(optimizers[i % 2]) == i
    for mine, expected in zip(policy.q_net.parameters(), plain.parameters(), strict=True):
        th.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-7)
    # What is saved are the shared statistics
    saved, expected_state = policy.optimizer.state_dict()["state"], plain_optimizer.state_dict()["state"]
    for index, state in expected_state.items():
        for name, value in state.items():
            if value is not None:
                th.testing.assert_close(th.as_tensor(saved[index][name]), th.as_tensor(value))


@pytest.mark.parametrize("n_times", [1, 3])
def test_soft_sync(n_times):
    policy = make_policy()
    tau = 0.1
    target = [p.detach().clone() for p in policy.q_net_target.parameters()]
    with th.no_grad():
        for parameter in policy.q_net.parameters():
            parameter.add_(1.0)
    for _ in range(n_times):
        target = [(1 - tau) * t + tau * p for t, p in zip(target, policy.q_net.parameters(), strict=True)]
    shared = SharedParameters(policy, tau, lock_updates=False)
    shared.sync_target(n_times)
    assert shared.n_target_syncs == n_times
    for mine, expected in zip(policy.q_net_target.parameters(), target, strict=True):
        th.testing.assert_close(mine, expected)
